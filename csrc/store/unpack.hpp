// The conversions of unpack_kernels.hpp at the level of this process.
#pragma once

#include "core/cpu_features.hpp"
#include "store/unpack_kernels.hpp"

namespace crosscoder {

const UnpackKernels& unpack_kernels(IsaLevel level);

}  // namespace crosscoder
