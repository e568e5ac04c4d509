// A sparse code as the binding files take it.
#pragma once

#include <tuple>

#include "bind/bindings.hpp"
#include "step/sparse_code.hpp"

namespace crosscoder::arrays {

// (row_offsets, features, values, gates, n_snapshots, n_features)
using CodeTuple = std::tuple<py::object, py::object, py::object, py::object, std::size_t, std::size_t>;

inline CodeView code_of(const CodeTuple& tuple) {
    const auto& [row_offsets, features, values, gates, n_snapshots, n_features] = tuple;
    const std::size_t n_pairs = length(features, "features", 0, 1);
    const std::size_t n_offsets = length(row_offsets, "row_offsets", 0, 1);
    if (n_offsets == 0) {
        throw py::value_error("row_offsets is empty");
    }
    const CodeView view = {in<std::int64_t>(row_offsets, "row_offsets", {n_offsets}),
                           in<std::int32_t>(features, "features", {n_pairs}),
                           in<float>(values, "values", {n_pairs}),
                           reinterpret_cast<const std::uint64_t*>(in<std::int64_t>(gates, "gates", {n_pairs})),
                           n_offsets - 1,
                           n_pairs,
                           n_snapshots,
                           n_features};
    bool good = view.row_offsets[0] == 0 && view.row_offsets[view.n_tokens] == static_cast<std::int64_t>(n_pairs) &&
                n_snapshots >= 1 && n_snapshots <= 64;
    for (std::size_t b = 0; b < view.n_tokens; ++b) {
        good = good && view.row_offsets[b] <= view.row_offsets[b + 1];
    }
    for (std::size_t i = 0; i < n_pairs; ++i) {
        good = good && static_cast<std::uint64_t>(view.features[i]) < n_features;
    }
    if (!good) {
        throw py::value_error("not a sparse code: row_offsets must ascend from 0 to the number of pairs, features "
                              "must be below n_features, snapshots 1 to 64");
    }
    return view;
}

}  // namespace crosscoder::arrays
