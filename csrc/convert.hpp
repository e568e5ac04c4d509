// The conversions of convert_kernels.hpp at the level of this process.
#pragma once

#include "convert_kernels.hpp"
#include "cpu_features.hpp"

namespace crosscoder {

const ConvertKernels& convert_kernels(IsaLevel level);

}  // namespace crosscoder
