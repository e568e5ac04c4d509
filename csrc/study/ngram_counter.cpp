#include "study/ngram_counter.hpp"

#include <algorithm>
#include <array>
#include <iterator>
#include <limits>
#include <numeric>
#include <utility>

#include "core/parallel.hpp"

namespace crosscoder {
namespace {

constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();  // no id: ids are below 2^31
constexpr std::size_t kTokensPerThread = std::size_t{1} << 15;
constexpr std::size_t kBlock = 1024;   // pairs collected before they are counted
constexpr std::size_t kAhead = 16;     // slots are fetched into the cache that many pairs in advance, rows twice

std::uint64_t key_of(std::uint32_t first, std::uint32_t second) { return (std::uint64_t{first} << 32) | second; }

// The owner of a row: of both rows of a cache line the same.
std::uint32_t owner_of(std::uint32_t first, std::uint32_t n_owners) {
    return static_cast<std::uint32_t>((std::uint64_t{first / 2 * 0x9e3779b1U} * n_owners) >> 32);
}

}  // namespace

template <class Count>
BasicNgramCounter<Count>::BasicNgramCounter(std::int32_t vocab_size, std::optional<std::int32_t> ignore)
    : vocab_size_(vocab_size), ignore_(ignore), lines_((static_cast<std::size_t>(vocab_size) + 1) / 2) {}

template <class Count>
std::size_t BasicNgramCounter<Count>::find_invalid(const std::int32_t* tokens, std::size_t n) const {
    const auto size = static_cast<std::uint32_t>(vocab_size_);
    const std::int32_t ignored = ignore_.value_or(0);  // 0 is valid anyway
    constexpr std::size_t kStride = 4096;
    for (std::size_t begin = 0; begin < n; begin += kStride) {
        const std::size_t end = std::min(n, begin + kStride);
        bool any = false;  // without a branch in it, this loop is vectorised
        for (std::size_t i = begin; i < end; ++i) {
            any |= (static_cast<std::uint32_t>(tokens[i]) >= size) & (tokens[i] != ignored);
        }
        if (any) {
            const auto invalid = [=](std::int32_t token) {
                return static_cast<std::uint32_t>(token) >= size && token != ignored;
            };
            return static_cast<std::size_t>(std::find_if(tokens + begin, tokens + end, invalid) - tokens);
        }
    }
    return n;
}

template <class Count>
std::uint32_t BasicNgramCounter<Count>::capacity(const Row& row) const {
    return is_direct(row) ? static_cast<std::uint32_t>(vocab_size_) : static_cast<std::uint32_t>(row.scale);
}

template <class Count>
std::uint32_t BasicNgramCounter<Count>::position(const Row& row, std::uint32_t second) {
    return static_cast<std::uint32_t>((std::uint64_t{second * row.multiplier} * row.scale) >> 32);
}

// The slot that holds `second`, or the empty one where it belongs. A hashed table is never full, a direct one never
// searched beyond the first position. The row must have a table.
template <class Count>
std::uint32_t BasicNgramCounter<Count>::find(const Row& row, std::uint32_t second) {
    std::uint32_t i = position(row, second);
    while (row.slots[i].second != second && row.slots[i].second != kNone) {
        i = i + 1 == row.scale ? 0 : i + 1;
    }
    return i;
}

template <class Count>
void BasicNgramCounter<Count>::grow(Row& row) const {
    const auto size = static_cast<std::uint32_t>(vocab_size_);
    const std::uint32_t old_capacity = capacity(row);
    const std::uint32_t wanted = std::max(4U, old_capacity + old_capacity / 2);
    Row larger;
    if (wanted < size) {
        larger.scale = wanted;
    } else {
        larger.scale = std::uint64_t{1} << 32;
        larger.multiplier = 1;
    }
    larger.slots = std::make_unique_for_overwrite<Slot[]>(capacity(larger));
    std::fill_n(larger.slots.get(), capacity(larger), Slot{kNone, 0});
    for (std::uint32_t i = 0; i < old_capacity; ++i) {
        const Slot slot = row.slots[i];
        if (slot.second != kNone) {
            larger.slots[find(larger, slot.second)] = slot;
        }
    }
    larger.size = row.size;
    larger.n_tokens = row.n_tokens;
    row = std::move(larger);
}

// A place for a bigram that its row does not hold yet.
template <class Count>
auto BasicNgramCounter<Count>::insert(Row& row, std::uint32_t second) -> Slot& {
    const auto most = [this, &row] { return capacity(row) - capacity(row) / 5 - 1; };
    if (!row.slots || (!is_direct(row) && row.size >= most())) {
        grow(row);
    }
    Slot& slot = row.slots[find(row, second)];
    slot.second = second;
    ++row.size;
    return slot;
}

template <class Count>
void BasicNgramCounter<Count>::count(Pair pair) {
    Row& r = row(pair.first);
    ++r.n_tokens;
    if (pair.second == kNone) {
        return;
    }
    Slot* slot = r.slots ? &r.slots[find(r, pair.second)] : nullptr;
    if (slot == nullptr || slot->second == kNone) {
        slot = &insert(r, pair.second);
    }
    if (++slot->count == 0) {
        const std::lock_guard lock(excess_mutex_);
        excess_[key_of(pair.first, pair.second)] += std::int64_t{std::numeric_limits<Count>::max()} + 1;
    }
}

template <class Count>
void BasicNgramCounter<Count>::count_all(const Pair* pairs, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        if (i + 2 * kAhead < n) {
            __builtin_prefetch(&row(pairs[i + 2 * kAhead].first), 1);
        }
        if (i + kAhead < n) {
            const Pair next = pairs[i + kAhead];
            const Row& r = row(next.first);
            __builtin_prefetch(r.slots.get() + (next.second == kNone ? 0 : position(r, next.second)), 1);
        }
        count(pairs[i]);
    }
}

template <class Count>
void BasicNgramCounter<Count>::count_owned(const std::int32_t* tokens, std::size_t n_sequences, std::size_t length,
                                           std::uint32_t owner, std::uint32_t n_owners) {
    const std::int32_t ignored = ignore_.value_or(-1);  // without `ignore` all tokens are ids, never -1
    std::array<Pair, kBlock> block;
    std::size_t filled = 0;
    for (std::size_t s = 0; s < n_sequences; ++s) {
        const std::int32_t* sequence = tokens + s * length;
        for (std::size_t c = 0; c < length;) {
            const std::size_t end = std::min(length, c + (kBlock - filled));
            for (; c < end; ++c) {
                const std::int32_t next = c + 1 < length ? sequence[c + 1] : ignored;
                const auto first = static_cast<std::uint32_t>(sequence[c]);
                block[filled] = {first, next == ignored ? kNone : static_cast<std::uint32_t>(next)};
                // Kept or overwritten by the next one: cheaper than a branch that is taken at random.
                filled += static_cast<std::size_t>((owner_of(first, n_owners) == owner) & (sequence[c] != ignored));
            }
            if (filled == kBlock) {
                count_all(block.data(), filled);
                filled = 0;
            }
        }
    }
    count_all(block.data(), filled);
}

template <class Count>
void BasicNgramCounter<Count>::add(const std::int32_t* tokens, std::size_t n_sequences, std::size_t length,
                                   unsigned n_threads) {
    const std::size_t most = std::max<std::size_t>(1, n_sequences * length / kTokensPerThread);
    const auto n_owners = static_cast<std::uint32_t>(std::min<std::size_t>(std::max(1U, n_threads), most));
    const std::lock_guard lock(mutex_);
    parallel_for(n_owners, 1, n_owners, [=, this](std::size_t begin, std::size_t end) {
        for (std::size_t owner = begin; owner < end; ++owner) {
            count_owned(tokens, n_sequences, length, static_cast<std::uint32_t>(owner), n_owners);
        }
    });
}

template <class Count>
std::vector<std::int64_t> BasicNgramCounter<Count>::unigrams() const {
    const std::lock_guard lock(mutex_);
    std::vector<std::int64_t> counts(static_cast<std::size_t>(vocab_size_));
    for (std::size_t id = 0; id < counts.size(); ++id) {
        counts[id] = row(static_cast<std::uint32_t>(id)).n_tokens;
    }
    return counts;
}

template <class Count>
Bigrams BasicNgramCounter<Count>::bigrams(unsigned n_threads) const {
    constexpr std::size_t kRowsAtOnce = 256;
    const std::lock_guard lock(mutex_);
    const auto n_rows = static_cast<std::size_t>(vocab_size_);
    std::vector<std::size_t> begin_of(n_rows + 1);  // where a row's bigrams go
    for (std::size_t first = 0; first < n_rows; ++first) {
        begin_of[first + 1] = begin_of[first] + row(static_cast<std::uint32_t>(first)).size;
    }
    Bigrams result;
    result.first.resize(begin_of.back());
    result.second.resize(begin_of.back());
    result.count.resize(begin_of.back());
    parallel_chunks(n_rows, kRowsAtOnce, n_threads, [&, this](std::size_t begin, std::size_t end) {
        std::vector<Slot> sorted;
        for (std::size_t first = begin; first < end; ++first) {
            const Row& r = row(static_cast<std::uint32_t>(first));
            sorted.clear();
            std::copy_if(r.slots.get(), r.slots.get() + capacity(r), std::back_inserter(sorted),
                         [](const Slot& slot) { return slot.second != kNone; });
            if (!is_direct(r)) {
                std::sort(sorted.begin(), sorted.end(),
                          [](const Slot& a, const Slot& b) { return a.second < b.second; });
            }
            std::size_t to = begin_of[first];
            for (const Slot& slot : sorted) {
                result.first[to] = static_cast<std::int32_t>(first);
                result.second[to] = static_cast<std::int32_t>(slot.second);
                result.count[to] = slot.count;
                if (!excess_.empty()) {
                    const auto excess = excess_.find(key_of(static_cast<std::uint32_t>(first), slot.second));
                    result.count[to] += excess == excess_.end() ? 0 : excess->second;
                }
                ++to;
            }
        }
    });
    return result;
}

template <class Count>
std::int64_t BasicNgramCounter<Count>::n_tokens() const {
    const std::vector<std::int64_t> counts = unigrams();
    return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
}

template class BasicNgramCounter<std::uint32_t>;
template class BasicNgramCounter<std::uint8_t>;

}  // namespace crosscoder
