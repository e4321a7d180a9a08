/* A strict reader of safetensors files (see safetensors.h). */
#define _GNU_SOURCE
#include "safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_HEADER = 100 * 1000 * 1000 }; /* the format's own limit */

/* --- the subset of JSON that headers are written in --- */

typedef struct {
  char *at;
  const char *wrong; /* the first thing that did not parse */
} parser;

static int bad(parser *p, const char *what) {
  if (!p->wrong) p->wrong = what;
  return -1;
}

static char peek(parser *p) {
  while (*p->at == ' ' || *p->at == '\n' || *p->at == '\t' || *p->at == '\r') p->at++;
  return *p->at;
}

static int expect(parser *p, char c) {
  if (peek(p) != c) return bad(p, "its header is not the JSON of safetensors");
  p->at++;
  return 0;
}

static char *put_utf8(char *out, unsigned code) {
  if (code < 0x80) {
    *out++ = (char)code;
  } else if (code < 0x800) {
    *out++ = (char)(0xc0 | code >> 6);
    *out++ = (char)(0x80 | (code & 63));
  } else {
    *out++ = (char)(0xe0 | code >> 12);
    *out++ = (char)(0x80 | (code >> 6 & 63));
    *out++ = (char)(0x80 | (code & 63));
  }
  return out;
}

static int hex4(const char *text, unsigned *code) {
  *code = 0;
  for (int i = 0; i < 4; i++) {
    char c = text[i];
    int digit = c >= '0' && c <= '9'   ? c - '0'
                : c >= 'a' && c <= 'f' ? c - 'a' + 10
                : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                       : -1;
    if (digit < 0) return -1;
    *code = *code * 16 + (unsigned)digit;
  }
  return 0;
}

/* Unescapes in place: the result is never longer than its source. */
static char *parse_string(parser *p) {
  static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
  if (expect(p, '"')) return NULL;
  char *start = p->at, *out = start;
  for (;;) {
    char c = *p->at++;
    if (c == '"') break;
    if (!c) return bad(p, "its header ends inside a string"), NULL;
    if (c != '\\') {
      *out++ = c;
      continue;
    }
    c = *p->at++;
    const char *escape = c ? strchr(from, c) : NULL;
    unsigned code;
    if (escape) {
      *out++ = to[escape - from];
    } else if (c == 'u' && !hex4(p->at, &code)) {
      p->at += 4;
      out = put_utf8(out, code);
    } else {
      return bad(p, "its header has a bad escape"), NULL;
    }
  }
  *out = 0;
  return start;
}

static int parse_int(parser *p, int64_t *value) {
  char first = peek(p), *end;
  if (first < '0' || first > '9') return bad(p, "its header has no number where one belongs");
  errno = 0;
  *value = strtoll(p->at, &end, 10);
  if (errno || *value < 0) return bad(p, "its header has a number out of range");
  p->at = end;
  return 0;
}

static int parse_ints(parser *p, int64_t *values, int32_t room, int32_t *count) {
  if (expect(p, '[')) return -1;
  *count = 0;
  if (peek(p) == ']') return p->at++, 0;
  for (;;) {
    if (*count == room) return bad(p, "a tensor has more axes than are supported (8)");
    if (parse_int(p, &values[(*count)++])) return -1;
    if (peek(p) == ']') return p->at++, 0;
    if (expect(p, ',')) return -1;
  }
}

/* Calls `entry` for every key of an object. */
static int parse_object(parser *p, int (*entry)(parser *, char *, void *), void *data) {
  if (expect(p, '{')) return -1;
  if (peek(p) == '}') return p->at++, 0;
  for (;;) {
    char *key = parse_string(p);
    if (!key || expect(p, ':') || entry(p, key, data)) return -1;
    if (peek(p) == '}') return p->at++, 0;
    if (expect(p, ',')) return -1;
  }
}

static int tensor_entry(parser *p, char *key, void *data) {
  st_tensor *tensor = data;
  int64_t ends[2];
  int32_t count;
  if (strcmp(key, "dtype") == 0) {
    char *text = parse_string(p);
    if (!text) return -1;
    snprintf(tensor->dtype, sizeof tensor->dtype, "%s", text);
    return 0;
  }
  if (strcmp(key, "shape") == 0) return parse_ints(p, tensor->shape, ST_MAX_DIMS, &tensor->ndim);
  if (strcmp(key, "data_offsets") == 0) {
    if (parse_ints(p, ends, 2, &count)) return -1;
    if (count != 2 || ends[1] < ends[0]) return bad(p, "its header has bad data_offsets");
    tensor->begin = ends[0];
    tensor->nbytes = ends[1] - ends[0];
    return 0;
  }
  return bad(p, "its header has a key that safetensors does not know");
}

static int metadata_entry(parser *p, char *key, void *data) {
  st_file *file = data;
  char *value = parse_string(p);
  if (!value) return -1;
  st_pair *grown = realloc(file->metadata, (file->n_metadata + 1) * sizeof *grown);
  if (!grown) return bad(p, "there is no memory for its header");
  file->metadata = grown;
  grown[file->n_metadata++] = (st_pair){key, value};
  return 0;
}

static int header_entry(parser *p, char *key, void *data) {
  st_file *file = data;
  if (strcmp(key, "__metadata__") == 0) return parse_object(p, metadata_entry, file);
  if ((file->n_tensors & (file->n_tensors + 1)) == 0) { /* room doubles at 2^k - 1 */
    st_tensor *grown = realloc(file->tensors, 2 * (file->n_tensors + 1) * sizeof *grown);
    if (!grown) return bad(p, "there is no memory for its header");
    file->tensors = grown;
  }
  st_tensor *tensor = &file->tensors[file->n_tensors++];
  *tensor = (st_tensor){.name = key, .begin = -1, .ndim = -1};
  if (parse_object(p, tensor_entry, tensor)) return -1;
  if (tensor->begin < 0 || tensor->ndim < 0 || !tensor->dtype[0])
    return bad(p, "its header describes a tensor incompletely");
  return 0;
}

/* --- files --- */

int st_item_bytes(const char *dtype) {
  static const struct {
    char name[8];
    int nbytes;
  } known[] = {{"F32", 4}, {"I32", 4}, {"U32", 4}, {"I64", 8}, {"U64", 8},  {"F64", 8}, {"F16", 2},
               {"I16", 2}, {"U16", 2}, {"I8", 1},  {"U8", 1},  {"BOOL", 1}, {"BF16", 2}};
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (strcmp(dtype, known[i].name) == 0) return known[i].nbytes;
  return 0;
}

int st_read(const st_file *file, int64_t at, void *dest, size_t nbytes) {
  char *out = dest;
  while (nbytes) {
    ssize_t n = pread(file->fd, out, nbytes, (off_t)at);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      if (n == 0) errno = EIO; /* the file shrank under us */
      return -1;
    }
    out += n;
    at += n;
    nbytes -= (size_t)n;
  }
  return 0;
}

/* Sizes and places of one tensor against the file; the reason into `error` when they disagree. */
static int check_tensor(const st_file *file, st_tensor *tensor, char *error, size_t room) {
  int64_t size = 1;
  int item = st_item_bytes(tensor->dtype);
  for (int32_t i = 0; i < tensor->ndim; i++)
    if (__builtin_mul_overflow(size, tensor->shape[i], &size)) item = 0;
  if (item == 0 || __builtin_mul_overflow(size, item, &size) || size != tensor->nbytes) {
    snprintf(error, room, "its tensor '%s' has %lld bytes, not what its shape and dtype %s need",
             tensor->name, (long long)tensor->nbytes, tensor->dtype);
    return -1;
  }
  int64_t held = file->file_bytes - file->data_begin;
  if (tensor->begin > held || tensor->nbytes > held - tensor->begin) {
    snprintf(error, room, "it is truncated: tensor '%s' ends at byte %lld, the file at %lld",
             tensor->name, (long long)(file->data_begin + tensor->begin + tensor->nbytes),
             (long long)file->file_bytes);
    return -1;
  }
  tensor->begin += file->data_begin;
  return 0;
}

static int by_name(const void *a, const void *b) {
  return strcmp(((const st_tensor *)a)->name, ((const st_tensor *)b)->name);
}

static int read_header(st_file *file, char *error, size_t room) {
  uint8_t head[8];
  uint64_t length = 0;
  if (file->file_bytes < 8 || st_read(file, 0, head, 8)) {
    snprintf(error, room, "it is not a safetensors file (%lld bytes)", (long long)file->file_bytes);
    return -1;
  }
  for (int i = 7; i >= 0; i--) length = length << 8 | head[i];
  if (length > MAX_HEADER || (int64_t)length > file->file_bytes - 8) {
    snprintf(error, room, "it is not a safetensors file, or it is truncated inside its header");
    return -1;
  }
  file->text = malloc(length + 1);
  if (!file->text || st_read(file, 8, file->text, length)) {
    snprintf(error, room, "its header cannot be read: %s", strerror(errno));
    return -1;
  }
  file->text[length] = 0;
  file->data_begin = 8 + (int64_t)length;
  parser p = {file->text, NULL};
  if (parse_object(&p, header_entry, file)) {
    snprintf(error, room, "%s", p.wrong);
    return -1;
  }
  return 0;
}

int st_open(st_file *file, const char *path, char *error, size_t room) {
  *file = (st_file){.fd = open(path, O_RDONLY | O_CLOEXEC)};
  struct stat facts;
  if (file->fd < 0 || fstat(file->fd, &facts)) {
    snprintf(error, room, "%s", strerror(errno));
    return st_close(file), -1;
  }
  if (!S_ISREG(facts.st_mode)) {
    snprintf(error, room, "it is not a file");
    return st_close(file), -1;
  }
  file->file_bytes = facts.st_size;
  if (read_header(file, error, room)) return st_close(file), -1;
  for (size_t i = 0; i < file->n_tensors; i++)
    if (check_tensor(file, &file->tensors[i], error, room)) return st_close(file), -1;
  if (file->n_tensors) qsort(file->tensors, file->n_tensors, sizeof *file->tensors, by_name);
  return 0;
}

void st_close(st_file *file) {
  if (file->fd >= 0) close(file->fd);
  free(file->text);
  free(file->tensors);
  free(file->metadata);
  *file = (st_file){.fd = -1};
}

const st_tensor *st_find(const st_file *file, const char *name) {
  st_tensor key = {.name = name};
  return file->n_tensors ? bsearch(&key, file->tensors, file->n_tensors, sizeof key, by_name) : NULL;
}

const char *st_metadata(const st_file *file, const char *key) {
  for (size_t i = 0; i < file->n_metadata; i++)
    if (strcmp(file->metadata[i].key, key) == 0) return file->metadata[i].value;
  return NULL;
}

uint32_t st_crc32(uint32_t crc, const void *data, size_t nbytes) {
  static uint32_t table[256];
  if (!table[1]) /* filling it twice at once writes the same numbers */
    for (uint32_t i = 256; i-- > 0;) {
      uint32_t c = i;
      for (int k = 0; k < 8; k++) c = c & 1 ? 0xedb88320u ^ c >> 1 : c >> 1;
      table[i] = c;
    }
  const uint8_t *bytes = data;
  crc = ~crc;
  for (size_t i = 0; i < nbytes; i++) crc = table[(crc ^ bytes[i]) & 255] ^ crc >> 8;
  return ~crc;
}
