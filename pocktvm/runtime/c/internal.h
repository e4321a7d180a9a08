/* What the runtime's files share: the generated tables (codegen/step.py writes them) and the few
 * structures of TVM's calling convention. */
#ifndef POCKTVM_INTERNAL_H
#define POCKTVM_INTERNAL_H

#include <stdarg.h>

#include "pocktvm.h"

/* --- TVM's packed calling convention (tvm_ffi/c_api.h, dlpack.h) --- */

enum { PK_ANY_DLTENSOR = 7 };

typedef struct {
  int32_t type_index;
  uint32_t padding;
  union {
    int64_t integer;
    void *pointer;
  } v;
} pk_any;

typedef struct {
  uint8_t code, bits;
  uint16_t lanes;
} pk_dltype;

typedef struct {
  void *data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  pk_dltype dtype;
  const int64_t *shape;
  const int64_t *strides;
  uint64_t byte_offset;
} pk_dltensor;

typedef int (*pk_kernel)(void *self, const pk_any *args, int32_t n, pk_any *result);

/* --- generated tables --- */

enum { PK_ARENA = 0, PK_FROZEN = 1 };
enum { PK_SCALAR_LR = 0, PK_SCALAR_BIAS_CORRECTION = 1, PK_SCALAR_DROPOUT_SEED = 2 };
enum { PK_TRAINED = 0, PK_OPTIMIZER = 1, PK_SELECTION = 2 };
enum { PK_NOWHERE = -1 };

typedef struct {
  int64_t offset;
  int32_t space; /* PK_ARENA | PK_FROZEN */
  int32_t ndim;
  const int64_t *shape;
  pk_dltype dtype;
} pk_view;

typedef struct {
  pk_kernel kernel;
  int32_t first_arg; /* into pk_program.args */
  int32_t n_args;
  int32_t first_launch, n_launches; /* on a GPU, instead of the kernel */
} pk_call;

/* One start of a GPU function. */
typedef struct {
  int32_t function;         /* into pk_gpu.functions */
  int32_t first_arg, n_args; /* into pk_program.launch_args */
  uint32_t grid[3], block[3];
} pk_launch;

typedef struct {
  int64_t offset;
  int32_t formula;
  double beta;
} pk_scalar;

typedef struct {
  int32_t index;  /* into plan.inputs */
  int64_t offset; /* PK_NOWHERE: no kernel reads it */
} pk_program_input;

typedef struct {
  const char *name;
  int32_t n_views, n_args, n_calls, n_inputs, n_scalars;
  const pk_view *views;
  const int32_t *args; /* indices of views, calls' arguments in a row */
  const pk_call *calls;
  const pk_program_input *inputs;
  const pk_scalar *scalars;
  int64_t loss_offset, output_offset; /* PK_NOWHERE: not computed */
  int32_t n_launches, n_launch_args;
  const pk_launch *launches;
  const int32_t *launch_args; /* indices of views */
} pk_program;

/* Code of all GPU functions for one compute capability; PTX ends with a NUL. */
typedef struct {
  const char *data;
  int32_t major, minor, is_ptx;
} pk_image;

/* What runs a model that does not run on the processor (cuda.c). The arena of the handle is then a
 * copy in host memory; offsets are the same on both sides. */
typedef struct {
  int (*open)(pocktvm *m); /* also uploads the frozen weights */
  void (*close)(pocktvm *m);
  int (*push)(pocktvm *m, int64_t offset, int64_t nbytes); /* host to device */
  int (*pull)(pocktvm *m, int64_t offset, int64_t nbytes); /* device to host; waits */
  int (*run)(pocktvm *m, const pk_program *program, int64_t *call_ns);
} pk_device_api;

typedef struct {
  const pk_device_api *api;
  int32_t n_images, n_functions;
  const pk_image *images; /* machine code first, PTX last */
  const char *const *functions;
} pk_gpu;

typedef struct {
  const char *name;
  const char *const *aliases; /* ends with NULL */
  int32_t kind; /* PK_TRAINED | PK_OPTIMIZER | PK_SELECTION */
  int32_t ndim;
  const int64_t *shape, *strides; /* torch's axes */
  int64_t offset, size;
  int64_t initial; /* of what is not trained: its first value in the frozen pages; nowhere: zeros */
  int32_t part_axis, part_count; /* only these indices of an axis learn; -1: all of it */
  const int32_t *part;
  int32_t selects, select_axis; /* a selection's tensor (into pk_model.tensors) and its axis */
} pk_tensor;

typedef struct {
  pocktvm_plan_info plan;
  int64_t persistent_bytes;
  int32_t default_threads;
  const char *frozen_file; /* NULL: embedded */
  const char *frozen;      /* embedded bytes */
  int64_t frozen_bytes;
  const pk_tensor *tensors; /* sorted by name */
  const pk_program *step, *predict;
  const pk_gpu *gpu; /* NULL: the processor runs it */
} pk_model;

extern const pk_model pk_the_model;

/* --- an open trainer --- */

typedef struct pk_pool pk_pool;
typedef struct pk_device pk_device;

typedef struct {
  const pk_program *program;
  pk_dltensor *tensors;
  pk_any *args;
} pk_bound;

struct pocktvm {
  pocktvm_plan_info plan; /* a copy, with this trainer's threads, steps, … */
  char *arena;
  char *fast; /* the arena's last plan.fast_bytes; directly behind the rest unless the caller's */
  int64_t mapped_bytes; /* 0: the caller's arena */
  const char *frozen;
  int64_t frozen_mapped_bytes;
  pk_bound step, predict;
  pk_pool *pool;
  int64_t *call_ns;
  int32_t *chosen; /* room for the longest selection */
  pk_device *device; /* NULL: the processor */
  int device_newer;  /* steps were done since the state was last fetched */
  int host_newer;    /* the caller was handed the state and may have changed it */
  int lock_fd;
  char *lock_path;   /* the lock file held */
  char *locked_file; /* the checkpoint it stands for */
  char error[1024];
};

/* Writes the handle's error (open's when m is NULL) and returns `status`. */
int pk_fail(pocktvm *m, int status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* kernel_abi.c */
void pk_use_pool(pk_pool *pool); /* of the calling thread, for the kernels it is about to call */
const char *pk_kernel_error(void);

/* threads.c */
pk_pool *pk_pool_open(int threads, int pin); /* pin: each thread keeps to a core */
void pk_pool_close(pk_pool *pool);
int pk_pool_threads(const pk_pool *pool);
int pk_pool_run(pk_pool *pool, int (*task)(int, void *, void *), void *data, int n_tasks);

/* affinity.c */
int pk_online_cpus(void);
int pk_fast_cpus(int *cpus, int most);   /* those we may use, fastest first; their number */
int pk_hold(const int *cpus, int n);     /* keeps the calling thread to these */

/* runtime.c: the trained state on the processor's side is the device's, and the reverse */
int pk_fetch_state(pocktvm *m);
int pk_send_state(pocktvm *m);
int pk_has_name(const pk_tensor *tensor, const char *name); /* torch's, or an alias */

/* cuda.c */
extern const pk_device_api pk_cuda;

/* inputs.c */
int pk_copy_input(pocktvm *m, const pocktvm_input *input, const pocktvm_array *array, char *dest);

/* select.c */
int pk_reserve_selections(pocktvm *m);
const char *pk_bad_selection(const pk_tensor *selection, const int32_t *indices, int64_t position);

/* restore.c */
int pk_load_initial(pocktvm *m, const char *path);

/* lock.c */
int pk_lock(pocktvm *m, const char *path);
void pk_unlock(pocktvm *m);

/* process.c */
int64_t pk_resident_bytes(void);
void pk_prefault(const char *start, int64_t nbytes);
void pk_prefault_code(void);
void pk_prefault_stack(void);
int pk_library_folder(char *folder, size_t room);

#endif
