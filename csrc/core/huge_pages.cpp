#include "core/huge_pages.hpp"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace crosscoder {

void prefer_huge_pages(void* data, std::size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
    const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
    const auto end = (reinterpret_cast<std::uintptr_t>(data) + size) / kPage * kPage;
    if (begin >= end) {
        return;
    }
    auto* const start = reinterpret_cast<void*>(begin);
    if (madvise(start, end - begin, MADV_HUGEPAGE) == 0) {
        constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1: pages that exist already
        (void)madvise(start, end - begin, kCollapse);
    }
#else
    (void)data;
    (void)size;
#endif
}

}  // namespace crosscoder
