#include "study/cosine_statistics.hpp"

#include <algorithm>

#include "core/parallel.hpp"

namespace crosscoder {

void add_cosines(const float* cosines, const std::int32_t* groups, std::size_t n, std::size_t K,
                 const CosineStatistics& to, unsigned n_threads) {
    const std::size_t n_pairs = K * (K + 1) / 2;
    const auto half = static_cast<float>(to.n_bins) / 2;
    const auto last = static_cast<float>(to.n_bins - 1);
    // Each thread has its own pairs: no shared counts, the same sums whatever the number of threads.
    parallel_chunks(K, 1, n_threads, [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) {
            const std::size_t first = i * K - i * (i + 1) / 2;  // the pair (i, j) is number first + j
            for (std::size_t f = 0; f < n; ++f) {
                if (groups[f] < 0) {
                    continue;
                }
                const std::size_t row = static_cast<std::size_t>(groups[f]) * n_pairs + first;
                const float* values = cosines + (f * K + i) * K;
                for (std::size_t j = i; j < K; ++j) {
                    const float value = values[j];
                    if (!(value >= -1.0F && value <= 1.0F)) {
                        continue;
                    }
                    const auto bin = static_cast<std::size_t>(std::min((value + 1.0F) * half, last));
                    to.sums[row + j] += static_cast<double>(value);
                    ++to.counts[row + j];
                    ++to.histogram[(first + j) * to.n_bins + bin];
                    float& smallest = to.extremes[first + j];
                    float& largest = to.extremes[n_pairs + first + j];
                    smallest = std::min(smallest, value);
                    largest = std::max(largest, value);
                }
            }
        }
    });
}

}  // namespace crosscoder
