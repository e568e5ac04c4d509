// XXH3, 64 bits, seed 0: the checksum of all files of this project.
#pragma once

#include <cstddef>
#include <cstdint>

namespace crosscoder {

std::uint64_t xxh3_64(const void* data, std::size_t size);

}  // namespace crosscoder
