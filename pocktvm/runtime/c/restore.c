/* Reading checkpoints, and the weights that training starts from.
 *
 * A load checks names, shapes, sizes, selections and the CRC of the bytes before it writes the
 * first one: what does not fit leaves the state as it is. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"
#include "safetensors.h"
#include "walk.h"

static void describe_shape(const st_tensor *found, const pk_tensor *tensor, int part, char *text,
                           size_t room) {
  size_t used = (size_t)snprintf(text, room, "%s[", found->dtype);
  for (int32_t i = 0; i < found->ndim && used < room; i++)
    used += (size_t)snprintf(text + used, room - used, i ? ",%lld" : "%lld",
                             (long long)found->shape[i]);
  if (used < room) used += (size_t)snprintf(text + used, room - used, "], not %s[", dtype_of(tensor));
  for (int32_t i = 0; i < tensor->ndim && used < room; i++)
    used += (size_t)snprintf(text + used, room - used, i ? ",%lld" : "%lld",
                             (long long)extent(tensor, i, part));
  if (used < room) snprintf(text + used, room - used, "]");
}

static const char *const WHAT[] = {"trained", "optimizer state", "which channels learn"};

static int check_one(pocktvm *m, const st_file *file, const char *path, const pk_tensor *tensor,
                     int part) {
  const st_tensor *found = st_find(file, tensor->name);
  if (!found)
    return pk_fail(m, POCKTVM_BAD_FILE, "%s does not fit this model: it has no tensor '%s' (%s); "
                   "was it made with another scheme or optimizer%s?", path, tensor->name,
                   WHAT[tensor->kind],
                   tensor->kind == PK_SELECTION ? ", or without --resample" : "");
  int same = strcmp(found->dtype, dtype_of(tensor)) == 0 && found->ndim == tensor->ndim;
  for (int32_t d = 0; d < tensor->ndim && same; d++)
    same = found->shape[d] == extent(tensor, d, part);
  if (same) return POCKTVM_OK;
  char text[256];
  describe_shape(found, tensor, part, text, sizeof text);
  return pk_fail(m, POCKTVM_BAD_FILE, "%s does not fit this model: tensor '%s' is %s", path,
                 tensor->name, text);
}

static const pk_tensor *known(const char *name) {
  for (int32_t i = 0; i < pk_the_model.plan.n_tensors; i++)
    if (strcmp(pk_the_model.tensors[i].name, name) == 0) return &pk_the_model.tensors[i];
  return NULL;
}

static int check_extra(pocktvm *m, const st_file *file, const char *path) {
  for (size_t i = 0; i < file->n_tensors; i++)
    if (!known(file->tensors[i].name))
      return pk_fail(m, POCKTVM_BAD_FILE, "%s does not fit this model: its tensor '%s' is not "
                     "trained here; was it made with another scheme or optimizer?", path,
                     file->tensors[i].name);
  return POCKTVM_OK;
}

static int chooses(const st_file *file) {
  for (size_t i = 0; i < file->n_tensors; i++)
    if (strncmp(file->tensors[i].name, "selection/", 10) == 0) return 1;
  return 0;
}

static int check_metadata(pocktvm *m, const st_file *file, const char *path, int64_t *steps) {
  const char *version = st_metadata(file, "pocktvm"), *step = st_metadata(file, "step");
  const char *fingerprint = st_metadata(file, "fingerprint");
  char *end = NULL;
  *steps = step ? strtoll(step, &end, 10) : -1;
  if (!version || !step || !*step || *end || *steps < 0)
    return pk_fail(m, POCKTVM_BAD_FILE, "%s is a safetensors file, but not a checkpoint of pocktvm "
                   "(to start from weights, give them to the build: --weights)", path);
  if (chooses(file) != (m->plan.n_selections > 0))
    return pk_fail(m, POCKTVM_BAD_FILE, "%s does not fit this artifact: one of the two was built "
                   "with --resample and the other was not", path);
  if (fingerprint && strcmp(fingerprint, m->plan.fingerprint))
    return pk_fail(m, POCKTVM_BAD_FILE, "%s was trained on top of other frozen weights than this "
                   "artifact's; build with the --weights it was made with", path);
  return POCKTVM_OK;
}

static int check_bytes(pocktvm *m, const st_file *file, const char *path) {
  const char *expected = st_metadata(file, "crc32");
  char chunk[4 * CHUNK], actual[16];
  uint32_t crc = 0;
  if (!expected) return POCKTVM_OK;
  for (int64_t at = file->data_begin; at < file->file_bytes;) {
    int64_t n = file->file_bytes - at < (int64_t)sizeof chunk ? file->file_bytes - at
                                                              : (int64_t)sizeof chunk;
    if (st_read(file, at, chunk, (size_t)n))
      return pk_fail(m, POCKTVM_IO, "%s cannot be read: %s", path, strerror(errno));
    crc = st_crc32(crc, chunk, (size_t)n);
    at += n;
  }
  snprintf(actual, sizeof actual, "%08x", (unsigned)crc);
  if (strcmp(actual, expected) == 0) return POCKTVM_OK;
  return pk_fail(m, POCKTVM_BAD_FILE, "%s is damaged: its checksum is %s, its bytes give %s", path,
                 expected, actual);
}

/* A kernel writes where these indices say. */
static int check_selection(pocktvm *m, const st_file *file, const char *path,
                           const pk_tensor *selection) {
  if (selection->kind != PK_SELECTION) return POCKTVM_OK;
  size_t nbytes = (size_t)selection->size * sizeof *m->chosen;
  if (st_read(file, st_find(file, selection->name)->begin, m->chosen, nbytes))
    return pk_fail(m, POCKTVM_IO, "%s cannot be read: %s", path, strerror(errno));
  for (int64_t i = 0; i < selection->size; i++) {
    const char *wrong = pk_bad_selection(selection, m->chosen, i);
    if (wrong)
      return pk_fail(m, POCKTVM_BAD_FILE, "%s does not fit this model: in '%s' index %d is %s", path,
                     selection->name, (int)m->chosen[i], wrong);
  }
  return POCKTVM_OK;
}

static int read_tensor(pocktvm *m, const st_file *file, const char *path, const pk_tensor *tensor,
                       int part) {
  float chunk[CHUNK];
  walker w = start(tensor, part);
  float *values = (float *)(m->arena + tensor->offset);
  int64_t at = st_find(file, tensor->name)->begin;
  for (int64_t done = 0, size = count(tensor, part); done < size;) {
    int64_t n = size - done < CHUNK ? size - done : CHUNK;
    if (st_read(file, at + done * 4, chunk, (size_t)n * 4))
      return pk_fail(m, POCKTVM_IO, "%s cannot be read: %s", path, strerror(errno));
    for (int64_t i = 0; i < n; i++) values[next_element(&w)] = chunk[i];
    done += n;
  }
  return POCKTVM_OK;
}

static int load_open_file(pocktvm *m, const st_file *file, const char *path) {
  int64_t steps;
  int status = check_metadata(m, file, path, &steps);
  for (int32_t i = 0; i < m->plan.n_tensors && !status; i++)
    status = check_one(m, file, path, &pk_the_model.tensors[i], 1);
  if (!status) status = check_extra(m, file, path);
  if (!status) status = check_bytes(m, file, path);
  for (int32_t i = 0; i < m->plan.n_tensors && !status; i++)
    status = check_selection(m, file, path, &pk_the_model.tensors[i]);
  for (int32_t i = 0; i < m->plan.n_tensors && !status; i++)
    status = read_tensor(m, file, path, &pk_the_model.tensors[i], 1);
  const char *seed = st_metadata(file, "seed");
  if (!status && seed) m->plan.seed = strtoull(seed, NULL, 10);
  if (!status) m->plan.steps = steps;
  return status;
}

int pocktvm_load(pocktvm *m, const char *path) {
  st_file file;
  char reason[512];
  if (st_open(&file, path, reason, sizeof reason))
    return pk_fail(m, POCKTVM_BAD_FILE, "cannot load checkpoint %s: %s", path, reason);
  int status = pk_fetch_state(m); /* a load that fails midway leaves the rest as it is */
  if (!status) status = load_open_file(m, &file, path);
  if (!status) status = pk_send_state(m);
  st_close(&file);
  return status;
}

/* --- what training starts from --- */

static int initial_tensor(pocktvm *m, const st_file *file, const char *path, const pk_tensor *t) {
  if (t->kind == PK_TRAINED) {
    int status = check_one(m, file, path, t, 0);
    return status ? status : read_tensor(m, file, path, t, 0);
  }
  char *values = m->arena + t->offset;
  if (t->initial == PK_NOWHERE)
    memset(values, 0, (size_t)t->size * 4);
  else
    memcpy(values, m->frozen + t->initial, (size_t)t->size * 4);
  return POCKTVM_OK;
}

int pk_load_initial(pocktvm *m, const char *path) {
  char beside[4096], reason[512];
  if (!path) {
    if (pk_library_folder(beside, sizeof beside - 32))
      return pk_fail(m, POCKTVM_IO, "cannot tell where this library lies; give options.weights");
    path = strcat(beside, "/weights.safetensors");
  }
  st_file file;
  if (st_open(&file, path, reason, sizeof reason))
    return pk_fail(m, POCKTVM_BAD_FILE, "cannot read the initial weights %s: %s", path, reason);
  int status = POCKTVM_OK;
  for (int32_t i = 0; i < m->plan.n_tensors && !status; i++)
    status = initial_tensor(m, &file, path, &pk_the_model.tensors[i]);
  st_close(&file);
  return status;
}
