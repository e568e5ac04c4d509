// Work split over a pool of threads that lives as long as the process.
#pragma once

#include <cstddef>
#include <functional>

namespace crosscoder {

// Calls work(begin, end) on disjoint consecutive ranges that cover [0, n): at most `n_threads` of them, none but
// the last shorter than `grain`, the first on the calling thread. Returns when all are done and rethrows the
// exception of the lowest range that threw. Threads that the system refuses to start cost speed, nothing else.
void parallel_for(std::size_t n, std::size_t grain, unsigned n_threads,
                  const std::function<void(std::size_t begin, std::size_t end)>& work);

// Calls work(begin, end) on the ranges [0, chunk), [chunk, 2 chunk), ... of [0, n), each taken by whichever thread is
// free: for work of uneven size. Otherwise as parallel_for. What is computed for a range must not depend on others.
void parallel_chunks(std::size_t n, std::size_t chunk, unsigned n_threads,
                     const std::function<void(std::size_t begin, std::size_t end)>& work);

}  // namespace crosscoder
