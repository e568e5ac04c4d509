// One pass over a batch of activations (B, K D): what the step needs to know of it before it starts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "step/step_kernels.hpp"

namespace crosscoder {

// fourth_B = ||x_b||_4; bf16 copies and int8 rows where their pointers are not null. int8 rows are of x / column_scale,
// each with its own scale: x ~ int8 * int8_scale_B * column_scale; int8_norm_B = ||x / column_scale||_2.
struct PreparedBatch {
    float* fourth_B;
    std::uint16_t* bf16;
    std::int8_t* int8;
    float* int8_scale_B;
    float* int8_norm_B;
    const float* inverse_column_scale;
};

void prepare_batch(const StepKernels& kernels, const float* x, std::size_t n_tokens, std::size_t width,
                   const PreparedBatch& out, unsigned n_threads);

// sums[j] = sum over rows of a (rows, width), rows in order; squares, if not null, the sums of their squares.
void column_sums(const StepKernels& kernels, const float* a, std::size_t n_rows, std::size_t width, float* sums,
                 unsigned n_threads);

// out_bk = sum_l mix_kl x_bl, for x and out (B, K, D).
void mix_snapshots(const StepKernels& kernels, const float* x, const float* mix_KK, std::size_t n_tokens,
                   std::size_t n_snapshots, std::size_t width, float* out, unsigned n_threads);

// out_BK = sum over d of (x - mean_KD)^2.
void squared_distances(const float* x, const float* mean, std::size_t n_tokens, std::size_t n_snapshots,
                       std::size_t width, float* out_BK, unsigned n_threads);

}  // namespace crosscoder
