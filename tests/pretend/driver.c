/* libcuda.so.1: what Triton's launcher and PyTorch ask of the driver. The rest returns success. */
#include <stddef.h>
#include <string.h>

typedef int Result;
typedef void *Pointer;
typedef unsigned long long Address;

enum { SUCCESS = 0, INVALID_VALUE = 1 };
enum { SHARED_LIMIT = 232448, PROCESSORS = 132 };

static long launches;

long pretended_launches(void) { return launches; }

Result cuGetErrorString(Result error, const char **text) { *text = "refused by the pretended card"; return SUCCESS; }
Result cuGetErrorName(Result error, const char **text) { *text = "PRETENDED"; return SUCCESS; }
Result cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
Result cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
Result cuDeviceGet(int *device, int ordinal) { *device = 0; return SUCCESS; }
Result cuDeviceGetName(char *name, int size, int device) { strncpy(name, "NVIDIA H100 80GB HBM3", size); return SUCCESS; }
Result cuDevicePrimaryCtxRetain(Pointer *context, int device) { *context = (Pointer)1; return SUCCESS; }
Result cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return SUCCESS; }
Result cuCtxGetCurrent(Pointer *context) { *context = (Pointer)1; return SUCCESS; }
Result cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return SUCCESS; }

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 10: *value = 32; break;              /* threads of a warp */
    case 12: *value = 65536; break;           /* registers of a block */
    case 13: *value = 1980000; break;         /* kHz */
    case 16: *value = PROCESSORS; break;
    case 36: *value = 2619000; break;         /* kHz of the memory */
    case 37: *value = 5120; break;            /* bits of its bus */
    case 97: *value = SHARED_LIMIT; break;    /* shared memory of a block, on demand */
    default: *value = 1;
    }
    return SUCCESS;
}

Result cuModuleLoadData(Pointer *module, const void *image) { *module = (Pointer)2; return SUCCESS; }
Result cuModuleLoadDataEx(Pointer *module, const void *image, unsigned n, Pointer keys, Pointer values) { *module = (Pointer)2; return SUCCESS; }
Result cuModuleGetFunction(Pointer *function, Pointer module, const char *name) { *function = (Pointer)3; return SUCCESS; }
Result cuModuleGetLoadingMode(int *mode) { *mode = 2; return SUCCESS; }
Result cuFuncGetAttribute(int *value, int attribute, Pointer function) { *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0; return SUCCESS; }
Result cuOccupancyMaxActiveClusters(int *count, Pointer function, Pointer config) { *count = PROCESSORS / 2; return SUCCESS; }
Result cuPointerGetAttribute(Pointer data, int attribute, Address pointer) { *(Address *)data = pointer; return SUCCESS; }
Result cuMemGetAddressRange_v2(Address *base, size_t *size, Address pointer) { *base = pointer; *size = 0; return SUCCESS; }

/* What the hardware demands of a descriptor for its copy engine. */
Result cuTensorMapEncodeTiled(Pointer map, int dtype, unsigned rank, Pointer address, const Address *sizes,
                              const Address *strides, const unsigned *box, const unsigned *steps,
                              int interleave, int swizzle, int promotion, int fill) {
    if (((Address)map & 63) || ((Address)address & 15)) return INVALID_VALUE;
    for (unsigned i = 0; i < rank; i++)
        if (sizes[i] == 0 || box[i] == 0 || box[i] > 256) return INVALID_VALUE;
    for (unsigned i = 0; i + 1 < rank; i++)
        if (strides[i] == 0 || (strides[i] & 15)) return INVALID_VALUE;
    memset(map, 0, 128);
    return SUCCESS;
}

typedef struct { unsigned grid[3], block[3], shared; Pointer stream, attributes; unsigned count; } Config;

/* And of a grid. */
Result cuLaunchKernelEx(const Config *config, Pointer function, Pointer *arguments, Pointer *extra) {
    const unsigned *grid = config->grid, *block = config->block;
    if (!grid[0] || !grid[1] || !grid[2] || grid[1] > 65535 || grid[2] > 65535) return INVALID_VALUE;
    if (block[0] * block[1] * block[2] > 1024 || config->shared > SHARED_LIMIT) return INVALID_VALUE;
    launches++;
    return SUCCESS;
}

Result cuLaunchKernel(Pointer function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, Pointer stream, Pointer *arguments, Pointer *extra) {
    Config config = {{gx, gy, gz}, {bx, by, bz}, shared, stream, NULL, 0};
    return cuLaunchKernelEx(&config, function, arguments, extra);
}
