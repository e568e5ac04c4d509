// What the binding files of the training step share: checks of shapes, nothing else. The Python faces are
// kernels/*/native.py; bf16 numbers are uint16 bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>

#include "bind/bindings.hpp"
#include "bind/bindings_code.hpp"
#include "core/cpu_features.hpp"
#include "step/encoder.hpp"
#include "step/sparse_code.hpp"
#include "step/step.hpp"

namespace crosscoder::arrays {

inline const StepKernels& kernels() { return step_kernels(active_level()); }

inline bool is_bf16(const py::object& object) {
    return py::isinstance<py::array>(object) &&
           py::reinterpret_borrow<py::array>(object).dtype().equal(py::dtype::of<std::uint16_t>());
}

// Weights (rows..., width), fp32 or bf16.
inline RowsView rows_of(const py::object& object, const char* name, const Shape& shape, std::size_t width) {
    if (is_bf16(object)) {
        return {in<std::uint16_t>(object, name, shape), true, width};
    }
    return {in<float>(object, name, shape), false, width};
}

// A tile of products (rows, features from `first` on), fp32, bf16 or int32.
inline ProductTile tile_of(const py::object& object, const char* name, std::size_t first, std::size_t n_rows,
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

inline OrderView order_of(const OrderTuple& tuple, const CodeView& code) {
    const auto& [feature_offsets, tokens, order] = tuple;
    return {in<std::int64_t>(feature_offsets, "feature_offsets", {code.n_features + 1}),
            in<std::int32_t>(tokens, "tokens", {code.n_pairs}), in<std::int64_t>(order, "order", {code.n_pairs})};
}

// (tanh_scale, linear, shared, window)
using PenaltyTuple = std::tuple<float, bool, bool, float>;

inline PenaltyView penalty_of(const PenaltyTuple& tuple) {
    return {std::get<0>(tuple), std::get<1>(tuple), std::get<2>(tuple), std::get<3>(tuple)};
}

}  // namespace crosscoder::arrays
