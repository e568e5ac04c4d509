// The inner loops of the sparse training step: the signatures that every instruction set implements.
//
// step_kernels.inc has the one implementation, in the compiler's vector types; step_<level>.cpp compile it with
// flags of their own. So that no code compiled with these flags can be picked by the linker for the rest of the
// program, they include this header, C headers and intrinsics, nothing else; all but the table is static.
//
// Sums run in a fixed order for a given n, so results do not depend on threads; they differ by level.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace crosscoder {

// Of products p_j, bounds: position j is kept iff p_j > cut[j] - margin[0] * width0[j] - margin[1] * width1[j].
// width1 may be null. Positions come ascending; `out` has room for n. Returns how many.
struct CollectBounds {
    const float* cut;
    const float* width0;
    const float* width1;
    float margin[2];
};

// Constants of one Adam step; the gradient is given as it is (already clipped).
struct AdamFactors {
    float lr;          // learning rate / (1 - beta1^t)
    float root_scale;  // 1 / sqrt(1 - beta2^t)
    float epsilon;
    float beta1;  // decay of the moments, beta^elapsed
    float beta2;
    float gain1;  // 1 - beta1, 1 - beta2 of a single step
    float gain2;
};

// The straight-through window of one snapshot: features j of a row.
struct WindowBounds {
    const float* bias;
    const float* unit;
    const float* theta;
    const float* closed_slope;
    float half_window;
    float gradient_scale;
};

struct StepKernels {
    size_t (*collect_fp32)(const float* p, const CollectBounds* bounds, size_t n, uint32_t* out);
    size_t (*collect_bf16)(const uint16_t* p, const CollectBounds* bounds, size_t n, uint32_t* out);
    // of p_j = token_scale * scale[j] * p[j]
    size_t (*collect_int32)(const int32_t* p, float token_scale, const float* scale, const CollectBounds* bounds,
                            size_t n, uint32_t* out);

    // out[i] = sum_j a[j] rows[i][j] for i < n_rows
    void (*dots_fp32)(const float* a, const float* const* rows, size_t n_rows, size_t n, float* out);
    void (*dots_bf16)(const float* a, const uint16_t* const* rows, size_t n_rows, size_t n, float* out);

    // acc[j] += sum_i c[i] rows[i][j]
    void (*combine_fp32)(float* acc, const float* const* rows, const float* c, size_t n_rows, size_t n);
    void (*combine_bf16)(float* acc, const uint16_t* const* rows, const float* c, size_t n_rows, size_t n);

    float (*sum_squares_fp32)(const float* a, size_t n);
    float (*sum_squares_bf16)(const uint16_t* a, size_t n);
    float (*sum_fourth_powers_fp32)(const float* a, size_t n);
    float (*sum_fourth_powers_bf16)(const uint16_t* a, size_t n);
    float (*largest_fp32)(const float* a, size_t n);  // magnitude
    float (*largest_bf16)(const uint16_t* a, size_t n);

    void (*widen_bf16)(const uint16_t* a, float* out, size_t n);
    void (*narrow_bf16)(const float* a, uint16_t* out, size_t n);              // to nearest even
    void (*quantize)(const float* a, float factor, int8_t* out, size_t n);    // nearest of a * factor, in -127..127
    void (*scale_columns)(const float* a, const float* c, float* out, size_t n);  // out = a * c
    void (*scale)(float* a, float c, size_t n);
    void (*scale_bf16)(uint16_t* a, float c, size_t n);

    // total += sum_j tanh(c z_j) with z_j = f * norms[j] over the open gates (bits of `gates`); and
    // slope_sums[j] += f * c (1 - tanh^2); for `linear` (the l1 penalty) z_j itself and a slope of 1.
    float (*activity)(float f, const float* norms, uint64_t gates, float c, bool linear, float* slope_sums, size_t n);
    // out[j] = c (1 - tanh(c f norms[j])^2), or 1 for `linear`; for open gates. Closed ones: the slope at 0.
    void (*activity_slope)(float f, const float* norms, uint64_t gates, float c, bool linear, float* out, size_t n);

    // sums[j] += gradient_scale * inner[j] + closed_slope[j] where h = p[j] + bias[j] > 0, unit > 0 and
    // |h unit - theta| < half_window.
    void (*window_fp32)(const float* p, const float* inner, const WindowBounds* bounds, size_t n, float* sums);
    void (*window_bf16)(const uint16_t* p, const uint16_t* inner, const WindowBounds* bounds, size_t n, float* sums);

    void (*adam_fp32)(float* w, float* m, float* v, const float* g, const AdamFactors* factors, size_t n);
    // A block of at most 256 neighbours: bf16 weights with stochastic rounding, 8-bit moments (train/state.py).
    // `seed` and `index` (of the first element) make the random bits.
    void (*adam_8bit)(uint16_t* w, int8_t* m, float* m_scale, uint8_t* v, float* v_scale, const float* g,
                      const AdamFactors* factors, uint32_t seed, uint32_t index, size_t n);
};

extern const StepKernels step_portable;
extern const StepKernels step_avx2;         // AVX2, FMA
extern const StepKernels step_avx512;       // AVX-512 F, BW, DQ, VL
extern const StepKernels step_avx512_bf16;  // and AVX-512 BF16

}  // namespace crosscoder
