#include "step/rank_encoder.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "core/parallel.hpp"
#include "step/rows.hpp"

namespace crosscoder {
namespace {

constexpr std::size_t kTokensPerChunk = 16;
constexpr std::size_t kMostBeforePruning = 4;  // times what is kept

float product_at(const ProductTile& tile, const CandidateRule& rule, std::size_t b, std::size_t j) {
    const std::size_t place = b * tile.n + j;
    switch (tile.type) {
        case ProductType::fp32:
            return static_cast<const float*>(tile.data)[place];
        case ProductType::bf16: {
            const std::uint32_t bits = static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(tile.data)[place])
                                       << 16;
            float value = 0;
            static_assert(sizeof(value) == sizeof(bits));
            __builtin_memcpy(&value, &bits, sizeof(value));
            return value;
        }
        case ProductType::int32:
            break;
    }
    return static_cast<float>(static_cast<const std::int32_t*>(tile.data)[place]) * rule.token_scale_B[b] *
           rule.scale_F[tile.first + j];
}

// The k-th largest of `values` (reordered), or `none` where there are fewer.
float kth_largest(std::vector<float>& values, std::size_t k, float none) {
    if (k == 0 || values.size() < k) {
        return none;
    }
    const auto kth = values.begin() + static_cast<std::ptrdiff_t>(k - 1);
    std::nth_element(values.begin(), kth, values.end(), std::greater<>());
    return *kth;
}

}  // namespace

RankEncoder::RankEncoder(const float* x, std::size_t n_tokens, RowsView weights, const float* bias_F,
                         const float* largest_norm_F, std::size_t top_k, bool whole_batch)
    : x_(x),
      n_tokens_(n_tokens),
      weights_(weights),
      bias_F_(bias_F),
      largest_norm_F_(largest_norm_F),
      top_k_(top_k),
      whole_batch_(whole_batch),
      row_bound_(n_tokens, 0.0F),
      rows_(n_tokens) {}

void RankEncoder::add(const StepKernels& kernels, const ProductTile& tile, const CandidateRule& rule, float relative,
                      unsigned n_threads) {
    const bool second = rule.width1_F != nullptr;
    parallel_chunks(n_tokens_, kTokensPerChunk, n_threads, [&](std::size_t begin, std::size_t end) {
        std::vector<std::uint32_t> found(tile.n);
        std::vector<float> cut(tile.n);
        std::vector<float> lower;
        for (std::size_t b = begin; b < end; ++b) {
            const float bound = std::max(whole_batch_ ? batch_bound_ : row_bound_[b], 0.0F);
            for (std::size_t j = 0; j < tile.n; ++j) {
                const std::size_t f = tile.first + j;
                // A norm of 0 scores 0: 0 / 0 or bound / 0 lets nothing through.
                const float level = bound / largest_norm_F_[f] - bias_F_[f];
                cut[j] = level - relative * std::abs(level);
            }
            const std::size_t count = collect_candidates(kernels, tile, rule, cut.data(), b, found.data());
            Row& row = rows_[b];
            for (std::size_t i = 0; i < count; ++i) {
                const std::size_t f = tile.first + found[i];
                const float product = product_at(tile, rule, b, found[i]);
                const float error = rule.margin0_B[b] * rule.width0_F[f] +
                                    (second ? rule.margin1_B[b] * rule.width1_F[f] : 0.0F) +
                                    relative * std::abs(product);
                const float h = product + bias_F_[f];
                row.push_back({static_cast<std::int32_t>(f), (h - error) * largest_norm_F_[f],
                               (h + error) * largest_norm_F_[f]});
            }
            if (!whole_batch_ && row.size() > kMostBeforePruning * top_k_) {
                lower.clear();
                for (const Entry& entry : row) {
                    lower.push_back(entry.lower);
                }
                row_bound_[b] = std::max(row_bound_[b], kth_largest(lower, top_k_, 0.0F));
                std::erase_if(row, [&](const Entry& entry) { return entry.upper < row_bound_[b]; });
            }
        }
    });
    if (whole_batch_ && n_pairs() > kMostBeforePruning * top_k_ * n_tokens_) {
        prune_batch();
    }
}

void RankEncoder::prune_batch() {
    std::vector<float> lower;
    lower.reserve(n_pairs());
    for (const Row& row : rows_) {
        for (const Entry& entry : row) {
            lower.push_back(entry.lower);
        }
    }
    batch_bound_ = std::max(batch_bound_, kth_largest(lower, top_k_ * n_tokens_, 0.0F));
    for (Row& row : rows_) {
        std::erase_if(row, [&](const Entry& entry) { return entry.upper < batch_bound_; });
    }
}

void RankEncoder::select(const StepKernels& kernels, unsigned n_threads) {
    if (whole_batch_) {
        prune_batch();
    }
    parallel_chunks(n_tokens_, kTokensPerChunk, n_threads, [&](std::size_t begin, std::size_t end) {
        std::vector<std::int32_t> tokens;
        std::vector<std::int32_t> features;
        std::vector<float> h;
        for (std::size_t b = begin; b < end; ++b) {
            Row& row = rows_[b];
            tokens.assign(row.size(), static_cast<std::int32_t>(b));
            features.clear();
            for (const Entry& entry : row) {
                features.push_back(entry.feature);
            }
            h.resize(row.size());
            score_pairs(kernels, x_, weights_, bias_F_, tokens.data(), features.data(), row.size(), h.data(), 1);
            for (std::size_t i = 0; i < row.size(); ++i) {
                row[i].lower = h[i];
                row[i].upper = h[i] * largest_norm_F_[static_cast<std::size_t>(row[i].feature)];
            }
            std::erase_if(row, [](const Entry& entry) { return !(entry.lower > 0 && entry.upper > 0); });
            if (!whole_batch_ && row.size() > top_k_) {
                const auto larger = [](const Entry& a, const Entry& c) {
                    return a.upper != c.upper ? a.upper > c.upper : a.feature < c.feature;
                };
                std::nth_element(row.begin(), row.begin() + static_cast<std::ptrdiff_t>(top_k_), row.end(), larger);
                row.resize(top_k_);
            }
            std::sort(row.begin(), row.end(), [](const Entry& a, const Entry& c) { return a.feature < c.feature; });
        }
    });
    const std::size_t most = top_k_ * n_tokens_;
    if (whole_batch_ && n_pairs() > most) {
        std::vector<float> scores;
        for (const Row& row : rows_) {
            for (const Entry& entry : row) {
                scores.push_back(entry.upper);
            }
        }
        const float kth = kth_largest(scores, most, 0.0F);
        std::size_t ties = most;  // how many scores equal to the last may stay, in the order of the pairs
        for (const float score : scores) {
            ties -= static_cast<std::size_t>(score > kth);
        }
        for (Row& row : rows_) {
            std::erase_if(row, [&](const Entry& entry) {
                if (entry.upper == kth && ties > 0) {
                    --ties;
                    return false;
                }
                return !(entry.upper > kth);
            });
        }
    }
    float smallest = std::numeric_limits<float>::infinity();
    for (const Row& row : rows_) {
        for (const Entry& entry : row) {
            smallest = std::min(smallest, entry.upper);
        }
    }
    smallest_ = std::isinf(smallest) ? 0.0F : smallest;
}

std::size_t RankEncoder::n_pairs() const {
    std::size_t n = 0;
    for (const Row& row : rows_) {
        n += row.size();
    }
    return n;
}

void RankEncoder::finish(std::int64_t* row_offsets, std::int32_t* features, float* values) const {
    std::size_t place = 0;
    for (std::size_t b = 0; b < n_tokens_; ++b) {
        row_offsets[b] = static_cast<std::int64_t>(place);
        for (const Entry& entry : rows_[b]) {
            features[place] = entry.feature;
            values[place] = entry.lower;
            ++place;
        }
    }
    row_offsets[n_tokens_] = static_cast<std::int64_t>(place);
}

}  // namespace crosscoder
