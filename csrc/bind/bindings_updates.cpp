// Gradients of rows and the optimiser that updates them.

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>

#include "bind/bindings.hpp"
#include "bind/bindings_step.hpp"
#include "step/updater.hpp"

namespace py = pybind11;

namespace crosscoder {
namespace {

using namespace arrays;

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

UpdatedRows rows_to_update(std::size_t F, std::size_t K, const MatrixTuple& W_enc, const MatrixTuple& W_dec,
                           const MatrixTuple& bias, const py::object& last_step, const DerivedTuple& derived) {
    const std::size_t D = length(std::get<0>(W_dec), "W_dec", 2, 3);
    return {matrix_of(W_enc, "W_enc", F, K, D), matrix_of(W_dec, "W_dec", F, K, D), vector_of(bias, "b_enc", F),
            is_bf16(std::get<0>(W_dec)), out<std::int32_t>(last_step, "last_step", {F}),
            derived_of(derived, F, K, D), K, D};
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

}  // namespace

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
            {
                const ReleasedGil released;
                gradient_squares(kernels(), view, by_feature, gradient, rows, to, threads(n_threads));
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
            const ReleasedGil released;
            gradient_rows(kernels(), view, by_feature, gradient, rows, to_enc, to_dec, threads(n_threads));
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
            const UpdatedRows rows = rows_to_update(F, view.n_snapshots, W_enc, W_dec, bias, last_step, derived);
            const GradientParts gradient = parts_of(parts, view, rows.width);
            const auto* db = in<float>(db_enc, "db_enc", {F});
            const UpdateOptions update = options_of(options);
            const ReleasedGil released;
            update_rows(kernels(), view, by_feature, gradient, db, rows, update, threads(n_threads));
        },
        py::arg("code"), py::arg("order"), py::arg("parts"), py::arg("db_enc"), py::arg("W_enc"), py::arg("W_dec"),
        py::arg("b_enc"), py::arg("last_step"), py::arg("derived"), py::arg("options"), py::arg("n_threads"));
    m.def(
        "update_dense_rows",
        [](const py::object& dW_enc, const py::object& dW_dec, const py::object& db_enc, const py::object& touched,
           std::size_t first, const MatrixTuple& W_enc, const MatrixTuple& W_dec, const MatrixTuple& bias, const py::object& last_step,
           const DerivedTuple& derived, const OptionsTuple& options, int n_threads) {
            const auto [F, K, D] = lengths<3>(std::get<0>(W_dec), "W_dec");
            const UpdatedRows rows = rows_to_update(F, K, W_enc, W_dec, bias, last_step, derived);
            const std::size_t n = length(db_enc, "db_enc", 0, 1);
            if (first + n > F) {
                throw py::value_error("the gradients reach beyond feature " + std::to_string(F));
            }
            const auto* d_enc = in<float>(dW_enc, "dW_enc", {n, K, D});
            const auto* d_dec = in<float>(dW_dec, "dW_dec", {n, K, D});
            const auto* db = in<float>(db_enc, "db_enc", {n});
            const auto* any = in<std::uint8_t>(touched, "touched", {n});
            const UpdateOptions update = options_of(options);
            const ReleasedGil released;
            update_dense_rows(kernels(), d_enc, d_dec, db, any, first, n, rows, update, threads(n_threads));
        },
        py::arg("dW_enc"), py::arg("dW_dec"), py::arg("db_enc"), py::arg("touched"), py::arg("first"), py::arg("W_enc"),
        py::arg("W_dec"), py::arg("b_enc"), py::arg("last_step"), py::arg("derived"), py::arg("options"), py::arg("n_threads"));
    m.def(
        "derive_rows",
        [](const py::object& W_enc, const py::object& W_dec, const DerivedTuple& derived, int n_threads) {
            const auto [F, K, D] = lengths<3>(W_dec, "W_dec");
            if (is_bf16(W_enc) != is_bf16(W_dec)) {
                throw py::value_error("W_enc and W_dec must be of one dtype");
            }
            const RowsView encoder = rows_of(W_enc, "W_enc", {F, K, D}, K * D);
            const RowsView decoder = rows_of(W_dec, "W_dec", {F, K, D}, D);
            const DerivedRows rows = derived_of(derived, F, K, D);
            const ReleasedGil released;
            derive_rows(kernels(), encoder, decoder, 0, F, K, rows, threads(n_threads));
        },
        py::arg("W_enc"), py::arg("W_dec"), py::arg("derived"), py::arg("n_threads"));
}

}  // namespace crosscoder
