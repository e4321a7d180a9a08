/* What the files of pocktvm-run share. The runner reaches the model only through pocktvm.h. */
#ifndef POCKTVM_RUNNER_H
#define POCKTVM_RUNNER_H

#include <stdarg.h>

#include "pocktvm.h"
#include "safetensors.h"

typedef struct {
  int (*open)(const pocktvm_options *, pocktvm **);
  void (*close)(pocktvm *);
  int (*step)(pocktvm *, const pocktvm_array *, double, float *);
  int (*predict)(pocktvm *, const pocktvm_array *, float *);
  int (*save)(pocktvm *, const char *);
  int (*load)(pocktvm *, const char *);
  int (*tensor)(pocktvm *, const char *, pocktvm_tensor_view *);
  int (*select)(pocktvm *, const char *, const int32_t *, int32_t);
  int (*resample)(pocktvm *, uint64_t);
  const pocktvm_plan_info *(*plan)(const pocktvm *);
  const char *(*last_error)(const pocktvm *);
} pk_api;

typedef struct {
  const char *artifact, *data, *save, *resume;
  int64_t steps;      /* total, resumed ones included; -1: not given */
  double lr;          /* < 0: the artifact's */
  int threads, pin;
  double save_seconds; /* 0: only at the end */
  int64_t save_steps;  /* 0: by time */
  int64_t resample_epochs; /* 0: never */
  uint64_t seed;
  int json, selftest, serve, profile, progress, emulated, die_with_parent;
} pk_settings;

/* Where batches come from: a file of samples, or the generator when `path` is NULL. */
typedef struct {
  const pocktvm_plan_info *plan;
  const char *path;
  st_file file;
  struct {
    const st_tensor *tensor;
    int64_t sample_bytes;
  } columns[64];
  int64_t n_samples;
  uint64_t seed;
  pocktvm_array *arrays; /* the batch, one per input */
  int64_t *rows;         /* which samples it holds */
} pk_source;

/* Prints "pocktvm-run: …" and returns the exit code of what the user can fix. */
int pk_complain(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* library.c */
int pk_load_library(const char *artifact, pk_api *api, char *folder, size_t room);

/* source.c, generate.c */
int pk_source_open(pk_source *source, const char *path, const pocktvm_plan_info *plan, uint64_t seed);
int pk_source_batch(pk_source *source, int64_t step);
void pk_source_close(pk_source *source);
int64_t pk_source_epoch_steps(const pk_source *source);
void pk_generate(const pocktvm_plan_info *plan, int32_t input, uint64_t seed, void *out);
int64_t pk_shuffled(int64_t i, int64_t n, uint64_t seed, uint64_t epoch);
int64_t pk_input_size(const pocktvm_input *input);
int pk_dtype_bytes(int32_t dtype);

/* train.c, selftest.c, serve.c: exit codes */
int pk_train(const pk_api *api, const pk_settings *settings, const pocktvm_options *options);
int pk_selftest(const pk_api *api, const pk_settings *settings, const pocktvm_options *options);
int pk_serve(const pk_api *api, const pocktvm_options *options);

/* json.c */
void pk_json_string(const char *text);
void pk_json_number(double value);

#endif
