#define STEP_BYTES 64
#define STEP_TABLE step_avx512
#include "step/step_kernels.inc"
