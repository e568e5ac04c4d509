// Unigram and bigram counts of a stream of token sequences.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

namespace crosscoder {

// Distinct bigrams (first[i], second[i]) and how often each occurred, sorted by (first, second).
struct Bigrams {
    std::vector<std::int32_t> first;
    std::vector<std::int32_t> second;
    std::vector<std::int64_t> count;
};

// One table of successors for each first token: open addressing, 8 bytes a slot, between 53 % and 80 % full, grown
// by half; once a table would be as large as the vocabulary, it is indexed by the second token itself. So memory is
// 10 to 15 bytes for each distinct bigram plus 32 for each id, and sorting by first token comes free.
//
// Threads do not share a table: each goes through all tokens and counts those whose first token it owns. Hence no
// atomics, and the same counts whatever the number of threads. All members may be called from several threads.
//
// `Count` is the integer kept in a slot; what exceeds it goes to a map on the side.
template <class Count>
class BasicNgramCounter {
  public:
    // Ids are 0 to vocab_size - 1. The id `ignore` (any integer) is never counted and ends a sequence.
    BasicNgramCounter(std::int32_t vocab_size, std::optional<std::int32_t> ignore);

    // Position of the first of n tokens that is neither an id nor `ignore`; n if there is none.
    std::size_t find_invalid(const std::int32_t* tokens, std::size_t n) const;

    // Counts n_sequences x length tokens, row-major, all valid; no bigram crosses from one sequence to the next.
    void add(const std::int32_t* tokens, std::size_t n_sequences, std::size_t length, unsigned n_threads);

    std::vector<std::int64_t> unigrams() const;
    Bigrams bigrams(unsigned n_threads = 1) const;

    std::int32_t vocab_size() const { return vocab_size_; }
    std::optional<std::int32_t> ignore() const { return ignore_; }
    std::int64_t n_tokens() const;  // counted, that is without ignored ones

  private:
    static constexpr std::uint32_t kHash = 0x9e3779b1U;  // 2^32 over the golden ratio

    struct Slot {
        std::uint32_t second;
        Count count;
    };
    // The position of a second token is (second * multiplier mod 2^32) * scale / 2^32: a multiplicative hash onto
    // [0, capacity), or with 1 and 2^32 the token itself (a direct table), without a branch to tell them apart.
    struct Row {
        std::unique_ptr<Slot[]> slots;
        std::int64_t n_tokens = 0;
        std::uint64_t scale = 0;
        std::uint32_t multiplier = kHash;
        std::uint32_t size = 0;
    };
    // Two rows to a cache line, owned by the same thread: no line is written by two threads.
    struct alignas(64) Line {
        Row rows[2];
    };
    struct Pair {
        std::uint32_t first;
        std::uint32_t second;  // kNone: nothing follows
    };

    Row& row(std::uint32_t first) { return lines_[first / 2].rows[first % 2]; }
    const Row& row(std::uint32_t first) const { return lines_[first / 2].rows[first % 2]; }
    static bool is_direct(const Row& row) { return row.multiplier == 1; }
    std::uint32_t capacity(const Row& row) const;
    static std::uint32_t position(const Row& row, std::uint32_t second);
    static std::uint32_t find(const Row& row, std::uint32_t second);
    void grow(Row& row) const;
    Slot& insert(Row& row, std::uint32_t second);
    void count(Pair pair);
    void count_all(const Pair* pairs, std::size_t n);
    void count_owned(const std::int32_t* tokens, std::size_t n_sequences, std::size_t length, std::uint32_t owner,
                     std::uint32_t n_owners);

    std::int32_t vocab_size_;
    std::optional<std::int32_t> ignore_;
    std::vector<Line> lines_;
    std::unordered_map<std::uint64_t, std::int64_t> excess_;  // by first << 32 | second
    std::mutex excess_mutex_;
    mutable std::mutex mutex_;
};

extern template class BasicNgramCounter<std::uint32_t>;
extern template class BasicNgramCounter<std::uint8_t>;  // for the tests: exceeds its slots early

using NgramCounter = BasicNgramCounter<std::uint32_t>;

}  // namespace crosscoder
