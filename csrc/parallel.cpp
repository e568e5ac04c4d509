#include "parallel.hpp"

#include <algorithm>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace crosscoder {

void parallel_for(std::size_t n, std::size_t grain, unsigned n_threads,
                  const std::function<void(std::size_t, std::size_t)>& work) {
    if (n == 0) {
        return;
    }
    const std::size_t most = std::max<std::size_t>(1, n / std::max<std::size_t>(1, grain));
    const std::size_t n_ranges = std::min<std::size_t>(std::max(1U, n_threads), most);
    const std::size_t quotient = n / n_ranges;
    const std::size_t remainder = n % n_ranges;
    const auto begin_of = [=](std::size_t i) { return i * quotient + std::min(i, remainder); };

    std::vector<std::exception_ptr> errors(n_ranges);
    const auto run = [&](std::size_t i) {
        try {
            work(begin_of(i), begin_of(i + 1));
        } catch (...) {
            errors[i] = std::current_exception();
        }
    };

    std::vector<std::thread> threads;
    threads.reserve(n_ranges - 1);
    std::size_t started = 1;
    try {
        for (; started < n_ranges; ++started) {
            threads.emplace_back(run, started);
        }
    } catch (const std::system_error&) {
        // No more threads to be had: the ranges left over run below, on this thread.
    }
    run(0);
    for (std::size_t i = started; i < n_ranges; ++i) {
        run(i);
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    for (const std::exception_ptr& error : errors) {
        if (error) {
            std::rethrow_exception(error);
        }
    }
}

}  // namespace crosscoder
