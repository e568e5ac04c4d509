#include "core/checksum.hpp"

#include "core/checksum_kernels.hpp"
#include "core/cpu_features.hpp"

namespace crosscoder {

std::uint64_t xxh3_64(const void* data, std::size_t size) {
#if defined(CROSSCODER_X86)
    switch (active_level()) {
        case IsaLevel::portable:
            return xxh3_64_portable(data, size);
        case IsaLevel::avx2:
            return xxh3_64_avx2(data, size);
        case IsaLevel::avx512:
        case IsaLevel::avx512_bf16:
            return xxh3_64_avx512(data, size);
    }
#endif
    return xxh3_64_portable(data, size);
}

}  // namespace crosscoder
