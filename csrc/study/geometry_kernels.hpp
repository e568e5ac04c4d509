// Products of bfloat16 decoder rows: the signatures that the instruction set implements. The rules for the file
// geometry_avx512_bf16.cpp are those of store/unpack_kernels.hpp: nothing of external linkage but the table, no standard
// library.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace crosscoder {

// Packed matrices are panels of kPanel columns; in a panel, row pair p holds for each column its rows 2p and 2p + 1.
constexpr size_t kPanel = 48;
constexpr size_t kTile = 8;  // rows of a register tile

struct GeometryKernels {
    // out[i * K + j] = w_i . w_j of K rows of D numbers.
    void (*products)(const uint16_t* w_KD, size_t K, size_t D, float* out_KK);
    // out[i] = w_i . w_i of n rows of D numbers.
    void (*squares)(const uint16_t* w_nD, size_t n, size_t D, float* out_n);
    // to (padded_rows / 2 pairs a panel) = n rows of D numbers, `stride` apart, as panels; zeros beyond n and D.
    void (*pack)(const uint16_t* w, size_t stride, size_t n, size_t D, size_t padded_rows, uint16_t* to);
    // gram[i * ld + j] += sum over row pairs of column i times column j, for all j of panel `j_panel` and all i of
    // panels 0 to j_panel.
    void (*add_gram)(const uint16_t* packed, size_t n_pairs, size_t j_panel, float* gram, size_t ld);
    // sums[r] += sum over columns j of panel `j_panel` of w_rj sum_i w_ri B_ij, for kTile padded rows w; B is the
    // panel, high parts in `n_pairs` row pairs and low parts in as many behind them.
    void (*add_form)(const uint16_t* w, size_t ld, const uint16_t* panel, size_t n_pairs, size_t j_panel, float* sums);
};

extern const GeometryKernels geometry_avx512_bf16;  // AVX-512 F, BW, DQ, VL and BF16

}  // namespace crosscoder
