#define STEP_BYTES 32
#define STEP_TABLE step_avx2
#include "step/step_kernels.inc"
