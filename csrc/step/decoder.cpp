#include "step/decoder.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.hpp"
#include "step/rows.hpp"

namespace crosscoder {
namespace {

constexpr std::size_t kTokensPerChunk = 8;

template <class T>
class TokenDecoder {
  public:
    TokenDecoder(const StepKernels& kernels, const CodeView& code, const T* W_dec, std::size_t width)
        : kernels_(kernels), code_(code), W_dec_(W_dec), width_(width) {}

    std::size_t begin(std::size_t b) const { return static_cast<std::size_t>(code_.row_offsets[b]); }
    std::size_t end(std::size_t b) const { return static_cast<std::size_t>(code_.row_offsets[b + 1]); }

    const T* row(std::size_t pair, std::size_t k) const {
        return W_dec_ + (static_cast<std::size_t>(code_.features[pair]) * code_.n_snapshots + k) * width_;
    }

    // out (k0 to k1 - 1) = b_dec + sum over open gates of h W_dec - target, all beginning at k0.
    void decode(std::size_t b, std::size_t k0, std::size_t k1, const float* b_dec, const float* target, float* out) {
        const std::size_t n = (k1 - k0) * width_;
        if (target == nullptr) {
            std::copy_n(b_dec, n, out);
        } else {
            for (std::size_t d = 0; d < n; ++d) {
                out[d] = b_dec[d] - target[d];
            }
        }
        const std::uint64_t all = gates_between(~std::uint64_t{0}, k0, k1);
        sum_.clear();
        for (std::size_t i = begin(b); i < end(b); ++i) {
            sum_.add(row(i, k0), code_.values[i], gates_between(code_.gates[i], k0, k1), all);
        }
        sum_.run(kernels_, out, k1 - k0, width_);
    }

    // out[i - begin(b)] = <g, W_dec> for every pair of the token; `everywhere`, or where the gate is open.
    void inner(std::size_t b, std::size_t k, const float* g, bool everywhere, float* out) {
        rows_.clear();
        places_.clear();
        for (std::size_t i = begin(b); i < end(b); ++i) {
            if (everywhere || ((code_.gates[i] >> k) & 1U) != 0) {
                rows_.push_back(row(i, k));
                places_.push_back(i - begin(b));
            }
        }
        values_.resize(rows_.size());
        dots(kernels_, g, rows_.data(), rows_.size(), width_, values_.data());
        for (std::size_t i = 0; i < places_.size(); ++i) {
            out[places_[i]] = values_[i];
        }
    }

  private:
    const StepKernels& kernels_;
    const CodeView& code_;
    const T* W_dec_;
    std::size_t width_;
    GatedCombine<T> sum_;
    std::vector<const T*> rows_;
    std::vector<float> values_;
    std::vector<std::size_t> places_;
};

// Calls work(decoder, begin, end) with a decoder of the weights' type for ranges of tokens.
template <class Work>
void for_tokens(const StepKernels& kernels, const CodeView& code, const RowsView& W_dec, unsigned n_threads,
                const Work& work) {
    parallel_chunks(code.n_tokens, kTokensPerChunk, n_threads, [&](std::size_t begin, std::size_t end) {
        if (W_dec.bf16) {
            TokenDecoder decoder(kernels, code, static_cast<const std::uint16_t*>(W_dec.data), W_dec.width);
            work(decoder, begin, end);
        } else {
            TokenDecoder decoder(kernels, code, static_cast<const float*>(W_dec.data), W_dec.width);
            work(decoder, begin, end);
        }
    });
}

}  // namespace

void decode(const StepKernels& kernels, const CodeView& code, const RowsView& W_dec, const float* b_dec,
            const float* target, float* out, unsigned n_threads) {
    const std::size_t K = code.n_snapshots;
    const std::size_t D = W_dec.width;
    const std::size_t together = snapshots_together(D, K);
    for_tokens(kernels, code, W_dec, n_threads, [&](auto& decoder, std::size_t begin, std::size_t end) {
        for (std::size_t b = begin; b < end; ++b) {
            for (std::size_t k0 = 0; k0 < K; k0 += together) {
                const std::size_t k1 = std::min(K, k0 + together);
                const std::size_t place = (b * K + k0) * D;
                decoder.decode(b, k0, k1, b_dec + k0 * D, target == nullptr ? nullptr : target + place, out + place);
            }
        }
    });
}

void pair_gradients(const StepKernels& kernels, const CodeView& code, const RowsView& W_dec, const float* b_dec,
                    const float* target, float gradient_scale, const float* weight_F, const float* norms_FK,
                    const float* theta_F, const PenaltyView& penalty, float* residual, float* error_BK,
                    const PairGradients& out, unsigned n_threads) {
    const std::size_t K = code.n_snapshots;
    const std::size_t D = W_dec.width;
    const std::size_t together = snapshots_together(D, K);
    const bool windowed = out.threshold_N != nullptr;
    for_tokens(kernels, code, W_dec, n_threads, [&](auto& decoder, std::size_t begin, std::size_t end) {
        std::vector<float> inner;
        std::vector<float> slopes;
        for (std::size_t b = begin; b < end; ++b) {
            const std::size_t first = decoder.begin(b);
            const std::size_t n = decoder.end(b) - first;
            inner.resize(n);
            slopes.resize(n * K);
            for (std::size_t i = 0; i < n; ++i) {
                const std::size_t pair = first + i;
                const auto f = static_cast<std::size_t>(code.features[pair]);
                kernels.activity_slope(code.values[pair], norms_FK + f * K, code.gates[pair], penalty.tanh_scale,
                                       penalty.linear, slopes.data() + i * K, K);
                out.dh_N[pair] = 0;
                if (windowed) {
                    out.threshold_N[pair] = 0;
                }
            }
            for (std::size_t k = 0; k < K; ++k) {
                const std::size_t place = (b * K + k) * D;
                if (b_dec != nullptr && k % together == 0) {
                    decoder.decode(b, k, std::min(K, k + together), b_dec + k * D, target + place, residual + place);
                }
                error_BK[b * K + k] = kernels.sum_squares_fp32(residual + place, D);
                decoder.inner(b, k, residual + place, windowed, inner.data());
                for (std::size_t i = 0; i < n; ++i) {
                    const std::size_t pair = first + i;
                    const bool open = ((code.gates[pair] >> k) & 1U) != 0;
                    if (!open && !windowed) {
                        continue;
                    }
                    const auto f = static_cast<std::size_t>(code.features[pair]);
                    const float norm = norms_FK[f * K + k];
                    const float df = gradient_scale * inner[i] + weight_F[f] * norm * slopes[i * K + k];
                    if (open) {
                        out.dh_N[pair] += df;
                    }
                    const float unit = penalty.shared ? 1.0F : norm;
                    const float h = code.values[pair];
                    if (windowed && unit > 0 && h > 0 &&
                        std::abs(h * unit - theta_F[f]) < penalty.window / 2) {
                        out.threshold_N[pair] -= df * (theta_F[f] * theta_F[f]) / (penalty.window * unit);
                    }
                }
            }
        }
    });
}

}  // namespace crosscoder
