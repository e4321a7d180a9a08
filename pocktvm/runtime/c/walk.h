/* Walking what learns of a tensor, in torch's order: what checkpoints are written and read by. */
#ifndef POCKTVM_WALK_H
#define POCKTVM_WALK_H

#include "internal.h"

enum { CHUNK = 4096 }; /* elements on the stack */

typedef struct {
  const pk_tensor *tensor;
  int part; /* the trained indices alone */
  int64_t index[POCKTVM_MAX_DIMS];
  int64_t at; /* element in the arena's order */
} walker;

static inline const char *dtype_of(const pk_tensor *t) {
  return t->kind == PK_SELECTION ? "I32" : "F32";
}

static inline int64_t extent(const pk_tensor *t, int32_t axis, int part) {
  return part && axis == t->part_axis ? t->part_count : t->shape[axis];
}

static inline int64_t count(const pk_tensor *t, int part) {
  int64_t n = 1;
  for (int32_t d = 0; d < t->ndim; d++) n *= extent(t, d, part);
  return n;
}

static inline int64_t place(const walker *w, int32_t axis, int64_t i) {
  const pk_tensor *t = w->tensor;
  return (w->part && axis == t->part_axis ? t->part[i] : i) * t->strides[axis];
}

static inline walker start(const pk_tensor *t, int part) {
  walker w = {.tensor = t, .part = part && t->part_count};
  for (int32_t d = 0; d < t->ndim; d++) w.at += place(&w, d, 0);
  return w;
}

static inline int64_t next_element(walker *w) {
  int64_t here = w->at;
  for (int32_t d = w->tensor->ndim; d-- > 0;) {
    w->at -= place(w, d, w->index[d]);
    if (++w->index[d] == extent(w->tensor, d, w->part)) w->index[d] = 0;
    w->at += place(w, d, w->index[d]);
    if (w->index[d]) break;
  }
  return here;
}

#endif
