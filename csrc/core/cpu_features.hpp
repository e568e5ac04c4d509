// What this CPU can do, found by CPUID and XGETBV, and the instruction-set level that the kernels run at.
#pragma once

#include <string>
#include <vector>

namespace crosscoder {

struct CpuFeatures {
    bool avx2 = false;
    bool f16c = false;
    bool fma = false;
    bool avx512f = false;
    bool avx512bw = false;
    bool avx512dq = false;
    bool avx512vl = false;
    bool avx512_bf16 = false;
    bool amx_bf16 = false;
};

// Each level includes those before it.
enum class IsaLevel { portable, avx2, avx512, avx512_bf16 };

// True only where both the CPU and the operating system (register state saved, XCR0) support it.
CpuFeatures detect_cpu_features();

IsaLevel best_level(const CpuFeatures& features);

const char* level_name(IsaLevel level);

// Names of all levels up to and including `best`, lowest first.
std::vector<std::string> level_names(IsaLevel best);

// The level to run at: `requested` (nullptr or empty: `best`).
// Throws std::runtime_error if `requested` is no level's name or is above `best`.
IsaLevel choose_level(const char* requested, IsaLevel best);

// The level of this process, decided once from the environment variable CROSSCODER_ISA and the CPU.
// Throws as choose_level does.
IsaLevel active_level();

}  // namespace crosscoder
