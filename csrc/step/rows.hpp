// Rows of fp32 or bf16 numbers behind one spelling.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "step/step_kernels.hpp"

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

// Snapshots are taken in groups whose rows, of `width` numbers each, are long enough to stream from memory and short
// enough for a core's first cache.
inline std::size_t snapshots_together(std::size_t width, std::size_t n_snapshots) {
    constexpr std::size_t kNumbers = 2048;
    return std::min(n_snapshots, std::max<std::size_t>(1, kNumbers / std::max<std::size_t>(1, width)));
}

// The gates' bits k0 to k1 - 1, shifted to the lowest place.
inline std::uint64_t gates_between(std::uint64_t gates, std::size_t k0, std::size_t k1) {
    const std::size_t n = k1 - k0;
    return (gates >> k0) & (n == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << n) - 1);
}

// out (K0.., width) += sum_i c[i] rows[i] at the snapshots k0 to k1 - 1 whose gate is open; rows[i] and out begin at
// k0. First all rows that are open throughout, then the others snapshot by snapshot.
template <class T>
class GatedCombine {
  public:
    void clear() {
        whole_rows_.clear();
        whole_c_.clear();
        partial_.clear();
    }
    void add(const T* row, float c, std::uint64_t gates, std::uint64_t all) {
        if (gates == all) {
            whole_rows_.push_back(row);
            whole_c_.push_back(c);
        } else if (gates != 0) {
            partial_.push_back({row, c, gates});
        }
    }
    void run(const StepKernels& kernels, float* out, std::size_t n_snapshots, std::size_t width) {
        combine(kernels, out, whole_rows_.data(), whole_c_.data(), whole_rows_.size(), n_snapshots * width);
        if (partial_.empty()) {
            return;
        }
        for (std::size_t k = 0; k < n_snapshots; ++k) {
            whole_rows_.clear();
            whole_c_.clear();
            for (const Partial& partial : partial_) {
                if (((partial.gates >> k) & 1U) != 0) {
                    whole_rows_.push_back(partial.row + k * width);
                    whole_c_.push_back(partial.c);
                }
            }
            combine(kernels, out + k * width, whole_rows_.data(), whole_c_.data(), whole_rows_.size(), width);
        }
    }

  private:
    struct Partial {
        const T* row;
        float c;
        std::uint64_t gates;
    };
    std::vector<const T*> whole_rows_;
    std::vector<float> whole_c_;
    std::vector<Partial> partial_;
};

}  // namespace crosscoder
