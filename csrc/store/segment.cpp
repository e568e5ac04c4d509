#include "store/segment.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "core/checksum.hpp"

namespace crosscoder {
namespace {

constexpr char kMagic[8] = {'X', 'C', 'S', 'E', 'G', 'M', 'N', 'T'};
constexpr std::uint32_t kByteOrder = 0x01020304;
constexpr std::uint32_t kOtherByteOrder = 0x04030201;
constexpr std::size_t kIdentityBytes = 64;
constexpr std::size_t kNameAt = 76;
constexpr std::size_t kNameBytes = 948;
constexpr std::size_t kArraysAt = 1024;
constexpr std::size_t kBlockBytes = std::size_t{1} << 18;
constexpr std::size_t kChunkBytes = std::size_t{1} << 23;
constexpr std::size_t kSparse = 8;  // of a checked block, one row in so many or fewer is read row by row
constexpr std::uint32_t kMostWidth = 1U << 22;

template <class T>
void put(unsigned char* bytes, std::size_t at, T value) {
    std::memcpy(bytes + at, &value, sizeof value);
}

template <class T>
T get(const unsigned char* bytes, std::size_t at) {
    T value{};
    std::memcpy(&value, bytes + at, sizeof value);
    return value;
}

// Of the fields that say which segment this is.
std::uint64_t salt_of(const unsigned char* head, const std::string& name) {
    return xxh3_64(head, kIdentityBytes) ^ xxh3_64(name.data(), name.size());
}

std::uint64_t mixed(std::uint64_t salt, std::size_t block) { return salt ^ (block * 0x9e3779b97f4a7c15ULL); }

std::uint16_t to_bf16(float value) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

float from_bf16(std::uint16_t half) {
    const std::uint32_t bits = std::uint32_t{half} << 16;
    float value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// To nearest, ties to even; beyond the largest finite value it is infinity.
std::uint16_t to_fp16(float value) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000U);
    bits &= 0x7fffffffU;
    if (bits >= 0x47800000U) {
        return static_cast<std::uint16_t>(sign | 0x7c00U);
    }
    if (bits < 0x38800000U) {  // a denormal: adding 0.5 leaves its bits, rounded, at the end of the mantissa
        float magnitude = 0;
        std::memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude += 0.5F;
        std::memcpy(&bits, &magnitude, sizeof bits);
        return static_cast<std::uint16_t>(sign | (bits - 0x3f000000U));
    }
    return static_cast<std::uint16_t>(sign | ((bits - 0x38000000U + 0xfffU + ((bits >> 13) & 1U)) >> 13));
}

// The smallest bfloat16 that is not below `value` >= 0.
std::uint16_t up_to_bf16(float value) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<std::uint16_t>((bits + 0xffffU) >> 16);
}

struct NotFinite {};

constexpr double kFar = 2.0;  // in median distances from the mean: a token that the fit does not look at

// Mean and standard deviation of each channel over some rows.
void fit_rows(SegmentHead& head, const float* x, const std::vector<bool>& far, std::vector<double>& deviations) {
    const std::size_t D = head.width;
    std::vector<double> sums(D), squares(D);
    double n = 0;
    for (std::uint64_t t = 0; t < head.rows; ++t) {
        if (far[t]) {
            continue;
        }
        n += 1;
        for (std::size_t d = 0; d < D; ++d) {
            sums[d] += static_cast<double>(x[t * D + d]);
        }
    }
    for (std::size_t d = 0; d < D; ++d) {
        head.offset[d] = static_cast<float>(sums[d] / n);
    }
    for (std::uint64_t t = 0; t < head.rows; ++t) {
        if (far[t]) {
            continue;
        }
        for (std::size_t d = 0; d < D; ++d) {
            const double distance = static_cast<double>(x[t * D + d]) - static_cast<double>(head.offset[d]);
            squares[d] += distance * distance;
        }
    }
    for (std::size_t d = 0; d < D; ++d) {
        deviations[d] = std::sqrt(squares[d] / n);
    }
}

// Marks the rows that are far from the mean, and says whether any is. More than half are never far.
bool mark_far(const SegmentHead& head, const float* x, std::vector<bool>& far) {
    const std::size_t D = head.width;
    std::vector<double> distances(head.rows);
    for (std::uint64_t t = 0; t < head.rows; ++t) {
        for (std::size_t d = 0; d < D; ++d) {
            const double distance = static_cast<double>(x[t * D + d]) - static_cast<double>(head.offset[d]);
            distances[t] += distance * distance;
        }
    }
    std::vector<double> sorted = distances;
    const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
    std::nth_element(sorted.begin(), middle, sorted.end());
    const double most = *middle * kFar * kFar;
    bool any = false;
    for (std::uint64_t t = 0; t < head.rows; ++t) {
        far[t] = distances[t] > most;
        any = any || far[t];
    }
    return any;
}

// Offset and gain of each channel, which int8 and int4 take off and divide by: mean and standard deviation, so that a
// channel that is always large costs the others nothing. Over the tokens that are not far from the mean: a few of huge
// norm (attention sinks) would otherwise make the gain of their channels so large that all others are rounded away.
void fit_channels(SegmentHead& head, const float* x) {
    const std::size_t D = head.width;
    head.offset.resize(D);
    head.gain.resize(D);
    std::vector<bool> far(head.rows);
    std::vector<double> all(D);
    fit_rows(head, x, far, all);
    std::vector<double> ordinary = all;
    for (int pass = 0; pass < 2 && mark_far(head, x, far); ++pass) {  // the second from a mean without the far ones
        fit_rows(head, x, far, ordinary);
    }
    for (std::size_t d = 0; d < D; ++d) {
        // A channel that only far tokens use keeps a gain of their size: what is small beside it is not lost.
        const double least = all[d] * 0x1p-10;
        const auto deviation = static_cast<float>(std::max(ordinary[d], least));
        head.gain[d] = deviation >= std::numeric_limits<float>::min() ? deviation : 1.0F;
    }
}

// `items` are zeros before.
void quantise(const SegmentHead& head, const float* row, std::vector<float>& whitened, unsigned char* items,
              unsigned char* scales) {
    const std::size_t D = head.width;
    const float most = head.item == Item::int8 ? 127.0F : 7.0F;
    for (std::size_t d = 0; d < D; ++d) {
        whitened[d] = (row[d] - head.offset[d]) / head.gain[d];
    }
    for (std::size_t begin = 0, g = 0; begin < D; begin += head.group, ++g) {
        const std::size_t end = std::min<std::size_t>(begin + head.group, D);
        float largest = 0;
        for (std::size_t d = begin; d < end; ++d) {
            largest = std::max(largest, std::fabs(whitened[d]));
        }
        if (!std::isfinite(largest)) {
            throw NotFinite();
        }
        const std::uint16_t half = up_to_bf16(largest / most);
        const float scale = from_bf16(half);
        put(scales, 2 * g, half);
        for (std::size_t d = begin; d < end; ++d) {
            const float steps = scale > 0 ? std::nearbyint(whitened[d] / scale) : 0.0F;
            const int q = static_cast<int>(std::clamp(steps, -most, most));
            if (head.item == Item::int8) {
                items[d] = static_cast<unsigned char>(q);
            } else {  // the earlier channel of a byte in its lower half
                items[d / 2] = static_cast<unsigned char>(items[d / 2] | (q & 15) << d % 2 * 4);
            }
        }
    }
}

class Writer {
  public:
    explicit Writer(const std::string& path) : path_(path) {
        open();
        struct stat status {};
        if (::fstat(descriptor_, &status) == 0 && status.st_nlink > 1) {
            // Another name of another's file, left by a killed merge: that must not be emptied.
            ::close(descriptor_);
            ::unlink(path.c_str());
            open();
        }
        if (::ftruncate(descriptor_, 0) != 0) {
            const int code = errno;
            ::close(descriptor_);
            throw FileError(code, path);
        }
    }
    ~Writer() {
        if (descriptor_ >= 0) {
            ::close(descriptor_);
        }
    }
    Writer(const Writer&) = delete;
    Writer& operator=(const Writer&) = delete;

    void write(const void* data, std::size_t size, std::size_t offset) {
        const auto* bytes = static_cast<const unsigned char*>(data);
        while (size > 0) {
            const ssize_t done = ::pwrite(descriptor_, bytes, size, static_cast<off_t>(offset));
            if (done < 0) {
                if (errno == EINTR) {
                    continue;
                }
                throw FileError(errno, path_);
            }
            bytes += done;
            size -= static_cast<std::size_t>(done);
            offset += static_cast<std::size_t>(done);
        }
    }

    void finish(const std::string& target) {
        if (::fsync(descriptor_) != 0) {
            throw FileError(errno, path_);
        }
        const int descriptor = descriptor_;
        descriptor_ = -1;
        if (::close(descriptor) != 0 || ::rename(path_.c_str(), target.c_str()) != 0) {
            throw FileError(errno, target);
        }
        const std::string folder = target.substr(0, target.find_last_of('/') + 1);
        const int opened = ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (opened >= 0) {
            ::fsync(opened);
            ::close(opened);
        }
    }

  private:
    void open() {
        descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0666);
        if (descriptor_ < 0) {
            throw FileError(errno, path_);
        }
    }

    std::string path_;
    int descriptor_ = -1;
};

// encode(first row, number of rows, block) fills a block of zeros, and the statistics in `head`.
template <class Encode>
void write_blocks(const std::string& path, const std::string& temporary, SegmentHead& head, const Encode& encode) {
    head.column_sums.assign(head.width, 0.0);
    head.salt = salt_of(format_head(head).data(), head.name);
    Writer file(temporary);
    // Written many blocks at a time: the page cache then keeps them in large pieces, which are quicker to read.
    std::vector<unsigned char> chunk;
    for (std::size_t first = 0; first < head.n_blocks();) {
        chunk.clear();
        std::size_t b = first;
        for (; b < head.n_blocks() && (chunk.empty() || chunk.size() + head.bytes_of(b) <= kChunkBytes); ++b) {
            chunk.resize(chunk.size() + head.bytes_of(b), 0);
            unsigned char* block = chunk.data() + chunk.size() - head.bytes_of(b);
            encode(b * head.rows_per_block, head.rows_of(b), block);
            const std::size_t end = head.bytes_of(b) - 8;
            put(block, end, xxh3_64(block, end) ^ mixed(head.salt, b));
        }
        file.write(chunk.data(), chunk.size(), head.offset_of(first));
        first = b;
    }
    const std::vector<unsigned char> bytes = format_head(head);
    file.write(bytes.data(), bytes.size(), 0);
    file.finish(path);
}

}  // namespace

FileError::FileError(int code, const std::string& path)
    : std::runtime_error(path + ": " + std::strerror(code)), code_(code), path_(path) {}

std::size_t SegmentHead::head_bytes() const {
    return round_up_to_page(kArraysAt + (quantised() ? 16 : 8) * std::size_t{width} + 8);
}

std::size_t SegmentHead::items_bytes() const {
    switch (item) {
        case Item::int4:
            return (std::size_t{width} + 1) / 2;
        case Item::int8:
            return width;
        case Item::bf16:
        case Item::fp16:
            return 2 * std::size_t{width};
        case Item::fp32:
        case Item::int32:
            break;
    }
    return 4 * std::size_t{width};
}

std::size_t SegmentHead::rows_of(std::size_t block) const {
    const std::uint64_t first = block * std::uint64_t{rows_per_block};
    return static_cast<std::size_t>(std::min<std::uint64_t>(rows_per_block, rows - first));
}

std::size_t SegmentHead::offset_of(std::size_t block) const {
    return head_bytes() + block * round_up_to_page(rows_per_block * row_bytes() + 8);
}

std::size_t SegmentHead::file_bytes() const {
    const std::size_t blocks = n_blocks();
    return blocks == 0 ? head_bytes() : offset_of(blocks - 1) + bytes_of(blocks - 1);
}

std::uint32_t default_rows_per_block(std::size_t row_bytes) {
    return static_cast<std::uint32_t>(std::max<std::size_t>(1, (kBlockBytes - 8) / row_bytes));
}

std::vector<unsigned char> format_head(const SegmentHead& head) {
    std::vector<unsigned char> bytes(head.head_bytes(), 0);
    unsigned char* b = bytes.data();
    std::memcpy(b, kMagic, sizeof kMagic);
    put(b, 8, kSegmentVersion);
    put(b, 12, kByteOrder);
    put(b, 16, static_cast<std::uint32_t>(bytes.size()));
    put(b, 20, static_cast<std::uint32_t>(head.kind));
    put(b, 24, static_cast<std::uint32_t>(head.item));
    put(b, 28, head.shard);
    put(b, 36, head.width);
    put(b, 40, head.rows);
    put(b, 48, head.rows_per_block);
    put(b, 52, head.group);
    put(b, 56, head.store);
    put(b, 64, head.norm_sum);
    put(b, 72, static_cast<std::uint32_t>(head.name.size()));
    if (head.name.size() > kNameBytes) {
        throw FormatError("a snapshot's name has more than " + std::to_string(kNameBytes) + " bytes; shorten it");
    }
    std::memcpy(b + kNameAt, head.name.data(), head.name.size());
    std::size_t at = kArraysAt;
    const auto append = [&](const auto& values) {
        if (!values.empty()) {
            std::memcpy(b + at, values.data(), values.size() * sizeof values[0]);
        }
        at += head.width * sizeof values[0];
    };
    append(head.column_sums);
    if (head.quantised()) {
        append(head.offset);
        append(head.gain);
    }
    put(b, bytes.size() - 8, xxh3_64(b, bytes.size() - 8));
    return bytes;
}

SegmentHead parse_head(const unsigned char* b, std::size_t size, const std::string& path) {
    if (size < kPage || std::memcmp(b, kMagic, sizeof kMagic) != 0) {
        throw FormatError(path + " is not a segment of an activation store (or is truncated)");
    }
    if (get<std::uint32_t>(b, 12) == kOtherByteOrder) {
        throw FormatError(path + " was written on a machine of the other byte order (big-endian); collect it again");
    }
    const auto version = get<std::uint32_t>(b, 8);
    if (version != kSegmentVersion) {
        throw FormatError(path + " has format version " + std::to_string(version) + ", this release reads " +
                          std::to_string(kSegmentVersion) + "; collect it again");
    }
    const std::size_t length = get<std::uint32_t>(b, 16);
    if (length < kPage || length % kPage != 0 || length > size ||
        get<std::uint64_t>(b, length - 8) != xxh3_64(b, length - 8)) {
        throw FormatError(path + ": the header is damaged; collect it again");
    }
    SegmentHead head;
    head.kind = static_cast<Kind>(get<std::uint32_t>(b, 20));
    head.item = static_cast<Item>(get<std::uint32_t>(b, 24));
    head.shard = get<std::uint32_t>(b, 28);
    head.width = get<std::uint32_t>(b, 36);
    head.rows = get<std::uint64_t>(b, 40);
    head.rows_per_block = get<std::uint32_t>(b, 48);
    head.group = get<std::uint32_t>(b, 52);
    head.store = get<std::uint64_t>(b, 56);
    head.norm_sum = get<double>(b, 64);
    const auto name_bytes = get<std::uint32_t>(b, 72);
    // A right checksum over wrong fields is another writer's fault, not the disk's: refused all the same.
    const bool tokens = head.kind == Kind::tokens && head.item == Item::int32;
    const bool activations = head.kind == Kind::activations && (head.item <= Item::int8 || head.item == Item::int4);
    const bool grouped = head.quantised() ? head.group >= 1 : head.group == 0;
    const bool whole_bytes = head.item != Item::int4 || head.group % 2 == 0 || head.group >= head.width;
    if (!(tokens || activations) || !grouped || !whole_bytes || head.width < 1 || head.width > kMostWidth ||
        head.rows < 1 || head.rows >> 40 != 0 || head.rows_per_block < 1 || head.rows_per_block > 1U << 24 ||
        name_bytes > kNameBytes || head.head_bytes() != length || !std::isfinite(head.norm_sum)) {
        throw FormatError(path + ": the header makes no sense; collect it again");
    }
    head.name.assign(reinterpret_cast<const char*>(b + kNameAt), name_bytes);
    head.salt = salt_of(b, head.name);
    std::size_t at = kArraysAt;
    const auto extract = [&](auto& values) {
        values.resize(head.width);
        std::memcpy(values.data(), b + at, values.size() * sizeof values[0]);
        at += values.size() * sizeof values[0];
    };
    extract(head.column_sums);
    if (head.quantised()) {
        extract(head.offset);
        extract(head.gain);
    }
    return head;
}

bool block_is_whole(const SegmentHead& head, std::size_t block, const unsigned char* data) {
    const std::size_t end = head.bytes_of(block) - 8;
    return get<std::uint64_t>(data, end) == (xxh3_64(data, end) ^ mixed(head.salt, block));
}

bool write_activations(const std::string& path, const std::string& temporary, SegmentHead head, const float* x) {
    const std::size_t D = head.width;
    const std::size_t n = static_cast<std::size_t>(head.rows) * D;
    if (!std::all_of(x, x + n, [](float value) { return std::isfinite(value); })) {
        return false;
    }
    if (head.quantised()) {
        fit_channels(head, x);
    }
    head.rows_per_block = default_rows_per_block(head.row_bytes());
    std::vector<float> stored(D), whitened(D);
    std::vector<std::uint16_t> halves(head.groups());
    const auto encode_row = [&](const float* row, unsigned char* items, unsigned char* scales) {
        switch (head.item) {
            case Item::bf16:
                for (std::size_t d = 0; d < D; ++d) {
                    const std::uint16_t half = to_bf16(row[d]);
                    put(items, 2 * d, half);
                    stored[d] = from_bf16(half);
                }
                break;
            case Item::fp16:
                for (std::size_t d = 0; d < D; ++d) {
                    put(items, 2 * d, to_fp16(row[d]));
                }
                unpack_portable.scaled[2][0](items, 1.0F, stored.data(), D, false);
                for (std::size_t d = 0; d < D; ++d) {
                    if (std::fabs(row[d]) >= 65520.0F) {
                        throw NotFinite();
                    }
                }
                break;
            case Item::int8:
            case Item::int4:
                quantise(head, row, whitened, items, scales);
                std::memcpy(halves.data(), scales, 2 * halves.size());
                unpack_portable.quantised[head.item == Item::int4 ? 1 : 0][0](
                    items, halves.data(), head.group, head.gain.data(), head.offset.data(), stored.data(), D, false);
                break;
            case Item::fp32:
            case Item::int32:
                std::memcpy(items, row, 4 * D);
                std::memcpy(stored.data(), row, 4 * D);
                break;
        }
        double squares = 0;
        for (std::size_t d = 0; d < D; ++d) {
            const auto value = static_cast<double>(stored[d]);
            squares += value * value;
            head.column_sums[d] += value;
        }
        if (!std::isfinite(squares)) {
            throw NotFinite();
        }
        head.norm_sum += std::sqrt(squares);
    };
    try {
        write_blocks(path, temporary, head, [&](std::size_t first, std::size_t rows, unsigned char* block) {
            const std::size_t items_bytes = head.items_bytes();
            for (std::size_t i = 0; i < rows; ++i) {
                encode_row(x + (first + i) * D, block + i * items_bytes,
                           block + rows * items_bytes + 2 * i * head.groups());
            }
        });
    } catch (const NotFinite&) {
        ::unlink(temporary.c_str());
        return false;
    }
    return true;
}

void write_tokens(const std::string& path, const std::string& temporary, SegmentHead head, const std::int32_t* rows) {
    head.rows_per_block = default_rows_per_block(head.row_bytes());
    write_blocks(path, temporary, head, [&](std::size_t first, std::size_t n, unsigned char* block) {
        std::memcpy(block, rows + first * head.width, n * head.row_bytes());
    });
}

void read_exactly(int descriptor, void* out, std::size_t size, std::size_t offset, const std::string& path) {
    auto* bytes = static_cast<unsigned char*>(out);
    while (size > 0) {
        const ssize_t done = ::pread(descriptor, bytes, size, static_cast<off_t>(offset));
        if (done < 0 && errno == EINTR) {
            continue;
        }
        if (done < 0) {
            throw FileError(errno, path);
        }
        if (done == 0) {
            throw FormatError(path + " was cut while it was read; collect it again");
        }
        bytes += done;
        size -= static_cast<std::size_t>(done);
        offset += static_cast<std::size_t>(done);
    }
}

SegmentFile::SegmentFile(const std::string& path) : path_(path) {
    descriptor_ = ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);  // a fifo is not waited for
    if (descriptor_ < 0) {
        if (errno == ENOENT) {
            throw FormatError(path + " does not exist; run the collection again to complete the store");
        }
        throw FileError(errno, path);
    }
    try {
        struct stat status {};
        if (::fstat(descriptor_, &status) != 0) {
            throw FileError(errno, path);
        }
        if (!S_ISREG(status.st_mode)) {
            throw FormatError(path + " is not a file but a folder, a fifo or a device; remove it and collect again");
        }
        written_ = status.st_mtim;
        const auto size = static_cast<std::size_t>(status.st_size);
        std::vector<unsigned char> bytes(std::min(size, kPage));
        read_exactly(descriptor_, bytes.data(), bytes.size(), 0, path);
        if (bytes.size() == kPage && std::memcmp(bytes.data(), kMagic, sizeof kMagic) == 0) {
            const std::size_t length = get<std::uint32_t>(bytes.data(), 16);
            const std::size_t most = round_up_to_page(kArraysAt + 16 * std::size_t{kMostWidth} + 8);
            bytes.resize(std::clamp(length, kPage, std::max(kPage, std::min(size, most))));
            read_exactly(descriptor_, bytes.data(), bytes.size(), 0, path);
        }
        head_ = parse_head(bytes.data(), bytes.size(), path);
        if (size != head_.file_bytes()) {
            throw FormatError(path + " is truncated or has bytes appended (" + std::to_string(size) + " bytes, not " +
                              std::to_string(head_.file_bytes()) + "); collect it again");
        }
    } catch (...) {
        ::close(descriptor_);
        throw;
    }
    checked_ = std::make_unique<std::atomic<bool>[]>(head_.n_blocks());
}

SegmentFile::~SegmentFile() { ::close(descriptor_); }

const unsigned char* SegmentFile::read_block(std::size_t block, std::vector<unsigned char>& copy) const {
    copy.resize(head_.bytes_of(block));
    read_exactly(descriptor_, copy.data(), copy.size(), head_.offset_of(block), path_);
    return copy.data();
}

void SegmentFile::require_unchanged() const {
    struct stat status {};
    if (::fstat(descriptor_, &status) != 0 || static_cast<std::size_t>(status.st_size) != head_.file_bytes() ||
        status.st_mtim.tv_sec != written_.tv_sec || status.st_mtim.tv_nsec != written_.tv_nsec) {
        throw FormatError(path_ + " was changed while it was read; verify the store, or collect it again");
    }
}

void SegmentFile::refuse(std::size_t block) const {
    throw FormatError(path_ + ": block " + std::to_string(block) + " of " + std::to_string(head_.n_blocks()) +
                      " is damaged; collect it again");
}

void SegmentFile::check(std::size_t block, const unsigned char* data) {
    if (!checked_[block].load(std::memory_order_relaxed)) {
        if (!block_is_whole(head_, block, data)) {
            refuse(block);
        }
        checked_[block].store(true, std::memory_order_relaxed);
    }
}

bool SegmentFile::is_checked(std::size_t first_block, std::size_t last_block) const {
    return std::all_of(checked_.get() + first_block, checked_.get() + last_block + 1,
                       [](const std::atomic<bool>& checked) { return checked.load(std::memory_order_relaxed); });
}

MappedFile* SegmentFile::mapped() {
    std::call_once(mapping_, [this] { mapped_ = std::make_unique<MappedFile>(descriptor_, head_.file_bytes()); });
    return mapped_->data() != nullptr ? mapped_.get() : nullptr;
}

std::vector<std::size_t> SegmentFile::damaged_blocks() const {
    std::vector<std::size_t> damaged;
    std::vector<unsigned char> block;
    for (std::size_t b = 0; b < head_.n_blocks(); ++b) {
        block.resize(head_.bytes_of(b));
        try {
            read_exactly(descriptor_, block.data(), block.size(), head_.offset_of(b), path_);
            if (block_is_whole(head_, b, block.data())) {
                continue;
            }
        } catch (const FileError& error) {
            if (error.code() != EIO) {
                throw;
            }
        }
        damaged.push_back(b);
    }
    return damaged;
}

void SegmentFile::read_tokens(std::int32_t* out) const {
    std::vector<unsigned char> block;
    for (std::size_t b = 0; b < head_.n_blocks(); ++b) {
        block.resize(head_.bytes_of(b));
        read_exactly(descriptor_, block.data(), block.size(), head_.offset_of(b), path_);
        if (!block_is_whole(head_, b, block.data())) {
            refuse(b);
        }
        std::memcpy(out + b * head_.rows_per_block * head_.width, block.data(), head_.rows_of(b) * head_.row_bytes());
    }
}

void SegmentFile::gather(const UnpackKernels& kernels, const std::int64_t* index, std::size_t n, float scale,
                         float* out, std::size_t stride) {
    if (n == 0) {
        return;
    }
    const RowUnpacker unpack(kernels, head_, scale, 0, false);
    const std::size_t per_block = head_.rows_per_block;
    std::vector<std::size_t> order(n);
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return index[a] < index[b]; });
    std::vector<unsigned char> bytes;
    for (std::size_t begin = 0; begin < n;) {
        const std::size_t block = static_cast<std::size_t>(index[order[begin]]) / per_block;
        const std::size_t rows = head_.rows_of(block);
        std::size_t end = begin;
        while (end < n && static_cast<std::size_t>(index[order[end]]) / per_block == block) {
            ++end;
        }
        const bool checked = checked_[block].load(std::memory_order_relaxed);
        const bool whole = !checked || (end - begin) * kSparse >= rows;
        if (whole) {
            check(block, read_block(block, bytes));
        }
        for (; begin < end; ++begin) {
            const std::size_t row = static_cast<std::size_t>(index[order[begin]]) % per_block;
            float* target = out + order[begin] * stride;
            if (whole) {
                unpack(bytes.data(), rows, row, target);
                continue;
            }
            // Of a block that is known to be whole: the row alone, laid out as a block of one row.
            const std::size_t items = head_.items_bytes();
            const std::size_t scales = 2 * head_.groups();
            const std::size_t at = head_.offset_of(block);
            bytes.resize(std::max(bytes.size(), items + scales));
            read_exactly(descriptor_, bytes.data(), items, at + row * items, path_);
            read_exactly(descriptor_, bytes.data() + items, scales, at + rows * items + row * scales, path_);
            unpack(bytes.data(), 1, 0, target);
        }
    }
    require_unchanged();
}

RowUnpacker::RowUnpacker(const UnpackKernels& kernels, const SegmentHead& head, float scale, int output, bool stream)
    : kernels_(kernels),
      item_(head.item),
      width_(head.width),
      items_bytes_(head.items_bytes()),
      groups_(head.groups()),
      group_(head.group),
      scale_(scale),
      output_(output),
      stream_(stream),
      offset_(head.offset),
      gain_(head.gain) {
    for (float& value : offset_) {
        value *= scale;
    }
    for (float& value : gain_) {
        value *= scale;
    }
}

void RowUnpacker::operator()(const unsigned char* block, std::size_t rows, std::size_t row, void* out) const {
    const unsigned char* items = block + row * items_bytes_;
    if (groups_ == 0) {
        kernels_.scaled[static_cast<std::size_t>(item_)][output_](items, scale_, out, width_, stream_);
        return;
    }
    const unsigned char* scales = block + rows * items_bytes_ + 2 * row * groups_;
    const std::size_t per_byte = item_ == Item::int4 ? 2 : 1;
    const auto unpack = kernels_.quantised[per_byte - 1][output_];
    constexpr std::size_t kMost = 256;
    std::uint16_t aligned[kMost];  // scales may lie at odd addresses
    for (std::size_t g = 0; g < groups_; g += kMost) {
        const std::size_t count = std::min(kMost, groups_ - g);
        std::memcpy(aligned, scales + 2 * g, 2 * count);
        const std::size_t begin = g * group_;
        const std::size_t width = std::min(width_ - begin, count * group_);
        unpack(items + begin / per_byte, aligned, group_, gain_.data() + begin, offset_.data() + begin,
               static_cast<unsigned char*>(out) + begin * (output_ == 0 ? 4 : 2), width, stream_);
    }
}

}  // namespace crosscoder
