// The Python module crosscoder._core: checks of arguments, conversions, nothing else.
// Python sees these functions as python/crosscoder/_core.pyi declares them.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <exception>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind/bindings.hpp"
#include "bind/bindings_store.hpp"
#include "core/checksum.hpp"
#include "core/cpu_features.hpp"
#include "study/ngram_counter.hpp"

namespace py = pybind11;

namespace crosscoder {
namespace {

using arrays::str;

std::size_t size_of(const py::array& array, py::ssize_t axis) { return static_cast<std::size_t>(array.shape(axis)); }

// A numpy array that owns the vector's memory, without a copy.
template <class T>
py::array_t<T> to_array(std::vector<T>&& values) {
    auto* owned = new std::vector<T>(std::move(values));
    const py::capsule owner(owned, [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
    return py::array_t<T>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

std::uint64_t bind_xxh3_64(const py::object& data) {
    struct Buffer {
        Py_buffer view{};
        ~Buffer() { PyBuffer_Release(&view); }
    } buffer;
    if (PyObject_CheckBuffer(data.ptr()) == 0) {
        throw py::type_error("data must have the buffer protocol (bytes, numpy array, ...), not " +
                             str(py::type::of(data).attr("__name__")));
    }
    if (PyObject_GetBuffer(data.ptr(), &buffer.view, PyBUF_SIMPLE) != 0) {
        PyErr_Clear();
        throw py::value_error("data must be C-contiguous (see numpy.ascontiguousarray)");
    }
    const py::gil_scoped_release release;
    return xxh3_64(buffer.view.buf, static_cast<std::size_t>(buffer.view.len));
}

NgramCounter* make_counter(std::int64_t vocab_size, std::optional<std::int32_t> ignore) {
    if (vocab_size < 1 || vocab_size > std::numeric_limits<std::int32_t>::max()) {
        throw py::value_error("vocab_size must be between 1 and 2147483647, not " + std::to_string(vocab_size));
    }
    return new NgramCounter(static_cast<std::int32_t>(vocab_size), ignore);
}

void bind_add(NgramCounter& counter, const py::object& tokens, int n_threads) {
    const py::array ids = arrays::typed<std::int32_t>(tokens, "tokens");
    if (ids.ndim() != 1 && ids.ndim() != 2) {
        throw py::value_error("tokens must have shape (T,) or (S, C), not " + str(ids.attr("shape")));
    }
    arrays::require_layout(ids, "tokens");
    const std::size_t n_sequences = ids.ndim() == 2 ? size_of(ids, 0) : 1;
    const std::size_t length = size_of(ids, ids.ndim() - 1);
    const std::size_t n = n_sequences * length;
    const unsigned threads = arrays::threads(n_threads);
    const auto* values = static_cast<const std::int32_t*>(ids.data());
    std::size_t invalid = 0;
    {
        const py::gil_scoped_release release;
        invalid = counter.find_invalid(values, n);
        if (invalid == n) {
            counter.add(values, n_sequences, length, threads);
        }
    }
    if (invalid != n) {
        const std::string row = ids.ndim() == 2 ? std::to_string(invalid / length) + ", " : "";
        throw py::value_error("tokens[" + row + std::to_string(invalid % length) + "] is " +
                              std::to_string(values[invalid]) + ", outside 0.." +
                              std::to_string(counter.vocab_size() - 1));
    }
}

py::tuple bind_bigrams(const NgramCounter& counter, int n_threads) {
    const unsigned threads = arrays::threads(n_threads);
    Bigrams bigrams;
    {
        const py::gil_scoped_release release;
        bigrams = counter.bigrams(threads);
    }
    return py::make_tuple(to_array(std::move(bigrams.first)), to_array(std::move(bigrams.second)),
                          to_array(std::move(bigrams.count)));
}

py::dict features_as_dict(const CpuFeatures& f) {
    py::dict result;
    result["avx2"] = f.avx2;
    result["f16c"] = f.f16c;
    result["fma"] = f.fma;
    result["avx512f"] = f.avx512f;
    result["avx512bw"] = f.avx512bw;
    result["avx512dq"] = f.avx512dq;
    result["avx512vl"] = f.avx512vl;
    result["avx512_bf16"] = f.avx512_bf16;
    result["amx_bf16"] = f.amx_bf16;
    return result;
}

}  // namespace
}  // namespace crosscoder

bool interpreter_is_ending() {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing() != 0;
#else
    return _Py_IsFinalizing() != 0;
#endif
}

// Until Python 3.13 a daemon thread that asks for the interpreter's lock while it ends is unwound (pthread_exit), which
// C++ answers with std::terminate, in this module and in torch alike. Such a thread sleeps until the process is gone
// instead, as it does from Python 3.14 on.
void let_daemon_threads_sleep_at_exit() {
    static std::terminate_handler before = nullptr;
    before = std::set_terminate([] {
        while (interpreter_is_ending() && ::syscall(SYS_gettid) != ::getpid()) {
            ::pause();
        }
        before();
    });
}

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
    using namespace crosscoder;
    // Documented in _core.pyi.
    active_level();  // a wrong CROSSCODER_ISA is an ImportError here, not a surprise later
    let_daemon_threads_sleep_at_exit();

    m.def("isa_level", [] { return std::string(level_name(active_level())); });
    m.def("isa_levels", [] { return level_names(best_level(detect_cpu_features())); });
    m.def("cpu_features", [] { return features_as_dict(detect_cpu_features()); });

    bind_encoders(m);
    bind_code(m);
    bind_decoders(m);
    bind_threshold(m);
    bind_batch(m);
    bind_updates(m);
    bind_examples(m);
    bind_geometry(m);

    m.def("xxh3_64", &bind_xxh3_64, py::arg("data"));

    py::class_<NgramCounter>(m, "NgramCounter")
        .def(py::init(&make_counter), py::arg("vocab_size"), py::kw_only(), py::arg("ignore") = py::none())
        .def("add", &bind_add, py::arg("tokens"), py::arg("n_threads") = 1)
        .def("unigrams", [](const NgramCounter& counter) { return to_array(counter.unigrams()); })
        .def("bigrams", &bind_bigrams, py::arg("n_threads") = 1)
        .def_property_readonly("total", &NgramCounter::n_tokens)
        .def_property_readonly("vocab_size", &NgramCounter::vocab_size)
        .def_property_readonly("ignore", &NgramCounter::ignore);

    bind_store(m);
}
