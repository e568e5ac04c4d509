// The part of crosscoder._core for the geometry of bfloat16 decoders (uint16 bits); its Python face is
// crosscoder/evolution/geometry.py.

#include "bind/bindings.hpp"
#include "study/cosine_statistics.hpp"
#include "study/geometry.hpp"

namespace py = pybind11;

namespace crosscoder {
namespace {

using namespace arrays;

DecoderBlock block_of(const py::object& decoders) {
    const auto [n, K, D] = lengths<3>(decoders, "decoders");
    if (!has_geometry()) {
        throw py::value_error("this CPU has no bfloat16 instructions (geometry_available() tells)");
    }
    return {in<std::uint16_t>(decoders, "decoders", {n, K, D}), n, K, D};
}

}  // namespace

void bind_geometry(py::module_& m) {
    m.def(
        "add_cosines",
        [](const py::object& cosines, const py::object& groups, const py::object& sums, const py::object& counts,
           const py::object& histogram, const py::object& extremes, int n_threads) {
            const std::size_t n = length(cosines, "cosines", 0, 3);
            const std::size_t K = length(cosines, "cosines", 1, 3);
            const std::size_t n_pairs = K * (K + 1) / 2;
            const std::size_t n_groups = length(sums, "sums", 0, 2);
            const std::size_t n_bins = length(histogram, "histogram", 1, 2);
            const auto* values = in<float>(cosines, "cosines", {n, K, K});
            const auto* group_n = in<std::int32_t>(groups, "groups", {n});
            const CosineStatistics to = {out<double>(sums, "sums", {n_groups, n_pairs}),
                                         out<std::int64_t>(counts, "counts", {n_groups, n_pairs}),
                                         out<std::int64_t>(histogram, "histogram", {n_pairs, n_bins}),
                                         out<float>(extremes, "extremes", {2, n_pairs}), n_bins};
            for (std::size_t f = 0; f < n; ++f) {
                if (group_n[f] >= 0 && static_cast<std::size_t>(group_n[f]) >= n_groups) {
                    throw py::value_error("groups[" + std::to_string(f) + "] is " + std::to_string(group_n[f]) +
                                          ", but there are " + std::to_string(n_groups));
                }
            }
            if (n_bins == 0) {
                throw py::value_error("histogram has no bins");
            }
            const ReleasedGil released;
            add_cosines(values, group_n, n, K, to, threads(n_threads));
        },
        py::arg("cosines"), py::arg("groups"), py::arg("sums"), py::arg("counts"), py::arg("histogram"),
        py::arg("extremes"), py::arg("n_threads"));
    m.def("geometry_available", &has_geometry);
    m.def(
        "snapshot_products",
        [](const py::object& decoders, const py::object& products, int n_threads) {
            const DecoderBlock block = block_of(decoders);
            auto* to = out<float>(products, "products", {block.n, block.n_snapshots, block.n_snapshots});
            const ReleasedGil released;
            snapshot_products(block, to, threads(n_threads));
        },
        py::arg("decoders"), py::arg("products"), py::arg("n_threads"));
    m.def(
        "squared_norms",
        [](const py::object& decoders, const py::object& squares, int n_threads) {
            const DecoderBlock block = block_of(decoders);
            auto* to = out<float>(squares, "squares", {block.n, block.n_snapshots});
            const ReleasedGil released;
            squared_norms(block, to, threads(n_threads));
        },
        py::arg("decoders"), py::arg("squares"), py::arg("n_threads"));
    m.def("padded_width", &padded_width, py::arg("width"));
    m.def(
        "add_grams",
        [](const py::object& decoders, const py::object& grams, int n_threads) {
            const DecoderBlock block = block_of(decoders);
            const std::size_t padded = padded_width(block.width);
            auto* to = out<float>(grams, "grams", {block.n_snapshots, padded, padded});
            const ReleasedGil released;
            add_grams(block, to, threads(n_threads));
        },
        py::arg("decoders"), py::arg("grams"), py::arg("n_threads"));
    m.def(
        "pack_form",
        [](const py::object& gram, std::size_t width) {
            const std::size_t padded = padded_width(width);
            const auto* from = in<float>(gram, "gram", {padded, padded});
            auto form = make<std::uint16_t>({form_size(width)});
            auto* to = form.mutable_data();
            {
                const ReleasedGil released;
                pack_form(from, width, to);
            }
            return form;
        },
        py::arg("gram"), py::arg("width"));
    m.def(
        "quadratic_forms",
        [](const py::object& decoders, const py::object& forms, const py::object& values, int n_threads) {
            const DecoderBlock block = block_of(decoders);
            const auto* packed = in<std::uint16_t>(forms, "forms", {block.n_snapshots, form_size(block.width)});
            auto* to = out<float>(values, "values", {block.n, block.n_snapshots});
            const ReleasedGil released;
            quadratic_forms(block, packed, to, threads(n_threads));
        },
        py::arg("decoders"), py::arg("forms"), py::arg("values"), py::arg("n_threads"));
}

}  // namespace crosscoder
