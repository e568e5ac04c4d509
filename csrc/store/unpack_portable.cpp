#include <math.h>
#include <string.h>

#include "store/unpack_kernels.hpp"

namespace crosscoder {
namespace {

float from_bits(uint32_t bits) {
    float value = 0;
    memcpy(&value, &bits, sizeof value);
    return value;
}

uint32_t to_bits(float value) {
    uint32_t bits = 0;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

float widen_bf16(uint16_t half) { return from_bits(uint32_t{half} << 16); }

// Of finite values: exponent and mantissa move up by 13 bits and the bias is corrected; denormals get an implicit one,
// which the subtraction (exact) takes off again.
float widen_fp16(uint16_t half) {
    const uint32_t sign = (uint32_t{half} & 0x8000U) << 16;
    const uint32_t rebiased = ((uint32_t{half} & 0x7fffU) << 13) + (112U << 23);
    const uint32_t denormal = to_bits(from_bits(rebiased + (1U << 23)) - from_bits(113U << 23));
    return from_bits(sign | ((half & 0x7c00U) == 0 ? denormal : rebiased));
}

float load(const float* src) { return *src; }

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

float load(const Bf16* src) { return widen_bf16(src->bits); }
float load(const Fp16* src) { return widen_fp16(src->bits); }

void store(float value, float* dst) { *dst = value; }

void store(float value, Bf16* dst) {
    const uint32_t bits = to_bits(value);
    const bool tiny = (bits & 0x7f800000U) == 0;
    dst->bits = static_cast<uint16_t>((tiny ? bits & 0x80000000U : bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

template <class From, class To>
void scaled(const void* src, float scale, void* dst, size_t n, bool) {
    const From* from = static_cast<const From*>(src);
    To* to = static_cast<To*>(dst);
    for (size_t i = 0; i < n; ++i) {
        store(load(from + i) * scale, to + i);
    }
}

struct Int8 {
    static int at(const uint8_t* src, size_t i) { return static_cast<int8_t>(src[i]); }
};
struct Int4 {
    static int at(const uint8_t* src, size_t i) { return ((src[i / 2] >> i % 2 * 4 & 15) ^ 8) - 8; }
};

template <class From, class To>
void quantised(const void* src, const uint16_t* scales, size_t group, const float* gain, const float* offset,
               void* dst, size_t n, bool) {
    const uint8_t* from = static_cast<const uint8_t*>(src);
    To* to = static_cast<To*>(dst);
    for (size_t i = 0; i < n; ++i) {
        const float value = static_cast<float>(From::at(from, i)) * widen_bf16(scales[i / group]);
        store(fmaf(value, gain[i], offset[i]), to + i);
    }
}

}  // namespace

constinit const UnpackKernels unpack_portable = {
    {{scaled<float, float>, scaled<float, Bf16>},
     {scaled<Bf16, float>, scaled<Bf16, Bf16>},
     {scaled<Fp16, float>, scaled<Fp16, Bf16>}},
    {{quantised<Int8, float>, quantised<Int8, Bf16>}, {quantised<Int4, float>, quantised<Int4, Bf16>}}};

}  // namespace crosscoder
