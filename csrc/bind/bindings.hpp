// What the binding files share: checks of numpy arrays. Arrays are taken as they are, never converted or copied.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cxxabi.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace crosscoder {

// The training step, in bindings_encoders.cpp, bindings_decoders.cpp, bindings_batch.cpp and bindings_updates.cpp.
void bind_encoders(pybind11::module_& m);
void bind_code(pybind11::module_& m);
void bind_decoders(pybind11::module_& m);
void bind_threshold(pybind11::module_& m);
void bind_batch(pybind11::module_& m);
void bind_updates(pybind11::module_& m);

// The collection of examples, in bindings_examples.cpp.
void bind_examples(pybind11::module_& m);
// The geometry of decoders, in bindings_geometry.cpp.
void bind_geometry(pybind11::module_& m);

// The interpreter's lock, given up while this lives.
//
// Until Python 3.13 a daemon thread that asks for the lock when the interpreter is ending is unwound (pthread_exit).
// That must not pass through C++: destructors would touch Python objects, and a destructor that throws ends the process
// with SIGABRT. Such a thread sleeps here until the process is gone, as it does from Python 3.14 on.
class ReleasedGil {
  public:
    ReleasedGil() : state_(PyEval_SaveThread()) {}
    ~ReleasedGil() {
#if defined(__GLIBCXX__)
        try {
            PyEval_RestoreThread(state_);
        } catch (abi::__forced_unwind&) {
            while (true) {
                ::pause();
            }
        }
#else
        PyEval_RestoreThread(state_);
#endif
    }
    ReleasedGil(const ReleasedGil&) = delete;
    ReleasedGil& operator=(const ReleasedGil&) = delete;

  private:
    PyThreadState* state_;
};

namespace arrays {

namespace py = pybind11;

inline std::string str(const py::handle& object) { return py::cast<std::string>(py::str(object)); }

using Shape = std::vector<std::size_t>;

// A length that may be anything, in the shape that an array must have; shown as *.
constexpr std::size_t kAny = ~std::size_t{0};

inline std::string shape_text(const Shape& shape) {
    std::string text;
    for (const std::size_t length : shape) {
        text += (text.empty() ? "" : ", ") + (length == kAny ? "*" : std::to_string(length));
    }
    return "(" + text + (shape.size() == 1 ? ",)" : ")");
}

// A numpy array of T. Raises TypeError or ValueError naming the argument, what it must be and what it is.
template <class T>
py::array typed(const py::object& object, const std::string& name) {
    if (!py::isinstance<py::array>(object)) {
        throw py::type_error(name + " must be a numpy array, not " + str(py::type::of(object).attr("__name__")));
    }
    auto array = py::reinterpret_borrow<py::array>(object);
    if (!array.dtype().equal(py::dtype::of<T>())) {
        throw py::value_error(name + " must be " + str(py::dtype::of<T>()) + ", not " + str(array.dtype()));
    }
    return array;
}

inline void require_layout(const py::array& array, const std::string& name) {
    if ((array.flags() & py::array::c_style) == 0) {
        throw py::value_error(name + " must be C-contiguous (see numpy.ascontiguousarray)");
    }
    if ((array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0) {
        throw py::value_error(name + " must be aligned to its element size");
    }
}

// A C-contiguous, aligned array of T with this shape.
template <class T>
py::array require(const py::object& object, const std::string& name, const Shape& shape) {
    py::array array = typed<T>(object, name);
    bool same = static_cast<std::size_t>(array.ndim()) == shape.size();
    for (std::size_t i = 0; same && i < shape.size(); ++i) {
        same = shape[i] == kAny || static_cast<std::size_t>(array.shape(static_cast<py::ssize_t>(i))) == shape[i];
    }
    if (!same) {
        throw py::value_error(name + " must have shape " + shape_text(shape) + ", not " + str(array.attr("shape")));
    }
    require_layout(array, name);
    return array;
}

// Its data, to read.
template <class T>
const T* in(const py::object& object, const char* name, const Shape& shape) {
    return static_cast<const T*>(require<T>(object, name, shape).data());
}

// Its data, to write.
template <class T>
T* out(const py::object& object, const char* name, const Shape& shape) {
    py::array array = require<T>(object, name, shape);
    if (!array.writeable()) {
        throw py::value_error(std::string(name) + " must be writable");
    }
    return static_cast<T*>(array.mutable_data());
}

// None is a null pointer.
template <class T>
const T* in_or_null(const py::object& object, const char* name, const Shape& shape) {
    return object.is_none() ? nullptr : in<T>(object, name, shape);
}
template <class T>
T* out_or_null(const py::object& object, const char* name, const Shape& shape) {
    return object.is_none() ? nullptr : out<T>(object, name, shape);
}

// An array of its own, not filled.
template <class T>
py::array_t<T> make(const Shape& shape) {
    return py::array_t<T>(std::vector<py::ssize_t>(shape.begin(), shape.end()));
}

inline std::size_t length(const py::object& object, const char* name, std::size_t axis, std::size_t ndim) {
    if (!py::isinstance<py::array>(object)) {
        throw py::type_error(std::string(name) + " must be a numpy array, not " +
                             str(py::type::of(object).attr("__name__")));
    }
    const auto array = py::reinterpret_borrow<py::array>(object);
    if (static_cast<std::size_t>(array.ndim()) != ndim) {
        throw py::value_error(std::string(name) + " must have " + std::to_string(ndim) + " axes, not " +
                              std::to_string(array.ndim()));
    }
    return static_cast<std::size_t>(array.shape(static_cast<py::ssize_t>(axis)));
}

// The lengths of an array of that many axes.
template <std::size_t ndim>
std::array<std::size_t, ndim> lengths(const py::object& object, const char* name) {
    std::array<std::size_t, ndim> found{};
    for (std::size_t axis = 0; axis < ndim; ++axis) {
        found[axis] = length(object, name, axis, ndim);
    }
    return found;
}

inline unsigned threads(int n_threads) {
    if (n_threads < 1) {
        throw py::value_error("n_threads must be at least 1, not " + std::to_string(n_threads));
    }
    return static_cast<unsigned>(n_threads);
}

}  // namespace arrays
}  // namespace crosscoder
