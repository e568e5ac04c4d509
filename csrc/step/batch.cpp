#include "step/batch.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.hpp"

namespace crosscoder {
namespace {

constexpr std::size_t kTokensPerChunk = 32;
constexpr std::size_t kColumnsPerChunk = 256;
constexpr std::size_t kRowsTogether = 64;

}  // namespace

void prepare_batch(const StepKernels& kernels, const float* x, std::size_t n_tokens, std::size_t width,
                   const PreparedBatch& out, unsigned n_threads) {
    parallel_chunks(n_tokens, kTokensPerChunk, n_threads, [&](std::size_t begin, std::size_t end) {
        std::vector<float> row(out.int8 == nullptr ? 0 : width);
        for (std::size_t b = begin; b < end; ++b) {
            const float* own = x + b * width;
            out.fourth_B[b] = std::sqrt(std::sqrt(kernels.sum_fourth_powers_fp32(own, width)));
            if (out.bf16 != nullptr) {
                kernels.narrow_bf16(own, out.bf16 + b * width, width);
            }
            if (out.int8 != nullptr) {
                kernels.scale_columns(own, out.inverse_column_scale, row.data(), width);
                const float top = kernels.largest_fp32(row.data(), width);
                kernels.quantize(row.data(), top > 0 ? 127.0F / top : 0.0F, out.int8 + b * width, width);
                out.int8_scale_B[b] = top / 127.0F;
                out.int8_norm_B[b] = std::sqrt(kernels.sum_squares_fp32(row.data(), width));
            }
        }
    });
}

void column_sums(const StepKernels& kernels, const float* a, std::size_t n_rows, std::size_t width, float* sums,
                 unsigned n_threads) {
    const std::vector<float> ones(kRowsTogether, 1.0F);
    parallel_chunks(width, kColumnsPerChunk, n_threads, [&](std::size_t begin, std::size_t end) {
        std::fill(sums + begin, sums + end, 0.0F);
        std::vector<const float*> rows(kRowsTogether);
        std::vector<float> partial(end - begin);
        for (std::size_t i = 0; i < n_rows; i += kRowsTogether) {
            const std::size_t n = std::min(kRowsTogether, n_rows - i);
            for (std::size_t j = 0; j < n; ++j) {
                rows[j] = a + (i + j) * width + begin;
            }
            std::fill(partial.begin(), partial.end(), 0.0F);
            kernels.combine_fp32(partial.data(), rows.data(), ones.data(), n, end - begin);
            for (std::size_t j = begin; j < end; ++j) {
                sums[j] += partial[j - begin];
            }
        }
    });
}

void mix_snapshots(const StepKernels& kernels, const float* x, const float* mix_KK, std::size_t n_tokens,
                   std::size_t n_snapshots, std::size_t width, float* out, unsigned n_threads) {
    parallel_chunks(n_tokens, kTokensPerChunk, n_threads, [&](std::size_t begin, std::size_t end) {
        std::vector<const float*> rows(n_snapshots);
        for (std::size_t b = begin; b < end; ++b) {
            const std::size_t token = b * n_snapshots * width;
            for (std::size_t l = 0; l < n_snapshots; ++l) {
                rows[l] = x + token + l * width;
            }
            std::fill(out + token, out + token + n_snapshots * width, 0.0F);
            for (std::size_t k = 0; k < n_snapshots; ++k) {
                kernels.combine_fp32(out + token + k * width, rows.data(), mix_KK + k * n_snapshots, n_snapshots,
                                     width);
            }
        }
    });
}

void squared_distances(const float* x, const float* mean, std::size_t n_tokens, std::size_t n_snapshots,
                       std::size_t width, float* out_BK, unsigned n_threads) {
    parallel_chunks(n_tokens, kTokensPerChunk, n_threads, [&](std::size_t begin, std::size_t end) {
        for (std::size_t row = begin * n_snapshots; row < end * n_snapshots; ++row) {
            const float* own = x + row * width;
            const float* center = mean + (row % n_snapshots) * width;
            constexpr std::size_t kLanes = 16;  // independent sums, so that the compiler may use vectors
            float sums[kLanes] = {};
            std::size_t d = 0;
            for (; d + kLanes <= width; d += kLanes) {
                for (std::size_t j = 0; j < kLanes; ++j) {
                    const float distance = own[d + j] - center[d + j];
                    sums[j] += distance * distance;
                }
            }
            float total = 0;
            for (; d < width; ++d) {
                total += (own[d] - center[d]) * (own[d] - center[d]);
            }
            for (const float sum : sums) {
                total += sum;
            }
            out_BK[row] = total;
        }
    });
}

}  // namespace crosscoder
