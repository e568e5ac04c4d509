// Threads that read runs of rows from the segments of a store and lay them out as batches (B, K, D).
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "store/segment.hpp"

namespace crosscoder {

// What all segments of a store have in common, and what becomes of their rows.
struct StoreLayout {
    std::uint64_t store = 0;
    std::uint32_t width = 0;  // D
    Item item = Item::bf16;
    std::vector<std::string> snapshots;  // (K,) names
    std::vector<float> scales;           // (K,)
    int output = 0;       // 0: fp32, 1: bf16
    bool stream = false;  // write past the caches
    bool direct = false;  // read past the page cache where the file system can
};

// A run of rows of one shard, in all snapshots.
struct Run {
    std::uint32_t shard = 0;
    std::uint64_t shard_rows = 0;
    std::uint64_t first = 0;
    std::uint64_t rows = 0;
    std::size_t target = 0;            // of its first row, in Window::targets
    std::vector<std::string> paths;    // (K,) files
};

// Runs that are read together; their rows go to batches of `batch_rows` rows.
struct Window {
    std::vector<Run> runs;
    std::vector<std::int64_t> targets;  // row of run r -> batch * batch_rows + place in it; -1: nobody wants it
    std::vector<void*> batches;
    std::size_t batch_rows = 0;
};

class Prefetcher {
  public:
    Prefetcher(StoreLayout layout, unsigned n_threads);
    ~Prefetcher();  // drops what is not begun
    Prefetcher(const Prefetcher&) = delete;
    Prefetcher& operator=(const Prefetcher&) = delete;

    // Begin to read a window; returns its ticket. The batches must live until wait(ticket) or drain() is over.
    std::uint64_t submit(Window window);
    bool is_done(std::uint64_t ticket);
    // Returns when the window is complete. Throws what went wrong in it: FormatError, FileError, std::bad_alloc.
    void wait(std::uint64_t ticket);
    // Forget all windows; returns when no thread touches a batch any more. Does nothing in a forked child.
    void drain();

    // False in a forked child, where nothing else of it may be used: its threads are the parent's.
    bool is_of_this_process() const;

    // Bytes taken from files so far.

  private:
    struct Job {
        Window window;
        std::size_t pending = 0;
        std::exception_ptr error;
    };
    struct Task {
        std::shared_ptr<Job> job;
        std::size_t run, k;
    };
    struct Opened {
        explicit Opened(const std::string& path) : file(path) {}
        ~Opened();
        Opened(const Opened&) = delete;
        Opened& operator=(const Opened&) = delete;
        SegmentFile file;
        int direct = -1;
    };
    struct Scratch;

    // Throws FormatError in a forked child.
    void require_this_process() const;
    void work();
    void load(const Task& task, Scratch& scratch);
    void advise(const Task& task);
    std::shared_ptr<Opened> open(const Run& run, std::size_t k);

    const pid_t process_;
    StoreLayout layout_;
    const std::size_t most_open_files_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::deque<Task> tasks_;
    std::unordered_map<std::uint64_t, std::shared_ptr<Job>> jobs_;
    std::uint64_t next_ticket_ = 0;
    std::size_t running_ = 0;
    bool stop_ = false;

    using Recent = std::list<std::pair<std::string, std::shared_ptr<Opened>>>;
    std::mutex files_mutex_;
    Recent recent_;  // the last used first
    std::unordered_map<std::string, Recent::iterator> by_path_;

    std::vector<std::thread> threads_;
};

}  // namespace crosscoder
