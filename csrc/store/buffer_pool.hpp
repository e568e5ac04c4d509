// Large buffers that are used again and again, on huge pages where the system gives them.
#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

namespace crosscoder {

// Thread-safe. Memory goes back to the system when the pool is destroyed.
class BufferPool {
  public:
    explicit BufferPool(std::size_t bytes);
    ~BufferPool();
    BufferPool(const BufferPool&) = delete;
    BufferPool& operator=(const BufferPool&) = delete;

    std::size_t bytes() const { return bytes_; }
    // A buffer of bytes(), aligned to 2 MiB. Throws std::bad_alloc.
    void* take();
    void give_back(void* buffer);

  private:
    std::size_t bytes_, mapped_;
    std::mutex mutex_;
    std::vector<void*> free_;
};

}  // namespace crosscoder
