// All snapshots' reconstructions, their residuals and the gradient of each pair, in one pass over a token's rows.
#pragma once

#include "step/encoder.hpp"
#include "step/sparse_code.hpp"

namespace crosscoder {

// x^ - target (B, K, D): target may be null (x^ itself).
void decode(const StepKernels& kernels, const CodeView& code, const RowsView& W_dec, const float* b_dec,
            const float* target, float* out, unsigned n_threads);

struct PairGradients {
    float* dh_N;          // gradient in h: sum over open gates of df
    float* threshold_N;   // each pair's part of dlog_theta, null where the window is 0
};

// From each residual (B, K, D) the pairs' gradients (docs/method.md, section 3):
// df = gradient_scale <residual, W_dec> + weight_F n slope; and its sum of squares, error_BK.
// With b_dec and target not null the residual is decoded first, token by token: rows of W_dec are then read from memory
// once. Otherwise it is read: decoded elsewhere, and summed over the processes that share the features.
void pair_gradients(const StepKernels& kernels, const CodeView& code, const RowsView& W_dec, const float* b_dec,
                    const float* target, float gradient_scale, const float* weight_F, const float* norms_FK,
                    const float* theta_F, const PenaltyView& penalty, float* residual, float* error_BK,
                    const PairGradients& out, unsigned n_threads);

}  // namespace crosscoder
