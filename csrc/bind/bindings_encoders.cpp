// The sparse encoders: from products, tile by tile, to a sparse code.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>

#include "bind/bindings.hpp"
#include "bind/bindings_step.hpp"
#include "step/encoder.hpp"
#include "step/rank_encoder.hpp"

namespace py = pybind11;

namespace crosscoder {
namespace {

using namespace arrays;

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
    const auto [B, width] = lengths<2>(x, "x");
    const std::size_t F = length(weights, "weights", 0, 2);
    return {in<float>(x, "x", {B, width}), B, rows_of(weights, "weights", {F, width}, width),
            in<float>(bias, "bias", {F}), F};
}

using EncoderHolder = Holder<Encoder>;
using RankHolder = Holder<RankEncoder>;

}  // namespace

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
                const ReleasedGil released;
                return self.encoder->add(kernels(), tile, candidates, keep, threads(n_threads));
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
                {
                    const ReleasedGil released;
                    self.encoder->finish(norms_FK, K, theta_F, shared, offsets, ids, h, bits, threads(n_threads));
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
                const ReleasedGil released;
                self.encoder->add(kernels(), tile, candidates, relative, threads(n_threads));
            },
            py::arg("products"), py::arg("first"), py::arg("rule"), py::arg("relative"), py::arg("n_threads"))
        .def(
            "finish",
            [](RankHolder& self, int n_threads) {
                {
                    const ReleasedGil released;
                    self.encoder->select(kernels(), threads(n_threads));
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

}  // namespace crosscoder
