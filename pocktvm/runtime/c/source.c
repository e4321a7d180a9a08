/* Batches from a safetensors file: keys are the inputs' names, axis 0 counts samples.
 *
 * Rows are read one by one into a batch of their own: a mapped file would count as the trainer's
 * memory. The order depends on (seed, epoch) alone and the epoch on the step, so a resumed run
 * continues where it stopped. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runner.h"

static void shape_text(const int64_t *shape, int32_t from, int32_t ndim, char *text, size_t room) {
  size_t used = (size_t)snprintf(text, room, "[");
  for (int32_t i = from; i < ndim && used < room; i++)
    used += (size_t)snprintf(text + used, room - used, i > from ? ", %lld" : "%lld",
                             (long long)shape[i]);
  if (used < room) snprintf(text + used, room - used, "]");
}

static int same_sample(const st_tensor *tensor, const pocktvm_input *input) {
  return tensor->ndim == input->ndim &&
         memcmp(tensor->shape + 1, input->shape + 1, (size_t)(input->ndim - 1) * 8) == 0;
}

static int channels_last(const st_tensor *tensor, const pocktvm_input *input) {
  return tensor->ndim == 4 && input->ndim == 4 && tensor->shape[1] == input->shape[2] &&
         tensor->shape[2] == input->shape[3] && tensor->shape[3] == input->shape[1];
}

/* How the library shall read the column; -1: it cannot. */
static int32_t dtype_of(const st_tensor *tensor, const pocktvm_input *input) {
  int same = same_sample(tensor, input);
  if (input->dtype == POCKTVM_INT32) {
    if (same && strcmp(tensor->dtype, "I32") == 0) return POCKTVM_INT32;
    return same && strcmp(tensor->dtype, "I64") == 0 ? POCKTVM_INT64 : -1;
  }
  if (same && strcmp(tensor->dtype, "F32") == 0) return POCKTVM_FLOAT32;
  if (!input->channels || strcmp(tensor->dtype, "U8")) return -1;
  return same ? POCKTVM_UINT8 : channels_last(tensor, input) ? POCKTVM_UINT8_NHWC : -1;
}

static int refuse_column(const pk_source *source, const st_tensor *tensor,
                         const pocktvm_input *input) {
  char has[128], wants[128];
  shape_text(tensor->shape, 1, tensor->ndim, has, sizeof has);
  shape_text(input->shape, 1, input->ndim, wants, sizeof wants);
  return pk_complain("%s: '%s' has samples of %s %s; this model takes %s of %s", source->path,
                     input->name, tensor->dtype, has,
                     input->dtype == POCKTVM_INT32 ? "I32 or I64"
                     : input->channels             ? "F32 or U8 (channels first or last)"
                                                   : "F32",
                     wants);
}

static int add_column(pk_source *source, int32_t i) {
  const pocktvm_input *input = &source->plan->inputs[i];
  const st_tensor *tensor = st_find(&source->file, input->name);
  if (!tensor && input->is_label) tensor = st_find(&source->file, "y"); /* labels go by both */
  if (!tensor) {
    char keys[512] = "";
    for (size_t k = 0; k < source->file.n_tensors && strlen(keys) < 400; k++)
      snprintf(keys + strlen(keys), sizeof keys - strlen(keys), k ? ", %.60s" : "%.60s",
               source->file.tensors[k].name);
    return pk_complain("%s has no '%s'; its keys are: %s", source->path, input->name, keys);
  }
  if (tensor->ndim < 1 || (source->arrays[i].dtype = dtype_of(tensor, input)) < 0)
    return refuse_column(source, tensor, input);
  if (i == 0) source->n_samples = tensor->shape[0];
  if (tensor->shape[0] != source->n_samples)
    return pk_complain("%s: '%s' has %lld samples, '%s' has %lld", source->path, input->name,
                       (long long)tensor->shape[0], source->plan->inputs[0].name,
                       (long long)source->n_samples);
  source->columns[i].tensor = tensor;
  source->columns[i].sample_bytes = tensor->shape[0] ? tensor->nbytes / tensor->shape[0] : 0;
  return 0;
}

/* Integers are cheap to check before the first step: a bad label in the last sample would
 * otherwise end a long run. */
static int check_integers(const pk_source *source, int32_t i) {
  const pocktvm_input *input = &source->plan->inputs[i];
  int item = pk_dtype_bytes(source->arrays[i].dtype);
  const st_tensor *tensor = source->columns[i].tensor;
  int64_t buffer[512], per_sample = source->columns[i].sample_bytes / item;
  if (!input->bound) return 0;
  for (int64_t done = 0; done < tensor->nbytes;) {
    int64_t n = tensor->nbytes - done < 4096 ? tensor->nbytes - done : 4096;
    if (st_read(&source->file, tensor->begin + done, buffer, (size_t)n))
      return pk_complain("%s: %s", source->path, strerror(errno));
    for (int64_t k = 0; k < n / item; k++) {
      int64_t value = item == 8 ? buffer[k] : ((const int32_t *)buffer)[k];
      if (value >= 0 && value < input->bound) continue;
      if (input->has_ignore_index && value == input->ignore_index) continue;
      return pk_complain("%s: '%s' is %lld in sample %lld; this model takes 0 to %lld",
                         source->path, input->name, (long long)value,
                         (long long)((done / item + k) / per_sample), (long long)input->bound - 1);
    }
    done += n;
  }
  return 0;
}

static int open_file(pk_source *source) {
  char reason[512];
  if (st_open(&source->file, source->path, reason, sizeof reason))
    return pk_complain("cannot read data %s: %s", source->path, reason);
  for (int32_t i = 0; i < source->plan->n_inputs; i++)
    if (add_column(source, i)) return 1;
  if (source->n_samples < source->plan->batch)
    return pk_complain("%s has %lld samples, one batch of this artifact has %d; give more data or "
                       "build with a smaller --batch", source->path, (long long)source->n_samples,
                       (int)source->plan->batch);
  for (int32_t i = 0; i < source->plan->n_inputs; i++)
    if (source->plan->inputs[i].dtype == POCKTVM_INT32 && check_integers(source, i)) return 1;
  return 0;
}

int pk_source_open(pk_source *source, const char *path, const pocktvm_plan_info *plan,
                   uint64_t seed) {
  *source = (pk_source){.plan = plan, .path = path, .seed = seed, .file = {.fd = -1}};
  source->arrays = calloc((size_t)plan->n_inputs + 1, sizeof *source->arrays);
  source->rows = calloc((size_t)plan->batch + 1, sizeof *source->rows);
  if (!source->arrays || !source->rows || plan->n_inputs > 64) return pk_complain("no memory");
  if (path && open_file(source)) return 1;
  for (int32_t i = 0; i < plan->n_inputs; i++) {
    const pocktvm_input *input = &plan->inputs[i];
    if (!path) source->arrays[i].dtype = input->dtype;
    size_t nbytes = (size_t)(pk_input_size(input) * pk_dtype_bytes(source->arrays[i].dtype));
    void *data = malloc(nbytes + 1);
    if (!data) return pk_complain("no memory for a batch");
    memset(data, 0, nbytes); /* resident now, so that a measurement counts it before the arena */
    if (!path) pk_generate(plan, i, seed, data);
    source->arrays[i].data = data;
  }
  return 0;
}

int64_t pk_source_epoch_steps(const pk_source *source) {
  return source->path ? source->n_samples / source->plan->batch : 0;
}

int pk_source_batch(pk_source *source, int64_t step) {
  if (!source->path) return 0;
  int64_t batch = source->plan->batch, per_epoch = pk_source_epoch_steps(source);
  for (int64_t b = 0; b < batch; b++)
    source->rows[b] = pk_shuffled(step % per_epoch * batch + b, source->n_samples, source->seed,
                                  (uint64_t)(step / per_epoch));
  for (int32_t i = 0; i < source->plan->n_inputs; i++) {
    int64_t nbytes = source->columns[i].sample_bytes;
    char *out = (char *)(uintptr_t)source->arrays[i].data;
    for (int64_t b = 0; b < batch; b++)
      if (st_read(&source->file, source->columns[i].tensor->begin + source->rows[b] * nbytes,
                  out + b * nbytes, (size_t)nbytes))
        return pk_complain("%s: %s", source->path, strerror(errno));
  }
  return 0;
}

void pk_source_close(pk_source *source) {
  if (source->path) st_close(&source->file);
  for (int32_t i = 0; source->arrays && i < source->plan->n_inputs; i++)
    free((void *)(uintptr_t)source->arrays[i].data);
  free(source->arrays);
  free(source->rows);
}
