#include "study/examples.hpp"

#include <algorithm>
#include <bit>
#include <vector>

#include "core/parallel.hpp"

namespace crosscoder {
namespace {

constexpr std::size_t kPairsPerThread = std::size_t{1} << 13;
constexpr std::size_t kFeaturesPerChunk = 256;
constexpr std::int32_t kLowestExponent = -12;
constexpr std::uint32_t kMantissa = 0x7fffffU;
// Mantissas of 2^(1/4), 2^(1/2), 2^(3/4) in float32.
constexpr std::uint32_t kQuarters[3] = {0x1837f0U, 0x3504f3U, 0x5744fdU};

// The finalizer of splitmix64: a bijection, so that different places of a feature never share a key.
std::uint64_t mix(std::uint64_t x) {
    x += 0x9e3779b97f4a7c15ULL;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

std::uint64_t salt_of(std::uint64_t seed, std::size_t feature) { return mix(mix(seed) + feature); }

bool is_better(float a, float b) { return a > b; }
bool is_better(std::uint64_t a, std::uint64_t b) { return a < b; }

// Does a token go before the one that is kept at index i (of all features' rows together)? Equal ranks are in order of
// the text; an empty entry's place is below all others and its rank never equal to a token's.
template <class Rank>
bool goes_before(const KeptTokens<Rank>& kept, std::size_t i, Rank rank, std::int64_t place) {
    if (rank != kept.rank[i]) {
        return is_better(rank, kept.rank[i]);
    }
    return place < std::int64_t{kept.sequence[i]} * (std::int64_t{1} << 32) + kept.position[i];
}

template <class T>
void shift(T* first, T* last, std::size_t by) {
    std::copy_backward(first, last, last + by);
}

// A feature's pairs in the batch, in order of the text.
class FeaturePairs {
  public:
    FeaturePairs(const CodeView& code, const OrderView& order, const std::int64_t* place_B, std::size_t feature)
        : code_(code),
          order_(order),
          place_B_(place_B),
          begin_(static_cast<std::size_t>(order.feature_offsets[feature])),
          end_(static_cast<std::size_t>(order.feature_offsets[feature + 1])) {}

    std::size_t begin() const { return begin_; }
    std::size_t end() const { return end_; }
    float value(std::size_t i) const { return code_.values[order_.order[i]]; }
    std::uint64_t gates(std::size_t i) const { return code_.gates[order_.order[i]]; }
    std::int64_t place(std::size_t i) const { return place_B_[order_.tokens[i]]; }
    std::int64_t sequence(std::size_t i) const { return place(i) >> 32; }

    // The activations from `before` tokens before that of pair i on. Tokens of another sequence are 2^31 places away.
    void window(std::size_t i, std::size_t before, std::size_t length, float* out) const {
        std::fill_n(out, length, 0.0F);
        const std::int64_t first = place(i) - static_cast<std::int64_t>(before);
        for (std::size_t j = i; place(j) >= first; --j) {
            out[place(j) - first] = value(j);
            if (j == begin_) {
                break;
            }
        }
        for (std::size_t j = i + 1; j < end_ && place(j) < first + static_cast<std::int64_t>(length); ++j) {
            out[place(j) - first] = value(j);
        }
    }

  private:
    const CodeView& code_;
    const OrderView& order_;
    const std::int64_t* place_B_;
    std::size_t begin_;
    std::size_t end_;
};

// Keeps the token of pair i if it is among the feature's n best so far; the worst goes.
template <class Rank>
void offer(const KeptTokens<Rank>& kept, const ExampleState& state, std::size_t feature, const FeaturePairs& pairs,
           std::size_t i, Rank rank) {
    const std::size_t row = feature * kept.n;
    const std::size_t last = row + kept.n - 1;
    const std::int64_t place = pairs.place(i);
    if (!goes_before(kept, last, rank, place)) {
        return;
    }
    std::size_t at = last;
    while (at > row && goes_before(kept, at - 1, rank, place)) {
        --at;
    }
    const std::size_t length = state.length;
    shift(kept.rank + at, kept.rank + last, 1);
    shift(kept.sequence + at, kept.sequence + last, 1);
    shift(kept.position + at, kept.position + last, 1);
    shift(kept.activations + at * length, kept.activations + last * length, length);
    kept.rank[at] = rank;
    kept.sequence[at] = static_cast<std::int32_t>(place >> 32);
    kept.position[at] = static_cast<std::int32_t>(place & 0xffffffff);
    pairs.window(i, state.before, length, kept.activations + at * length);
}

void collect_feature(const FeaturePairs& pairs, const ExampleState& state, std::size_t feature, std::size_t K) {
    const std::uint64_t known = ~std::uint64_t{0} >> (64 - K);
    const std::uint64_t salt = salt_of(state.seed, feature);
    std::int64_t* fired_K = state.fired_FK + feature * K;
    std::int64_t* histogram_H = state.histogram_FH + feature * kHistogramBins;
    double sum = state.sum_F[feature];
    std::size_t best = pairs.begin();  // of its sequence: that one token stands for it among the strongest
    for (std::size_t i = pairs.begin(); i < pairs.end(); ++i) {
        const float value = pairs.value(i);
        for (std::uint64_t gates = pairs.gates(i) & known; gates != 0; gates &= gates - 1) {
            ++fired_K[std::countr_zero(gates)];
        }
        sum += static_cast<double>(value);
        ++histogram_H[histogram_bin(value)];
        const auto key = mix(salt + static_cast<std::uint64_t>(pairs.place(i)));
        offer(state.sampled, state, feature, pairs, i, key);
        if (pairs.sequence(i) != pairs.sequence(best)) {
            offer(state.strongest, state, feature, pairs, best, pairs.value(best));
            best = i;
        } else if (value > pairs.value(best)) {
            best = i;
        }
    }
    if (pairs.begin() != pairs.end()) {
        offer(state.strongest, state, feature, pairs, best, pairs.value(best));
    }
    state.sum_F[feature] = sum;
    state.fired_any_F[feature] += static_cast<std::int64_t>(pairs.end() - pairs.begin());
}

}  // namespace

std::size_t histogram_bin(float activation) {
    const auto bits = std::bit_cast<std::uint32_t>(activation);
    const std::uint32_t mantissa = bits & kMantissa;
    const auto exponent = static_cast<std::int32_t>(bits >> 23) - 127;
    std::int32_t quarter = 0;
    for (const std::uint32_t edge : kQuarters) {
        quarter += static_cast<std::int32_t>(mantissa >= edge);
    }
    const std::int32_t bin = 4 * (exponent - kLowestExponent) + quarter;
    return static_cast<std::size_t>(std::clamp(bin, 0, static_cast<std::int32_t>(kHistogramBins) - 1));
}

std::uint64_t sample_key(std::uint64_t seed, std::size_t feature, std::int64_t place) {
    return mix(salt_of(seed, feature) + static_cast<std::uint64_t>(place));
}

void collect_examples(const CodeView& code, const std::int64_t* place_B, const ExampleState& state,
                      unsigned n_threads) {
    const auto most = static_cast<unsigned>(std::min<std::size_t>(n_threads, 1 + code.n_pairs / kPairsPerThread));
    std::vector<std::int64_t> feature_offsets(code.n_features + 1);
    std::vector<std::int32_t> tokens(code.n_pairs);
    std::vector<std::int64_t> positions(code.n_pairs);
    transpose(code, feature_offsets.data(), tokens.data(), positions.data(), most);
    const OrderView order = {feature_offsets.data(), tokens.data(), positions.data()};
    parallel_chunks(code.n_features, kFeaturesPerChunk, most, [&](std::size_t begin, std::size_t end) {
        for (std::size_t f = begin; f < end; ++f) {
            if (order.feature_offsets[f] != order.feature_offsets[f + 1]) {
                collect_feature(FeaturePairs(code, order, place_B, f), state, f, code.n_snapshots);
            }
        }
    });
}

}  // namespace crosscoder
