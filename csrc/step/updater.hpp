// Feature by feature: the gradient of its rows from its pairs, and Adam on them at once. No gradient of the weights'
// size ever exists.
#pragma once

#include "step/encoder.hpp"
#include "step/sparse_code.hpp"

namespace crosscoder {

// One matrix (F, K, D) with its moments: fp32, or bf16 weights and 8-bit moments with scales (F, K, blocks).
struct MatrixState {
    void* w;
    void* m;
    void* v;
    float* m_scale;  // null in fp32
    float* v_scale;
};

// Linear in the batch: what a row's gradient is made of, beside the pairs.
struct GradientParts {
    const float* dh_N;       // by pair: d loss / d h
    const float* x;          // (B, K, D)
    const float* residual;   // (B, K, D)
    float residual_scale;    // gradient of the loss in the reconstruction = residual_scale * residual
    const float* dnorm_FK;   // (F, K): d loss / d decoder norm
    const float* norms_FK;
    // l_pre, all three null without: dW_enc[f] += every_F[f] * x_sum, where x_sum is the batch's sum (K, D), and
    // below_F[f] is subtracted again from dh of the pairs at or above their threshold.
    const float* every_F;
    const float* x_sum;
    const float* theta_F;
};

// What is derived from the weights, written again for every row that changes. All but norms_FK may be null.
struct DerivedRows {
    float* norms_FK;
    float* fourth_F;          // ||W_enc[f]||_4
    std::uint16_t* enc_bf16;  // (F, K D)
    std::int8_t* enc_int8;    // (F, K D)
    float* enc_scale_F;       // int8 row = W_enc[f] * column_scale / enc_scale_F[f]
    float* enc_norm_F;        // ||W_enc[f] * column_scale||_2
    const float* column_scale; // (K D)
};

// Everything that an update writes: the matrices, the encoder's bias (w, m, v fp32), t of each row's last update, and
// what is derived from the rows.
struct UpdatedRows {
    MatrixState W_enc;
    MatrixState W_dec;
    MatrixState bias;
    bool bf16;
    std::int32_t* last_step_F;
    DerivedRows derived;
    std::size_t n_snapshots;
    std::size_t width;
};

struct UpdateOptions {
    double lr;
    double beta1, beta2;
    float epsilon;
    std::int32_t t;            // Adam's step, from 1
    bool lazy;                 // rows without a gradient are left alone
    float gradient_factor;     // clipping
    float norm_limit;          // largest decoder norm of a feature, 0: none
    std::uint32_t seed;        // of stochastic rounding
};

// The squared norm of each feature's part of the gradient (W_enc and W_dec), for clipping.
void gradient_squares(const StepKernels& kernels, const CodeView& code, const OrderView& order,
                      const GradientParts& parts, const RowsView& W_dec, float* squares_F, unsigned n_threads);

// Adds the gradient itself into dW_enc and dW_dec (F, K, D): for callers that want it.
void gradient_rows(const StepKernels& kernels, const CodeView& code, const OrderView& order,
                   const GradientParts& parts, const RowsView& W_dec, float* dW_enc, float* dW_dec,
                   unsigned n_threads);

// Adam on W_enc, W_dec and b_enc, whose gradient is `db_enc_F`.
void update_rows(const StepKernels& kernels, const CodeView& code, const OrderView& order, const GradientParts& parts,
                 const float* db_enc_F, const UpdatedRows& rows, const UpdateOptions& options, unsigned n_threads);

// The same for given gradients dW_enc, dW_dec (n, K, D) of the features first to first + n - 1; `touched` (n): which
// of them have any, for the lazy mode.
void update_dense_rows(const StepKernels& kernels, const float* dW_enc, const float* dW_dec, const float* db_enc,
                       const std::uint8_t* touched, std::size_t first, std::size_t n, const UpdatedRows& rows,
                       const UpdateOptions& options, unsigned n_threads);

// Everything derived from the rows first to first + n - 1.
void derive_rows(const StepKernels& kernels, const RowsView& W_enc, const RowsView& W_dec, std::size_t first,
                 std::size_t n, std::size_t n_snapshots, const DerivedRows& derived, unsigned n_threads);

}  // namespace crosscoder
