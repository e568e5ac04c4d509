#include "step/sparse_code.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <mutex>
#include <vector>

#include "core/parallel.hpp"

namespace crosscoder {
namespace {

constexpr std::size_t kFeaturesPerChunk = 64;
constexpr std::size_t kPairsPerThread = std::size_t{1} << 15;

}  // namespace

void transpose(const CodeView& code, std::int64_t* feature_offsets, std::int32_t* tokens, std::int64_t* order,
               unsigned n_threads) {
    // Each thread owns a range of features and reads all pairs: no two write to the same place, whatever their number.
    std::fill_n(feature_offsets, code.n_features + 1, std::int64_t{0});
    const auto most = static_cast<unsigned>(std::min<std::size_t>(n_threads, 1 + code.n_pairs / kPairsPerThread));
    for (std::size_t i = 0; i < code.n_pairs; ++i) {
        ++feature_offsets[static_cast<std::size_t>(code.features[i]) + 1];
    }
    for (std::size_t f = 0; f < code.n_features; ++f) {
        feature_offsets[f + 1] += feature_offsets[f];
    }
    std::vector<std::int64_t> next(feature_offsets, feature_offsets + code.n_features);
    parallel_for(code.n_features, 1, most, [&](std::size_t begin, std::size_t end) {
        for (std::size_t b = 0; b < code.n_tokens; ++b) {
            const auto last = static_cast<std::size_t>(code.row_offsets[b + 1]);
            for (auto i = static_cast<std::size_t>(code.row_offsets[b]); i < last; ++i) {
                const auto f = static_cast<std::size_t>(code.features[i]);
                if (f >= begin && f < end) {
                    const auto place = static_cast<std::size_t>(next[f]++);
                    tokens[place] = static_cast<std::int32_t>(b);
                    order[place] = static_cast<std::int64_t>(i);
                }
            }
        }
    });
}

void feature_sums(const StepKernels& kernels, const CodeView& code, const OrderView& order, const float* norms_FK,
                  const float* theta_F, const PenaltyView& penalty, const FeatureSums& out, unsigned n_threads) {
    const std::size_t K = code.n_snapshots;
    std::fill_n(out.open_K, K, std::int64_t{0});
    std::mutex mutex;
    parallel_chunks(code.n_features, kFeaturesPerChunk, n_threads, [&](std::size_t begin, std::size_t end) {
        std::array<std::int64_t, 64> open = {};
        for (std::size_t f = begin; f < end; ++f) {
            float* slopes = out.slope_FK + f * K;
            std::fill_n(slopes, K, 0.0F);
            float activity = 0;
            float above = 0;
            std::int64_t fired = 0;
            std::int64_t n_above = 0;
            for (auto i = order.feature_offsets[f]; i < order.feature_offsets[f + 1]; ++i) {
                const auto pair = static_cast<std::size_t>(order.order[i]);
                const float h = code.values[pair];
                std::uint64_t gates = code.gates[pair];
                if (h >= theta_F[f]) {
                    above += theta_F[f] - h;
                    ++n_above;
                }
                if (gates == 0) {
                    continue;
                }
                ++fired;
                activity += kernels.activity(h, norms_FK + f * K, gates, penalty.tanh_scale, penalty.linear, slopes, K);
                for (; gates != 0; gates &= gates - 1) {
                    ++open[static_cast<std::size_t>(std::countr_zero(gates))];
                }
            }
            out.activity_F[f] = activity;
            out.fired_F[f] = fired;
            out.above_F[f] = above;
            out.n_above_F[f] = n_above;
        }
        const std::lock_guard<std::mutex> lock(mutex);
        for (std::size_t k = 0; k < K; ++k) {
            out.open_K[k] += open[k];
        }
    });
}

}  // namespace crosscoder
