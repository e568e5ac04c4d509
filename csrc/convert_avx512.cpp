#include <immintrin.h>

#include "convert_kernels.hpp"

namespace crosscoder {
namespace {

constexpr size_t kWidth = 16;

// Lanes of the last n < 16 elements.
__mmask16 tail_mask(size_t n) { return static_cast<__mmask16>((1U << n) - 1U); }

__m512 widen_bf16(__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

__m256i narrow_bf16(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i upper = _mm512_srli_epi32(bits, 16);
    const __m512i tie = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), tie), 16);
    const __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, quiet));
}

void scale_fp32(const float* src, float scale, float* dst, size_t n) {
    const __m512 factor = _mm512_set1_ps(scale);
    size_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
        _mm512_storeu_ps(dst + i, _mm512_mul_ps(_mm512_loadu_ps(src + i), factor));
    }
    if (i < n) {
        const __mmask16 mask = tail_mask(n - i);
        _mm512_mask_storeu_ps(dst + i, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, src + i), factor));
    }
}

void scale_bf16(const uint16_t* src, float scale, float* dst, size_t n) {
    const __m512 factor = _mm512_set1_ps(scale);
    size_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
        _mm512_storeu_ps(dst + i, _mm512_mul_ps(widen_bf16(_mm256_loadu_epi16(src + i)), factor));
    }
    if (i < n) {
        const __mmask16 mask = tail_mask(n - i);
        const __m256i half = _mm256_maskz_loadu_epi16(mask, src + i);
        _mm512_mask_storeu_ps(dst + i, mask, _mm512_mul_ps(widen_bf16(half), factor));
    }
}

void scale_fp16(const uint16_t* src, float scale, float* dst, size_t n) {
    const __m512 factor = _mm512_set1_ps(scale);
    size_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
        _mm512_storeu_ps(dst + i, _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_epi16(src + i)), factor));
    }
    if (i < n) {
        const __mmask16 mask = tail_mask(n - i);
        const __m256i half = _mm256_maskz_loadu_epi16(mask, src + i);
        _mm512_mask_storeu_ps(dst + i, mask, _mm512_mul_ps(_mm512_cvtph_ps(half), factor));
    }
}

void to_bf16(const float* src, uint16_t* dst, size_t n) {
    size_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
        _mm256_storeu_epi16(dst + i, narrow_bf16(_mm512_loadu_ps(src + i)));
    }
    if (i < n) {
        const __mmask16 mask = tail_mask(n - i);
        _mm256_mask_storeu_epi16(dst + i, mask, narrow_bf16(_mm512_maskz_loadu_ps(mask, src + i)));
    }
}

}  // namespace

constinit const ConvertKernels convert_avx512 = {scale_fp32, scale_bf16, scale_fp16, to_bf16};

}  // namespace crosscoder
