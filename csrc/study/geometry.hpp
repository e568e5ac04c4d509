// Geometry of bfloat16 decoders (n features, K snapshots, D) where they lie: products between snapshots, Gram matrices
// and quadratic forms. Products of two bfloat16 numbers are exact in fp32, sums are fp32. Only for CPUs with bfloat16
// instructions: elsewhere the same is done by torch in fp32.
//
// Denormal numbers, of inputs and sums, count as 0: so rows with a norm under about 1e-19.
#pragma once

#include <cstddef>
#include <cstdint>

namespace crosscoder {

struct DecoderBlock {
    const std::uint16_t* bits;  // row-major
    std::size_t n;
    std::size_t n_snapshots;
    std::size_t width;
};

// Whether this CPU has them; if not, the functions below throw std::runtime_error.
bool has_geometry();

// out (n, K, K) = w_fi . w_fj.
void snapshot_products(const DecoderBlock& block, float* out, unsigned n_threads);

// out (n, K) = w_fk . w_fk.
void squared_norms(const DecoderBlock& block, float* out, unsigned n_threads);

// D rounded up to whole panels.
std::size_t padded_width(std::size_t width);

// grams (K, P, P), P the padded width: adds sum_f w_fk w_fk^T at and above the diagonal; some elements below it are
// written too and mean nothing.
void add_grams(const DecoderBlock& block, float* grams, unsigned n_threads);

// Numbers that the packed form of one gram takes.
std::size_t form_size(std::size_t width);

// A gram (P, P), of which the part at and above the diagonal is read, as two bfloat16 numbers an element (their sum is
// within 2^-16 of it), ordered for quadratic_forms.
void pack_form(const float* gram, std::size_t width, std::uint16_t* form);

// out (n, K) = w_fk^T G_k w_fk, forms (K, form_size).
void quadratic_forms(const DecoderBlock& block, const std::uint16_t* forms, float* out, unsigned n_threads);

}  // namespace crosscoder
