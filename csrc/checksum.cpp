#include "checksum.hpp"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace crosscoder {

std::uint64_t xxh3_64(const void* data, std::size_t size) { return XXH3_64bits(data, size); }

}  // namespace crosscoder
