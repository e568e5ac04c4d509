#include "core/checksum_kernels.hpp"

namespace crosscoder {

uint64_t xxh3_64_avx2(const void* data, size_t size) { return XXH3_64bits(data, size); }

}  // namespace crosscoder
