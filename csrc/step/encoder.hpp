// From products x W^T, tile of features by tile, to the pairs of a sparse code with exact preactivations.
//
// The products may be rounded (bf16, int8): they only name candidates, with a margin. Each candidate's h is then
// computed in float32 in a fixed order, and h decides. So the code does not depend on how the products were made.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "step/step_kernels.hpp"

namespace crosscoder {

enum class ProductType { fp32, bf16, int32 };

// Products of all B tokens with the features first to first + n - 1, row by row.
struct ProductTile {
    const void* data;
    ProductType type;
    std::size_t first;
    std::size_t n;
};

// Which candidates a tile has: product > cut_F - margin0_B width0_F - margin1_B width1_F (arrays over all features
// and tokens; width1_F and margin1_B may be null). For int32 products: times token_scale_B times scale_F.
struct CandidateRule {
    const float* cut_F;
    const float* width0_F;
    const float* width1_F;
    const float* margin0_B;
    const float* margin1_B;
    const float* scale_F;
    const float* token_scale_B;
};

// Positions in the tile (ascending, room for tile.n) of the candidates of token b.
std::size_t collect_candidates(const StepKernels& kernels, const ProductTile& tile, const CandidateRule& rule,
                               const float* tile_cut, std::size_t b, std::uint32_t* out);

// Rows of width floats or of width bf16 numbers.
struct RowsView {
    const void* data;
    bool bf16;
    std::size_t width;
};

// A candidate is kept iff h > 0 and h scale > level, or h >= also (null: no such rule).
struct KeepRule {
    const float* scale_F;
    const float* level_F;
    const float* also_F;
};

class Encoder {
  public:
    Encoder(const float* x, std::size_t n_tokens, RowsView weights, const float* bias_F, std::size_t n_features);

    // Finds and scores a tile's candidates. Tiles come in ascending order. Returns the number of pairs so far.
    std::size_t add(const StepKernels& kernels, const ProductTile& tile, const CandidateRule& candidates,
                    const KeepRule& keep, unsigned n_threads);

    std::size_t n_pairs() const;

    // Fills row_offsets (B + 1), features, values, gates (n_pairs()). The gate at k: h norms > theta (`shared`:
    // h > theta at all). Frees the memory.
    void finish(const float* norms_FK, std::size_t n_snapshots, const float* theta_F, bool shared,
                std::int64_t* row_offsets, std::int32_t* features, float* values, std::uint64_t* gates,
                unsigned n_threads);

  private:
    struct Entry {
        std::uint32_t row;
        std::int32_t feature;
        float h;
    };
    struct Chunk {
        std::vector<Entry> entries;
    };

    const float* x_;
    std::size_t n_tokens_;
    RowsView weights_;
    const float* bias_F_;
    std::size_t n_features_;
    std::vector<Chunk> chunks_;
};

// h of the pairs (token, feature) given: the same bits as Encoder's.
void score_pairs(const StepKernels& kernels, const float* x, RowsView weights, const float* bias_F,
                 const std::int32_t* tokens, const std::int32_t* features, std::size_t n, float* h,
                 unsigned n_threads);

}  // namespace crosscoder
