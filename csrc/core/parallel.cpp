#include "core/parallel.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace crosscoder {
namespace {

// Ranges 0 to n_ranges - 1, handed out one by one to the threads that take part.
struct Job {
    const std::function<void(std::size_t)>* run = nullptr;
    std::size_t n_ranges = 0;
    std::atomic<std::size_t> next{0};

    void take_part() {
        for (std::size_t i = next.fetch_add(1); i < n_ranges; i = next.fetch_add(1)) {
            (*run)(i);
        }
    }
};

// Is this thread working on a job? What it calls then runs on it alone.
thread_local bool within_job = false;

class Pool {
  public:
    // Runs the job on `n_threads` threads, the calling one included; `job.run` must not throw.
    void run(Job& job, unsigned n_threads) {
        if (n_threads < 2 || within_job) {
            job.take_part();
            return;
        }
        const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) {
            job.take_part();  // the pool is busy with another caller's job
            return;
        }
        const unsigned helpers = grow(n_threads - 1);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            wanted_ = helpers;
            active_ = helpers;
            ++generation_;
        }
        start_.notify_all();
        within_job = true;
        job.take_part();
        within_job = false;
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return active_ == 0; });
        job_ = nullptr;
    }

    // The threads of the parent do not exist in a forked child.
    void forget_threads() {
        new (&turn_) std::mutex;
        new (&mutex_) std::mutex;
        new (&start_) std::condition_variable;
        new (&done_) std::condition_variable;
        n_workers_ = 0;
        active_ = 0;
    }

  private:
    unsigned grow(unsigned wanted) {
        while (n_workers_ < wanted) {
            try {
                std::uint64_t generation = 0;
                {
                    const std::lock_guard<std::mutex> lock(mutex_);
                    generation = generation_;
                }
                std::thread(&Pool::work, this, n_workers_, generation).detach();
                ++n_workers_;
            } catch (const std::system_error&) {
                break;  // no more threads to be had
            }
        }
        return std::min(n_workers_, wanted);
    }

    void work(unsigned index, std::uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            start_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (index >= wanted_) {
                continue;
            }
            Job* job = job_;
            lock.unlock();
            within_job = true;
            job->take_part();
            within_job = false;
            lock.lock();
            if (--active_ == 0) {
                done_.notify_one();
            }
        }
    }

    std::mutex turn_;   // held by the thread whose job is running
    std::mutex mutex_;  // guards what follows
    std::condition_variable start_;
    std::condition_variable done_;
    Job* job_ = nullptr;
    std::uint64_t generation_ = 0;
    unsigned wanted_ = 0;
    unsigned active_ = 0;
    unsigned n_workers_ = 0;  // written by the holder of turn_ only
};

// Never destroyed: its threads may still wait on it while the process ends.
Pool& pool() {
    static Pool* const instance = [] {
        auto* made = new Pool;
        pthread_atfork(nullptr, nullptr, [] { pool().forget_threads(); });
        return made;
    }();
    return *instance;
}

void run_ranges(std::size_t n_ranges, unsigned n_threads, const std::function<void(std::size_t)>& work) {
    if (n_ranges == 0) {
        return;
    }
    if (n_ranges == 1) {
        work(0);
        return;
    }
    std::vector<std::exception_ptr> errors(n_ranges);
    const std::function<void(std::size_t)> guarded = [&](std::size_t i) {
        try {
            work(i);
        } catch (...) {
            errors[i] = std::current_exception();
        }
    };
    Job job;
    job.run = &guarded;
    job.n_ranges = n_ranges;
    pool().run(job, static_cast<unsigned>(std::min<std::size_t>(n_threads, n_ranges)));
    for (const std::exception_ptr& error : errors) {
        if (error) {
            std::rethrow_exception(error);
        }
    }
}

}  // namespace

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
    run_ranges(n_ranges, n_threads, [&](std::size_t i) { work(begin_of(i), begin_of(i + 1)); });
}

void parallel_chunks(std::size_t n, std::size_t chunk, unsigned n_threads,
                     const std::function<void(std::size_t, std::size_t)>& work) {
    const std::size_t size = std::max<std::size_t>(1, chunk);
    run_ranges((n + size - 1) / size, n_threads,
               [&](std::size_t i) { work(i * size, std::min(n, (i + 1) * size)); });
}

}  // namespace crosscoder
