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

constexpr size_t kWidth = 16;
constexpr size_t kPair = 2 * kWidth;
constexpr size_t kBurst = 4 * kPair;  // read and written at a time: one pair after the other is a tenth slower

__mmask16 tail_mask(size_t n) { return static_cast<__mmask16>((1U << n) - 1U); }

bool aligned(const void* pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 63U) == 0; }

__m512 load(const float* src, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, src); }
__m512 load(const Bf16* src, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, src)), 16));
}
__m512 load(const Fp16* src, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, src)); }

// Bits whose upper half is the bfloat16.
__m512i rounded(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i tie = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __mmask16 tiny = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), tie);
    return _mm512_mask_and_epi32(sum, tiny, bits, _mm512_set1_epi32(static_cast<int>(0x80000000U)));
}

void store(float* dst, __m512 value, __mmask16 mask) { _mm512_mask_storeu_ps(dst, mask, value); }
void store(Bf16* dst, __m512 value, __mmask16 mask) {
    _mm256_mask_storeu_epi16(dst, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(value), 16)));
}

void store_pair(float* dst, __m512 first, __m512 second, bool stream) {
    if (stream) {
        _mm512_stream_ps(dst, first);
        _mm512_stream_ps(dst + kWidth, second);
    } else {
        _mm512_storeu_ps(dst, first);
        _mm512_storeu_ps(dst + kWidth, second);
    }
}

// The upper halves of 32 lanes, in order.
void store_pair(Bf16* dst, __m512 first, __m512 second, bool stream) {
#if defined(CROSSCODER_AVX512_BF16)
    __m512i both;
    const __m512bh narrowed = _mm512_cvtne2ps_pbh(second, first);
    memcpy(&both, &narrowed, sizeof both);
#else
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const __m512i both = _mm512_permutex2var_epi16(rounded(first), odd, rounded(second));
#endif
    if (stream) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), both);
    } else {
        _mm512_storeu_si512(dst, both);
    }
}

template <class From, class To>
void scaled(const void* src, float scale, void* dst, size_t n, bool stream) {
    const From* from = static_cast<const From*>(src);
    To* to = static_cast<To*>(dst);
    const __m512 factor = _mm512_set1_ps(scale);
    const bool past_caches = stream && aligned(to);
    size_t i = 0;
    const auto pair = [&](size_t j) {
        store_pair(to + j, _mm512_mul_ps(load(from + j, 0xffff), factor),
                   _mm512_mul_ps(load(from + j + kWidth, 0xffff), factor), past_caches);
    };
    for (; i + kBurst <= n; i += kBurst) {
        fetch_ahead(from + i, kBurst * sizeof(From));
        pair(i);
        pair(i + kPair);
        pair(i + 2 * kPair);
        pair(i + 3 * kPair);
    }
    for (; i + kPair <= n; i += kPair) {
        pair(i);
    }
    for (; i < n; i += kWidth) {
        const __mmask16 mask = n - i < kWidth ? tail_mask(n - i) : __mmask16{0xffff};
        store(to + i, _mm512_mul_ps(load(from + i, mask), factor), mask);
    }
}

#if !defined(CROSSCODER_AVX512_BF16)
// Even and odd elements apart: no lane has to move.
void scaled_bf16(const void* src, float scale, void* dst, size_t n, bool stream) {
    const Bf16* from = static_cast<const Bf16*>(src);
    Bf16* to = static_cast<Bf16*>(dst);
    const __m512 factor = _mm512_set1_ps(scale);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000U));
    const bool past_caches = stream && aligned(to);
    size_t i = 0;
    const auto line = [&](size_t j) {
        const __m512i pair = _mm512_loadu_si512(from + j);
        const __m512i even = rounded(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), factor));
        const __m512i odd = rounded(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(pair, upper)), factor));
        const __m512i both = _mm512_ternarylogic_epi32(upper, odd, _mm512_srli_epi32(even, 16), 0xca);
        if (past_caches) {
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to + j), both);
        } else {
            _mm512_storeu_si512(to + j, both);
        }
    };
    for (; i + kBurst <= n; i += kBurst) {
        fetch_ahead(from + i, kBurst * sizeof(Bf16));
        line(i);
        line(i + kPair);
        line(i + 2 * kPair);
        line(i + 3 * kPair);
    }
    for (; i + kPair <= n; i += kPair) {
        line(i);
    }
    if (i < n) {
        scaled<Bf16, Bf16>(from + i, scale, to + i, n - i, false);
    }
}
#endif

// Values of a group times its scale, each product rounded. pair: 32 values; part: the first n <= 16.
class Int8 {
  public:
    static constexpr size_t kPerByte = 1;
    explicit Int8(__m512 scale) : scale_(scale) {}
    void pair(const uint8_t* src, __m512* values) const {
        values[0] = part(src, kWidth);
        values[1] = part(src + kWidth, kWidth);
    }
    __m512 part(const uint8_t* src, size_t n) const {
        const __m128i bytes = _mm_maskz_loadu_epi8(tail_mask(n), src);
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), scale_);
    }

  private:
    __m512 scale_;
};

// There are only 16 products: they are made once a group and looked up.
class Int4 {
  public:
    static constexpr size_t kPerByte = 2;
    explicit Int4(__m512 scale)
        : products_(_mm512_mul_ps(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1), scale)) {}
    void pair(const uint8_t* src, __m512* values) const {
        const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
        const __m128i upper = _mm_srli_epi16(pairs, 4);
        values[0] = looked_up(_mm_unpacklo_epi8(pairs, upper));
        values[1] = looked_up(_mm_unpackhi_epi8(pairs, upper));
    }
    __m512 part(const uint8_t* src, size_t n) const {
        const __m128i pairs = _mm_maskz_loadu_epi8(tail_mask((n + 1) / 2), src);
        return looked_up(_mm_unpacklo_epi8(pairs, _mm_srli_epi16(pairs, 4)));
    }

  private:
    // Of each byte the lower 4 bits; the permutation takes no notice of the others.
    __m512 looked_up(__m128i bytes) const { return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(bytes), products_); }

    __m512 products_;
};

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
        const From source(_mm512_set1_ps(factor));
        const bool past_caches = stream && aligned(to + begin);
        size_t i = begin;
        const auto pair = [&](size_t j) {
            const size_t k = j + kWidth;
            __m512 values[2];
            source.pair(from + j / From::kPerByte, values);
            store_pair(to + j, _mm512_fmadd_ps(values[0], _mm512_loadu_ps(gain + j), _mm512_loadu_ps(offset + j)),
                       _mm512_fmadd_ps(values[1], _mm512_loadu_ps(gain + k), _mm512_loadu_ps(offset + k)), past_caches);
        };
        for (; i + kBurst <= end; i += kBurst) {
            fetch_ahead(from + i / From::kPerByte, kBurst / From::kPerByte);
            pair(i);
            pair(i + kPair);
            pair(i + 2 * kPair);
            pair(i + 3 * kPair);
        }
        for (; i + kPair <= end; i += kPair) {
            fetch_ahead(from + i / From::kPerByte, kPair / From::kPerByte);
            pair(i);
        }
        for (; i < end; i += kWidth) {
            const size_t left = end - i < kWidth ? end - i : kWidth;
            const __mmask16 mask = tail_mask(left);
            store(to + i,
                  _mm512_fmadd_ps(source.part(from + i / From::kPerByte, left), _mm512_maskz_loadu_ps(mask, gain + i),
                                  _mm512_maskz_loadu_ps(mask, offset + i)),
                  mask);
        }
    }
}

}  // namespace

#if defined(CROSSCODER_AVX512_BF16)
constinit const UnpackKernels unpack_avx512_bf16 = {{{scaled<float, float>, scaled<float, Bf16>},
                                                     {scaled<Bf16, float>, scaled<Bf16, Bf16>},
                                                     {scaled<Fp16, float>, scaled<Fp16, Bf16>}},
                                                    {{quantised<Int8, float>, quantised<Int8, Bf16>},
                                                     {quantised<Int4, float>, quantised<Int4, Bf16>}}};
#else
constinit const UnpackKernels unpack_avx512 = {{{scaled<float, float>, scaled<float, Bf16>},
                                                {scaled<Bf16, float>, scaled_bf16},
                                                {scaled<Fp16, float>, scaled<Fp16, Bf16>}},
                                               {{quantised<Int8, float>, quantised<Int8, Bf16>},
                                                {quantised<Int4, float>, quantised<Int4, Bf16>}}};
#endif

}  // namespace crosscoder
