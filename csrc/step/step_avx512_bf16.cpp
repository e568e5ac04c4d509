#define STEP_BYTES 64
#define STEP_TABLE step_avx512_bf16
#include "step/step_kernels.inc"
