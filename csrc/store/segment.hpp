// One file of an activation store, docs/store-format.md: its head, its blocks, written and read.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "store/mapped_file.hpp"
#include "store/unpack_kernels.hpp"

namespace crosscoder {

// What is in a file is wrong; the message names the file (and the block) and the remedy.
class FormatError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// The operating system refused; `code` is its errno.
class FileError : public std::runtime_error {
  public:
    FileError(int code, const std::string& path);
    int code() const { return code_; }
    const std::string& path() const { return path_; }

  private:
    int code_;
    std::string path_;
};

enum class Kind : std::uint32_t { tokens = 0, activations = 1 };
enum class Item : std::uint32_t { fp32 = 0, bf16 = 1, fp16 = 2, int8 = 3, int32 = 4, int4 = 5 };

constexpr std::size_t kPage = 4096;
constexpr std::uint32_t kSegmentVersion = 2;

constexpr std::size_t round_up_to_page(std::size_t n) { return (n + kPage - 1) / kPage * kPage; }

struct SegmentHead {
    Kind kind = Kind::activations;
    Item item = Item::bf16;
    std::uint32_t shard = 0;
    std::uint32_t width = 0;
    std::uint64_t rows = 0;
    std::uint32_t rows_per_block = 0;
    std::uint32_t group = 0;  // int8, int4: neighbouring channels that share a scale
    std::uint64_t store = 0;  // identity of the store
    double norm_sum = 0;
    std::string name;       // of the snapshot
    std::vector<double> column_sums;   // (width,)
    std::vector<float> offset, gain;   // int8, int4: (width,)
    std::uint64_t salt = 0;            // what ties a block to this file

    bool quantised() const { return item == Item::int8 || item == Item::int4; }
    std::size_t groups() const { return quantised() ? (std::size_t{width} + group - 1) / group : 0; }
    std::size_t items_bytes() const;  // of a row, without its scales
    std::size_t row_bytes() const { return items_bytes() + 2 * groups(); }
    std::size_t head_bytes() const;
    std::size_t n_blocks() const { return static_cast<std::size_t>((rows + rows_per_block - 1) / rows_per_block); }
    std::size_t rows_of(std::size_t block) const;
    std::size_t bytes_of(std::size_t block) const { return round_up_to_page(rows_of(block) * row_bytes() + 8); }
    std::size_t offset_of(std::size_t block) const;
    std::size_t file_bytes() const;
};

// Rows in a block of about 256 KiB.
std::uint32_t default_rows_per_block(std::size_t row_bytes);

// The whole bytes of the head, checksum included; and back. `name` is for messages.
// parse_head throws FormatError; `size` is at least the head's own length.
std::vector<unsigned char> format_head(const SegmentHead& head);
SegmentHead parse_head(const unsigned char* bytes, std::size_t size, const std::string& path);

// Whether the block's checksum holds.
bool block_is_whole(const SegmentHead& head, std::size_t block, const unsigned char* data);

// Write x (rows, width), rounded to head.item, to `temporary`, sync it and rename it to `path`. Fills the rest of
// head: statistics of what is stored, offset and gain. Returns false, with nothing at `path`, if a value is not finite
// (also after rounding). Throws FileError.
bool write_activations(const std::string& path, const std::string& temporary, SegmentHead head, const float* x);
void write_tokens(const std::string& path, const std::string& temporary, SegmentHead head, const std::int32_t* rows);


// An open segment, its head checked. Reading is safe from several threads.
class SegmentFile {
  public:
    // Throws FormatError, FileError (ENOENT as FormatError).
    explicit SegmentFile(const std::string& path);
    ~SegmentFile();
    SegmentFile(const SegmentFile&) = delete;
    SegmentFile& operator=(const SegmentFile&) = delete;

    const SegmentHead& head() const { return head_; }
    const std::string& path() const { return path_; }
    int descriptor() const { return descriptor_; }

    // Blocks whose checksum does not hold or that cannot be read, in order.
    std::vector<std::size_t> damaged_blocks() const;
    // All rows of a segment of tokens (rows, width). Throws FormatError naming the block.
    void read_tokens(std::int32_t* out) const;
    // out[i * stride ...] = float32(row index[i]) * scale. Each block is checked when it is first met.
    void gather(const UnpackKernels& kernels, const std::int64_t* index, std::size_t n, float scale, float* out,
                std::size_t stride);

    // The bytes of a block, read into `copy`. Throws FileError, FormatError for a file that was cut since it was opened.
    const unsigned char* read_block(std::size_t block, std::vector<unsigned char>& copy) const;
    // Throws FormatError if the file was written to since it was opened (by its size and time): what was read since
    // then may be of two writings.
    void require_unchanged() const;
    // Throws FormatError if the checksum of the block at `data` does not hold; looks once while the file is open.
    void check(std::size_t block, const unsigned char* data);
    // Whether the checksums of these blocks held since the file was opened.
    bool is_checked(std::size_t first_block, std::size_t last_block) const;
    // The whole file in memory; null where the system does not map it.
    MappedFile* mapped();

  private:
    [[noreturn]] void refuse(std::size_t block) const;

    std::string path_;
    int descriptor_ = -1;
    SegmentHead head_;
    timespec written_{};  // when the file was last written to, at opening
    std::unique_ptr<std::atomic<bool>[]> checked_;  // blocks whose checksum held in this process
    std::once_flag mapping_;
    std::unique_ptr<MappedFile> mapped_;
};

// Turns one row of a block into T (0: fp32, 1: bf16), times a scale that is fixed when this is made.
class RowUnpacker {
  public:
    RowUnpacker(const UnpackKernels& kernels, const SegmentHead& head, float scale, int output, bool stream);
    // `block` points at the block's first byte, `rows` is its number of rows.
    void operator()(const unsigned char* block, std::size_t rows, std::size_t row, void* out) const;

  private:
    const UnpackKernels& kernels_;
    Item item_;
    std::size_t width_, items_bytes_, groups_, group_;
    float scale_;
    int output_;
    bool stream_;
    std::vector<float> offset_, gain_;
};

// pread until `size` bytes are there. Throws FileError, FormatError at the end of the file.
void read_exactly(int descriptor, void* out, std::size_t size, std::size_t offset, const std::string& path);

}  // namespace crosscoder
