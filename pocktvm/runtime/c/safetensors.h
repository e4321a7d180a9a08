/* Reading safetensors: 8 bytes of little-endian header length, a JSON header, the tensors' bytes.
 * Everything the header says is checked against the file before it is believed. */
#ifndef POCKTVM_SAFETENSORS_H
#define POCKTVM_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

enum { ST_MAX_DIMS = 8 };

typedef struct {
  const char *name;
  char dtype[8]; /* "F32", "I64", … */
  int32_t ndim;
  int64_t shape[ST_MAX_DIMS];
  int64_t begin, nbytes; /* begin: from the file's start */
} st_tensor;

typedef struct {
  const char *key, *value;
} st_pair;

typedef struct {
  int fd;
  int64_t file_bytes, data_begin;
  char *text; /* the header, its strings unescaped in place */
  st_tensor *tensors;
  size_t n_tensors;
  st_pair *metadata;
  size_t n_metadata;
} st_file;

/* 0, or -1 with the reason in `error`; the file is then closed. */
int st_open(st_file *file, const char *path, char *error, size_t room);
void st_close(st_file *file);
const st_tensor *st_find(const st_file *file, const char *name);
const char *st_metadata(const st_file *file, const char *key); /* NULL: absent */
int st_read(const st_file *file, int64_t at, void *dest, size_t nbytes); /* 0 or -1 with errno */
int st_item_bytes(const char *dtype);                           /* 0: unknown */
uint32_t st_crc32(uint32_t crc, const void *data, size_t nbytes);

#endif
