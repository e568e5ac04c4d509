// Rows of fp32 or bf16 numbers behind one spelling.
#pragma once

#include <cstddef>
#include <cstdint>

#include "step_kernels.hpp"

namespace crosscoder {

inline void dots(const StepKernels& k, const float* a, const float* const* rows, std::size_t n_rows, std::size_t n,
                 float* out) {
    k.dots_fp32(a, rows, n_rows, n, out);
}
inline void dots(const StepKernels& k, const float* a, const std::uint16_t* const* rows, std::size_t n_rows,
                 std::size_t n, float* out) {
    k.dots_bf16(a, rows, n_rows, n, out);
}
inline void combine(const StepKernels& k, float* acc, const float* const* rows, const float* c, std::size_t n_rows,
                    std::size_t n) {
    k.combine_fp32(acc, rows, c, n_rows, n);
}
inline void combine(const StepKernels& k, float* acc, const std::uint16_t* const* rows, const float* c,
                    std::size_t n_rows, std::size_t n) {
    k.combine_bf16(acc, rows, c, n_rows, n);
}
inline float sum_squares(const StepKernels& k, const float* a, std::size_t n) { return k.sum_squares_fp32(a, n); }
inline float sum_squares(const StepKernels& k, const std::uint16_t* a, std::size_t n) {
    return k.sum_squares_bf16(a, n);
}
inline float sum_fourth_powers(const StepKernels& k, const float* a, std::size_t n) {
    return k.sum_fourth_powers_fp32(a, n);
}
inline float sum_fourth_powers(const StepKernels& k, const std::uint16_t* a, std::size_t n) {
    return k.sum_fourth_powers_bf16(a, n);
}
inline float largest(const StepKernels& k, const float* a, std::size_t n) { return k.largest_fp32(a, n); }
inline float largest(const StepKernels& k, const std::uint16_t* a, std::size_t n) { return k.largest_bf16(a, n); }
inline void rescale(const StepKernels& k, float* a, float c, std::size_t n) { k.scale(a, c, n); }
inline void rescale(const StepKernels& k, std::uint16_t* a, float c, std::size_t n) { k.scale_bf16(a, c, n); }

}  // namespace crosscoder
