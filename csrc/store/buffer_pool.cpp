#include "store/buffer_pool.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <new>

namespace crosscoder {
namespace {

constexpr std::size_t kHuge = std::size_t{2} << 20;

}  // namespace

BufferPool::BufferPool(std::size_t bytes)
    : bytes_(bytes), mapped_((std::max<std::size_t>(1, bytes) + kHuge - 1) / kHuge * kHuge) {}

BufferPool::~BufferPool() {
    for (void* buffer : free_) {
        ::munmap(buffer, mapped_);
    }
}

void* BufferPool::take() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!free_.empty()) {
            void* buffer = free_.back();
            free_.pop_back();
            return buffer;
        }
    }
    // One huge page more than is needed, and what lies outside of the alignment given back.
    void* mapped = ::mmap(nullptr, mapped_ + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) {
        throw std::bad_alloc();
    }
    auto* begin = static_cast<unsigned char*>(mapped);
    const std::size_t before = (kHuge - reinterpret_cast<std::uintptr_t>(begin) % kHuge) % kHuge;
    if (before > 0) {
        ::munmap(begin, before);
    }
    if (before < kHuge) {
        ::munmap(begin + before + mapped_, kHuge - before);
    }
    ::madvise(begin + before, mapped_, MADV_HUGEPAGE);
    return begin + before;
}

void BufferPool::give_back(void* buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(buffer);
}

}  // namespace crosscoder
