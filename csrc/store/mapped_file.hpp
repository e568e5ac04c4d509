// A file mapped for reading, safe against files that change: a page that is gone does not end the process.
#pragma once

#include <atomic>
#include <cstddef>

namespace crosscoder {

// The kernel sends SIGBUS to a thread that touches a mapped page which it cannot have: the file was truncated, or the
// disk failed. Between a Reading's construction and its end, this thread's touches are caught instead: the handler puts
// zeros in the place of the whole mapping, for all threads, and marks it as lost. So whoever reads must ask
// `is_whole()` afterwards, and read the file in another way if it is not.
//
// The handler is installed when it is first needed, and again when another took its place. A SIGBUS that is none of
// ours goes to the handler that was there before.
class MappedFile {
  public:
    // `data()` is null where the system refuses to map. `descriptor` may be closed later.
    MappedFile(int descriptor, std::size_t bytes);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const unsigned char* data() const { return data_; }

    // At most one at a time in a thread.
    class Reading {
      public:
        explicit Reading(MappedFile& file);
        ~Reading();
        Reading(const Reading&) = delete;
        Reading& operator=(const Reading&) = delete;
        // Whether all that was read until now came from the file.
        bool is_whole() const;

      private:
        MappedFile& file_;
        bool was_blocked_;
    };

    // Called by the handler alone. False if the address is not of this mapping.
    bool replace(const void* address);

  private:
    unsigned char* data_ = nullptr;
    std::size_t bytes_;
    std::atomic<unsigned> lost_ = 0;
};

}  // namespace crosscoder
