#include <immintrin.h>
#include <string.h>

#include "convert_kernels.hpp"

namespace crosscoder {
namespace {

constexpr size_t kWidth = 8;

__m256 widen_bf16(__m128i half) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// Eight bfloat16 in the low halves of eight 32-bit lanes.
__m256i narrow_bf16(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i upper = _mm256_srli_epi32(bits, 16);
    const __m256i tie = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), tie), 16);
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, quiet, is_nan);
}

__m128i pack(__m256i lanes) {
    return _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
}

__m128i load_half(const uint16_t* src) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(src)); }

void store_half(uint16_t* dst, __m128i half) { _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), half); }

// The last n < 8 elements go through buffers, so that nothing beyond the arrays is touched.
void scale_fp32(const float* src, float scale, float* dst, size_t n) {
    const __m256 factor = _mm256_set1_ps(scale);
    size_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
        _mm256_storeu_ps(dst + i, _mm256_mul_ps(_mm256_loadu_ps(src + i), factor));
    }
    if (i < n) {
        float buffer[kWidth] = {};
        memcpy(buffer, src + i, (n - i) * sizeof(float));
        _mm256_storeu_ps(buffer, _mm256_mul_ps(_mm256_loadu_ps(buffer), factor));
        memcpy(dst + i, buffer, (n - i) * sizeof(float));
    }
}

void scale_bf16(const uint16_t* src, float scale, float* dst, size_t n) {
    const __m256 factor = _mm256_set1_ps(scale);
    size_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
        _mm256_storeu_ps(dst + i, _mm256_mul_ps(widen_bf16(load_half(src + i)), factor));
    }
    if (i < n) {
        uint16_t in[kWidth] = {};
        float out[kWidth];
        memcpy(in, src + i, (n - i) * sizeof(uint16_t));
        _mm256_storeu_ps(out, _mm256_mul_ps(widen_bf16(load_half(in)), factor));
        memcpy(dst + i, out, (n - i) * sizeof(float));
    }
}

void scale_fp16(const uint16_t* src, float scale, float* dst, size_t n) {
    const __m256 factor = _mm256_set1_ps(scale);
    size_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
        _mm256_storeu_ps(dst + i, _mm256_mul_ps(_mm256_cvtph_ps(load_half(src + i)), factor));
    }
    if (i < n) {
        uint16_t in[kWidth] = {};
        float out[kWidth];
        memcpy(in, src + i, (n - i) * sizeof(uint16_t));
        _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtph_ps(load_half(in)), factor));
        memcpy(dst + i, out, (n - i) * sizeof(float));
    }
}

void to_bf16(const float* src, uint16_t* dst, size_t n) {
    size_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
        store_half(dst + i, pack(narrow_bf16(_mm256_loadu_ps(src + i))));
    }
    if (i < n) {
        float in[kWidth] = {};
        uint16_t out[kWidth];
        memcpy(in, src + i, (n - i) * sizeof(float));
        store_half(out, pack(narrow_bf16(_mm256_loadu_ps(in))));
        memcpy(dst + i, out, (n - i) * sizeof(uint16_t));
    }
}

}  // namespace

constinit const ConvertKernels convert_avx2 = {scale_fp32, scale_bf16, scale_fp16, to_bf16};

}  // namespace crosscoder
