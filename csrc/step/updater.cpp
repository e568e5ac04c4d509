#include "step/updater.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.hpp"
#include "step/rows.hpp"

namespace crosscoder {
namespace {

constexpr std::size_t kFeaturesPerChunk = 8;
constexpr std::size_t kBlock = 256;  // train/state.py, BLOCK
constexpr std::uint32_t kDecoderSalt = 0x5bd1e995U;

// One feature's gradient, snapshot by snapshot.
template <class T>
class FeatureGradient {
  public:
    FeatureGradient(const StepKernels& kernels, const CodeView& code, const OrderView& order,
                    const GradientParts& parts, const T* W_dec, std::size_t width)
        : kernels_(kernels), code_(code), order_(order), parts_(parts), W_dec_(W_dec), width_(width) {}

    // Selects a feature. Returns false if its rows have no gradient at all.
    bool select(std::size_t f) {
        f_ = f;
        first_ = order_.feature_offsets[f];
        const auto n = static_cast<std::size_t>(order_.feature_offsets[f + 1] - first_);
        coefficients_.resize(n);
        const float every = parts_.every_F == nullptr ? 0.0F : parts_.every_F[f];
        for (std::size_t i = 0; i < n; ++i) {
            const std::size_t pair = pair_at(i);
            coefficients_[i] = parts_.dh_N[pair];
            if (parts_.every_F != nullptr && code_.values[pair] >= parts_.theta_F[f]) {
                coefficients_[i] -= every;
            }
        }
        return n > 0 || parts_.every_F != nullptr;
    }

    // dW_enc of the snapshots k0 to k1 - 1.
    void encoder(std::size_t k0, std::size_t k1, float* out) {
        const std::size_t K = code_.n_snapshots;
        const std::size_t n = (k1 - k0) * width_;
        std::fill_n(out, n, 0.0F);
        if (parts_.every_F != nullptr) {
            const float* sum = parts_.x_sum + k0 * width_;
            combine(kernels_, out, &sum, parts_.every_F + f_, 1, n);
        }
        rows_.resize(coefficients_.size());
        for (std::size_t i = 0; i < rows_.size(); ++i) {
            rows_[i] = parts_.x + (token_at(i) * K + k0) * width_;
        }
        combine(kernels_, out, rows_.data(), coefficients_.data(), rows_.size(), n);
    }

    // dW_dec of the same.
    void decoder(std::size_t k0, std::size_t k1, float* out) {
        const std::size_t K = code_.n_snapshots;
        std::fill_n(out, (k1 - k0) * width_, 0.0F);
        for (std::size_t k = k0; k < k1; ++k) {
            const float norm = parts_.norms_FK[f_ * K + k];
            if (norm > 0) {
                const float c = parts_.dnorm_FK[f_ * K + k] / norm;
                const T* own = W_dec_ + (f_ * K + k) * width_;
                combine(kernels_, out + (k - k0) * width_, &own, &c, 1, width_);
            }
        }
        const std::uint64_t all = gates_between(~std::uint64_t{0}, k0, k1);
        sum_.clear();
        for (std::size_t i = 0; i < coefficients_.size(); ++i) {
            const std::size_t pair = pair_at(i);
            sum_.add(parts_.residual + (token_at(i) * K + k0) * width_, parts_.residual_scale * code_.values[pair],
                     gates_between(code_.gates[pair], k0, k1), all);
        }
        sum_.run(kernels_, out, k1 - k0, width_);
    }

  private:
    std::size_t pair_at(std::size_t i) const {
        return static_cast<std::size_t>(order_.order[static_cast<std::size_t>(first_) + i]);
    }
    std::size_t token_at(std::size_t i) const {
        return static_cast<std::size_t>(order_.tokens[static_cast<std::size_t>(first_) + i]);
    }

    const StepKernels& kernels_;
    const CodeView& code_;
    const OrderView& order_;
    const GradientParts& parts_;
    const T* W_dec_;
    std::size_t width_;
    std::size_t f_ = 0;
    std::int64_t first_ = 0;
    std::vector<float> coefficients_;
    std::vector<const float*> rows_;
    GatedCombine<float> sum_;
};

// Calls work(gradient, begin, end) with a FeatureGradient of the weights' type for ranges of features.
template <class Work>
void for_features(const StepKernels& kernels, const CodeView& code, const OrderView& order, const GradientParts& parts,
                  const void* W_dec, bool bf16, std::size_t width, unsigned n_threads, const Work& work) {
    parallel_chunks(code.n_features, kFeaturesPerChunk, n_threads, [&](std::size_t begin, std::size_t end) {
        if (bf16) {
            FeatureGradient gradient(kernels, code, order, parts, static_cast<const std::uint16_t*>(W_dec), width);
            work(gradient, begin, end);
        } else {
            FeatureGradient gradient(kernels, code, order, parts, static_cast<const float*>(W_dec), width);
            work(gradient, begin, end);
        }
    });
}

template <class T>
void derive_feature(const StepKernels& kernels, const T* W_enc, const T* W_dec, std::size_t f, std::size_t n_snapshots,
                    std::size_t width, const DerivedRows& out, std::vector<float>& row) {
    const std::size_t n = n_snapshots * width;
    for (std::size_t k = 0; k < n_snapshots; ++k) {
        out.norms_FK[f * n_snapshots + k] = std::sqrt(sum_squares(kernels, W_dec + f * n + k * width, width));
    }
    const T* encoder = W_enc + f * n;
    if (out.fourth_F != nullptr) {
        out.fourth_F[f] = std::sqrt(std::sqrt(sum_fourth_powers(kernels, encoder, n)));
    }
    if constexpr (sizeof(T) == 4) {
        if (out.enc_bf16 != nullptr) {
            kernels.narrow_bf16(encoder, out.enc_bf16 + f * n, n);
        }
    }
    if (out.enc_int8 != nullptr) {
        row.resize(n);
        if constexpr (sizeof(T) == 4) {
            kernels.scale_columns(encoder, out.column_scale, row.data(), n);
        } else {
            kernels.widen_bf16(encoder, row.data(), n);
            kernels.scale_columns(row.data(), out.column_scale, row.data(), n);
        }
        const float top = kernels.largest_fp32(row.data(), n);
        kernels.quantize(row.data(), top > 0 ? 127.0F / top : 0.0F, out.enc_int8 + f * n, n);
        out.enc_scale_F[f] = top / 127.0F;
        out.enc_norm_F[f] = std::sqrt(kernels.sum_squares_fp32(row.data(), n));
    }
}

// Adam on the rows of one feature, whose gradient comes from `fill(k0, k1, encoder rows, decoder rows)`.
class RowUpdater {
  public:
    RowUpdater(const StepKernels& kernels, const UpdatedRows& rows, const UpdateOptions& options)
        : kernels_(kernels),
          rows_(rows),
          K_(rows.n_snapshots),
          D_(rows.width),
          options_(options),
          together_(snapshots_together(D_, K_)),
          d_enc_(together_ * D_),
          d_dec_(together_ * D_) {}

    template <class Fill>
    void update(std::size_t f, float db_enc, const Fill& fill) {
        const AdamFactors factors = factors_of(f);
        for (std::size_t k0 = 0; k0 < K_; k0 += together_) {
            const std::size_t k1 = std::min(K_, k0 + together_);
            fill(k0, k1, d_enc_.data(), d_dec_.data());
            if (options_.gradient_factor != 1.0F) {
                kernels_.scale(d_enc_.data(), options_.gradient_factor, (k1 - k0) * D_);
                kernels_.scale(d_dec_.data(), options_.gradient_factor, (k1 - k0) * D_);
            }
            step(rows_.W_enc, f * K_ + k0, k1 - k0, d_enc_.data(), factors, options_.seed);
            step(rows_.W_dec, f * K_ + k0, k1 - k0, d_dec_.data(), factors, options_.seed ^ kDecoderSalt);
        }
        const float db = db_enc * options_.gradient_factor;
        kernels_.adam_fp32(static_cast<float*>(rows_.bias.w) + f, static_cast<float*>(rows_.bias.m) + f,
                           static_cast<float*>(rows_.bias.v) + f, &db, &factors, 1);
        rows_.last_step_F[f] = options_.t;
        if (rows_.bf16) {
            derive(static_cast<const std::uint16_t*>(rows_.W_enc.w), static_cast<std::uint16_t*>(rows_.W_dec.w), f);
        } else {
            derive(static_cast<const float*>(rows_.W_enc.w), static_cast<float*>(rows_.W_dec.w), f);
        }
    }

  private:
    AdamFactors factors_of(std::size_t f) const {
        const double t = options_.t;
        const double elapsed = options_.t - rows_.last_step_F[f];
        return {static_cast<float>(options_.lr / (1 - std::pow(options_.beta1, t))),
                static_cast<float>(1 / std::sqrt(1 - std::pow(options_.beta2, t))),
                options_.epsilon,
                static_cast<float>(std::pow(options_.beta1, elapsed)),
                static_cast<float>(std::pow(options_.beta2, elapsed)),
                static_cast<float>(1 - options_.beta1),
                static_cast<float>(1 - options_.beta2)};
    }

    // `n_rows` rows of D numbers, from row `first` = f K + k on.
    void step(const MatrixState& matrix, std::size_t first, std::size_t n_rows, const float* gradient,
              const AdamFactors& factors, std::uint32_t seed) const {
        if (!rows_.bf16) {
            kernels_.adam_fp32(static_cast<float*>(matrix.w) + first * D_, static_cast<float*>(matrix.m) + first * D_,
                               static_cast<float*>(matrix.v) + first * D_, gradient, &factors, n_rows * D_);
            return;
        }
        const std::size_t n_blocks = (D_ + kBlock - 1) / kBlock;
        for (std::size_t row = first; row < first + n_rows; ++row) {
            for (std::size_t i = 0; i < n_blocks; ++i) {
                const std::size_t at = row * D_ + i * kBlock;
                kernels_.adam_8bit(static_cast<std::uint16_t*>(matrix.w) + at,
                                   static_cast<std::int8_t*>(matrix.m) + at, matrix.m_scale + row * n_blocks + i,
                                   static_cast<std::uint8_t*>(matrix.v) + at, matrix.v_scale + row * n_blocks + i,
                                   gradient + (row - first) * D_ + i * kBlock, &factors, seed,
                                   static_cast<std::uint32_t>(at), std::min(kBlock, D_ - i * kBlock));
            }
        }
    }

    template <class T>
    void derive(const T* W_enc, T* W_dec, std::size_t f) {
        derive_feature(kernels_, W_enc, W_dec, f, K_, D_, rows_.derived, row_);
        const float* norms = rows_.derived.norms_FK + f * K_;
        const float top = *std::max_element(norms, norms + K_);
        if (options_.norm_limit > 0 && top > options_.norm_limit) {
            rescale(kernels_, W_dec + f * K_ * D_, options_.norm_limit / top, K_ * D_);
            for (std::size_t k = 0; k < K_; ++k) {
                rows_.derived.norms_FK[f * K_ + k] = std::sqrt(sum_squares(kernels_, W_dec + (f * K_ + k) * D_, D_));
            }
        }
    }

    const StepKernels& kernels_;
    const UpdatedRows& rows_;
    std::size_t K_;
    std::size_t D_;
    const UpdateOptions& options_;
    std::size_t together_;
    std::vector<float> d_enc_;
    std::vector<float> d_dec_;
    std::vector<float> row_;
};

}  // namespace

void gradient_squares(const StepKernels& kernels, const CodeView& code, const OrderView& order,
                      const GradientParts& parts, const RowsView& W_dec, float* squares_F, unsigned n_threads) {
    const std::size_t D = W_dec.width;
    const std::size_t K = code.n_snapshots;
    const std::size_t together = snapshots_together(D, K);
    for_features(kernels, code, order, parts, W_dec.data, W_dec.bf16, D, n_threads,
                 [&](auto& gradient, std::size_t begin, std::size_t end) {
                     std::vector<float> row(together * D);
                     for (std::size_t f = begin; f < end; ++f) {
                         squares_F[f] = 0;
                         if (!gradient.select(f)) {
                             continue;
                         }
                         for (std::size_t k0 = 0; k0 < K; k0 += together) {
                             const std::size_t k1 = std::min(K, k0 + together);
                             gradient.encoder(k0, k1, row.data());
                             squares_F[f] += kernels.sum_squares_fp32(row.data(), (k1 - k0) * D);
                             gradient.decoder(k0, k1, row.data());
                             squares_F[f] += kernels.sum_squares_fp32(row.data(), (k1 - k0) * D);
                         }
                     }
                 });
}

void gradient_rows(const StepKernels& kernels, const CodeView& code, const OrderView& order,
                   const GradientParts& parts, const RowsView& W_dec, float* dW_enc, float* dW_dec,
                   unsigned n_threads) {
    const std::size_t D = W_dec.width;
    const std::size_t K = code.n_snapshots;
    for_features(kernels, code, order, parts, W_dec.data, W_dec.bf16, D, n_threads,
                 [&](auto& gradient, std::size_t begin, std::size_t end) {
                     for (std::size_t f = begin; f < end; ++f) {
                         gradient.select(f);
                         gradient.encoder(0, K, dW_enc + f * K * D);
                         gradient.decoder(0, K, dW_dec + f * K * D);
                     }
                 });
}

void update_rows(const StepKernels& kernels, const CodeView& code, const OrderView& order, const GradientParts& parts,
                 const float* db_enc_F, const UpdatedRows& rows, const UpdateOptions& options, unsigned n_threads) {
    for_features(kernels, code, order, parts, rows.W_dec.w, rows.bf16, rows.width, n_threads,
                 [&](auto& gradient, std::size_t begin, std::size_t end) {
                     RowUpdater updater(kernels, rows, options);
                     for (std::size_t f = begin; f < end; ++f) {
                         if (!gradient.select(f) && options.lazy) {
                             continue;
                         }
                         updater.update(f, db_enc_F[f], [&](std::size_t k0, std::size_t k1, float* d_enc, float* d_dec) {
                             gradient.encoder(k0, k1, d_enc);
                             gradient.decoder(k0, k1, d_dec);
                         });
                     }
                 });
}

void update_dense_rows(const StepKernels& kernels, const float* dW_enc, const float* dW_dec, const float* db_enc,
                       const std::uint8_t* touched, std::size_t first, std::size_t n, const UpdatedRows& rows,
                       const UpdateOptions& options, unsigned n_threads) {
    const std::size_t K = rows.n_snapshots;
    const std::size_t D = rows.width;
    parallel_chunks(n, kFeaturesPerChunk, n_threads, [&](std::size_t begin, std::size_t end) {
        RowUpdater updater(kernels, rows, options);
        for (std::size_t i = begin; i < end; ++i) {
            if (touched[i] == 0 && options.lazy) {
                continue;
            }
            updater.update(first + i, db_enc[i], [&](std::size_t k0, std::size_t k1, float* d_enc, float* d_dec) {
                std::copy_n(dW_enc + (i * K + k0) * D, (k1 - k0) * D, d_enc);
                std::copy_n(dW_dec + (i * K + k0) * D, (k1 - k0) * D, d_dec);
            });
        }
    });
}

void derive_rows(const StepKernels& kernels, const RowsView& W_enc, const RowsView& W_dec, std::size_t first,
                 std::size_t n, std::size_t n_snapshots, const DerivedRows& derived, unsigned n_threads) {
    const std::size_t D = W_dec.width;
    parallel_chunks(n, kFeaturesPerChunk, n_threads, [&](std::size_t begin, std::size_t end) {
        std::vector<float> row;
        for (std::size_t f = first + begin; f < first + end; ++f) {
            if (W_dec.bf16) {
                derive_feature(kernels, static_cast<const std::uint16_t*>(W_enc.data),
                               static_cast<const std::uint16_t*>(W_dec.data), f, n_snapshots, D, derived, row);
            } else {
                derive_feature(kernels, static_cast<const float*>(W_enc.data), static_cast<const float*>(W_dec.data),
                               f, n_snapshots, D, derived, row);
            }
        }
    });
}

}  // namespace crosscoder
