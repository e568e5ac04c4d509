// The encoder of the gates that keep the largest scores, relu(h) max_k n: TopK by token, BatchTopK over the batch.
//
// As in encoder.hpp, rounded products only name candidates: each gives a lower and an upper bound of its score, and
// what lies under the k-th largest lower bound is dropped while the tiles stream by. The rest is scored exactly.
#pragma once

#include "step/encoder.hpp"

namespace crosscoder {

class RankEncoder {
  public:
    // Keeps `top_k` features a token, or top_k times n_tokens over the whole batch. `largest_norm_F`: max_k n.
    RankEncoder(const float* x, std::size_t n_tokens, RowsView weights, const float* bias_F,
                const float* largest_norm_F, std::size_t top_k, bool whole_batch);

    // `candidates.cut_F` is not used; `relative` is the relative error of the products beside the margins.
    void add(const StepKernels& kernels, const ProductTile& tile, const CandidateRule& candidates, float relative,
             unsigned n_threads);

    // Scores and selects. Afterwards n_pairs() are left.
    void select(const StepKernels& kernels, unsigned n_threads);
    std::size_t n_pairs() const;

    // The smallest score kept, 0 where none is.
    float smallest_score() const { return smallest_; }

    // Fills row_offsets (B + 1), features, values.
    void finish(std::int64_t* row_offsets, std::int32_t* features, float* values) const;

  private:
    struct Entry {
        std::int32_t feature;
        float lower;  // bounds of the score; after select(), h and the score
        float upper;
    };
    using Row = std::vector<Entry>;

    void prune_batch();

    const float* x_;
    std::size_t n_tokens_;
    RowsView weights_;
    const float* bias_F_;
    const float* largest_norm_F_;
    std::size_t top_k_;
    bool whole_batch_;
    float batch_bound_ = 0;
    float smallest_ = 0;
    std::vector<float> row_bound_;
    std::vector<Row> rows_;
};

}  // namespace crosscoder
