// What the library says of itself, so that kernels/_native.py can refuse one that doesn't fit.
// The macros come from CMakeLists.txt. Plain C, because ctypes reads it.

#if defined(_WIN32)
#define VITKERN_EXPORT extern "C" __declspec(dllexport)
#else
#define VITKERN_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Raised whenever a signature in this folder changes; asked for before anything else is called.
VITKERN_EXPORT int vitkern_abi() { return VITKERN_ABI; }

VITKERN_EXPORT const char* vitkern_version() { return VITKERN_VERSION; }

VITKERN_EXPORT const char* vitkern_compiler() { return VITKERN_COMPILER; }

// The CUDA compiler's version; empty in a build without CUDA.
VITKERN_EXPORT const char* vitkern_cuda() { return VITKERN_CUDA; }
