#include "core/cpu_features.hpp"

#include <array>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace crosscoder {
namespace {

constexpr std::array<const char*, 4> kLevelNames = {"portable", "avx2", "avx512", "avx512_bf16"};

#if defined(__x86_64__)

constexpr bool bit(std::uint32_t word, unsigned position) { return ((word >> position) & 1U) != 0; }

// The instruction itself instead of _xgetbv(): that one needs -mxsave.
std::uint64_t read_xcr0() {
    std::uint32_t low = 0;
    std::uint32_t high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (std::uint64_t{high} << 32) | low;
}

struct Registers {
    std::uint32_t eax = 0;
    std::uint32_t ebx = 0;
    std::uint32_t ecx = 0;
    std::uint32_t edx = 0;
};

// All zeros where the CPU has no such leaf.
Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
    Registers r;
    if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) {
        return {};
    }
    return r;
}

#endif

}  // namespace

// __builtin_cpu_supports() is of no use here: it returns 0 for everything under some compilers (zig cc).
CpuFeatures detect_cpu_features() {
    CpuFeatures features;
#if defined(__x86_64__)
    constexpr std::uint64_t kAvxState = 0x6;      // XMM, YMM
    constexpr std::uint64_t kAvx512State = 0xe6;  // and opmask, upper ZMM0-15, ZMM16-31
    constexpr std::uint64_t kAmxState = 0x60000;  // tile configuration, tile data

    const Registers leaf1 = cpuid(1, 0);
    const bool has_osxsave = bit(leaf1.ecx, 27);
    const std::uint64_t xcr0 = has_osxsave ? read_xcr0() : 0;
    const auto saves = [xcr0](std::uint64_t state) { return (xcr0 & state) == state; };
    const Registers leaf7 = cpuid(7, 0);
    const Registers leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : Registers{};

    if (saves(kAvxState) && bit(leaf1.ecx, 28)) {
        features.avx2 = bit(leaf7.ebx, 5);
        features.f16c = bit(leaf1.ecx, 29);
        features.fma = bit(leaf1.ecx, 12);
    }
    if (saves(kAvx512State)) {
        features.avx512f = bit(leaf7.ebx, 16);
        features.avx512dq = bit(leaf7.ebx, 17);
        features.avx512bw = bit(leaf7.ebx, 30);
        features.avx512vl = bit(leaf7.ebx, 31);
        features.avx512_bf16 = bit(leaf7_1.eax, 5);
    }
    if (saves(kAmxState)) {
        features.amx_bf16 = bit(leaf7.edx, 22) && bit(leaf7.edx, 24);
    }
#endif
    return features;
}

IsaLevel best_level(const CpuFeatures& f) {
    if (!(f.avx2 && f.f16c && f.fma)) {
        return IsaLevel::portable;
    }
    if (!(f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl)) {
        return IsaLevel::avx2;
    }
    return f.avx512_bf16 ? IsaLevel::avx512_bf16 : IsaLevel::avx512;
}

const char* level_name(IsaLevel level) { return kLevelNames[static_cast<std::size_t>(level)]; }

std::vector<std::string> level_names(IsaLevel best) {
    return {kLevelNames.begin(), kLevelNames.begin() + static_cast<std::ptrdiff_t>(best) + 1};
}

IsaLevel choose_level(const char* requested, IsaLevel best) {
    if (requested == nullptr || *requested == '\0') {
        return best;
    }
    const std::string name = requested;
    for (std::size_t i = 0; i < kLevelNames.size(); ++i) {
        if (name == kLevelNames[i]) {
            const auto level = static_cast<IsaLevel>(i);
            if (level > best) {
                throw std::runtime_error("CROSSCODER_ISA=" + name + " is above what this CPU has (" +
                                         level_name(best) + "); set it lower or unset it");
            }
            return level;
        }
    }
    std::string known;
    for (const char* level : kLevelNames) {
        known += (known.empty() ? "" : ", ") + std::string(level);
    }
    throw std::runtime_error("CROSSCODER_ISA=" + name + " is not one of " + known);
}

IsaLevel active_level() {
    static const IsaLevel level =
        choose_level(std::getenv("CROSSCODER_ISA"), best_level(detect_cpu_features()));
    return level;
}

}  // namespace crosscoder
