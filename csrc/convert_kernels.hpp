// Conversions between 16-bit and 32-bit floating point: the signatures that every instruction set implements.
//
// The files convert_<level>.cpp are compiled with instruction-set flags of their own. So that no code compiled
// with these flags can be picked by the linker for the rest of the program, they include this header, C headers
// and intrinsics, nothing else: no inline functions, no templates, no standard library; all but the table is static.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace crosscoder {

// dst[i] = float(src[i]) * scale, rounded once, for i < n. Any n, any alignment of the element's own size.
struct ConvertKernels {
    void (*scale_fp32)(const float* src, float scale, float* dst, size_t n);
    void (*scale_bf16)(const uint16_t* src, float scale, float* dst, size_t n);
    void (*scale_fp16)(const uint16_t* src, float scale, float* dst, size_t n);
    // dst[i] = bfloat16(src[i]), nearest, ties to even; a NaN stays one (made quiet, sign and upper payload kept).
    void (*to_bf16)(const float* src, uint16_t* dst, size_t n);
};

extern const ConvertKernels convert_portable;
extern const ConvertKernels convert_avx2;    // AVX2, F16C
extern const ConvertKernels convert_avx512;  // AVX-512 F, BW, DQ, VL

}  // namespace crosscoder
