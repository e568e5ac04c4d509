// What is made of a sparse code: its transpose, sums by feature, reconstructions, gradients of its pairs.

#include <cstddef>
#include <cstdint>

#include "bind/bindings.hpp"
#include "bind/bindings_step.hpp"
#include "step/decoder.hpp"
#include "step/sparse_code.hpp"

namespace py = pybind11;

namespace crosscoder {

using namespace arrays;

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
            {
                const ReleasedGil released;
                transpose(view, to_offsets, to_tokens, to_order, threads(n_threads));
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
            {
                const ReleasedGil released;
                feature_sums(kernels(), view, by_feature, norms_FK, theta_F, options, sums, threads(n_threads));
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
            const ReleasedGil released;
            decode(kernels(), view, rows, bias, x, to, threads(n_threads));
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
            const ReleasedGil released;
            pair_gradients(kernels(), view, rows, bias, x, gradient_scale, weight_F, norms_FK, theta_F, options, to,
                           error_BK, pairs, threads(n_threads));
        },
        py::arg("code"), py::arg("W_dec"), py::arg("b_dec"), py::arg("target"), py::arg("gradient_scale"),
        py::arg("weight"), py::arg("norms"), py::arg("theta"), py::arg("penalty"), py::arg("residual"), py::arg("error"), py::arg("dh"),
        py::arg("threshold"), py::arg("n_threads"));
}

}  // namespace crosscoder
