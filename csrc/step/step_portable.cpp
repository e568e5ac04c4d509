#define STEP_BYTES 16
#define STEP_TABLE step_portable
#include "step/step_kernels.inc"
