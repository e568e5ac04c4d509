// XXH3 as every instruction set computes it: the same bits. The files checksum_<level>.cpp hold to the rules of
// store/unpack_kernels.hpp: nothing of external linkage but what is declared here, no standard library.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace crosscoder {

uint64_t xxh3_64_portable(const void* data, size_t size);
uint64_t xxh3_64_avx2(const void* data, size_t size);
uint64_t xxh3_64_avx512(const void* data, size_t size);  // AVX-512 F

}  // namespace crosscoder

// Files are mapped in pages of 4 KiB, where the processor's own prefetching ends: ask for the next page's bytes.
#define XXH_PREFETCH_DIST 4096
#define XXH_INLINE_ALL
#include <xxhash.h>
