#include "step/encoder.hpp"

#include <algorithm>

#include "core/parallel.hpp"
#include "step/rows.hpp"

namespace crosscoder {
namespace {

constexpr std::size_t kTokensPerChunk = 16;
constexpr std::size_t kBatch = 64;  // candidates scored together

// h of one token for several features: out[i] = <x, W[features[i]]> + bias[features[i]].
template <class T>
void score(const StepKernels& kernels, const float* x, const T* weights, std::size_t width, const float* bias_F,
           const std::uint32_t* features, std::size_t n, float* out) {
    const T* rows[kBatch];
    for (std::size_t i = 0; i < n; ++i) {
        rows[i] = weights + features[i] * width;
    }
    dots(kernels, x, rows, n, width, out);
    for (std::size_t i = 0; i < n; ++i) {
        out[i] += bias_F[features[i]];
    }
}

void score(const StepKernels& kernels, const float* x, const RowsView& weights, const float* bias_F,
           const std::uint32_t* features, std::size_t n, float* out) {
    if (weights.bf16) {
        score(kernels, x, static_cast<const std::uint16_t*>(weights.data), weights.width, bias_F, features, n, out);
    } else {
        score(kernels, x, static_cast<const float*>(weights.data), weights.width, bias_F, features, n, out);
    }
}

}  // namespace

std::size_t collect_candidates(const StepKernels& kernels, const ProductTile& tile, const CandidateRule& rule,
                               const float* tile_cut, std::size_t b, std::uint32_t* out) {
    const bool second = rule.width1_F != nullptr;
    const CollectBounds bounds = {tile_cut,
                                  rule.width0_F + tile.first,
                                  second ? rule.width1_F + tile.first : nullptr,
                                  {rule.margin0_B[b], second ? rule.margin1_B[b] : 0.0F}};
    switch (tile.type) {
        case ProductType::fp32:
            return kernels.collect_fp32(static_cast<const float*>(tile.data) + b * tile.n, &bounds, tile.n, out);
        case ProductType::bf16:
            return kernels.collect_bf16(static_cast<const std::uint16_t*>(tile.data) + b * tile.n, &bounds, tile.n,
                                        out);
        case ProductType::int32:
            break;
    }
    return kernels.collect_int32(static_cast<const std::int32_t*>(tile.data) + b * tile.n, rule.token_scale_B[b],
                                 rule.scale_F + tile.first, &bounds, tile.n, out);
}

Encoder::Encoder(const float* x, std::size_t n_tokens, RowsView weights, const float* bias_F, std::size_t n_features)
    : x_(x),
      n_tokens_(n_tokens),
      weights_(weights),
      bias_F_(bias_F),
      n_features_(n_features),
      chunks_((n_tokens + kTokensPerChunk - 1) / kTokensPerChunk) {}

std::size_t Encoder::add(const StepKernels& kernels, const ProductTile& tile, const CandidateRule& candidates,
                         const KeepRule& keep, unsigned n_threads) {
    parallel_chunks(n_tokens_, kTokensPerChunk, n_threads, [&](std::size_t begin, std::size_t end) {
        Chunk& chunk = chunks_[begin / kTokensPerChunk];
        std::vector<std::uint32_t> found(tile.n);
        float h[kBatch];
        for (std::size_t b = begin; b < end; ++b) {
            const std::size_t count = collect_candidates(kernels, tile, candidates, candidates.cut_F + tile.first, b, found.data());
            for (std::size_t i = 0; i < count; ++i) {
                found[i] += static_cast<std::uint32_t>(tile.first);
            }
            for (std::size_t i = 0; i < count; i += kBatch) {
                const std::size_t n = std::min(kBatch, count - i);
                score(kernels, x_ + b * weights_.width, weights_, bias_F_, found.data() + i, n, h);
                for (std::size_t j = 0; j < n; ++j) {
                    const std::uint32_t f = found[i + j];
                    if ((h[j] > 0 && h[j] * keep.scale_F[f] > keep.level_F[f]) ||
                        (keep.also_F != nullptr && h[j] >= keep.also_F[f])) {
                        chunk.entries.push_back(
                            {static_cast<std::uint32_t>(b), static_cast<std::int32_t>(f), h[j]});
                    }
                }
            }
        }
    });
    return n_pairs();
}

std::size_t Encoder::n_pairs() const {
    std::size_t n = 0;
    for (const Chunk& chunk : chunks_) {
        n += chunk.entries.size();
    }
    return n;
}

void Encoder::finish(const float* norms_FK, std::size_t n_snapshots, const float* theta_F, bool shared,
                     std::int64_t* row_offsets, std::int32_t* features, float* values, std::uint64_t* gates,
                     unsigned n_threads) {
    std::fill_n(row_offsets, n_tokens_ + 1, std::int64_t{0});
    for (const Chunk& chunk : chunks_) {
        for (const Entry& entry : chunk.entries) {
            ++row_offsets[entry.row + 1];
        }
    }
    for (std::size_t b = 0; b < n_tokens_; ++b) {
        row_offsets[b + 1] += row_offsets[b];
    }
    const std::uint64_t all = n_snapshots == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << n_snapshots) - 1;
    parallel_chunks(chunks_.size(), 1, n_threads, [&](std::size_t c, std::size_t) {
        const std::size_t first = c * kTokensPerChunk;
        std::int64_t next[kTokensPerChunk];
        for (std::size_t b = first; b < std::min(n_tokens_, first + kTokensPerChunk); ++b) {
            next[b - first] = row_offsets[b];
        }
        for (const Entry& entry : chunks_[c].entries) {
            const auto place = static_cast<std::size_t>(next[entry.row - first]++);
            const auto f = static_cast<std::size_t>(entry.feature);
            features[place] = entry.feature;
            values[place] = entry.h;
            std::uint64_t bits = 0;
            if (shared) {
                bits = entry.h > theta_F[f] ? all : 0;
            } else {
                const float* norms = norms_FK + f * n_snapshots;
                for (std::size_t k = 0; k < n_snapshots; ++k) {
                    bits |= static_cast<std::uint64_t>(entry.h * norms[k] > theta_F[f]) << k;
                }
            }
            gates[place] = bits;
        }
        std::vector<Entry>().swap(chunks_[c].entries);
    });
}

void score_pairs(const StepKernels& kernels, const float* x, RowsView weights, const float* bias_F,
                 const std::int32_t* tokens, const std::int32_t* features, std::size_t n, float* h,
                 unsigned n_threads) {
    parallel_chunks(n, 256, n_threads, [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) {
            const auto f = static_cast<std::uint32_t>(features[i]);
            score(kernels, x + static_cast<std::size_t>(tokens[i]) * weights.width, weights, bias_F, &f, 1, h + i);
        }
    });
}

}  // namespace crosscoder
