// The training step's part of crosscoder._core: checks of shapes, nothing else. The Python faces are
// kernels/*/native.py; bf16 numbers are uint16 bits.

#include <memory>
#include <optional>
#include <tuple>

#include "step/batch.hpp"
#include "bind/bindings.hpp"
#include "bind/bindings_code.hpp"
#include "step/decoder.hpp"
#include "step/encoder.hpp"
#include "core/huge_pages.hpp"
#include "step/rank_encoder.hpp"
#include "step/step.hpp"
#include "step/threshold.hpp"
#include "step/updater.hpp"

namespace py = pybind11;

namespace crosscoder {
namespace {

using arrays::code_of;
using arrays::CodeTuple;
using arrays::in;
using arrays::in_or_null;
using arrays::length;
using arrays::make;
using arrays::out;
using arrays::out_or_null;
using arrays::Shape;

const StepKernels& kernels() { return step_kernels(active_level()); }

bool is_bf16(const py::object& object) {
    return py::isinstance<py::array>(object) &&
           py::reinterpret_borrow<py::array>(object).dtype().equal(py::dtype::of<std::uint16_t>());
}

// Weights (rows..., width), fp32 or bf16.
RowsView rows_of(const py::object& object, const char* name, const Shape& shape, std::size_t width) {
    if (is_bf16(object)) {
        return {in<std::uint16_t>(object, name, shape), true, width};
    }
    return {in<float>(object, name, shape), false, width};
}

ProductTile tile_of(const py::object& object, const char* name, std::size_t first, std::size_t n_rows,
                    std::size_t n_features) {
    const std::size_t n = length(object, name, 1, 2);
    if (first + n > n_features) {
        throw py::value_error(std::string(name) + " reaches beyond feature " + std::to_string(n_features));
    }
    const auto array = py::reinterpret_borrow<py::array>(object);
    if (array.dtype().equal(py::dtype::of<std::int32_t>())) {
        return {in<std::int32_t>(object, name, {n_rows, n}), ProductType::int32, first, n};
    }
    if (is_bf16(object)) {
        return {in<std::uint16_t>(object, name, {n_rows, n}), ProductType::bf16, first, n};
    }
    return {in<float>(object, name, {n_rows, n}), ProductType::fp32, first, n};
}

// (feature_offsets, tokens, order), as `transpose` returned it.
using OrderTuple = std::tuple<py::object, py::object, py::object>;

OrderView order_of(const OrderTuple& tuple, const CodeView& code) {
    const auto& [feature_offsets, tokens, order] = tuple;
    return {in<std::int64_t>(feature_offsets, "feature_offsets", {code.n_features + 1}),
            in<std::int32_t>(tokens, "tokens", {code.n_pairs}), in<std::int64_t>(order, "order", {code.n_pairs})};
}

// (tanh_scale, linear, shared, window)
using PenaltyTuple = std::tuple<float, bool, bool, float>;

PenaltyView penalty_of(const PenaltyTuple& tuple) {
    return {std::get<0>(tuple), std::get<1>(tuple), std::get<2>(tuple), std::get<3>(tuple)};
}

// (cut_F, width0_F, width1_F, margin0_B, margin1_B, scale_F, token_scale_B), None where there is none.
using RuleTuple = std::tuple<py::object, py::object, py::object, py::object, py::object, py::object, py::object>;

CandidateRule rule_of(const RuleTuple& tuple, std::size_t B, std::size_t F, ProductType type) {
    const auto& [cut, width0, width1, margin0, margin1, scale, token_scale] = tuple;
    const CandidateRule rule = {in_or_null<float>(cut, "cut", {F}),
                                in<float>(width0, "width0", {F}),
                                in_or_null<float>(width1, "width1", {F}),
                                in<float>(margin0, "margin0", {B}),
                                in_or_null<float>(margin1, "margin1", {B}),
                                in_or_null<float>(scale, "scale", {F}),
                                in_or_null<float>(token_scale, "token_scale", {B})};
    if ((rule.width1_F == nullptr) != (rule.margin1_B == nullptr)) {
        throw py::value_error("width1 and margin1 go together");
    }
    if (type == ProductType::int32 && (rule.scale_F == nullptr || rule.token_scale_B == nullptr)) {
        throw py::value_error("int32 products need scale and token_scale");
    }
    return rule;
}

// Keeps the arrays that an Encoder reads alive beside it.
template <class E>
struct Holder {
    py::object x, weights, bias, extra;
    std::size_t n_tokens = 0;
    std::size_t n_features = 0;
    std::unique_ptr<E> encoder;
};

struct EncoderInputs {
    const float* x;
    std::size_t n_tokens;
    RowsView weights;
    const float* bias;
    std::size_t n_features;
};

EncoderInputs encoder_inputs(const py::object& x, const py::object& weights, const py::object& bias) {
    const std::size_t B = length(x, "x", 0, 2);
    const std::size_t width = length(x, "x", 1, 2);
    const std::size_t F = length(weights, "weights", 0, 2);
    return {in<float>(x, "x", {B, width}), B, rows_of(weights, "weights", {F, width}, width),
            in<float>(bias, "bias", {F}), F};
}

using EncoderHolder = Holder<Encoder>;
using RankHolder = Holder<RankEncoder>;

void bind_encoders(py::module_& m) {
    py::class_<EncoderHolder>(m, "Encoder")
        .def(py::init([](const py::object& x, const py::object& weights, const py::object& bias) {
                 const EncoderInputs inputs = encoder_inputs(x, weights, bias);
                 auto holder = std::make_unique<EncoderHolder>();
                 *holder = {x, weights, bias, py::none(), inputs.n_tokens, inputs.n_features,
                            std::make_unique<Encoder>(inputs.x, inputs.n_tokens, inputs.weights, inputs.bias,
                                                      inputs.n_features)};
                 return holder;
             }),
             py::arg("x"), py::arg("weights"), py::arg("bias"))
        .def(
            "add",
            [](EncoderHolder& self, const py::object& products, std::size_t first, const RuleTuple& rule,
               const py::object& keep_scale, const py::object& keep_level, const py::object& keep_also,
               int n_threads) {
                const std::size_t F = self.n_features;
                const ProductTile tile = tile_of(products, "products", first, self.n_tokens, F);
                const CandidateRule candidates = rule_of(rule, self.n_tokens, F, tile.type);
                if (candidates.cut_F == nullptr) {
                    throw py::value_error("cut must be an array");
                }
                const KeepRule keep = {in<float>(keep_scale, "keep_scale", {F}),
                                       in<float>(keep_level, "keep_level", {F}),
                                       in_or_null<float>(keep_also, "keep_also", {F})};
                const unsigned threads = arrays::threads(n_threads);
                const ReleasedGil released;
                return self.encoder->add(kernels(), tile, candidates, keep, threads);
            },
            py::arg("products"), py::arg("first"), py::arg("rule"), py::arg("keep_scale"), py::arg("keep_level"),
            py::arg("keep_also"), py::arg("n_threads"))
        .def(
            "finish",
            [](EncoderHolder& self, const py::object& norms, const py::object& theta, bool shared, int n_threads) {
                const std::size_t K = length(norms, "norms", 1, 2);
                const auto* norms_FK = in<float>(norms, "norms", {self.n_features, K});
                const auto* theta_F = in<float>(theta, "theta", {self.n_features});
                if (K < 1 || K > 64) {
                    throw py::value_error("a sparse code holds the gates of 1 to 64 snapshots, not " +
                                          std::to_string(K));
                }
                const std::size_t n = self.encoder->n_pairs();
                auto row_offsets = make<std::int64_t>({self.n_tokens + 1});
                auto features = make<std::int32_t>({n});
                auto values = make<float>({n});
                auto gates = make<std::int64_t>({n});
                auto* bits = reinterpret_cast<std::uint64_t*>(gates.mutable_data());
                std::int64_t* offsets = row_offsets.mutable_data();
                std::int32_t* ids = features.mutable_data();
                float* h = values.mutable_data();
                const unsigned threads = arrays::threads(n_threads);
                {
                    const ReleasedGil released;
                    self.encoder->finish(norms_FK, K, theta_F, shared, offsets, ids, h, bits, threads);
                }
                return py::make_tuple(row_offsets, features, values, gates);
            },
            py::arg("norms"), py::arg("theta"), py::arg("shared"), py::arg("n_threads"));

    py::class_<RankHolder>(m, "RankEncoder")
        .def(py::init([](const py::object& x, const py::object& weights, const py::object& bias,
                         const py::object& largest_norm, std::size_t top_k, bool whole_batch) {
                 const EncoderInputs inputs = encoder_inputs(x, weights, bias);
                 if (top_k < 1) {
                     throw py::value_error("top_k must be at least 1");
                 }
                 auto holder = std::make_unique<RankHolder>();
                 *holder = {x, weights, bias, largest_norm, inputs.n_tokens, inputs.n_features,
                            std::make_unique<RankEncoder>(inputs.x, inputs.n_tokens, inputs.weights, inputs.bias,
                                                          in<float>(largest_norm, "largest_norm", {inputs.n_features}),
                                                          top_k, whole_batch)};
                 return holder;
             }),
             py::arg("x"), py::arg("weights"), py::arg("bias"), py::arg("largest_norm"), py::arg("top_k"),
             py::arg("whole_batch"))
        .def(
            "add",
            [](RankHolder& self, const py::object& products, std::size_t first, const RuleTuple& rule, float relative,
               int n_threads) {
                const ProductTile tile = tile_of(products, "products", first, self.n_tokens, self.n_features);
                const CandidateRule candidates = rule_of(rule, self.n_tokens, self.n_features, tile.type);
                const unsigned threads = arrays::threads(n_threads);
                const ReleasedGil released;
                self.encoder->add(kernels(), tile, candidates, relative, threads);
            },
            py::arg("products"), py::arg("first"), py::arg("rule"), py::arg("relative"), py::arg("n_threads"))
        .def(
            "finish",
            [](RankHolder& self, int n_threads) {
                const unsigned threads = arrays::threads(n_threads);
                {
                    const ReleasedGil released;
                    self.encoder->select(kernels(), threads);
                }
                const std::size_t n = self.encoder->n_pairs();
                auto row_offsets = make<std::int64_t>({self.n_tokens + 1});
                auto features = make<std::int32_t>({n});
                auto values = make<float>({n});
                self.encoder->finish(row_offsets.mutable_data(), features.mutable_data(), values.mutable_data());
                return py::make_tuple(row_offsets, features, values, self.encoder->smallest_score());
            },
            py::arg("n_threads"));
}

void bind_code(py::module_& m) {
    m.def(
        "transpose",
        [](const CodeTuple& code, int n_threads) {
            const CodeView view = code_of(code);
            auto offsets = make<std::int64_t>({view.n_features + 1});
            auto tokens = make<std::int32_t>({view.n_pairs});
            auto order = make<std::int64_t>({view.n_pairs});
            std::int64_t* to_offsets = offsets.mutable_data();
            std::int32_t* to_tokens = tokens.mutable_data();
            std::int64_t* to_order = order.mutable_data();
            const unsigned threads = arrays::threads(n_threads);
            {
                const ReleasedGil released;
                transpose(view, to_offsets, to_tokens, to_order, threads);
            }
            return py::make_tuple(offsets, tokens, order);
        },
        py::arg("code"), py::arg("n_threads"));
    m.def(
        "feature_sums",
        [](const CodeTuple& code, const OrderTuple& order, const py::object& norms, const py::object& theta,
           const PenaltyTuple& penalty, int n_threads) {
            const CodeView view = code_of(code);
            const OrderView by_feature = order_of(order, view);
            const std::size_t F = view.n_features;
            const std::size_t K = view.n_snapshots;
            auto activity = make<float>({F});
            auto slope = make<float>({F, K});
            auto fired = make<std::int64_t>({F});
            auto open = make<std::int64_t>({K});
            auto above = make<float>({F});
            auto n_above = make<std::int64_t>({F});
            const FeatureSums sums = {activity.mutable_data(), slope.mutable_data(), fired.mutable_data(),
                                      open.mutable_data(),     above.mutable_data(), n_above.mutable_data()};
            const auto* norms_FK = in<float>(norms, "norms", {F, K});
            const auto* theta_F = in<float>(theta, "theta", {F});
            const PenaltyView options = penalty_of(penalty);
            const unsigned threads = arrays::threads(n_threads);
            {
                const ReleasedGil released;
                feature_sums(kernels(), view, by_feature, norms_FK, theta_F, options, sums, threads);
            }
            return py::make_tuple(activity, slope, fired, open, above, n_above);
        },
        py::arg("code"), py::arg("order"), py::arg("norms"), py::arg("theta"), py::arg("penalty"),
        py::arg("n_threads"));
}

void bind_decoders(py::module_& m) {
    m.def(
        "decode",
        [](const CodeTuple& code, const py::object& W_dec, const py::object& b_dec, const py::object& target,
           const py::object& result, int n_threads) {
            const CodeView view = code_of(code);
            const std::size_t D = length(b_dec, "b_dec", 1, 2);
            const Shape batch = {view.n_tokens, view.n_snapshots, D};
            const RowsView rows = rows_of(W_dec, "W_dec", {view.n_features, view.n_snapshots, D}, D);
            const auto* bias = in<float>(b_dec, "b_dec", {view.n_snapshots, D});
            const auto* x = in_or_null<float>(target, "target", batch);
            auto* to = out<float>(result, "out", batch);
            const unsigned threads = arrays::threads(n_threads);
            const ReleasedGil released;
            decode(kernels(), view, rows, bias, x, to, threads);
        },
        py::arg("code"), py::arg("W_dec"), py::arg("b_dec"), py::arg("target"), py::arg("out"), py::arg("n_threads"));
    m.def(
        "pair_gradients",
        [](const CodeTuple& code, const py::object& W_dec, const py::object& b_dec,
           const py::object& target, float gradient_scale, const py::object& weight, const py::object& norms, const py::object& theta,
           const PenaltyTuple& penalty, const py::object& residual, const py::object& error, const py::object& dh,
           const py::object& threshold, int n_threads) {
            const CodeView view = code_of(code);
            const std::size_t D = length(residual, "residual", 2, 3);
            const std::size_t F = view.n_features;
            const std::size_t K = view.n_snapshots;
            const Shape batch = {view.n_tokens, K, D};
            const RowsView rows = rows_of(W_dec, "W_dec", {F, K, D}, D);
            const auto* bias = in_or_null<float>(b_dec, "b_dec", {K, D});
            const auto* x = in_or_null<float>(target, "target", batch);
            if ((bias == nullptr) != (x == nullptr)) {
                throw py::value_error("b_dec and target go together");
            }
            const auto* weight_F = in<float>(weight, "weight", {F});
            const auto* norms_FK = in<float>(norms, "norms", {F, K});
            const auto* theta_F = in<float>(theta, "theta", {F});
            const PenaltyView options = penalty_of(penalty);
            auto* to = out<float>(residual, "residual", batch);
            auto* error_BK = out<float>(error, "error", {view.n_tokens, K});
            const PairGradients pairs = {out<float>(dh, "dh", {view.n_pairs}),
                                         out_or_null<float>(threshold, "threshold", {view.n_pairs})};
            const unsigned threads = arrays::threads(n_threads);
            const ReleasedGil released;
            pair_gradients(kernels(), view, rows, bias, x, gradient_scale, weight_F, norms_FK, theta_F, options, to,
                           error_BK, pairs, threads);
        },
        py::arg("code"), py::arg("W_dec"), py::arg("b_dec"), py::arg("target"), py::arg("gradient_scale"),
        py::arg("weight"), py::arg("norms"), py::arg("theta"), py::arg("penalty"), py::arg("residual"), py::arg("error"), py::arg("dh"),
        py::arg("threshold"), py::arg("n_threads"));
}

void bind_threshold(py::module_& m) {
    m.def(
        "threshold_tile",
        [](const py::object& h, const py::object& inner, std::size_t first, const py::object& bias,
           const py::object& unit, const py::object& theta, const py::object& closed_slope, float window,
           float gradient_scale, const py::object& sums, int n_threads) {
            const std::size_t n_rows = length(h, "h", 0, 2);
            const std::size_t F = length(bias, "bias", 0, 1);
            const ProductTile tile = tile_of(h, "h", first, n_rows, F);
            const ProductTile products = tile_of(inner, "inner", first, n_rows, F);
            if (tile.type != products.type || tile.n != products.n || tile.type == ProductType::int32) {
                throw py::value_error("h and inner must be fp32 or bf16 of one shape");
            }
            const auto* bias_F = in<float>(bias, "bias", {F});
            const auto* unit_F = in<float>(unit, "unit", {F});
            const auto* theta_F = in<float>(theta, "theta", {F});
            const auto* slope_F = in<float>(closed_slope, "closed_slope", {F});
            auto* sums_F = out<float>(sums, "sums", {F});
            const unsigned threads = arrays::threads(n_threads);
            const ReleasedGil released;
            threshold_tile(kernels(), tile, products, n_rows, bias_F, unit_F, theta_F, slope_F, window, gradient_scale,
                           sums_F, threads);
        },
        py::arg("h"), py::arg("inner"), py::arg("first"), py::arg("bias"), py::arg("unit"), py::arg("theta"),
        py::arg("closed_slope"), py::arg("window"), py::arg("gradient_scale"), py::arg("sums"), py::arg("n_threads"));
    m.def(
        "threshold_open_gates",
        [](const CodeTuple& code, const OrderTuple& order, const py::object& chosen, const py::object& weight,
           const py::object& norms, const py::object& theta, const PenaltyTuple& penalty, const py::object& gradient,
           int n_threads) {
            const CodeView view = code_of(code);
            const OrderView by_feature = order_of(order, view);
            const std::size_t F = view.n_features;
            const auto* chosen_B = in<std::uint8_t>(chosen, "chosen", {view.n_tokens});
            const auto* weight_F = in<float>(weight, "weight", {F});
            const auto* norms_FK = in<float>(norms, "norms", {F, view.n_snapshots});
            const auto* theta_F = in<float>(theta, "theta", {F});
            const PenaltyView options = penalty_of(penalty);
            auto* gradient_F = out<float>(gradient, "gradient", {F});
            const unsigned threads = arrays::threads(n_threads);
            const ReleasedGil released;
            threshold_open_gates(kernels(), view, by_feature, chosen_B, weight_F, norms_FK, theta_F, options,
                                 gradient_F, threads);
        },
        py::arg("code"), py::arg("order"), py::arg("chosen"), py::arg("weight"), py::arg("norms"), py::arg("theta"),
        py::arg("penalty"), py::arg("gradient"), py::arg("n_threads"));
}

void bind_batch(py::module_& m) {
    m.def(
        "prefer_huge_pages",
        [](py::array array) {
            if (!array.writeable()) {
                throw py::value_error("array must be writable");
            }
            prefer_huge_pages(array.mutable_data(), static_cast<std::size_t>(array.nbytes()));
        },
        py::arg("array"));
    m.def(
        "prepare_batch",
        [](const py::object& x, const py::object& fourth, const py::object& bf16, const py::object& int8,
           const py::object& int8_scale, const py::object& int8_norm, const py::object& inverse_column_scale,
           int n_threads) {
            const std::size_t B = length(x, "x", 0, 2);
            const std::size_t width = length(x, "x", 1, 2);
            const auto* rows = in<float>(x, "x", {B, width});
            const PreparedBatch prepared = {out<float>(fourth, "fourth", {B}),
                                            out_or_null<std::uint16_t>(bf16, "bf16", {B, width}),
                                            out_or_null<std::int8_t>(int8, "int8", {B, width}),
                                            out_or_null<float>(int8_scale, "int8_scale", {B}),
                                            out_or_null<float>(int8_norm, "int8_norm", {B}),
                                            in_or_null<float>(inverse_column_scale, "inverse_column_scale", {width})};
            if (prepared.int8 != nullptr && (prepared.int8_scale_B == nullptr || prepared.int8_norm_B == nullptr ||
                                             prepared.inverse_column_scale == nullptr)) {
                throw py::value_error("int8 rows need int8_scale, int8_norm and inverse_column_scale");
            }
            const unsigned threads = arrays::threads(n_threads);
            const ReleasedGil released;
            prepare_batch(kernels(), rows, B, width, prepared, threads);
        },
        py::arg("x"), py::arg("fourth"), py::arg("bf16"), py::arg("int8"), py::arg("int8_scale"),
        py::arg("int8_norm"), py::arg("inverse_column_scale"), py::arg("n_threads"));
    m.def(
        "column_sums",
        [](const py::object& a, const py::object& sums, int n_threads) {
            const std::size_t rows = length(a, "a", 0, 2);
            const std::size_t width = length(a, "a", 1, 2);
            const auto* values = in<float>(a, "a", {rows, width});
            auto* to = out<float>(sums, "sums", {width});
            const unsigned threads = arrays::threads(n_threads);
            const ReleasedGil released;
            column_sums(kernels(), values, rows, width, to, threads);
        },
        py::arg("a"), py::arg("sums"), py::arg("n_threads"));
    m.def(
        "mix_snapshots",
        [](const py::object& x, const py::object& mix, const py::object& result, int n_threads) {
            const std::size_t B = length(x, "x", 0, 3);
            const std::size_t K = length(x, "x", 1, 3);
            const std::size_t D = length(x, "x", 2, 3);
            const auto* values = in<float>(x, "x", {B, K, D});
            const auto* factors = in<float>(mix, "mix", {K, K});
            auto* to = out<float>(result, "out", {B, K, D});
            const unsigned threads = arrays::threads(n_threads);
            const ReleasedGil released;
            mix_snapshots(kernels(), values, factors, B, K, D, to, threads);
        },
        py::arg("x"), py::arg("mix"), py::arg("out"), py::arg("n_threads"));
    m.def(
        "squared_distances",
        [](const py::object& x, const py::object& mean, const py::object& result, int n_threads) {
            const std::size_t B = length(x, "x", 0, 3);
            const std::size_t K = length(x, "x", 1, 3);
            const std::size_t D = length(x, "x", 2, 3);
            const auto* values = in<float>(x, "x", {B, K, D});
            const auto* center = in<float>(mean, "mean", {K, D});
            auto* to = out<float>(result, "out", {B, K});
            const unsigned threads = arrays::threads(n_threads);
            const ReleasedGil released;
            squared_distances(values, center, B, K, D, to, threads);
        },
        py::arg("x"), py::arg("mean"), py::arg("out"), py::arg("n_threads"));
}

// (w, m, v, m_scale, v_scale): fp32 with scales None, or bf16 bits, int8, uint8.
using MatrixTuple = std::tuple<py::object, py::object, py::object, py::object, py::object>;

MatrixState matrix_of(const MatrixTuple& tuple, const char* name, std::size_t F, std::size_t K, std::size_t D) {
    const auto& [w, m, v, m_scale, v_scale] = tuple;
    const Shape shape = {F, K, D};
    const Shape blocks = {F, K, (D + 255) / 256};
    if (is_bf16(w)) {
        return {out<std::uint16_t>(w, name, shape), out<std::int8_t>(m, name, shape),
                out<std::uint8_t>(v, name, shape), out<float>(m_scale, name, blocks),
                out<float>(v_scale, name, blocks)};
    }
    return {out<float>(w, name, shape), out<float>(m, name, shape), out<float>(v, name, shape), nullptr, nullptr};
}

MatrixState vector_of(const MatrixTuple& tuple, const char* name, std::size_t F) {
    return {out<float>(std::get<0>(tuple), name, {F}), out<float>(std::get<1>(tuple), name, {F}),
            out<float>(std::get<2>(tuple), name, {F}), nullptr, nullptr};
}

// (norms, fourth, enc_bf16, enc_int8, enc_scale, enc_norm, column_scale)
using DerivedTuple = std::tuple<py::object, py::object, py::object, py::object, py::object, py::object, py::object>;

DerivedRows derived_of(const DerivedTuple& tuple, std::size_t F, std::size_t K, std::size_t D) {
    const auto& [norms, fourth, enc_bf16, enc_int8, enc_scale, enc_norm, column_scale] = tuple;
    const DerivedRows derived = {out<float>(norms, "norms", {F, K}),
                                 out_or_null<float>(fourth, "fourth", {F}),
                                 out_or_null<std::uint16_t>(enc_bf16, "enc_bf16", {F, K, D}),
                                 out_or_null<std::int8_t>(enc_int8, "enc_int8", {F, K, D}),
                                 out_or_null<float>(enc_scale, "enc_scale", {F}),
                                 out_or_null<float>(enc_norm, "enc_norm", {F}),
                                 in_or_null<float>(column_scale, "column_scale", {K * D})};
    if (derived.enc_int8 != nullptr && (derived.enc_scale_F == nullptr || derived.enc_norm_F == nullptr ||
                                        derived.column_scale == nullptr)) {
        throw py::value_error("enc_int8 needs enc_scale, enc_norm and column_scale");
    }
    return derived;
}

// (lr, beta1, beta2, epsilon, t, lazy, gradient_factor, norm_limit, seed)
using OptionsTuple = std::tuple<double, double, double, float, std::int32_t, bool, float, float, std::uint32_t>;

UpdateOptions options_of(const OptionsTuple& tuple) {
    const auto& [lr, beta1, beta2, epsilon, t, lazy, gradient_factor, norm_limit, seed] = tuple;
    return {lr, beta1, beta2, epsilon, t, lazy, gradient_factor, norm_limit, seed};
}

// (dh, x, residual, residual_scale, dnorm, norms, every, x_sum, theta)
using PartsTuple = std::tuple<py::object, py::object, py::object, float, py::object, py::object, py::object,
                              py::object, py::object>;

GradientParts parts_of(const PartsTuple& tuple, const CodeView& code, std::size_t D) {
    const auto& [dh, x, residual, residual_scale, dnorm, norms, every, x_sum, theta] = tuple;
    const std::size_t F = code.n_features;
    const std::size_t K = code.n_snapshots;
    return {in<float>(dh, "dh", {code.n_pairs}),
            in<float>(x, "x", {code.n_tokens, K, D}),
            in<float>(residual, "residual", {code.n_tokens, K, D}),
            residual_scale,
            in<float>(dnorm, "dnorm", {F, K}),
            in<float>(norms, "norms", {F, K}),
            in_or_null<float>(every, "every", {F}),
            in_or_null<float>(x_sum, "x_sum", {K, D}),
            in<float>(theta, "theta", {F})};
}

void bind_updates(py::module_& m) {
    m.def(
        "gradient_squares",
        [](const CodeTuple& code, const OrderTuple& order, const PartsTuple& parts, const py::object& W_dec,
           int n_threads) {
            const CodeView view = code_of(code);
            const OrderView by_feature = order_of(order, view);
            const std::size_t D = length(W_dec, "W_dec", 2, 3);
            const GradientParts gradient = parts_of(parts, view, D);
            const RowsView rows = rows_of(W_dec, "W_dec", {view.n_features, view.n_snapshots, D}, D);
            auto squares = make<float>({view.n_features});
            float* to = squares.mutable_data();
            const unsigned threads = arrays::threads(n_threads);
            {
                const ReleasedGil released;
                gradient_squares(kernels(), view, by_feature, gradient, rows, to, threads);
            }
            return squares;
        },
        py::arg("code"), py::arg("order"), py::arg("parts"), py::arg("W_dec"), py::arg("n_threads"));
    m.def(
        "gradient_rows",
        [](const CodeTuple& code, const OrderTuple& order, const PartsTuple& parts, const py::object& W_dec,
           const py::object& dW_enc, const py::object& dW_dec, int n_threads) {
            const CodeView view = code_of(code);
            const OrderView by_feature = order_of(order, view);
            const std::size_t D = length(W_dec, "W_dec", 2, 3);
            const Shape shape = {view.n_features, view.n_snapshots, D};
            const GradientParts gradient = parts_of(parts, view, D);
            const RowsView rows = rows_of(W_dec, "W_dec", shape, D);
            auto* to_enc = out<float>(dW_enc, "dW_enc", shape);
            auto* to_dec = out<float>(dW_dec, "dW_dec", shape);
            const unsigned threads = arrays::threads(n_threads);
            const ReleasedGil released;
            gradient_rows(kernels(), view, by_feature, gradient, rows, to_enc, to_dec, threads);
        },
        py::arg("code"), py::arg("order"), py::arg("parts"), py::arg("W_dec"), py::arg("dW_enc"), py::arg("dW_dec"),
        py::arg("n_threads"));
    m.def(
        "update_rows",
        [](const CodeTuple& code, const OrderTuple& order, const PartsTuple& parts, const py::object& db_enc,
           const MatrixTuple& W_enc, const MatrixTuple& W_dec, const MatrixTuple& bias, const py::object& last_step,
           const DerivedTuple& derived, const OptionsTuple& options, int n_threads) {
            const CodeView view = code_of(code);
            const OrderView by_feature = order_of(order, view);
            const std::size_t F = view.n_features;
            const std::size_t K = view.n_snapshots;
            const std::size_t D = length(std::get<0>(W_dec), "W_dec", 2, 3);
            const GradientParts gradient = parts_of(parts, view, D);
            const auto* db = in<float>(db_enc, "db_enc", {F});
            const MatrixState encoder = matrix_of(W_enc, "W_enc", F, K, D);
            const MatrixState decoder = matrix_of(W_dec, "W_dec", F, K, D);
            const MatrixState b = vector_of(bias, "b_enc", F);
            auto* last = out<std::int32_t>(last_step, "last_step", {F});
            const DerivedRows rows = derived_of(derived, F, K, D);
            const bool bf16 = is_bf16(std::get<0>(W_dec));
            const UpdateOptions update = options_of(options);
            const unsigned threads = arrays::threads(n_threads);
            const ReleasedGil released;
            update_rows(kernels(), view, by_feature, gradient, db, encoder, decoder, b, bf16, last, rows, D, update,
                        threads);
        },
        py::arg("code"), py::arg("order"), py::arg("parts"), py::arg("db_enc"), py::arg("W_enc"), py::arg("W_dec"),
        py::arg("b_enc"), py::arg("last_step"), py::arg("derived"), py::arg("options"), py::arg("n_threads"));
    m.def(
        "update_dense_rows",
        [](const py::object& dW_enc, const py::object& dW_dec, const py::object& db_enc, const py::object& touched,
           std::size_t first, const MatrixTuple& W_enc, const MatrixTuple& W_dec, const MatrixTuple& bias, const py::object& last_step,
           const DerivedTuple& derived, const OptionsTuple& options, int n_threads) {
            const std::size_t F = length(std::get<0>(W_dec), "W_dec", 0, 3);
            const std::size_t K = length(std::get<0>(W_dec), "W_dec", 1, 3);
            const std::size_t D = length(std::get<0>(W_dec), "W_dec", 2, 3);
            const std::size_t n = length(db_enc, "db_enc", 0, 1);
            if (first + n > F) {
                throw py::value_error("the gradients reach beyond feature " + std::to_string(F));
            }
            const auto* d_enc = in<float>(dW_enc, "dW_enc", {n, K, D});
            const auto* d_dec = in<float>(dW_dec, "dW_dec", {n, K, D});
            const auto* db = in<float>(db_enc, "db_enc", {n});
            const auto* any = in<std::uint8_t>(touched, "touched", {n});
            const MatrixState encoder = matrix_of(W_enc, "W_enc", F, K, D);
            const MatrixState decoder = matrix_of(W_dec, "W_dec", F, K, D);
            const MatrixState b = vector_of(bias, "b_enc", F);
            auto* last = out<std::int32_t>(last_step, "last_step", {F});
            const DerivedRows rows = derived_of(derived, F, K, D);
            const bool bf16 = is_bf16(std::get<0>(W_dec));
            const UpdateOptions update = options_of(options);
            const unsigned threads = arrays::threads(n_threads);
            const ReleasedGil released;
            update_dense_rows(kernels(), d_enc, d_dec, db, any, first, n, K, encoder, decoder, b, bf16, last, rows, D,
                              update, threads);
        },
        py::arg("dW_enc"), py::arg("dW_dec"), py::arg("db_enc"), py::arg("touched"), py::arg("first"), py::arg("W_enc"),
        py::arg("W_dec"), py::arg("b_enc"), py::arg("last_step"), py::arg("derived"), py::arg("options"), py::arg("n_threads"));
    m.def(
        "derive_rows",
        [](const py::object& W_enc, const py::object& W_dec, const DerivedTuple& derived, int n_threads) {
            const std::size_t F = length(W_dec, "W_dec", 0, 3);
            const std::size_t K = length(W_dec, "W_dec", 1, 3);
            const std::size_t D = length(W_dec, "W_dec", 2, 3);
            if (is_bf16(W_enc) != is_bf16(W_dec)) {
                throw py::value_error("W_enc and W_dec must be of one dtype");
            }
            const RowsView encoder = rows_of(W_enc, "W_enc", {F, K, D}, K * D);
            const RowsView decoder = rows_of(W_dec, "W_dec", {F, K, D}, D);
            const DerivedRows rows = derived_of(derived, F, K, D);
            const unsigned threads = arrays::threads(n_threads);
            const ReleasedGil released;
            derive_rows(kernels(), encoder, decoder, 0, F, K, rows, threads);
        },
        py::arg("W_enc"), py::arg("W_dec"), py::arg("derived"), py::arg("n_threads"));
}

}  // namespace

void bind_step(py::module_& m) {
    bind_encoders(m);
    bind_code(m);
    bind_decoders(m);
    bind_threshold(m);
    bind_batch(m);
    bind_updates(m);
}

}  // namespace crosscoder
