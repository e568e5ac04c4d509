// unpack_avx512.cpp once more, with the instruction that rounds 32 floats to bfloat16 at once.
#define CROSSCODER_AVX512_BF16 1
#include "store/unpack_avx512.cpp"  // NOLINT(bugprone-suspicious-include)
