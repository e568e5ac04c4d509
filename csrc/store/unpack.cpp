#include "store/unpack.hpp"

namespace crosscoder {

const UnpackKernels& unpack_kernels(IsaLevel level) {
#if defined(CROSSCODER_X86)
    switch (level) {
        case IsaLevel::portable:
            return unpack_portable;
        case IsaLevel::avx2:
            return unpack_avx2;
        case IsaLevel::avx512:
            return unpack_avx512;
        case IsaLevel::avx512_bf16:
            return unpack_avx512_bf16;
    }
#endif
    (void)level;
    return unpack_portable;
}

}  // namespace crosscoder
