// One row of a store, widened or narrowed to what the trainer takes: the signatures that every instruction set
// implements.
//
// The files unpack_<level>.cpp are compiled with instruction-set flags of their own. So that no code compiled
// with these flags can be picked by the linker for the rest of the program, they include this header, C headers
// and intrinsics, nothing else: no inline functions, no templates of external linkage, no standard library; all but the
// table is static.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace crosscoder {

// All levels give the same bits. bfloat16 is rounded to nearest, ties to even; a result below 2^-126 becomes 0 in it.
// Values are finite. `stream` writes past the caches where `dst` is aligned for that.
struct UnpackKernels {
    // dst[i] = T(float(src[i]) * scale); [source: fp32, bf16, fp16][T: fp32, bf16].
    void (*scaled[3][2])(const void* src, float scale, void* dst, size_t n, bool stream);
    // dst[i] = T(fma(src[i] * scales[i / group], gain[i], offset[i])): the product is rounded, then the fused multiply-
    // add once. scales are bfloat16 bits. int4: two's complement, two a byte, the first in the lower half; `group` is
    // even, or at least n. [source: int8, int4][T: fp32, bf16].
    void (*quantised[2][2])(const void* src, const uint16_t* scales, size_t group, const float* gain,
                            const float* offset, void* dst, size_t n, bool stream);
};

// Asks for `bytes` a page ahead: the processor's own prefetching ends with the page, and rows come from mapped files in
// pages of 4 KiB. Into the second-level cache, which waits for more lines at once than the first. What lies behind the
// end of a mapping is not fetched and not an error.
static inline void fetch_ahead(const void* src, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch(static_cast<const char*>(src) + 4096 + i, 0, 2);
    }
}

extern const UnpackKernels unpack_portable;
extern const UnpackKernels unpack_avx2;         // AVX2, F16C, FMA
extern const UnpackKernels unpack_avx512;       // AVX-512 F, BW, DQ, VL
extern const UnpackKernels unpack_avx512_bf16;  // and BF16

}  // namespace crosscoder
