// Tests of what Python cannot reach, meant for sanitizers: reads beyond the end, data races, counts beyond a slot.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/checksum.hpp"
#include "core/cpu_features.hpp"
#include "core/parallel.hpp"
#include "study/cosine_statistics.hpp"
#include "study/examples.hpp"
#include "study/geometry.hpp"
#include "study/ngram_counter.hpp"

namespace {

using namespace crosscoder;

// The same numbers on every platform.
class Random {
  public:
    std::uint32_t operator()() {
        state_ = state_ * 6364136223846793005ULL + 1442695040888963407ULL;
        return static_cast<std::uint32_t>(state_ >> 32);
    }

  private:
    std::uint64_t state_ = 1;
};

void test_levels() {
    CpuFeatures features;
    CHECK(best_level(features) == IsaLevel::portable);
    features.avx2 = features.fma = true;
    CHECK(best_level(features) == IsaLevel::portable);  // F16C is missing
    features.f16c = true;
    CHECK(best_level(features) == IsaLevel::avx2);
    features.avx512f = features.avx512bw = features.avx512dq = features.avx512_bf16 = true;
    CHECK(best_level(features) == IsaLevel::avx2);  // AVX-512 VL is missing
    features.avx512vl = true;
    CHECK(best_level(features) == IsaLevel::avx512_bf16);
    features.avx512_bf16 = false;
    CHECK(best_level(features) == IsaLevel::avx512);

    CHECK(choose_level(nullptr, IsaLevel::avx2) == IsaLevel::avx2);
    CHECK(choose_level("", IsaLevel::avx2) == IsaLevel::avx2);
    CHECK(choose_level("portable", IsaLevel::avx2) == IsaLevel::portable);
    CHECK(throws<std::runtime_error>([] { choose_level("avx512", IsaLevel::avx2); }));
    CHECK(throws<std::runtime_error>([] { choose_level("AVX2", IsaLevel::avx512); }));
    CHECK(level_names(IsaLevel::avx2) == (std::vector<std::string>{"portable", "avx2"}));
}

void test_parallel_for() {
    for (const std::size_t n : {0UL, 1UL, 2UL, 7UL, 100UL}) {
        for (const unsigned n_threads : {0U, 1U, 3U, 200U}) {
            std::vector<std::atomic<int>> visits(n);
            parallel_for(n, 3, n_threads, [&](std::size_t begin, std::size_t end) {
                CHECK(begin < end && end - begin >= std::min<std::size_t>(n, 3));
                for (std::size_t i = begin; i < end; ++i) {
                    ++visits[i];
                }
            });
            CHECK(std::all_of(visits.begin(), visits.end(), [](const auto& count) { return count == 1; }));
        }
    }
    std::string caught;
    try {
        parallel_for(8, 1, 8, [](std::size_t begin, std::size_t) {
            if (begin >= 3) {
                throw std::runtime_error(std::to_string(begin));
            }
        });
    } catch (const std::runtime_error& error) {
        caught = error.what();
    }
    CHECK(caught == "3");
}

template <class Counter>
Bigrams counted(const std::vector<std::int32_t>& tokens, std::size_t length, unsigned n_threads) {
    Counter counter(64, 0);
    for (int repeat = 0; repeat < 3; ++repeat) {
        counter.add(tokens.data(), tokens.size() / length, length, n_threads);
    }
    return counter.bigrams(n_threads);
}

// Slots of 8 bits overflow after 256, and hold the same counts as slots of 32; so do several threads.
void test_counts_beyond_a_slot() {
    Random random;
    std::vector<std::int32_t> tokens(std::size_t{1} << 17);
    for (std::int32_t& token : tokens) {
        const std::uint32_t draw = random() % 64;
        token = static_cast<std::int32_t>(draw * draw / 64);  // small ids are frequent
    }
    const Bigrams expected = counted<NgramCounter>(tokens, 64, 1);
    CHECK(*std::max_element(expected.count.begin(), expected.count.end()) > 3 * 256);
    for (const unsigned n_threads : {1U, 2U, 4U}) {
        for (const Bigrams& found : {counted<BasicNgramCounter<std::uint8_t>>(tokens, 64, n_threads),
                                     counted<NgramCounter>(tokens, 64, n_threads)}) {
            CHECK(found.first == expected.first);
            CHECK(found.second == expected.second);
            CHECK(found.count == expected.count);
        }
    }
}

// What is kept of F features, in buffers of exactly that size.
struct Kept {
    static constexpr std::size_t F = 700;
    static constexpr std::size_t K = 64;
    static constexpr std::size_t n = 3;
    static constexpr std::size_t m = 5;
    static constexpr std::size_t L = 6;
    std::vector<std::int64_t> fired = std::vector<std::int64_t>(F * K);
    std::vector<std::int64_t> fired_any = std::vector<std::int64_t>(F);
    std::vector<double> sum = std::vector<double>(F);
    std::vector<std::int64_t> histogram = std::vector<std::int64_t>(F * kHistogramBins);
    std::vector<float> value = std::vector<float>(F * n);
    std::vector<std::uint64_t> key = std::vector<std::uint64_t>(F * m, ~std::uint64_t{0});
    std::vector<std::int32_t> sequences = std::vector<std::int32_t>(F * (n + m), -1);
    std::vector<std::int32_t> positions = std::vector<std::int32_t>(F * (n + m), -1);
    std::vector<float> windows = std::vector<float>(F * (n + m) * L);

    bool operator==(const Kept&) const = default;

    ExampleState state() {
        return {fired.data(), fired_any.data(), sum.data(), histogram.data(),
                {value.data(), sequences.data(), positions.data(), windows.data(), n},
                {key.data(), sequences.data() + F * n, positions.data() + F * n, windows.data() + F * n * L, m},
                2, L, 7};
    }
};

// Tokens 0 to 8191 in sequences of 16, as a code of 4 pairs a token, in batches of `division` tokens.
Kept collected(std::size_t division, unsigned n_threads) {
    constexpr std::size_t kTokens = 8192;
    constexpr std::size_t kPairs = 4;
    Random random;
    std::vector<std::int32_t> features(kTokens * kPairs);
    std::vector<float> values(features.size());
    std::vector<std::uint64_t> gates(features.size());
    for (std::size_t i = 0; i < features.size(); ++i) {
        features[i] = static_cast<std::int32_t>(i % kPairs * (Kept::F / kPairs) + random() % (Kept::F / kPairs));
        values[i] = static_cast<float>(1 + random() % 5);
        gates[i] = std::uint64_t{random()} << 32 | random() | 1;
    }
    Kept kept;
    for (std::size_t begin = 0; begin < kTokens; begin += division) {
        std::vector<std::int64_t> offsets(division + 1);
        std::vector<std::int64_t> places(division);
        for (std::size_t b = 0; b <= division; ++b) {
            offsets[b] = static_cast<std::int64_t>(b * kPairs);
        }
        for (std::size_t b = 0; b < division; ++b) {
            places[b] = static_cast<std::int64_t>((begin + b) / 16 << 32 | (begin + b) % 16);
        }
        const CodeView code = {offsets.data(), features.data() + begin * kPairs, values.data() + begin * kPairs,
                               gates.data() + begin * kPairs, division, division * kPairs, Kept::K, Kept::F};
        collect_examples(code, places.data(), kept.state(), n_threads);
    }
    return kept;
}

void test_examples_of_any_division() {
    const Kept whole = collected(8192, 1);
    for (const unsigned n_threads : {1U, 2U, 5U}) {
        for (const std::size_t division : {16UL, 128UL, 8192UL}) {
            CHECK(collected(division, n_threads) == whole);
        }
    }
    CHECK(std::accumulate(whole.fired_any.begin(), whole.fired_any.end(), std::int64_t{0}) == 4 * 8192);
    CHECK(histogram_bin(0.0F) == 0);
    CHECK(histogram_bin(1.0F) == 48);
    CHECK(histogram_bin(std::numeric_limits<float>::infinity()) == kHistogramBins - 1);
    CHECK(sample_key(7, 3, 1) != sample_key(7, 3, 2) && sample_key(7, 3, 1) != sample_key(7, 4, 1));
}

void test_checksum_at_any_offset() {
    const std::vector<std::uint8_t> data(300, 7);
    for (std::size_t offset = 0; offset < 9; ++offset) {
        CHECK(xxh3_64(data.data() + offset, 256) == xxh3_64(data.data(), 256));
    }
    CHECK(xxh3_64(data.data(), 0) == 0x2d06800538d394c2ULL);
}

}  // namespace

// Small whole numbers, exact in bfloat16: every sum is exact too. The arrays end where their numbers end.
void test_geometry() {
    if (!has_geometry()) {
        return;
    }
    Random random;
    for (const std::size_t n : {std::size_t{1}, std::size_t{7}, std::size_t{259}}) {
        for (const std::size_t D : {std::size_t{1}, std::size_t{31}, std::size_t{50}}) {
            const std::size_t K = 5;
            std::vector<int> numbers(n * K * D);
            std::vector<std::uint16_t> bits(numbers.size());
            for (std::size_t i = 0; i < numbers.size(); ++i) {
                numbers[i] = static_cast<int>(random() % 7) - 3;
                const auto value = static_cast<float>(numbers[i]);
                std::uint32_t wide = 0;
                std::memcpy(&wide, &value, sizeof wide);
                bits[i] = static_cast<std::uint16_t>(wide >> 16);
            }
            const auto dot = [&](std::size_t row_a, std::size_t row_b) {
                int sum = 0;
                for (std::size_t d = 0; d < D; ++d) {
                    sum += numbers[row_a * D + d] * numbers[row_b * D + d];
                }
                return sum;
            };
            const DecoderBlock block = {bits.data(), n, K, D};
            const std::size_t padded = padded_width(D);
            std::vector<float> products(n * K * K);
            std::vector<float> squares(n * K);
            std::vector<float> grams(K * padded * padded);
            std::vector<float> forms(n * K);
            std::vector<std::uint16_t> packed(K * form_size(D));
            snapshot_products(block, products.data(), 3);
            squared_norms(block, squares.data(), 3);
            add_grams(block, grams.data(), 3);
            for (std::size_t k = 0; k < K; ++k) {
                pack_form(grams.data() + k * padded * padded, D, packed.data() + k * form_size(D));
            }
            quadratic_forms(block, packed.data(), forms.data(), 3);
            for (std::size_t f = 0; f < n; ++f) {
                for (std::size_t k = 0; k < K; ++k) {
                    CHECK(squares[f * K + k] == static_cast<float>(dot(f * K + k, f * K + k)));
                    for (std::size_t other = 0; other < K; ++other) {
                        CHECK(products[(f * K + k) * K + other] == static_cast<float>(dot(f * K + k, f * K + other)));
                    }
                    float form = 0;
                    for (std::size_t j = 0; j < n; ++j) {
                        const auto product = static_cast<float>(dot(f * K + k, j * K + k));
                        form += product * product;
                    }
                    CHECK(forms[f * K + k] == form);
                }
            }
            std::vector<double> sums(2 * K * (K + 1) / 2);
            std::vector<std::int64_t> counts(sums.size());
            std::vector<std::int64_t> histogram(sums.size() / 2 * 4);
            std::vector<float> extremes(sums.size());
            const std::vector<std::int32_t> groups(n, 1);
            const CosineStatistics to = {sums.data(), counts.data(), histogram.data(), extremes.data(), 4};
            add_cosines(products.data(), groups.data(), n, K, to, 3);  // what lies outside [-1, 1] is no cosine
            CHECK(counts[0] == 0);
        }
    }
}

int main() {
    test_geometry();
    test_levels();
    test_parallel_for();
    test_counts_beyond_a_slot();
    test_examples_of_any_division();
    test_checksum_at_any_offset();
    std::puts("all C++ tests passed");
    return 0;
}
