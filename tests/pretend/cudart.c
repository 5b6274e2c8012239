/* libcudart of CUDA 13: memory is the host's, time is the host's, kernels are forgotten. The rest returns success. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef cudaError_t Result;
#define SUCCESS cudaSuccess

/* The device */

static const size_t MEMORY = 80UL << 30;

Result cudaGetDeviceCount(int *count) { *count = 1; return SUCCESS; }
Result cudaGetDevice(int *device) { *device = 0; return SUCCESS; }
Result cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : SUCCESS; }
Result cudaDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
Result cudaRuntimeGetVersion(int *version) { *version = 13000; return SUCCESS; }
Result cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return SUCCESS; }
Result cudaDeviceGetPCIBusId(char *id, int size, int device) { strncpy(id, "0000:00:00.0", size); return SUCCESS; }
const char *cudaGetErrorName(Result error) { return "cudaErrorPretended"; }
const char *cudaGetErrorString(Result error) { return error == cudaErrorMemoryAllocation ? "out of memory" : "refused by the pretended card"; }

#undef cudaGetDeviceProperties
Result cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H100 80GB HBM3");
    p->major = 9;
    p->totalGlobalMem = MEMORY;
    p->multiProcessorCount = 132;
    p->l2CacheSize = 50 << 20;
    p->memoryBusWidth = 5120;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->textureAlignment = 512;
    return SUCCESS;
}

Result cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    default: *value = 1;
    }
    return SUCCESS;
}

/* Memory: pages that nobody touches cost nothing, so that 80 GB fit into less. */

static struct { char *start; size_t size; } blocks[1 << 16];
static size_t used;

Result cudaMalloc(void **pointer, size_t size) {
    if (used + size > MEMORY) return cudaErrorMemoryAllocation;
    int free = 0;
    while (free < 1 << 16 && blocks[free].start) free++;
    if (free == 1 << 16) return cudaErrorMemoryAllocation;
    char *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return cudaErrorMemoryAllocation;
    blocks[free].start = start;
    blocks[free].size = size;
    used += size;
    *pointer = start;
    return SUCCESS;
}

Result cudaFree(void *pointer) {
    for (int i = 0; pointer && i < 1 << 16; i++)
        if (blocks[i].start == pointer) {
            munmap(pointer, blocks[i].size);
            used -= blocks[i].size;
            blocks[i].start = NULL;
            break;
        }
    return SUCCESS;
}

Result cudaMallocAsync(void **pointer, size_t size, cudaStream_t stream) { return cudaMalloc(pointer, size); }
Result cudaFreeAsync(void *pointer, cudaStream_t stream) { return cudaFree(pointer); }
Result cudaMemGetInfo(size_t *left, size_t *total) { *total = MEMORY; *left = MEMORY - used; return SUCCESS; }
Result cudaHostAlloc(void **pointer, size_t size, unsigned flags) { *pointer = aligned_alloc(4096, (size + 4095) & ~4095UL); return SUCCESS; }
Result cudaFreeHost(void *pointer) { free(pointer); return SUCCESS; }
Result cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) { *pool = (cudaMemPool_t)64; return SUCCESS; }
Result cudaGetSymbolAddress(void **pointer, const void *symbol) { static char place[1 << 16]; *pointer = place; return SUCCESS; }

Result cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    for (int i = 0; i < 1 << 16; i++)
        if (blocks[i].start && (char *)pointer >= blocks[i].start && (char *)pointer < blocks[i].start + blocks[i].size) {
            attributes->type = cudaMemoryTypeDevice;
            attributes->devicePointer = (void *)pointer;
        }
    return SUCCESS;
}

Result cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) { memmove(to, from, size); return SUCCESS; }
Result cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) { memmove(to, from, size); return SUCCESS; }
Result cudaMemcpyPeerAsync(void *to, int device, const void *from, int peer, size_t size, cudaStream_t stream) { memmove(to, from, size); return SUCCESS; }
Result cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                         enum cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++)
        memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return SUCCESS;
}
/* What is large is there to flush a cache, and would only cost memory. */
Result cudaMemset(void *to, int value, size_t size) { if (size < 64 << 20) memset(to, value, size); return SUCCESS; }
Result cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) { return cudaMemset(to, value, size); }

/* Streams and events */

static size_t streams = 100;

Result cudaStreamCreate(cudaStream_t *stream) { *stream = (cudaStream_t)(16 * ++streams); return SUCCESS; }
Result cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { return cudaStreamCreate(stream); }
Result cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return SUCCESS; }
Result cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return SUCCESS; }

Result cudaEventCreate(cudaEvent_t *event) { *event = calloc(1, sizeof(double)); return SUCCESS; }
Result cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
Result cudaEventDestroy(cudaEvent_t event) { free(event); return SUCCESS; }
Result cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *(double *)event = 1e3 * now.tv_sec + 1e-6 * now.tv_nsec;
    return SUCCESS;
}
Result cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaEventRecord(event, stream); }
#undef cudaEventElapsedTime
Result cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) { *ms = *(double *)to - *(double *)from + 1e-3; return SUCCESS; }

/* Graphs: one is captured at a time, on whatever stream. */

static unsigned long long capture, captures;

Result cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) { capture = ++captures; return SUCCESS; }
Result cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) { capture = 0; *graph = (cudaGraph_t)32; return SUCCESS; }
Result cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return SUCCESS;
}
#undef cudaStreamGetCaptureInfo
Result cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
                                const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
    if (id) *id = capture;
    if (graph) *graph = (cudaGraph_t)32;
    if (count) *count = 0;
    return cudaStreamIsCapturing(stream, status);
}
Result cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) { *count = 1; return SUCCESS; }
Result cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) { *made = (cudaGraphExec_t)48; return SUCCESS; }

/* Kernels of PyTorch's own */

Result cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 64;
    attributes->binaryVersion = attributes->ptxVersion = 90;
    attributes->maxDynamicSharedSizeBytes = 232448;
    return SUCCESS;
}
Result cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *function, int threads, size_t shared, unsigned flags) { *count = 2; return SUCCESS; }
Result cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                        enum cudaDriverEntryPointQueryResult *result) {
    *function = dlsym(RTLD_DEFAULT, name);  /* the driver is loaded before us */
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return *function ? SUCCESS : cudaErrorSymbolNotFound;
}

void **__cudaRegisterFatBinary(void *binary) { static void *handle[4]; return handle; }
Result __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return SUCCESS; }

/* <<<grid, block, shared, stream>>> */
static __thread struct { dim3 grid, block; size_t shared; void *stream; } call;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    call.grid = grid, call.block = block, call.shared = shared, call.stream = stream;
    return 0;
}
Result __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = call.grid, *block = call.block, *shared = call.shared, *(void **)stream = call.stream;
    return SUCCESS;
}
