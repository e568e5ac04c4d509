#include "gather.hpp"

#include <algorithm>

#include "parallel.hpp"

namespace crosscoder {
namespace {

// Starting a thread takes some 20 us, in which one core converts about this many elements.
constexpr std::size_t kElementsPerThread = std::size_t{1} << 16;

template <class T>
void gather(void (*convert)(const T*, float, float*, std::size_t), const void* source, std::size_t width,
            const std::int64_t* index, std::size_t n, float scale, float* out, std::size_t out_stride,
            unsigned n_threads) {
    const T* rows = static_cast<const T*>(source);
    const std::size_t grain = std::max<std::size_t>(1, kElementsPerThread / std::max<std::size_t>(1, width));
    parallel_for(n, grain, n_threads, [=](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) {
            convert(rows + static_cast<std::size_t>(index[i]) * width, scale, out + i * out_stride, width);
        }
    });
}

}  // namespace

std::size_t element_size(ElementType type) { return type == ElementType::fp32 ? 4 : 2; }

std::size_t find_outside(const std::int64_t* index, std::size_t n, std::size_t n_rows) {
    const auto outside = [n_rows](std::int64_t row) { return static_cast<std::uint64_t>(row) >= n_rows; };
    return static_cast<std::size_t>(std::find_if(index, index + n, outside) - index);
}

void gather_rows(const ConvertKernels& kernels, const void* source, ElementType type, std::size_t width,
                 const std::int64_t* index, std::size_t n, float scale, float* out, std::size_t out_stride,
                 unsigned n_threads) {
    switch (type) {
        case ElementType::fp32:
            gather(kernels.scale_fp32, source, width, index, n, scale, out, out_stride, n_threads);
            break;
        case ElementType::bf16:
            gather(kernels.scale_bf16, source, width, index, n, scale, out, out_stride, n_threads);
            break;
        case ElementType::fp16:
            gather(kernels.scale_fp16, source, width, index, n, scale, out, out_stride, n_threads);
            break;
    }
}

void float32_to_bfloat16(const ConvertKernels& kernels, const float* src, std::uint16_t* dst, std::size_t n,
                         unsigned n_threads) {
    parallel_for(n, kElementsPerThread, n_threads, [&kernels, src, dst](std::size_t begin, std::size_t end) {
        kernels.to_bf16(src + begin, dst + begin, end - begin);
    });
}

}  // namespace crosscoder
