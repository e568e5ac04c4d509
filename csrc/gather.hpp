// Rows of one snapshot's activations, picked, widened to float32, scaled and laid into a batch of all snapshots.
#pragma once

#include <cstddef>
#include <cstdint>

#include "convert_kernels.hpp"

namespace crosscoder {

enum class ElementType { fp32, bf16, fp16 };

std::size_t element_size(ElementType type);

// Position of the first of index[0..n) that is not in [0, n_rows); n if all are.
std::size_t find_outside(const std::int64_t* index, std::size_t n, std::size_t n_rows);

// out[i * out_stride + d] = float(source[index[i], d]) * scale for i < n, d < width; `source` has rows of `width`
// elements, one after the other. All of `index` must be within it.
void gather_rows(const ConvertKernels& kernels, const void* source, ElementType type, std::size_t width,
                 const std::int64_t* index, std::size_t n, float scale, float* out, std::size_t out_stride,
                 unsigned n_threads);

// dst[i] = bfloat16(src[i]) for i < n.
void float32_to_bfloat16(const ConvertKernels& kernels, const float* src, std::uint16_t* dst, std::size_t n,
                         unsigned n_threads);

}  // namespace crosscoder
