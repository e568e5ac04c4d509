#include "study/geometry.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "core/cpu_features.hpp"
#include "study/geometry_kernels.hpp"
#include "core/parallel.hpp"

namespace crosscoder {
namespace {

// Rows packed at once: their panels (400 kB at D = 768) stay in a core's second-level cache.
constexpr std::size_t kRows = 256;

const GeometryKernels& kernels() {
#if defined(CROSSCODER_X86)
    if (active_level() == IsaLevel::avx512_bf16) {
        return geometry_avx512_bf16;
    }
#endif
    throw std::runtime_error("this CPU has no bfloat16 instructions");
}

std::size_t n_panels(std::size_t width) { return (width + kPanel - 1) / kPanel; }

// Row pairs of panel j of a triangular form.
std::size_t pairs_of(std::size_t panel) { return (panel + 1) * kPanel / 2; }

// Where panel j begins: high and low parts of the panels before it.
std::size_t form_offset(std::size_t panel) { return panel * (panel + 1) / 2 * kPanel * kPanel * 2; }

std::uint16_t rounded(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

float widened(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

}  // namespace

bool has_geometry() {
#if defined(CROSSCODER_X86)
    return active_level() == IsaLevel::avx512_bf16;
#else
    return false;
#endif
}

void snapshot_products(const DecoderBlock& block, float* out, unsigned n_threads) {
    const GeometryKernels& k = kernels();
    const std::size_t K = block.n_snapshots;
    parallel_for(block.n, 1, n_threads, [&](std::size_t begin, std::size_t end) {
        for (std::size_t f = begin; f < end; ++f) {
            k.products(block.bits + f * K * block.width, K, block.width, out + f * K * K);
        }
    });
}

void squared_norms(const DecoderBlock& block, float* out, unsigned n_threads) {
    const GeometryKernels& k = kernels();
    parallel_for(block.n * block.n_snapshots, 1, n_threads, [&](std::size_t begin, std::size_t end) {
        k.squares(block.bits + begin * block.width, end - begin, block.width, out + begin);
    });
}

std::size_t padded_width(std::size_t width) { return n_panels(width) * kPanel; }

void add_grams(const DecoderBlock& block, float* grams, unsigned n_threads) {
    const GeometryKernels& k = kernels();
    const std::size_t padded = padded_width(block.width);
    const std::size_t stride = block.n_snapshots * block.width;
    parallel_for(block.n_snapshots, 1, n_threads, [&](std::size_t begin, std::size_t end) {
        std::vector<std::uint16_t> packed(kRows * padded);
        for (std::size_t snapshot = begin; snapshot < end; ++snapshot) {
            for (std::size_t first = 0; first < block.n; first += kRows) {
                const std::size_t n = std::min(kRows, block.n - first);
                const std::size_t pairs = (n + 1) / 2;
                k.pack(block.bits + first * stride + snapshot * block.width, stride, n, block.width, 2 * pairs,
                       packed.data());
                for (std::size_t panel = 0; panel < n_panels(block.width); ++panel) {
                    k.add_gram(packed.data(), pairs, panel, grams + snapshot * padded * padded, padded);
                }
            }
        }
    });
}

std::size_t form_size(std::size_t width) { return form_offset(n_panels(width)); }

void pack_form(const float* gram, std::size_t width, std::uint16_t* form) {
    const std::size_t padded = padded_width(width);
    for (std::size_t panel = 0; panel < n_panels(width); ++panel) {
        std::uint16_t* high = form + form_offset(panel);
        std::uint16_t* low = high + pairs_of(panel) * kPanel * 2;
        for (std::size_t i = 0; i < 2 * pairs_of(panel); ++i) {
            for (std::size_t c = 0; c < kPanel; ++c) {
                const std::size_t j = panel * kPanel + c;
                // Both triangles in one: twice what lies above the diagonal.
                const float value = i > j ? 0.0F : (i < j ? 2.0F : 1.0F) * gram[i * padded + j];
                const std::size_t place = (i / 2 * kPanel + c) * 2 + i % 2;
                high[place] = rounded(value);
                low[place] = rounded(value - widened(high[place]));
            }
        }
    }
}

void quadratic_forms(const DecoderBlock& block, const std::uint16_t* forms, float* out, unsigned n_threads) {
    const GeometryKernels& k = kernels();
    const std::size_t K = block.n_snapshots;
    const std::size_t padded = padded_width(block.width);
    const std::size_t size = form_size(block.width);
    parallel_for(K, 1, n_threads, [&](std::size_t begin, std::size_t end) {
        std::vector<std::uint16_t> rows(kRows * padded);
        std::vector<float> sums(kRows);
        for (std::size_t snapshot = begin; snapshot < end; ++snapshot) {
            for (std::size_t first = 0; first < block.n; first += kRows) {
                const std::size_t n = std::min(kRows, block.n - first);
                std::fill(rows.begin(), rows.end(), std::uint16_t{0});
                for (std::size_t row = 0; row < n; ++row) {
                    std::memcpy(rows.data() + row * padded,
                                block.bits + ((first + row) * K + snapshot) * block.width,
                                block.width * sizeof(std::uint16_t));
                }
                std::fill(sums.begin(), sums.end(), 0.0F);
                for (std::size_t panel = 0; panel < n_panels(block.width); ++panel) {
                    const std::uint16_t* part = forms + snapshot * size + form_offset(panel);
                    for (std::size_t row = 0; row < n; row += kTile) {
                        k.add_form(rows.data() + row * padded, padded, part, pairs_of(panel), panel,
                                   sums.data() + row);
                    }
                }
                for (std::size_t row = 0; row < n; ++row) {
                    out[(first + row) * K + snapshot] = sums[row];
                }
            }
        }
    });
}

}  // namespace crosscoder
