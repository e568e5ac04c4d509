// Large pages for memory that is read row by row in random order.
#pragma once

#include <cstddef>

namespace crosscoder {

// Asks the system to back [data, data + size) with large pages, now if it can. Nothing but speed depends on it.
void prefer_huge_pages(void* data, std::size_t size);

}  // namespace crosscoder
