#include "convert.hpp"

namespace crosscoder {

const ConvertKernels& convert_kernels(IsaLevel level) {
#if defined(CROSSCODER_X86)
    switch (level) {
        case IsaLevel::portable:
            return convert_portable;
        case IsaLevel::avx2:
            return convert_avx2;
        case IsaLevel::avx512:
        case IsaLevel::avx512_bf16:
            // VCVTNEPS2BF16 flushes denormals to 0, so the AVX-512 code stays: all levels give the same bits.
            return convert_avx512;
    }
#endif
    (void)level;
    return convert_portable;
}

}  // namespace crosscoder
