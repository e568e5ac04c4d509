#include <immintrin.h>
#include <string.h>

#include "store/unpack_kernels.hpp"

namespace crosscoder {
namespace {

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

constexpr size_t kWidth = 8;

bool aligned(const void* pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 31U) == 0; }

__m256 load(const float* src) { return _mm256_loadu_ps(src); }
__m256 load(const Bf16* src) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
__m256 load(const Fp16* src) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src))); }

// bfloat16 bits in the lower half of each lane.
__m256i narrow(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i tie = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), tie);
    const __m256i exponent = _mm256_and_si256(bits, _mm256_set1_epi32(0x7f800000));
    const __m256i tiny = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
    const __m256i sign = _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0x80000000U)));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, sign, tiny), 16);
}

void store_pair(float* dst, __m256 first, __m256 second, bool stream) {
    if (stream) {
        _mm256_stream_ps(dst, first);
        _mm256_stream_ps(dst + kWidth, second);
    } else {
        _mm256_storeu_ps(dst, first);
        _mm256_storeu_ps(dst + kWidth, second);
    }
}

void store_pair(Bf16* dst, __m256 first, __m256 second, bool stream) {
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(narrow(first), narrow(second)), 0xd8);
    __m256i* target = reinterpret_cast<__m256i*>(dst);
    if (stream) {
        _mm256_stream_si256(target, both);
    } else {
        _mm256_storeu_si256(target, both);
    }
}

// The last n < 16 elements go through buffers, so that nothing beyond the arrays is touched.
template <class From, class To>
void scaled(const void* src, float scale, void* dst, size_t n, bool stream) {
    const From* from = static_cast<const From*>(src);
    To* to = static_cast<To*>(dst);
    const __m256 factor = _mm256_set1_ps(scale);
    const bool past_caches = stream && aligned(to);
    size_t i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
        fetch_ahead(from + i, 2 * kWidth * sizeof(From));
        store_pair(to + i, _mm256_mul_ps(load(from + i), factor), _mm256_mul_ps(load(from + i + kWidth), factor),
                   past_caches);
    }
    if (i < n) {
        From in[2 * kWidth] = {};
        To out[2 * kWidth];
        memcpy(in, from + i, (n - i) * sizeof(From));
        store_pair(out, _mm256_mul_ps(load(in), factor), _mm256_mul_ps(load(in + kWidth), factor), false);
        memcpy(to + i, out, (n - i) * sizeof(To));
    }
}

// eight: of 16 values the first or the second eight, in the lower bytes.
struct Int8 {
    static constexpr size_t kPerByte = 1;
    static __m128i eight(const uint8_t* src, size_t half) {
        return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(src + half * kWidth));
    }
};
struct Int4 {
    static constexpr size_t kPerByte = 2;
    static __m128i eight(const uint8_t* src, size_t half) {
        const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(src));
        const __m128i each = _mm_and_si128(_mm_unpacklo_epi8(pairs, _mm_srli_epi16(pairs, 4)), _mm_set1_epi8(15));
        const __m128i values = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
        const __m128i all = _mm_shuffle_epi8(values, each);
        return half == 0 ? all : _mm_srli_si128(all, kWidth);
    }
};

__m256 dequantised(__m128i eight, __m256 scale, const float* gain, const float* offset) {
    const __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    return _mm256_fmadd_ps(_mm256_mul_ps(value, scale), _mm256_loadu_ps(gain), _mm256_loadu_ps(offset));
}

template <class From, class To>
void store_dequantised(const uint8_t* src, __m256 scale, const float* gain, const float* offset, To* dst, bool stream) {
    store_pair(dst, dequantised(From::eight(src, 0), scale, gain, offset),
               dequantised(From::eight(src, 1), scale, gain + kWidth, offset + kWidth), stream);
}

template <class From, class To>
void quantised(const void* src, const uint16_t* scales, size_t group, const float* gain, const float* offset,
               void* dst, size_t n, bool stream) {
    const uint8_t* from = static_cast<const uint8_t*>(src);
    To* to = static_cast<To*>(dst);
    for (size_t begin = 0, g = 0; begin < n; begin += group, ++g) {
        const size_t end = begin + group < n ? begin + group : n;
        const uint32_t bits = static_cast<uint32_t>(scales[g]) << 16;
        float factor = 0;
        memcpy(&factor, &bits, sizeof factor);
        const __m256 scale = _mm256_set1_ps(factor);
        const bool past_caches = stream && aligned(to + begin);
        size_t i = begin;
        for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
            fetch_ahead(from + i / From::kPerByte, 2 * kWidth / From::kPerByte);
            store_dequantised<From>(from + i / From::kPerByte, scale, gain + i, offset + i, to + i, past_caches);
        }
        if (i < end) {
            uint8_t in[2 * kWidth] = {};
            float gains[2 * kWidth] = {};
            float offsets[2 * kWidth] = {};
            To out[2 * kWidth];
            memcpy(in, from + i / From::kPerByte, (end - i + From::kPerByte - 1) / From::kPerByte);
            memcpy(gains, gain + i, (end - i) * sizeof(float));
            memcpy(offsets, offset + i, (end - i) * sizeof(float));
            store_dequantised<From>(in, scale, gains, offsets, out, false);
            memcpy(to + i, out, (end - i) * sizeof(To));
        }
    }
}

}  // namespace

constinit const UnpackKernels unpack_avx2 = {{{scaled<float, float>, scaled<float, Bf16>},
                                              {scaled<Bf16, float>, scaled<Bf16, Bf16>},
                                              {scaled<Fp16, float>, scaled<Fp16, Bf16>}},
                                             {{quantised<Int8, float>, quantised<Int8, Bf16>},
                                              {quantised<Int4, float>, quantised<Int4, Bf16>}}};

}  // namespace crosscoder
