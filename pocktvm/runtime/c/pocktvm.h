/* pocktvm: train a compiled model on this device.
 *
 * One library holds one model. The functions below are all it exports; they work from C, C++ and
 * every language that calls C. A handle is used by one thread at a time; several handles may live
 * at once. Nothing is allocated after pocktvm_open.
 *
 *   pocktvm *m;
 *   if (pocktvm_open(NULL, &m)) fail(pocktvm_last_error(NULL));
 *   pocktvm_array batch[] = {{images, POCKTVM_FLOAT32}, {labels, POCKTVM_INT32}};
 *   float loss;
 *   if (pocktvm_step(m, batch, 1e-3, &loss)) fail(pocktvm_last_error(m));
 *   pocktvm_save(m, "user.safetensors");
 *   pocktvm_close(m);
 */
#ifndef POCKTVM_H
#define POCKTVM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define POCKTVM_ABI 3
#define POCKTVM_MAX_DIMS 8

typedef struct pocktvm pocktvm;

/* What a call returned; pocktvm_last_error has the sentence. */
typedef enum {
  POCKTVM_OK = 0,
  POCKTVM_BAD_INPUT = 1,  /* NaN, a label out of range, a wrong dtype or name */
  POCKTVM_BAD_FILE = 2,   /* foreign, truncated or of another model; nothing was changed */
  POCKTVM_IO = 3,         /* the disk is full, a path does not exist, … */
  POCKTVM_NO_MEMORY = 4,  /* the arena could not be had, or the caller's does not fit */
  POCKTVM_BUSY = 5,       /* another trainer holds this checkpoint */
  POCKTVM_KERNEL = 6,     /* a kernel refused its arguments: a bug of the compiler */
  POCKTVM_NO_DEVICE = 7   /* no driver, no GPU, or one this artifact holds no code for */
} pocktvm_status;

/* How the caller's array is stored; the library converts while it copies.
 * UINT8 is an image batch in the model's axis order, UINT8_NHWC one with channels last; both are
 * normalised by the mean and scale stored at build. INT64 narrows to int32 where it fits. */
typedef enum {
  POCKTVM_FLOAT32 = 0,
  POCKTVM_INT32 = 1,
  POCKTVM_INT64 = 2,
  POCKTVM_UINT8 = 3,
  POCKTVM_UINT8_NHWC = 4
} pocktvm_dtype;

typedef struct {
  const void *data;
  int32_t dtype; /* pocktvm_dtype */
} pocktvm_array;

/* An input of the model, as compiled. */
typedef struct {
  const char *name;
  int32_t dtype; /* POCKTVM_FLOAT32 or POCKTVM_INT32 */
  int32_t ndim;
  int64_t shape[POCKTVM_MAX_DIMS];
  int64_t bound; /* int32 values lie in [0, bound); 0: any */
  int64_t ignore_index;
  int32_t has_ignore_index;
  int32_t is_label;
  int32_t channels; /* of mean and scale; 0: uint8 is refused */
  const float *mean;
  const float *scale;
} pocktvm_input;

/* A trained tensor, an optimizer's state or a selection, in the arena. A selection's data are int32
 * and only to be read: pocktvm_select changes them. Shape and strides (in elements) follow
 * torch's axes, whatever order the device keeps: data[i * strides[0] + j * strides[1] + …].
 * Of a model on a GPU it is a copy, fetched by pocktvm_tensor and good until the next step; what is
 * written to it until then goes back. */
typedef struct {
  const char *name;
  const char *kind; /* "trained", "optimizer" or "selection" */
  float *data;
  int32_t ndim;
  int64_t shape[POCKTVM_MAX_DIMS];
  int64_t strides[POCKTVM_MAX_DIMS];
  int64_t size; /* elements */
} pocktvm_tensor_view;

/* Recorded at build by the source framework or the reference, never by these kernels: `output` is
 * predict's before the first step, `losses` are those of n_losses steps on the one batch. */
typedef struct {
  const pocktvm_array *inputs;
  int32_t n_losses;
  const float *losses;
  const float *output; /* NULL: not recorded */
  double lr;
} pocktvm_selftest;

/* Facts of the model; with a handle also those of the open trainer. */
typedef struct {
  int32_t abi;
  int32_t batch;
  const char *model, *target, *scheme, *optimizer, *loss;
  const char *fingerprint; /* of the frozen weights; checkpoints carry it */
  double lr;               /* used where the caller has none of its own */
  int64_t arena_bytes, lower_bound_bytes, total_bytes, frozen_bytes;
  int64_t fast_bytes; /* of the arena, its end: what should lie in the device's fast memory */
  int32_t n_inputs; /* labels last */
  const pocktvm_input *inputs;
  int32_t output_ndim;
  int64_t output_shape[POCKTVM_MAX_DIMS];
  int64_t output_size; /* elements */
  int32_t n_tensors;
  const char *const *tensor_names;
  int32_t n_calls; /* kernels per step */
  const char *const *call_labels;
  const pocktvm_selftest *selftest; /* NULL: none */
  /* zero without a handle */
  int32_t threads;
  int64_t steps;          /* done so far; a checkpoint carries it */
  int64_t rss_open_bytes; /* resident set before the arena was touched; 0 where unknown */
  uint64_t seed;          /* of dropout's masks; a checkpoint of a model that drops carries it */
  int32_t n_selections;   /* tensors whose channels can be chosen; also without a handle */
} pocktvm_plan_info;

/* All zero is the default. */
typedef struct {
  const char *weights;    /* NULL: weights.safetensors beside the library */
  void *arena;            /* NULL: the library maps arena_bytes itself; else aligned to 64 bytes.
                             Host memory, also where a GPU has the arena proper */
  int64_t arena_bytes;    /* of the caller's arena */
  void *fast;             /* on-chip memory for plan.fast_bytes of the arena, aligned to 64 bytes; the
                             arena then needs only the rest. NULL: they lie in the arena's end */
  int64_t fast_bytes;     /* of the caller's fast memory */
  int32_t threads;        /* 0: as many as the device has cores for us */
  int32_t pin;            /* 1: each thread keeps to a core of its own, the fastest first; the caller's
                             too, until close. Not where threads outnumber cores, nor on macOS */
  const char *checkpoint; /* held locked until close; NULL: none */
  int64_t *call_ns;       /* plan.n_calls sums of nanoseconds, for a profile; NULL: not measured */
  uint64_t seed;          /* of dropout's masks, where the model was built with dropout */
} pocktvm_options;

#if defined(_WIN32)
#define POCKTVM_API
#else
#define POCKTVM_API __attribute__((visibility("default")))
#endif

/* Opens the model with its initial weights. On failure *out is NULL. */
POCKTVM_API int pocktvm_open(const pocktvm_options *options, pocktvm **out);

POCKTVM_API void pocktvm_close(pocktvm *m);

/* One training step: forward, loss, backward, update. `inputs` are plan.n_inputs arrays. When it
 * refuses an input, no weight has changed. */
POCKTVM_API int pocktvm_step(pocktvm *m, const pocktvm_array *inputs, double lr, float *loss);

/* Forward only; labels are left off. `output` has room for plan.output_size floats. */
POCKTVM_API int pocktvm_predict(pocktvm *m, const pocktvm_array *inputs, float *output);

/* Trained tensors, optimizer state and step count as safetensors, in torch's layout. The file at
 * `path` is replaced only when the new one is complete on disk. */
POCKTVM_API int pocktvm_save(pocktvm *m, const char *path);

/* The reverse; a file that does not fit is refused whole. */
POCKTVM_API int pocktvm_load(pocktvm *m, const char *path);

/* Finds a tensor by torch's name (any of a tied tensor's names). */
POCKTVM_API int pocktvm_tensor(pocktvm *m, const char *name, pocktvm_tensor_view *view);

/* For artifacts built with --resample: from the next step on these indices of the tensor learn, in
 * any order, exactly as many as were compiled. What others have learned stays in the weight.
 * Optimizer state stays with the indices that were chosen before; that of the new ones starts as at
 * the first step, that of the others is dropped. When it refuses, nothing has changed. */
POCKTVM_API int pocktvm_select(pocktvm *m, const char *name, const int32_t *indices, int32_t count);

/* pocktvm_select of every tensor that has a choice, with indices drawn from `seed` alone. */
POCKTVM_API int pocktvm_resample(pocktvm *m, uint64_t seed);

/* Never NULL; `m` may be. */
POCKTVM_API const pocktvm_plan_info *pocktvm_plan(const pocktvm *m);

/* What went wrong last with this handle; with NULL, why the last open failed. */
POCKTVM_API const char *pocktvm_last_error(const pocktvm *m);

#ifdef __cplusplus
}
#endif
#endif
