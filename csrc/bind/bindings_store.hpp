// The activation store's part of the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace crosscoder {

void bind_store(pybind11::module_& m);

}  // namespace crosscoder
