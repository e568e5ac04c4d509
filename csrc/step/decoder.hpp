// All snapshots' reconstructions, their residuals and the gradient of each pair, in one pass over a token's rows.
#pragma once

#include "step/encoder.hpp"
#include "step/sparse_code.hpp"

namespace crosscoder {

// x^ - target (B, K, D): target may be null (x^ itself). error_BK, if not null, gets the sum of squares by token and
// snapshot.
void decode(const StepKernels& kernels, const CodeView& code, const RowsView& W_dec, const float* b_dec,
            const float* target, float* out, float* error_BK, unsigned n_threads);

// out (N, K) = <g[b, k], W_dec[f, k]> for every pair, open gate or not.
void code_grad(const StepKernels& kernels, const CodeView& code, const RowsView& W_dec, const float* g, float* out,
               unsigned n_threads);

struct PairGradients {
    float* dh_N;          // gradient in h: sum over open gates of df
    float* threshold_N;   // each pair's part of dlog_theta, null where the window is 0
};

// `decode` with a target, and from each residual at once the pairs' gradients (docs/method.md, section 3):
// df = gradient_scale <residual, W_dec> + weight_F n slope. Rows of W_dec are read from memory once.
void decode_with_gradients(const StepKernels& kernels, const CodeView& code, const RowsView& W_dec,
                           const float* b_dec, const float* target, float gradient_scale, const float* weight_F,
                           const float* norms_FK, const float* theta_F, const PenaltyView& penalty, float* residual,
                           float* error_BK, const PairGradients& out, unsigned n_threads);

}  // namespace crosscoder
