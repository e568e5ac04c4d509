// The thresholds' straight-through gradient on all pairs of some tokens (docs/method.md, section 3), from products.
#pragma once

#include "step/encoder.hpp"
#include "step/sparse_code.hpp"

namespace crosscoder {

// Adds to sums_F[first + j], for every feature j of the tile, the sum over the n_rows tokens with h > 0 and
// |h unit - theta| < window / 2 of (gradient_scale * inner + closed_slope): times -theta^2 / (window unit) it is the
// gradient of one snapshot as if all gates were closed. h and inner are (n_rows, n) of the tile's type (fp32, bf16);
// unit_F, closed_slope_F are of this snapshot. h comes without the bias.
void threshold_tile(const StepKernels& kernels, const ProductTile& h, const ProductTile& inner, std::size_t n_rows,
                    const float* bias_F, const float* unit_F, const float* theta_F, const float* closed_slope_F,
                    float window, float gradient_scale, float* sums_F, unsigned n_threads);

// Adds to gradient_F what open gates change in it: the penalty's slope at h instead of at 0. Of the tokens whose
// `chosen_B` is not 0.
void threshold_open_gates(const StepKernels& kernels, const CodeView& code, const OrderView& order,
                          const std::uint8_t* chosen_B, const float* weight_F, const float* norms_FK,
                          const float* theta_F, const PenaltyView& penalty, float* gradient_F, unsigned n_threads);

}  // namespace crosscoder
