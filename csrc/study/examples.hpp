// What one pass over the tokens keeps of every feature (python/crosscoder/evolution/examples.py): counts, a histogram,
// its strongest contexts and a uniform sample of the others.
#pragma once

#include <cstddef>
#include <cstdint>

#include "step/sparse_code.hpp"

namespace crosscoder {

// Bins of the histogram: quarters of an octave from 2^-12 to 2^12; what lies outside falls into the first or the last.
constexpr std::size_t kHistogramBins = 96;

// n tokens of each feature in order of rank, the best first, each with the feature's activations around it.
template <class Rank>
struct KeptTokens {
    Rank* rank;               // (F, n)
    std::int32_t* sequence;   // (F, n); -1 where there are fewer
    std::int32_t* position;   // (F, n); -1 where there are fewer
    float* activations;       // (F, n, L)
    std::size_t n;            // at least 1
};

struct ExampleState {
    std::int64_t* fired_FK;       // tokens with the gate open
    std::int64_t* fired_any_F;    // tokens with a gate open at any snapshot
    double* sum_F;                // of the activations
    std::int64_t* histogram_FH;   // of the activations; H = kHistogramBins
    KeptTokens<float> strongest;  // rank: the activation, larger is better; empty: 0
    KeptTokens<std::uint64_t> sampled;  // rank: sample_key, smaller is better; empty: all bits set
    std::size_t before;           // tokens of a window before its own, which stands at this index
    std::size_t length;           // L, at least before + 1
    std::uint64_t seed;
};

// The bin of a positive activation.
std::size_t histogram_bin(float activation);

// The place of a token in a sample of a feature's tokens, as good as random; different for different places.
std::uint64_t sample_key(std::uint64_t seed, std::size_t feature, std::int64_t place);

// Adds a batch of whole sequences. `place_B` is sequence * 2^32 + position of each token, ascending; both are at least
// 0 and below 2^31. What is kept does not depend on how sequences are divided into batches nor on n_threads; the order
// of the sequences decides only how `sum_F` is rounded.
void collect_examples(const CodeView& code, const std::int64_t* place_B, const ExampleState& state,
                      unsigned n_threads);

}  // namespace crosscoder
