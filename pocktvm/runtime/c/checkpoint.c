/* Trained tensors, optimizer state and step count as safetensors; restore.c reads them.
 *
 * A save writes <path>.tmp, fsyncs it, renames it over <path> and fsyncs the folder: at every
 * moment <path> is a whole checkpoint. Files hold torch's layout, so they also go into torch; they
 * are a function of the state alone (sorted names, no time stamps). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "internal.h"
#include "safetensors.h"
#include "walk.h"

/* Calls `sink` with the floats that learn, in torch's order, in chunks. */
static int each_chunk(pocktvm *m, const pk_tensor *tensor, int (*sink)(void *, const void *, size_t),
                      void *data) {
  float chunk[CHUNK];
  walker w = start(tensor, 1);
  const float *values = (const float *)(m->arena + tensor->offset);
  for (int64_t done = 0, size = count(tensor, 1); done < size;) {
    int64_t n = size - done < CHUNK ? size - done : CHUNK;
    for (int64_t i = 0; i < n; i++) chunk[i] = values[next_element(&w)];
    if (sink(data, chunk, (size_t)n * sizeof *chunk)) return -1;
    done += n;
  }
  return 0;
}

typedef struct {
  int fd;
  uint32_t crc;
  char *text; /* the header while it is built */
  size_t used, room;
} writer;

static int add_crc(void *data, const void *bytes, size_t n) {
  writer *w = data;
  w->crc = st_crc32(w->crc, bytes, n);
  return 0;
}

static int write_all(void *data, const void *bytes, size_t n) {
  const writer *w = data;
  const char *from = bytes;
  while (n) {
    ssize_t done = write(w->fd, from, n);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return -1;
    from += done;
    n -= (size_t)done;
  }
  return 0;
}

static int add_text(writer *w, const char *format, ...) {
  for (;;) {
    va_list list;
    va_start(list, format);
    int n = vsnprintf(w->text ? w->text + w->used : NULL, w->room - w->used, format, list);
    va_end(list);
    if (n >= 0 && w->used + (size_t)n < w->room) return w->used += (size_t)n, 0;
    size_t room = 2 * w->room + (size_t)n + 4096;
    char *grown = realloc(w->text, room);
    if (!grown) return -1;
    w->text = grown;
    w->room = room;
  }
}

static int add_string(writer *w, const char *text) {
  if (add_text(w, "\"")) return -1;
  for (; *text; text++) {
    unsigned char c = (unsigned char)*text;
    if (add_text(w, c < 0x20 ? "\\u%04x" : c == '"' || c == '\\' ? "\\%c" : "%c", c)) return -1;
  }
  return add_text(w, "\"");
}

/* Whether the step reads dropout's seed. */
static int drops(void) {
  const pk_program *step = pk_the_model.step;
  for (int32_t i = 0; step && i < step->n_scalars; i++)
    if (step->scalars[i].formula == PK_SCALAR_DROPOUT_SEED) return 1;
  return 0;
}

/* The header, padded so that the data starts aligned to 8 bytes. */
static int build_header(pocktvm *m, writer *w) {
  int64_t at = 0;
  int failed = add_text(w, "{\"__metadata__\":{\"crc32\":\"%08x\",\"fingerprint\":\"%s\",\"format\":"
                        "\"pt\",\"model\":", (unsigned)w->crc, m->plan.fingerprint);
  failed |= add_string(w, m->plan.model);
  failed |= add_text(w, ",\"pocktvm\":\"1\"");
  if (drops()) failed |= add_text(w, ",\"seed\":\"%llu\"", (unsigned long long)m->plan.seed);
  failed |= add_text(w, ",\"step\":\"%lld\"}", (long long)m->plan.steps);
  for (int32_t i = 0; i < m->plan.n_tensors && !failed; i++) {
    const pk_tensor *tensor = &pk_the_model.tensors[i];
    failed |= add_text(w, ",") | add_string(w, tensor->name);
    failed |= add_text(w, ":{\"dtype\":\"%s\",\"shape\":[", dtype_of(tensor));
    for (int32_t d = 0; d < tensor->ndim; d++)
      failed |= add_text(w, d ? ",%lld" : "%lld", (long long)extent(tensor, d, 1));
    int64_t end = at + count(tensor, 1) * 4;
    failed |= add_text(w, "],\"data_offsets\":[%lld,%lld]}", (long long)at, (long long)end);
    at = end;
  }
  failed |= add_text(w, "}");
  while (!failed && w->used % 8) failed |= add_text(w, " ");
  return failed;
}

static int write_file(pocktvm *m, writer *w) {
  uint8_t length[8];
  for (int i = 0; i < 8; i++) length[i] = (uint8_t)((uint64_t)w->used >> 8 * i);
  if (write_all(w, length, 8) || write_all(w, w->text, w->used)) return -1;
  for (int32_t i = 0; i < m->plan.n_tensors; i++)
    if (each_chunk(m, &pk_the_model.tensors[i], write_all, w)) return -1;
  return fsync(w->fd);
}

static int write_failed(pocktvm *m, const char *path, const char *verb) {
  int reason = errno;
  int64_t nbytes = 0;
  struct statvfs disk;
  char free_text[64] = "", folder[4096];
  for (int32_t i = 0; i < m->plan.n_tensors; i++) nbytes += count(&pk_the_model.tensors[i], 1) * 4;
  snprintf(folder, sizeof folder, "%s", path);
  if (reason == ENOSPC && statvfs(dirname(folder), &disk) == 0)
    snprintf(free_text, sizeof free_text, ", %lld are free",
             (long long)disk.f_bavail * (long long)disk.f_frsize);
  return pk_fail(m, POCKTVM_IO, "cannot %s checkpoint %s: %s (it needs %lld bytes%s); a previous "
                 "checkpoint there is untouched", verb, path, strerror(reason), (long long)nbytes,
                 free_text);
}

static void sync_folder(const char *path) {
  char folder[4096];
  snprintf(folder, sizeof folder, "%s", path);
  int fd = open(dirname(folder), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return;
  fsync(fd); /* some file systems refuse it on folders; the rename has happened either way */
  close(fd);
}

static int save_locked(pocktvm *m, const char *path) {
  char temporary[4096];
  writer w = {.fd = -1};
  if (snprintf(temporary, sizeof temporary, "%s.tmp", path) >= (int)sizeof temporary)
    return pk_fail(m, POCKTVM_IO, "the path of the checkpoint is too long");
  for (int32_t i = 0; i < m->plan.n_tensors; i++) each_chunk(m, &pk_the_model.tensors[i], add_crc, &w);
  if (build_header(m, &w)) {
    free(w.text);
    return pk_fail(m, POCKTVM_NO_MEMORY, "no memory for the checkpoint's header");
  }
  w.fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  int failed = w.fd < 0 || write_file(m, &w);
  if (w.fd >= 0 && close(w.fd)) failed = 1;
  free(w.text);
  if (!failed && rename(temporary, path) == 0) return sync_folder(path), POCKTVM_OK;
  int status = write_failed(m, path, "write");
  if (w.fd >= 0) unlink(temporary);
  return status;
}

int pocktvm_save(pocktvm *m, const char *path) {
  int fetched = pk_fetch_state(m);
  if (fetched) return fetched;
  int held = m->lock_fd >= 0 && strcmp(m->locked_file, path) == 0;
  if (held) return save_locked(m, path);
  /* another file than the one held since open: lock it for as long as the save takes */
  pocktvm other = {.lock_fd = -1};
  int status = pk_lock(&other, path);
  if (status)
    memcpy(m->error, other.error, sizeof m->error);
  else
    status = save_locked(m, path);
  pk_unlock(&other);
  return status;
}
