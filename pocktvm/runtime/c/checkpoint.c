/* Trained tensors, optimizer state and step count to and from safetensors.
 *
 * A save writes <path>.tmp, fsyncs it, renames it over <path> and fsyncs the folder: at every
 * moment <path> is a whole checkpoint. A load checks names, shapes, sizes and the CRC of the bytes
 * before it writes the first one. Files hold torch's layout, so they also go into torch; they are
 * a function of the state alone (sorted names, no time stamps). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "internal.h"
#include "safetensors.h"

enum { CHUNK = 4096 }; /* elements on the stack */

/* --- the lock beside a checkpoint --- */

static int lock_file(const char *path, pid_t *holder) {
  for (;;) {
    struct stat ours, there;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) return -1;
    if (flock(fd, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK) {
      char text[32] = "";
      if (pread(fd, text, sizeof text - 1, 0) > 0) *holder = (pid_t)atoi(text);
      close(fd);
      return errno = EWOULDBLOCK, -1;
    } /* a file system without locks: go on without */
    if (fstat(fd, &ours) == 0 && stat(path, &there) == 0 && ours.st_ino == there.st_ino) {
      char text[32];
      int n = snprintf(text, sizeof text, "%ld\n", (long)getpid());
      if (ftruncate(fd, 0) || pwrite(fd, text, (size_t)n, 0) != n) { /* only a courtesy */
      }
      return fd;
    }
    close(fd); /* the last holder removed it between our open and our lock */
  }
}

int pk_lock(pocktvm *m, const char *path) {
  if (m->lock_fd >= 0 && strcmp(m->locked_file, path) == 0) return POCKTVM_OK;
  pk_unlock(m);
  size_t room = strlen(path) + 6;
  m->lock_path = malloc(room);
  m->locked_file = strdup(path);
  if (!m->lock_path || !m->locked_file) return pk_fail(m, POCKTVM_NO_MEMORY, "no memory");
  snprintf(m->lock_path, room, "%s.lock", path);
  pid_t holder = 0;
  m->lock_fd = lock_file(m->lock_path, &holder);
  if (m->lock_fd >= 0) return POCKTVM_OK;
  if (errno == EWOULDBLOCK)
    return pk_fail(m, POCKTVM_BUSY, "checkpoint %s is in use by another trainer (process %ld); "
                   "stop that one, or save to another file", path, (long)holder);
  return pk_fail(m, POCKTVM_IO, "cannot write beside %s: %s", path, strerror(errno));
}

void pk_unlock(pocktvm *m) {
  if (m->lock_fd >= 0) {
    unlink(m->lock_path); /* while it is still ours */
    close(m->lock_fd);
  }
  free(m->lock_path);
  free(m->locked_file);
  m->lock_fd = -1;
  m->lock_path = m->locked_file = NULL;
}

/* --- walking what learns of a tensor, in torch's order --- */

typedef struct {
  const pk_tensor *tensor;
  int part; /* the trained indices alone */
  int64_t index[POCKTVM_MAX_DIMS];
  int64_t at; /* element in the arena's order */
} walker;

static const char *dtype_of(const pk_tensor *t) { return t->kind == PK_SELECTION ? "I32" : "F32"; }

static int64_t extent(const pk_tensor *t, int32_t axis, int part) {
  return part && axis == t->part_axis ? t->part_count : t->shape[axis];
}

static int64_t count(const pk_tensor *t, int part) {
  int64_t n = 1;
  for (int32_t d = 0; d < t->ndim; d++) n *= extent(t, d, part);
  return n;
}

static int64_t place(const walker *w, int32_t axis, int64_t i) {
  const pk_tensor *t = w->tensor;
  return (w->part && axis == t->part_axis ? t->part[i] : i) * t->strides[axis];
}

static walker start(const pk_tensor *t, int part) {
  walker w = {.tensor = t, .part = part && t->part_count};
  for (int32_t d = 0; d < t->ndim; d++) w.at += place(&w, d, 0);
  return w;
}

static int64_t next_element(walker *w) {
  int64_t here = w->at;
  for (int32_t d = w->tensor->ndim; d-- > 0;) {
    w->at -= place(w, d, w->index[d]);
    if (++w->index[d] == extent(w->tensor, d, w->part)) w->index[d] = 0;
    w->at += place(w, d, w->index[d]);
    if (w->index[d]) break;
  }
  return here;
}

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

/* --- save --- */

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

/* --- load --- */

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
