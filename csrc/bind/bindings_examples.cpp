// crosscoder._core.collect_examples: checks of shapes, nothing else. Its Python face is
// python/crosscoder/evolution/examples.py.

#include "study/examples.hpp"

#include <tuple>

#include "bind/bindings.hpp"
#include "bind/bindings_code.hpp"

namespace py = pybind11;

namespace crosscoder {
namespace {

using namespace arrays;

// (fired, fired_any, sum, histogram)
using CountsTuple = std::tuple<py::object, py::object, py::object, py::object>;
// (rank, sequence, position, activations)
using KeptTuple = std::tuple<py::object, py::object, py::object, py::object>;

template <class Rank>
KeptTokens<Rank> kept_of(const KeptTuple& tuple, std::size_t F, std::size_t L) {
    const auto& [rank, sequence, position, activations] = tuple;
    const std::size_t n = length(rank, "rank", 1, 2);
    if (n == 0) {
        throw py::value_error("at least one token of each feature must be kept");
    }
    return {out<Rank>(rank, "rank", {F, n}), out<std::int32_t>(sequence, "sequence", {F, n}),
            out<std::int32_t>(position, "position", {F, n}), out<float>(activations, "activations", {F, n, L}), n};
}

void check_places(const std::int64_t* place_B, std::size_t B) {
    bool good = true;
    for (std::size_t b = 0; b < B; ++b) {
        good = good && place_B[b] >= 0 && (place_B[b] & 0x80000000) == 0 && (b == 0 || place_B[b - 1] < place_B[b]);
    }
    if (!good) {
        throw py::value_error("place must ascend, with sequences and positions from 0 to 2^31 - 1");
    }
}

}  // namespace

void bind_examples(py::module_& m) {
    m.attr("HISTOGRAM_BINS") = kHistogramBins;
    m.def(
        "collect_examples",
        [](const CodeTuple& code, const py::object& place, const CountsTuple& counts,
           const KeptTuple& strongest, const KeptTuple& sampled, std::size_t before, std::uint64_t seed,
           int n_threads) {
            const CodeView view = code_of(code);
            const std::size_t F = view.n_features;
            const std::size_t L = length(std::get<3>(strongest), "activations", 2, 3);
            const auto* place_B = in<std::int64_t>(place, "place", {view.n_tokens});
            check_places(place_B, view.n_tokens);
            if (before >= L) {
                throw py::value_error("a window of " + std::to_string(L) + " tokens cannot hold " +
                                      std::to_string(before) + " before its own");
            }
            const auto& [fired, fired_any, sum, histogram] = counts;
            const ExampleState state = {out<std::int64_t>(fired, "fired", {F, view.n_snapshots}),
                                        out<std::int64_t>(fired_any, "fired_any", {F}),
                                        out<double>(sum, "sum", {F}),
                                        out<std::int64_t>(histogram, "histogram", {F, kHistogramBins}),
                                        kept_of<float>(strongest, F, L),
                                        kept_of<std::uint64_t>(sampled, F, L),
                                        before,
                                        L,
                                        seed};
            const ReleasedGil released;
            collect_examples(view, place_B, state, threads(n_threads));
        },
        py::arg("code"), py::arg("place"), py::arg("counts"), py::arg("strongest"), py::arg("sampled"),
        py::arg("before"), py::arg("seed"), py::arg("n_threads"));
}

}  // namespace crosscoder
