#include "step/threshold.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "core/parallel.hpp"

namespace crosscoder {
namespace {

constexpr std::size_t kColumnsPerChunk = 128;

}  // namespace

void threshold_tile(const StepKernels& kernels, const ProductTile& h, const ProductTile& inner, std::size_t n_rows,
                    const float* bias_F, const float* unit_F, const float* theta_F, const float* closed_slope_F,
                    float window, float gradient_scale, float* sums_F, unsigned n_threads) {
    parallel_chunks(h.n, kColumnsPerChunk, n_threads, [&](std::size_t begin, std::size_t end) {
        const std::size_t f = h.first + begin;
        const WindowBounds bounds = {bias_F + f, unit_F + f, theta_F + f, closed_slope_F + f, window / 2,
                                     gradient_scale};
        for (std::size_t b = 0; b < n_rows; ++b) {
            const std::size_t place = b * h.n + begin;
            if (h.type == ProductType::bf16) {
                kernels.window_bf16(static_cast<const std::uint16_t*>(h.data) + place,
                                    static_cast<const std::uint16_t*>(inner.data) + place, &bounds, end - begin,
                                    sums_F + f);
            } else {
                kernels.window_fp32(static_cast<const float*>(h.data) + place,
                                    static_cast<const float*>(inner.data) + place, &bounds, end - begin, sums_F + f);
            }
        }
    });
}

void threshold_open_gates(const StepKernels& kernels, const CodeView& code, const OrderView& order,
                          const std::uint8_t* chosen_B, const float* weight_F, const float* norms_FK,
                          const float* theta_F, const PenaltyView& penalty, float* gradient_F, unsigned n_threads) {
    const std::size_t K = code.n_snapshots;
    const float closed = penalty.linear ? 1.0F : penalty.tanh_scale;
    parallel_chunks(code.n_features, 64, n_threads, [&](std::size_t begin, std::size_t end) {
        std::array<float, 64> slopes = {};
        for (std::size_t f = begin; f < end; ++f) {
            float sum = 0;
            for (auto i = order.feature_offsets[f]; i < order.feature_offsets[f + 1]; ++i) {
                if (chosen_B[order.tokens[i]] == 0) {
                    continue;
                }
                const auto pair = static_cast<std::size_t>(order.order[i]);
                const float h = code.values[pair];
                const float* norms = norms_FK + f * K;
                kernels.activity_slope(h, norms, code.gates[pair], penalty.tanh_scale, penalty.linear, slopes.data(),
                                       K);
                for (std::size_t k = 0; k < K; ++k) {
                    const float unit = penalty.shared ? 1.0F : norms[k];
                    if (((code.gates[pair] >> k) & 1U) != 0 && unit > 0 && h > 0 &&
                        std::abs(h * unit - theta_F[f]) < penalty.window / 2) {
                        sum += norms[k] * (slopes[k] - closed) / unit;
                    }
                }
            }
            gradient_F[f] -= weight_F[f] * sum * (theta_F[f] * theta_F[f]) / penalty.window;
        }
    });
}

}  // namespace crosscoder
