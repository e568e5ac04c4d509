#include <string.h>

#include "convert_kernels.hpp"

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

// Exponent and mantissa move up by 13 bits and the bias is corrected; infinities and NaN need the bias corrected
// once more; denormals get an implicit one, which the subtraction (exact) takes off again.
float widen_fp16(uint16_t half) {
    const uint32_t sign = (uint32_t{half} & 0x8000U) << 16;
    const uint32_t shifted = (uint32_t{half} & 0x7fffU) << 13;
    const uint32_t exponent = shifted & 0x0f800000U;
    const uint32_t rebiased = shifted + (112U << 23);
    const uint32_t special = rebiased + (112U << 23);
    const uint32_t denormal = to_bits(from_bits(rebiased + (1U << 23)) - from_bits(113U << 23));
    const uint32_t magnitude = exponent == 0x0f800000U ? special : (exponent == 0 ? denormal : rebiased);
    return from_bits(sign | magnitude);
}

uint16_t narrow_bf16(float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40U;
    const bool is_nan = (bits & 0x7fffffffU) > 0x7f800000U;
    return static_cast<uint16_t>(is_nan ? quiet : rounded);
}

void scale_fp32(const float* src, float scale, float* dst, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        dst[i] = src[i] * scale;
    }
}

void scale_bf16(const uint16_t* src, float scale, float* dst, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        dst[i] = widen_bf16(src[i]) * scale;
    }
}

void scale_fp16(const uint16_t* src, float scale, float* dst, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        dst[i] = widen_fp16(src[i]) * scale;
    }
}

void to_bf16(const float* src, uint16_t* dst, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        dst[i] = narrow_bf16(src[i]);
    }
}

}  // namespace

constinit const ConvertKernels convert_portable = {scale_fp32, scale_bf16, scale_fp16, to_bf16};

}  // namespace crosscoder
