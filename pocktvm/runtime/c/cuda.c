/* Runs a model on an NVIDIA GPU, through the driver alone: libcuda.so.1 is looked up when the model
 * is opened, so that the library loads (and says what is missing) on a machine without one.
 *
 * The arena lies in the GPU's memory, at the offsets of the same plan; frozen weights are uploaded
 * once. Everything a launch needs is prepared at open: a step is a loop over a table of (function,
 * grid, block, addresses), queued on one stream, and one wait for the loss. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "internal.h"

/* cuda.h is not asked for: these few declarations of its stable interface are all there is to it */
typedef int cu_result;
typedef int cu_device;
typedef uint64_t cu_address;
typedef void *cu_handle; /* contexts, modules, functions, streams */

enum { CU_SUCCESS = 0, CU_NO_DEVICE = 100, CU_NO_BINARY = 209, CU_BAD_PTX = 218,
       CU_PTX_VERSION = 222 };
enum { CU_MAJOR = 75, CU_MINOR = 76 }; /* CUdevice_attribute: compute capability */
enum { CU_STREAM_NON_BLOCKING = 1 };

/* Every function of the driver that is called: X(name here, symbol, parameters). */
#define DRIVER(X)                                                                                  \
  X(init, "cuInit", (unsigned))                                                                    \
  X(error_string, "cuGetErrorString", (cu_result, const char **))                                  \
  X(device_count, "cuDeviceGetCount", (int *))                                                     \
  X(device_get, "cuDeviceGet", (cu_device *, int))                                                 \
  X(device_name, "cuDeviceGetName", (char *, int, cu_device))                                      \
  X(device_attribute, "cuDeviceGetAttribute", (int *, int, cu_device))                             \
  X(context_retain, "cuDevicePrimaryCtxRetain", (cu_handle *, cu_device))                          \
  X(context_release, "cuDevicePrimaryCtxRelease_v2", (cu_device))                                  \
  X(context_set, "cuCtxSetCurrent", (cu_handle))                                                   \
  X(memory_info, "cuMemGetInfo_v2", (size_t *, size_t *))                                          \
  X(memory_alloc, "cuMemAlloc_v2", (cu_address *, size_t))                                         \
  X(memory_free, "cuMemFree_v2", (cu_address))                                                     \
  X(to_device, "cuMemcpyHtoDAsync_v2", (cu_address, const void *, size_t, cu_handle))              \
  X(to_host, "cuMemcpyDtoHAsync_v2", (void *, cu_address, size_t, cu_handle))                      \
  X(module_load, "cuModuleLoadDataEx", (cu_handle *, const void *, unsigned, int *, void **))      \
  X(module_unload, "cuModuleUnload", (cu_handle))                                                  \
  X(module_function, "cuModuleGetFunction", (cu_handle *, cu_handle, const char *))                \
  X(stream_create, "cuStreamCreate", (cu_handle *, unsigned))                                      \
  X(stream_destroy, "cuStreamDestroy_v2", (cu_handle))                                             \
  X(stream_wait, "cuStreamSynchronize", (cu_handle))                                               \
  X(launch, "cuLaunchKernel",                                                                      \
    (cu_handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, cu_handle,   \
     void **, void **))

typedef struct {
#define FIELD(name, symbol, parameters) cu_result(*name) parameters;
  DRIVER(FIELD)
#undef FIELD
} driver;

/* One program's launches with their addresses. */
typedef struct {
  cu_address *addresses; /* of the program's views */
  void **parameters;     /* of all launches in a row: pointers into addresses */
} bound_program;

struct pk_device {
  driver cu;
  void *library;
  cu_device number;
  char name[128];
  cu_handle context, module, stream;
  cu_handle *functions;
  cu_address arena, frozen;
  bound_program step, predict;
};

static int failed(pocktvm *m, cu_result result, const char *what) {
  const char *text = NULL;
  if (m->device->cu.error_string(result, &text) || !text) text = "unknown error";
  return pk_fail(m, POCKTVM_NO_DEVICE, "%s: %s failed: %s (CUDA error %d)",
                 m->device->name[0] ? m->device->name : "GPU", what, text, result);
}

/* --- open --- */

static int load_driver(pocktvm *m) {
  pk_device *d = m->device;
  d->library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!d->library)
    return pk_fail(m, POCKTVM_NO_DEVICE, "no NVIDIA driver here (%s): this artifact's kernels run "
                   "on a GPU; install the driver, or build with --target host", dlerror());
  struct {
    void *place;
    const char *symbol;
  } wanted[] = {
#define ROW(name, symbol, parameters) {&d->cu.name, symbol},
      DRIVER(ROW)
#undef ROW
  };
  for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
    void *found = dlsym(d->library, wanted[i].symbol);
    if (!found)
      return pk_fail(m, POCKTVM_NO_DEVICE, "the NVIDIA driver has no %s: update it",
                     wanted[i].symbol);
    memcpy(wanted[i].place, &found, sizeof found);
  }
  return POCKTVM_OK;
}

static int choose_device(pocktvm *m) {
  pk_device *d = m->device;
  int count = 0;
  cu_result result = d->cu.init(0);
  if (!result) result = d->cu.device_count(&count);
  if (result == CU_NO_DEVICE || (!result && count == 0))
    return pk_fail(m, POCKTVM_NO_DEVICE, "the NVIDIA driver sees no GPU (is CUDA_VISIBLE_DEVICES "
                   "set? does nvidia-smi list one?)");
  if (result) return failed(m, result, "cuInit");
  if ((result = d->cu.device_get(&d->number, 0))) return failed(m, result, "cuDeviceGet");
  if (d->cu.device_name(d->name, sizeof d->name, d->number)) snprintf(d->name, 4, "GPU");
  if ((result = d->cu.context_retain(&d->context, d->number)))
    return failed(m, result, "cuDevicePrimaryCtxRetain");
  if ((result = d->cu.context_set(d->context))) return failed(m, result, "cuCtxSetCurrent");
  if ((result = d->cu.stream_create(&d->stream, CU_STREAM_NON_BLOCKING)))
    return failed(m, result, "cuStreamCreate");
  return POCKTVM_OK;
}

/* Machine code serves its own major version from its minor one on; PTX every newer GPU. */
static int fits(const pk_image *image, int major, int minor) {
  if (image->is_ptx)
    return major > image->major || (major == image->major && minor >= image->minor);
  return major == image->major && minor >= image->minor;
}

static int load_module(pocktvm *m) {
  pk_device *d = m->device;
  const pk_gpu *gpu = pk_the_model.gpu;
  int major = 0, minor = 0;
  cu_result result = CU_NO_BINARY;
  d->cu.device_attribute(&major, CU_MAJOR, d->number);
  d->cu.device_attribute(&minor, CU_MINOR, d->number);
  for (int32_t i = 0; i < gpu->n_images && !d->module; i++) {
    if (!fits(&gpu->images[i], major, minor)) continue;
    result = d->cu.module_load(&d->module, gpu->images[i].data, 0, NULL, NULL);
    if (!result) break;
    d->module = NULL;
    if (result != CU_NO_BINARY && result != CU_BAD_PTX && result != CU_PTX_VERSION)
      return failed(m, result, "cuModuleLoadDataEx");
  }
  if (!d->module) {
    char have[160] = "";
    for (int32_t i = 0; i < gpu->n_images; i++)
      snprintf(have + strlen(have), sizeof have - strlen(have), "%s%s_%d%d", i ? ", " : "",
               gpu->images[i].is_ptx ? "compute" : "sm", (int)gpu->images[i].major,
               (int)gpu->images[i].minor);
    return pk_fail(m, POCKTVM_NO_DEVICE, "%s is sm_%d%d and takes none of this artifact's code (%s)%s"
                   "; build for it: add its architecture to the target's 'cubins'", d->name, major,
                   minor, have, result == CU_PTX_VERSION ? ", whose PTX is newer than its driver" : "");
  }
  d->functions = calloc((size_t)gpu->n_functions + 1, sizeof *d->functions);
  if (!d->functions) return pk_fail(m, POCKTVM_NO_MEMORY, "no memory for the GPU's functions");
  for (int32_t i = 0; i < gpu->n_functions; i++)
    if ((result = d->cu.module_function(&d->functions[i], d->module, gpu->functions[i])))
      return failed(m, result, gpu->functions[i]);
  return POCKTVM_OK;
}

static int reserve_memory(pocktvm *m) {
  pk_device *d = m->device;
  size_t available = 0, total = 0;
  size_t arena = (size_t)m->plan.arena_bytes, frozen = (size_t)pk_the_model.frozen_bytes;
  cu_result result = d->cu.memory_info(&available, &total);
  if (result) return failed(m, result, "cuMemGetInfo");
  result = d->cu.memory_alloc(&d->arena, arena ? arena : 1);
  if (!result && frozen) result = d->cu.memory_alloc(&d->frozen, frozen);
  if (result)
    return pk_fail(m, POCKTVM_NO_MEMORY, "this model needs %.1f MB of GPU memory (arena %.1f, frozen "
                   "weights %.1f); %s has %.1f MB free of %.1f; build with a smaller --batch or a "
                   "--budget", (double)(arena + frozen) / 1e6, (double)arena / 1e6,
                   (double)frozen / 1e6, d->name, (double)available / 1e6, (double)total / 1e6);
  if (frozen && (result = d->cu.to_device(d->frozen, m->frozen, frozen, d->stream)))
    return failed(m, result, "uploading the frozen weights");
  return POCKTVM_OK;
}

static int bind_program(pocktvm *m, bound_program *bound, const pk_program *program) {
  pk_device *d = m->device;
  if (!program) return POCKTVM_OK;
  bound->addresses = calloc((size_t)program->n_views + 1, sizeof *bound->addresses);
  bound->parameters = calloc((size_t)program->n_launch_args + 1, sizeof *bound->parameters);
  if (!bound->addresses || !bound->parameters)
    return pk_fail(m, POCKTVM_NO_MEMORY, "no memory for the launches of '%s'", program->name);
  for (int32_t i = 0; i < program->n_views; i++) {
    const pk_view *view = &program->views[i];
    cu_address base = view->space == PK_FROZEN ? d->frozen : d->arena;
    bound->addresses[i] = base + (cu_address)view->offset;
  }
  for (int32_t i = 0; i < program->n_launch_args; i++)
    bound->parameters[i] = &bound->addresses[program->launch_args[i]];
  return POCKTVM_OK;
}

static int open_device(pocktvm *m) {
  int status;
  m->device = calloc(1, sizeof *m->device);
  if (!m->device) return pk_fail(m, POCKTVM_NO_MEMORY, "no memory for the GPU's tables");
  if ((status = load_driver(m)) || (status = choose_device(m)) || (status = load_module(m)) ||
      (status = reserve_memory(m)))
    return status;
  if ((status = bind_program(m, &m->device->step, pk_the_model.step))) return status;
  return bind_program(m, &m->device->predict, pk_the_model.predict);
}

static void close_device(pocktvm *m) {
  pk_device *d = m->device;
  if (d->context) {
    d->cu.context_set(d->context);
    if (d->stream) {
      d->cu.stream_wait(d->stream);
      d->cu.stream_destroy(d->stream);
    }
    if (d->arena) d->cu.memory_free(d->arena);
    if (d->frozen) d->cu.memory_free(d->frozen);
    if (d->module) d->cu.module_unload(d->module);
    d->cu.context_release(d->number);
  }
  free(d->functions);
  free(d->step.addresses);
  free(d->step.parameters);
  free(d->predict.addresses);
  free(d->predict.parameters);
  if (d->library) dlclose(d->library);
  free(d);
  m->device = NULL;
}

/* --- running --- */

/* The calling thread may be another one than last time. */
static int enter(pocktvm *m) {
  cu_result result = m->device->cu.context_set(m->device->context);
  return result ? failed(m, result, "cuCtxSetCurrent") : POCKTVM_OK;
}

static int push(pocktvm *m, int64_t offset, int64_t nbytes) {
  pk_device *d = m->device;
  int status = enter(m);
  if (status || nbytes <= 0) return status;
  cu_result result = d->cu.to_device(d->arena + (cu_address)offset, m->arena + offset,
                                     (size_t)nbytes, d->stream);
  return result ? failed(m, result, "copying to the GPU") : POCKTVM_OK;
}

static int pull(pocktvm *m, int64_t offset, int64_t nbytes) {
  pk_device *d = m->device;
  int status = enter(m);
  if (status) return status;
  cu_result result = CU_SUCCESS;
  if (nbytes > 0)
    result = d->cu.to_host(m->arena + offset, d->arena + (cu_address)offset, (size_t)nbytes,
                           d->stream);
  if (!result) result = d->cu.stream_wait(d->stream);
  return result ? failed(m, result, "a kernel, or copying from the GPU,") : POCKTVM_OK;
}

static int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int run_call(pocktvm *m, const pk_program *program, const bound_program *bound,
                    const pk_call *call) {
  pk_device *d = m->device;
  for (int32_t i = 0; i < call->n_launches; i++) {
    const pk_launch *l = &program->launches[call->first_launch + i];
    cu_result result = d->cu.launch(d->functions[l->function], l->grid[0], l->grid[1], l->grid[2],
                                    l->block[0], l->block[1], l->block[2], 0, d->stream,
                                    bound->parameters + l->first_arg, NULL);
    if (result) return failed(m, result, pk_the_model.gpu->functions[l->function]);
  }
  return POCKTVM_OK;
}

/* With `call_ns` every call is waited for: a profile, slower than the step it is of. */
static int run(pocktvm *m, const pk_program *program, int64_t *call_ns) {
  pk_device *d = m->device;
  const bound_program *bound = program == pk_the_model.step ? &d->step : &d->predict;
  int status = enter(m);
  for (int32_t i = 0; i < program->n_calls && !status; i++) {
    int64_t before = call_ns ? now_ns() : 0;
    status = run_call(m, program, bound, &program->calls[i]);
    if (!status && call_ns) {
      cu_result result = d->cu.stream_wait(d->stream);
      if (result) return failed(m, result, m->plan.call_labels[i]);
      call_ns[i] += now_ns() - before;
    }
  }
  return status;
}

const pk_device_api pk_cuda = {open_device, close_device, push, pull, run};
