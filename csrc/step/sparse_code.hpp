// A sparse code as the C++ side sees it (python/crosscoder/code.py), and its order by feature.
#pragma once

#include <cstddef>
#include <cstdint>

#include "step/step_kernels.hpp"

namespace crosscoder {

// N pairs (token, feature), token by token.
struct CodeView {
    const std::int64_t* row_offsets;  // (B + 1)
    const std::int32_t* features;     // (N)
    const float* values;              // (N)
    const std::uint64_t* gates;       // (N)
    std::size_t n_tokens;
    std::size_t n_pairs;
    std::size_t n_snapshots;
    std::size_t n_features;
};

// The pairs feature by feature, tokens ascending within a feature.
struct OrderView {
    const std::int64_t* feature_offsets;  // (F + 1)
    const std::int32_t* tokens;           // (N)
    const std::int64_t* order;            // (N): position of each pair in the code
};

// Fills the arrays of an OrderView: a counting sort.
void transpose(const CodeView& code, std::int64_t* feature_offsets, std::int32_t* tokens, std::int64_t* order,
               unsigned n_threads);

// Constants of the penalty and of the thresholds' window.
struct PenaltyView {
    float tanh_scale;
    bool linear;          // l1
    bool shared;          // one gate for all snapshots
    float window;         // 0: no window pairs
};

struct FeatureSums {
    float* activity_F;       // (F) sum over pairs and open gates of tanh(c f n)
    float* slope_FK;         // (F, K) sum over pairs of f c (1 - tanh^2) where open
    std::int64_t* fired_F;   // (F) tokens on which any gate is open
    std::int64_t* open_K;    // (K)
    float* above_F;          // (F) sum of theta - h over pairs with h >= theta
    std::int64_t* n_above_F; // (F) their number
};

// Everything of the penalty that is a sum over a feature's pairs.
void feature_sums(const StepKernels& kernels, const CodeView& code, const OrderView& order, const float* norms_FK,
                  const float* theta_F, const PenaltyView& penalty, const FeatureSums& out, unsigned n_threads);

}  // namespace crosscoder
