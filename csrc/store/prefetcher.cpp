#include "store/prefetcher.hpp"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <new>
#include <utility>

#include "store/unpack.hpp"

namespace crosscoder {
namespace {

// How many files stay open and known to be whole: at most 3/8 of the descriptors that the process may have, so
// that two loaders fit beside each other.
std::size_t most_open_files(bool direct) {
    constexpr rlim_t kMost = 4096;
    rlimit limit{};
    if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) {
        limit.rlim_cur = 1024;
    }
    const rlim_t descriptors = limit.rlim_cur / 8 * 3;
    return static_cast<std::size_t>(std::clamp<rlim_t>(direct ? descriptors / 2 : descriptors, 1, kMost));
}

struct FreeDeleter {
    void operator()(void* pointer) const { std::free(pointer); }
};

// Whether the page cache holds the byte at `offset`; false where the kernel cannot say.
bool is_cached(int descriptor, std::size_t offset) {
#if defined(RWF_NOWAIT)
    char byte = 0;
    const iovec vector{&byte, 1};
    return ::preadv2(descriptor, &vector, 1, static_cast<off_t>(offset), RWF_NOWAIT) == 1;
#else
    (void)descriptor;
    (void)offset;
    return false;
#endif
}

struct Span {
    std::size_t first_block, last_block, begin, bytes;
};

Span span_of(const SegmentHead& head, const Run& run) {
    Span span{};
    span.first_block = static_cast<std::size_t>(run.first / head.rows_per_block);
    span.last_block = static_cast<std::size_t>((run.first + run.rows - 1) / head.rows_per_block);
    span.begin = head.offset_of(span.first_block);
    span.bytes = head.offset_of(span.last_block) + head.bytes_of(span.last_block) - span.begin;
    return span;
}

}  // namespace

struct Prefetcher::Scratch {
    std::unique_ptr<unsigned char, FreeDeleter> memory;
    std::size_t size = 0;
    std::vector<unsigned char> copy;

    unsigned char* of(std::size_t bytes) {
        if (size < bytes) {
            memory.reset(static_cast<unsigned char*>(std::aligned_alloc(kPage, round_up_to_page(bytes))));
            size = memory ? bytes : 0;
            if (!memory) {
                throw std::bad_alloc();
            }
        }
        return memory.get();
    }
};

Prefetcher::Opened::~Opened() {
    if (direct >= 0) {
        ::close(direct);
    }
}

Prefetcher::Prefetcher(StoreLayout layout, unsigned n_threads)
    : process_(::getpid()), layout_(std::move(layout)), most_open_files_(most_open_files(layout_.direct)) {
    for (unsigned i = 0; i < std::max(1U, n_threads); ++i) {
        threads_.emplace_back([this] { work(); });
    }
}

Prefetcher::~Prefetcher() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        tasks_.clear();
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) {
        thread.join();
    }
}

bool Prefetcher::is_of_this_process() const { return ::getpid() == process_; }

void Prefetcher::require_this_process() const {
    if (!is_of_this_process()) {
        throw FormatError("this pass over the store was begun before a fork; begin a new one in the child");
    }
}

std::uint64_t Prefetcher::submit(Window window) {
    require_this_process();
    auto job = std::make_shared<Job>();
    job->window = std::move(window);
    const std::size_t K = layout_.snapshots.size();
    std::uint64_t ticket = 0;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        ticket = next_ticket_++;
        jobs_.emplace(ticket, job);
        for (std::size_t r = 0; r < job->window.runs.size(); ++r) {
            for (std::size_t k = 0; k < K; ++k) {
                tasks_.push_back({job, r, k});
                ++job->pending;
            }
        }
    }
    wake_.notify_all();
    return ticket;
}

bool Prefetcher::is_done(std::uint64_t ticket) {
    require_this_process();
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = jobs_.find(ticket);
    return found == jobs_.end() || found->second->pending == 0;
}

void Prefetcher::wait(std::uint64_t ticket) {
    require_this_process();
    std::shared_ptr<Job> job;
    {
        std::unique_lock<std::mutex> lock(mutex_);
        const auto found = jobs_.find(ticket);
        if (found == jobs_.end()) {
            return;
        }
        job = found->second;
        done_.wait(lock, [&] { return job->pending == 0; });
        jobs_.erase(ticket);
    }
    if (job->error) {
        std::rethrow_exception(job->error);
    }
}

void Prefetcher::drain() {
    if (!is_of_this_process()) {
        return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    tasks_.clear();
    jobs_.clear();
    done_.wait(lock, [&] { return running_ == 0; });
}

void Prefetcher::work() {
    Scratch scratch;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
        wake_.wait(lock, [&] { return stop_ || !tasks_.empty(); });
        if (stop_) {
            return;
        }
        const Task task = std::move(tasks_.front());
        tasks_.pop_front();
        // The schedule is known: while this piece is worked on, the disk can fetch the one after the next.
        const std::size_t ahead = threads_.size();
        const Task later = !layout_.direct && tasks_.size() > ahead ? tasks_[ahead] : Task{};
        ++running_;
        const bool failed = task.job->error != nullptr;
        lock.unlock();
        std::exception_ptr error;
        if (!failed) {
            try {
                if (later.job) {
                    advise(later);
                }
                load(task, scratch);
            } catch (...) {
                error = std::current_exception();
            }
        }
        lock.lock();
        --running_;
        if (error && !task.job->error) {
            task.job->error = error;
        }
        --task.job->pending;
        if (task.job->pending == 0 || running_ == 0) {
            done_.notify_all();
        }
    }
}

std::shared_ptr<Prefetcher::Opened> Prefetcher::open(const Run& run, std::size_t k) {
    const std::string& path = run.paths[k];
    {
        const std::lock_guard<std::mutex> lock(files_mutex_);
        const auto found = by_path_.find(path);
        if (found != by_path_.end()) {
            recent_.splice(recent_.begin(), recent_, found->second);
            return recent_.front().second;
        }
    }
    auto opened = std::make_shared<Opened>(path);
    const SegmentHead& head = opened->file.head();
    if (head.kind != Kind::activations || head.store != layout_.store || head.item != layout_.item ||
        head.width != layout_.width || head.shard != run.shard || head.name != layout_.snapshots[k] ||
        head.rows != run.shard_rows) {
        throw FormatError(path + " does not belong there: its header differs from the manifest; collect it again");
    }
#if defined(O_DIRECT)
    if (layout_.direct) {
        opened->direct = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    }
#endif
    const std::lock_guard<std::mutex> lock(files_mutex_);
    const auto found = by_path_.find(path);
    if (found != by_path_.end()) {
        return found->second->second;  // another thread was faster
    }
    recent_.emplace_front(path, opened);
    by_path_[path] = recent_.begin();
    while (recent_.size() > most_open_files_) {
        by_path_.erase(recent_.back().first);
        recent_.pop_back();
    }
    return opened;
}

void Prefetcher::advise(const Task& task) {
    const Run& run = task.job->window.runs[task.run];
    const std::shared_ptr<Opened> opened = open(run, task.k);
    const Span span = span_of(opened->file.head(), run);
    if (!is_cached(opened->file.descriptor(), span.begin + span.bytes - 1)) {
        ::posix_fadvise(opened->file.descriptor(), static_cast<off_t>(span.begin), static_cast<off_t>(span.bytes),
                        POSIX_FADV_WILLNEED);
    }
}

void Prefetcher::load(const Task& task, Scratch& scratch) {
    const Window& window = task.job->window;
    const Run& run = window.runs[task.run];
    const std::size_t K = layout_.snapshots.size();
    const std::shared_ptr<Opened> opened = open(run, task.k);
    SegmentFile& file = opened->file;
    const SegmentHead& head = file.head();
    const Span span = span_of(head, run);

    const unsigned char* data = nullptr;
    if (opened->direct >= 0) {
        unsigned char* buffer = scratch.of(span.bytes);
        try {
            read_exactly(opened->direct, buffer, span.bytes, span.begin, file.path());
            data = buffer;
        } catch (const FileError& error) {
            if (error.code() != EINVAL) {  // EINVAL: the file system wants another alignment; take the page cache
                throw;
            }
        }
    }

    const std::size_t row_out = std::size_t{head.width} * (layout_.output == 0 ? 4 : 2);
    const RowUnpacker unpack(unpack_kernels(active_level()), head, layout_.scales[task.k], layout_.output,
                             layout_.stream);
    const std::size_t per_block = head.rows_per_block;
    const auto first = static_cast<std::size_t>(run.first);
    const std::size_t end = first + static_cast<std::size_t>(run.rows);
    const auto place_rows = [&](std::size_t b, const unsigned char* block) {
        const std::size_t rows = head.rows_of(b);
        const std::size_t begin = b * per_block;
        for (std::size_t row = std::max(first, begin); row < std::min(end, begin + rows); ++row) {
            const std::int64_t target = window.targets[run.target + row - first];
            if (target >= 0) {
                const auto place = static_cast<std::size_t>(target);
                auto* batch = static_cast<unsigned char*>(window.batches[place / window.batch_rows]);
                unpack(block, rows, row - begin, batch + (place % window.batch_rows * K + task.k) * row_out);
            }
        }
    };
    // Mapped, what is in the page cache is read once; pread would copy it first.
    if (data == nullptr && file.is_checked(span.first_block, span.last_block) &&
        is_cached(file.descriptor(), span.begin + span.bytes - 1)) {
        if (MappedFile* mapped = file.mapped()) {
            const MappedFile::Reading reading(*mapped);
            for (std::size_t b = span.first_block; b <= span.last_block; ++b) {
                place_rows(b, mapped->data() + head.offset_of(b));
            }
            if (reading.is_whole()) {
                file.require_unchanged();
                return;
            }
        }
    }
    for (std::size_t b = span.first_block; b <= span.last_block; ++b) {
        const unsigned char* block =
            data != nullptr ? data + (head.offset_of(b) - span.begin) : file.read_block(b, scratch.copy);
        file.check(b, block);
        place_rows(b, block);
    }
    file.require_unchanged();
}

}  // namespace crosscoder
