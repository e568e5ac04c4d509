#include "step/step.hpp"

namespace crosscoder {

const StepKernels& step_kernels(IsaLevel level) {
#if defined(CROSSCODER_X86)
    switch (level) {
        case IsaLevel::portable:
            return step_portable;
        case IsaLevel::avx2:
            return step_avx2;
        case IsaLevel::avx512:
            return step_avx512;
        case IsaLevel::avx512_bf16:
            return step_avx512_bf16;
    }
#endif
    (void)level;
    return step_portable;
}

}  // namespace crosscoder
