#include <immintrin.h>
#include <string.h>

#include "study/geometry_kernels.hpp"

namespace crosscoder {
namespace {

constexpr size_t kWide = 32;  // bfloat16 numbers in a register
constexpr size_t kColumns = kPanel / 16;

__mmask32 tail_mask(size_t n) { return n >= kWide ? 0xffffffffU : (1U << n) - 1U; }

__m512bh bf16(__m512i bits) {
    __m512bh value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

__m512bh load(const uint16_t* src) { return bf16(_mm512_loadu_si512(src)); }

// The pair at src, in every lane.
__m512bh broadcast(const uint16_t* src) {
    int pair;
    memcpy(&pair, src, sizeof pair);
    return bf16(_mm512_set1_epi32(pair));
}

template <size_t Rows, size_t Columns>
void product_tile(const uint16_t* a, const uint16_t* b, size_t D, float* out, size_t K) {
    __m512 sum[Rows][Columns];
    for (size_t i = 0; i < Rows; ++i) {
        for (size_t j = 0; j < Columns; ++j) {
            sum[i][j] = _mm512_setzero_ps();
        }
    }
    for (size_t d = 0; d < D; d += kWide) {
        const __mmask32 mask = tail_mask(D - d);
        __m512bh right[Columns];
        for (size_t j = 0; j < Columns; ++j) {
            right[j] = bf16(_mm512_maskz_loadu_epi16(mask, b + j * D + d));
        }
        for (size_t i = 0; i < Rows; ++i) {
            const __m512bh left = bf16(_mm512_maskz_loadu_epi16(mask, a + i * D + d));
            for (size_t j = 0; j < Columns; ++j) {
                sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
            }
        }
    }
    for (size_t i = 0; i < Rows; ++i) {
        for (size_t j = 0; j < Columns; ++j) {
            out[i * K + j] = _mm512_reduce_add_ps(sum[i][j]);
        }
    }
}

void products(const uint16_t* w_KD, size_t K, size_t D, float* out_KK) {
    constexpr size_t kSide = 4;
    for (size_t i = 0; i < K; i += kSide) {
        for (size_t j = i; j < K; j += kSide) {
            const uint16_t* a = w_KD + i * D;
            const uint16_t* b = w_KD + j * D;
            if (j + kSide <= K) {
                product_tile<kSide, kSide>(a, b, D, out_KK + i * K + j, K);
            } else {
                for (size_t row = 0; row < kSide && i + row < K; ++row) {
                    for (size_t column = 0; j + column < K; ++column) {
                        product_tile<1, 1>(a + row * D, b + column * D, D, out_KK + (i + row) * K + j + column, K);
                    }
                }
            }
        }
    }
    for (size_t i = 0; i < K; ++i) {
        for (size_t j = 0; j < i; ++j) {
            out_KK[i * K + j] = out_KK[j * K + i];
        }
    }
}

void squares(const uint16_t* w_nD, size_t n, size_t D, float* out_n) {
    for (size_t i = 0; i < n; ++i) {
        product_tile<1, 1>(w_nD + i * D, w_nD + i * D, D, out_n + i, 1);
    }
}

void pack(const uint16_t* w, size_t stride, size_t n, size_t D, size_t padded_rows, uint16_t* to) {
    const size_t n_pairs = padded_rows / 2;
    const __m512i none = _mm512_setzero_si512();
    for (size_t column = 0; column < D; column += kPanel) {
        for (size_t part = 0; part < kColumns; ++part) {
            const size_t first = column + part * 16;
            const size_t left = first < D ? D - first : 0;
            const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffffU : (1U << left) - 1U);
            for (size_t p = 0; p < n_pairs; ++p) {
                __m512i low = none;
                __m512i high = none;
                if (2 * p < n) {
                    low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, w + 2 * p * stride + first));
                }
                if (2 * p + 1 < n) {
                    high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, w + (2 * p + 1) * stride + first));
                }
                const __m512i pairs = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
                _mm512_storeu_si512(to + 2 * ((column / kPanel * n_pairs + p) * kPanel + part * 16), pairs);
            }
        }
    }
}

void add_gram(const uint16_t* packed, size_t n_pairs, size_t j_panel, float* gram, size_t ld) {
    const uint16_t* right = packed + j_panel * n_pairs * kPanel * 2;
    for (size_t i = 0; i < (j_panel + 1) * kPanel; i += kTile) {
        const uint16_t* left = packed + (i / kPanel * n_pairs * kPanel + i % kPanel) * 2;
        __m512 sum[kTile][kColumns];
        for (size_t row = 0; row < kTile; ++row) {
            for (size_t c = 0; c < kColumns; ++c) {
                sum[row][c] = _mm512_setzero_ps();
            }
        }
        for (size_t p = 0; p < n_pairs; ++p) {
            const uint16_t* b = right + p * kPanel * 2;
            const uint16_t* a = left + p * kPanel * 2;
            __m512bh column[kColumns];
            for (size_t c = 0; c < kColumns; ++c) {
                column[c] = load(b + c * kWide);
            }
            for (size_t row = 0; row < kTile; ++row) {
                const __m512bh value = broadcast(a + row * 2);
                for (size_t c = 0; c < kColumns; ++c) {
                    sum[row][c] = _mm512_dpbf16_ps(sum[row][c], value, column[c]);
                }
            }
        }
        for (size_t row = 0; row < kTile; ++row) {
            for (size_t c = 0; c < kColumns; ++c) {
                float* to = gram + (i + row) * ld + j_panel * kPanel + c * 16;
                _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[row][c]));
            }
        }
    }
}

void add_form(const uint16_t* w, size_t ld, const uint16_t* panel, size_t n_pairs, size_t j_panel, float* sums) {
    __m512 sum[kTile][kColumns];
    for (size_t row = 0; row < kTile; ++row) {
        for (size_t c = 0; c < kColumns; ++c) {
            sum[row][c] = _mm512_setzero_ps();
        }
    }
    // Small terms first: the low parts, then the high ones.
    for (size_t part = 2; part-- > 0;) {
        const uint16_t* b = panel + part * n_pairs * kPanel * 2;
        for (size_t p = 0; p < n_pairs; ++p, b += kPanel * 2) {
            __m512bh column[kColumns];
            for (size_t c = 0; c < kColumns; ++c) {
                column[c] = load(b + c * kWide);
            }
            for (size_t row = 0; row < kTile; ++row) {
                const __m512bh value = broadcast(w + row * ld + 2 * p);
                for (size_t c = 0; c < kColumns; ++c) {
                    sum[row][c] = _mm512_dpbf16_ps(sum[row][c], value, column[c]);
                }
            }
        }
    }
    for (size_t row = 0; row < kTile; ++row) {
        __m512 total = _mm512_setzero_ps();
        for (size_t c = 0; c < kColumns; ++c) {
            const uint16_t* values = w + row * ld + j_panel * kPanel + c * 16;
            const __m512i bits = _mm512_slli_epi32(
                _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values))), 16);
            total = _mm512_fmadd_ps(sum[row][c], _mm512_castsi512_ps(bits), total);
        }
        sums[row] += _mm512_reduce_add_ps(total);
    }
}

}  // namespace

const GeometryKernels geometry_avx512_bf16 = {products, squares, pack, add_gram, add_form};

}  // namespace crosscoder
