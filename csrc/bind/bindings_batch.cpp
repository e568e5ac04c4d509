// What is made of a batch before it is encoded, and the thresholds of ranks.

#include <cstddef>
#include <cstdint>

#include "bind/bindings.hpp"
#include "bind/bindings_step.hpp"
#include "core/huge_pages.hpp"
#include "step/batch.hpp"
#include "step/threshold.hpp"

namespace py = pybind11;

namespace crosscoder {

using namespace arrays;

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
            const ReleasedGil released;
            threshold_tile(kernels(), tile, products, n_rows, bias_F, unit_F, theta_F, slope_F, window, gradient_scale,
                           sums_F, threads(n_threads));
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
            const ReleasedGil released;
            threshold_open_gates(kernels(), view, by_feature, chosen_B, weight_F, norms_FK, theta_F, options,
                                 gradient_F, threads(n_threads));
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
            const auto [B, width] = lengths<2>(x, "x");
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
            const ReleasedGil released;
            prepare_batch(kernels(), rows, B, width, prepared, threads(n_threads));
        },
        py::arg("x"), py::arg("fourth"), py::arg("bf16"), py::arg("int8"), py::arg("int8_scale"),
        py::arg("int8_norm"), py::arg("inverse_column_scale"), py::arg("n_threads"));
    m.def(
        "column_sums",
        [](const py::object& a, const py::object& sums, int n_threads) {
            const auto [rows, width] = lengths<2>(a, "a");
            const auto* values = in<float>(a, "a", {rows, width});
            auto* to = out<float>(sums, "sums", {width});
            const ReleasedGil released;
            column_sums(kernels(), values, rows, width, to, threads(n_threads));
        },
        py::arg("a"), py::arg("sums"), py::arg("n_threads"));
    m.def(
        "mix_snapshots",
        [](const py::object& x, const py::object& mix, const py::object& result, int n_threads) {
            const auto [B, K, D] = lengths<3>(x, "x");
            const auto* values = in<float>(x, "x", {B, K, D});
            const auto* factors = in<float>(mix, "mix", {K, K});
            auto* to = out<float>(result, "out", {B, K, D});
            const ReleasedGil released;
            mix_snapshots(kernels(), values, factors, B, K, D, to, threads(n_threads));
        },
        py::arg("x"), py::arg("mix"), py::arg("out"), py::arg("n_threads"));
    m.def(
        "squared_distances",
        [](const py::object& x, const py::object& mean, const py::object& result, int n_threads) {
            const auto [B, K, D] = lengths<3>(x, "x");
            const auto* values = in<float>(x, "x", {B, K, D});
            const auto* center = in<float>(mean, "mean", {K, D});
            auto* to = out<float>(result, "out", {B, K});
            const ReleasedGil released;
            squared_distances(values, center, B, K, D, to, threads(n_threads));
        },
        py::arg("x"), py::arg("mean"), py::arg("out"), py::arg("n_threads"));
}

}  // namespace crosscoder
