/* A libcuda.so.1 for tests: it has no GPU, records what it is asked to do, and answers as the real
   driver does where one module is loaded and its kernels are started.

   Every call adds lines to a record, which stub_record() gives: the name of the function, then its
   arguments as name=value. Handles are numbers above 2^32, so that one cut to 32 bits is seen. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef unsigned int Unsigned;

enum { SUCCESS = 0, INVALID_VALUE = 1, NO_DEVICE = 100, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
enum { INFO_LOG = 3, INFO_LOG_BYTES = 4, ERROR_LOG = 5, ERROR_LOG_BYTES = 6 };
enum { MAX_PARAMETERS = 64 };

static const uintptr_t CONTEXT = 0x7a11c0de00000011, MODULE = 0x7a11c0de00000022,
                       FUNCTION = 0x7a11c0de00000033;

static char *record;
static size_t used, room;
static int context_is_current = 1;
static Unsigned parameter_count, parameter_sizes[MAX_PARAMETERS];
static char failing[64], failure_log[256];
static Result failure;

static void note(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    if (used + length + 1 > room) {
        room = 2 * (used + length + 1);
        record = realloc(record, room);
    }
    va_start(arguments, format);
    vsnprintf(record + used, length + 1, format, arguments);
    va_end(arguments);
    used += length;
}

static void note_bytes(const char *name, const void *bytes, size_t count) {
    note(" %s=", name);
    for (size_t i = 0; i < count; i++) note("%02x", ((const unsigned char *)bytes)[i]);
}

/* What a test sets and reads. */

const char *stub_record(void) { return record ? record : ""; }

void stub_reset(void) {
    used = 0;
    note("%s", "");
    context_is_current = 1;
    parameter_count = 0;
    failing[0] = 0;
}

void stub_without_context(void) { context_is_current = 0; }

void stub_parameters(Unsigned count, const Unsigned *sizes) {
    parameter_count = count;
    memcpy(parameter_sizes, sizes, count * sizeof *sizes);
}

void stub_fail(const char *function, Result status, const char *log) {
    snprintf(failing, sizeof failing, "%s", function);
    snprintf(failure_log, sizeof failure_log, "%s", log);
    failure = status;
}

#define MAY_FAIL \
    if (strcmp(failing, __func__) == 0) return failure

/* The driver. */

Result cuInit(Unsigned flags) {
    note("cuInit flags=%u\n", flags);
    return NO_DEVICE;
}

Result cuDriverGetVersion(int *version) {
    note("cuDriverGetVersion\n");
    *version = 13000;
    return SUCCESS;
}

/* How the CUDA runtime asks for all the other functions. */
Result cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags,
                           int *status) {
    (void)version, (void)flags;
    note("cuGetProcAddress_v2 symbol=%s\n", symbol);
    *function = strcmp(symbol, "cuGetProcAddress") == 0 ? (void *)cuGetProcAddress_v2
                                                         : dlsym(RTLD_DEFAULT, symbol);
    if (status) *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}

/* The one function of the driver that ONNX Runtime's CUDA provider links. */
Result cuTensorMapEncodeTiled(void) {
    note("cuTensorMapEncodeTiled\n");
    return NO_DEVICE;
}

Result cuCtxGetCurrent(void **context) {
    note("cuCtxGetCurrent\n");
    MAY_FAIL;
    *context = context_is_current ? (void *)CONTEXT : NULL;
    return SUCCESS;
}

Result cuModuleLoadDataEx(void **module, const void *image, Unsigned count, const int *options,
                          void **values) {
    size_t info_bytes = 0, error_bytes = 0;
    char *info = NULL, *error = NULL;
    for (Unsigned i = 0; i < count; i++) {
        if (options[i] == INFO_LOG) info = values[i];
        if (options[i] == INFO_LOG_BYTES) info_bytes = (Unsigned)(uintptr_t)values[i];
        if (options[i] == ERROR_LOG) error = values[i];
        if (options[i] == ERROR_LOG_BYTES) error_bytes = (Unsigned)(uintptr_t)values[i];
    }
    note("cuModuleLoadDataEx info_bytes=%zu error_bytes=%zu", info_bytes, error_bytes);
    note_bytes("image", image, strlen(image) + 1);
    note("\n");
    if (strcmp(failing, __func__) == 0) {
        if (error) snprintf(error, error_bytes, "%s", failure_log);
        return failure;
    }
    if (info) snprintf(info, info_bytes, "%s", "info    : 0 bytes spill stores");
    *module = (void *)MODULE;
    return SUCCESS;
}

Result cuModuleGetFunction(void **function, void *module, const char *name) {
    note("cuModuleGetFunction module=%#lx name=%s\n", (unsigned long)(uintptr_t)module, name);
    MAY_FAIL;
    if ((uintptr_t)module != MODULE) return INVALID_VALUE;
    *function = (void *)FUNCTION;
    return SUCCESS;
}

Result cuModuleUnload(void *module) {
    note("cuModuleUnload module=%#lx\n", (unsigned long)(uintptr_t)module);
    MAY_FAIL;
    return (uintptr_t)module == MODULE ? SUCCESS : INVALID_VALUE;
}

Result cuFuncGetAttribute(int *value, int attribute, void *function) {
    note("cuFuncGetAttribute attribute=%d function=%#lx\n", attribute,
         (unsigned long)(uintptr_t)function);
    MAY_FAIL;
    if ((uintptr_t)function != FUNCTION) return INVALID_VALUE;
    *value = 100 + attribute;
    return SUCCESS;
}

Result cuLaunchKernel(void *function, Unsigned grid_x, Unsigned grid_y, Unsigned grid_z,
                      Unsigned block_x, Unsigned block_y, Unsigned block_z, Unsigned shared_bytes,
                      void *stream, void **parameters, void **extra) {
    note("cuLaunchKernel function=%#lx grid=%u,%u,%u block=%u,%u,%u shared_bytes=%u stream=%#lx"
         " extra=%#lx",
         (unsigned long)(uintptr_t)function, grid_x, grid_y, grid_z, block_x, block_y, block_z,
         shared_bytes, (unsigned long)(uintptr_t)stream, (unsigned long)(uintptr_t)extra);
    /* As the real driver does: so many bytes behind each pointer as the kernel declares. */
    for (Unsigned i = 0; i < parameter_count; i++) {
        note_bytes("parameter", parameters[i], parameter_sizes[i]);
    }
    note("\n");
    MAY_FAIL;
    return (uintptr_t)function == FUNCTION ? SUCCESS : INVALID_VALUE;
}

Result cuGetErrorName(Result status, const char **name) {
    *name = status == 218 ? "CUDA_ERROR_INVALID_PTX" : status == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS"
                                                                     : NULL;
    return *name ? SUCCESS : INVALID_VALUE;
}

Result cuGetErrorString(Result status, const char **text) {
    *text = status == 218 ? "a PTX JIT compilation failed"
            : status == 700 ? "an illegal memory access was encountered"
                            : NULL;
    return *text ? SUCCESS : INVALID_VALUE;
}
