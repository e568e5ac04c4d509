// The inner loops of step_kernels.hpp at the level of this process.
#pragma once

#include "core/cpu_features.hpp"
#include "step/step_kernels.hpp"

namespace crosscoder {

const StepKernels& step_kernels(IsaLevel level);

}  // namespace crosscoder
