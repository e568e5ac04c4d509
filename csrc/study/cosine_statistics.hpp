// Sums and histograms of cosines between snapshots, by pair of snapshots.
#pragma once

#include <cstddef>
#include <cstdint>

namespace crosscoder {

// One row for each of the K (K + 1) / 2 pairs i <= j, in row-major order of (i, j).
struct CosineStatistics {
    double* sums;              // (groups, pairs)
    std::int64_t* counts;      // (groups, pairs)
    std::int64_t* histogram;   // (pairs, bins), bins of equal width over [-1, 1]
    float* extremes;           // (2, pairs): smallest, largest
    std::size_t n_bins;
};

// Adds cosines (n, K, K), NaN where there is none; a feature counts in its group, a negative one not at all.
void add_cosines(const float* cosines, const std::int32_t* groups, std::size_t n, std::size_t K,
                 const CosineStatistics& to, unsigned n_threads);

}  // namespace crosscoder
