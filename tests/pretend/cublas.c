/* Of cuBLAS what hands something back. The rest returns success, and computes nothing. */
#include <stddef.h>

static char handle[64];

int cublasCreate_v2(void **made) { *made = handle; return 0; }
int cublasGetMathMode(void *self, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *self, int *mode) { *mode = 0; return 0; }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { *made = handle; return 0; }
int cublasLtMatrixLayoutCreate(void **made) { *made = handle; return 0; }
int cublasLtMatmulPreferenceCreate(void **made) { *made = handle; return 0; }
size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtMatmulAlgoGetHeuristic(void *self, void *what, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) { *found = 1; return 0; }
