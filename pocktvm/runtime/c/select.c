/* Which channels learn, chosen between steps.
 *
 * A selection is a tensor of int32 in the arena that kernels read as a table: increasing indices
 * along an axis of one trained tensor. To choose others is to write that table, and to move the
 * optimizer's state, which has one slice for each entry of it. */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static const pk_tensor *tensor_at(int32_t i) { return &pk_the_model.tensors[i]; }

static const pk_tensor *target_of(const pk_tensor *selection) {
  return tensor_at(selection->selects);
}

static int32_t *table_of(const pocktvm *m, const pk_tensor *selection) {
  return (int32_t *)(void *)(m->arena + selection->offset);
}

int pk_reserve_selections(pocktvm *m) {
  int64_t most = 0;
  for (int32_t i = 0; i < m->plan.n_tensors; i++)
    if (tensor_at(i)->kind == PK_SELECTION && tensor_at(i)->size > most) most = tensor_at(i)->size;
  if (!most) return POCKTVM_OK;
  m->chosen = calloc((size_t)most, sizeof *m->chosen);
  return m->chosen ? POCKTVM_OK : pk_fail(m, POCKTVM_NO_MEMORY, "no memory for the selections");
}

/* What is wrong with the entry at `position`, behind entries that are right; NULL: nothing. */
const char *pk_bad_selection(const pk_tensor *selection, const int32_t *indices, int64_t position) {
  int64_t extent = target_of(selection)->shape[selection->select_axis];
  if (indices[position] < 0 || indices[position] >= extent) return "out of range";
  if (position && indices[position] == indices[position - 1]) return "given twice";
  return position && indices[position] < indices[position - 1] ? "out of order" : NULL;
}

/* --- the optimizer's state --- */

/* Where entry `value` lies in increasing `table`; -1: nowhere. */
static int64_t find_index(const int32_t *table, int64_t count, int32_t value) {
  int64_t low = 0, high = count;
  while (low < high) {
    int64_t middle = low + (high - low) / 2;
    if (table[middle] < value)
      low = middle + 1;
    else
      high = middle;
  }
  return low < count && table[low] == value ? low : -1;
}

/* Slice `to` of a state becomes slice `from`, or its first values where `from` is -1. */
static void move_slice(pocktvm *m, const pk_tensor *state, int32_t axis, int64_t to, int64_t from) {
  float *values = (float *)(void *)(m->arena + state->offset);
  const float *first = state->initial == PK_NOWHERE
                           ? NULL
                           : (const float *)(const void *)(m->frozen + state->initial);
  int64_t index[POCKTVM_MAX_DIMS] = {0}, at = 0, step = state->strides[axis];
  for (int64_t left = state->size / state->shape[axis]; left > 0; left--) {
    int64_t goal = at + to * step;
    values[goal] = from >= 0 ? values[at + from * step] : first ? first[goal] : 0;
    for (int32_t d = state->ndim; d-- > 0;) {
      if (d == axis) continue;
      at += state->strides[d];
      if (++index[d] < state->shape[d]) break;
      at -= state->shape[d] * state->strides[d];
      index[d] = 0;
    }
  }
}

/* Both tables increase, so slices that stay keep their order: those that move down are moved from
 * the first on, those that move up from the last on, and none is overwritten before it moved. */
static void move_state(pocktvm *m, const pk_tensor *selection, const pk_tensor *state,
                       const int32_t *chosen) {
  const int32_t *old = table_of(m, selection);
  int64_t count = selection->size;
  int32_t axis = selection->select_axis;
  for (int64_t i = 0; i < count; i++) {
    int64_t from = find_index(old, count, chosen[i]);
    if (from > i) move_slice(m, state, axis, i, from);
  }
  for (int64_t i = count; i-- > 0;) {
    int64_t from = find_index(old, count, chosen[i]);
    if (from >= 0 && from < i) move_slice(m, state, axis, i, from);
  }
  for (int64_t i = 0; i < count; i++)
    if (find_index(old, count, chosen[i]) < 0) move_slice(m, state, axis, i, -1);
}

/* `<state>/<tensor>` */
static int is_state_of(const pk_tensor *state, const pk_tensor *tensor) {
  const char *slash = strchr(state->name, '/');
  return state->kind == PK_OPTIMIZER && slash && strcmp(slash + 1, tensor->name) == 0;
}

/* Takes over m->chosen, which is increasing and right. */
static void apply(pocktvm *m, const pk_tensor *selection) {
  for (int32_t i = 0; i < m->plan.n_tensors; i++)
    if (is_state_of(tensor_at(i), target_of(selection)))
      move_state(m, selection, tensor_at(i), m->chosen);
  memcpy(table_of(m, selection), m->chosen, (size_t)selection->size * sizeof *m->chosen);
}

/* --- the interface --- */

/* Shell sort: qsort may allocate. */
static void sort(int32_t *values, int64_t count) {
  for (int64_t gap = count / 2; gap > 0; gap /= 2)
    for (int64_t i = gap; i < count; i++) {
      int32_t value = values[i];
      int64_t at = i;
      for (; at >= gap && values[at - gap] > value; at -= gap) values[at] = values[at - gap];
      values[at] = value;
    }
}

static int no_choice(pocktvm *m) {
  return pk_fail(m, POCKTVM_BAD_INPUT, "the channels that learn are fixed in this artifact; build "
                 "it with --resample to choose them");
}

static const pk_tensor *selection_of(const pocktvm *m, const char *name) {
  for (int32_t i = 0; i < m->plan.n_tensors; i++)
    if (tensor_at(i)->kind == PK_SELECTION && pk_has_name(target_of(tensor_at(i)), name))
      return tensor_at(i);
  return NULL;
}

int pocktvm_select(pocktvm *m, const char *name, const int32_t *indices, int32_t count) {
  if (!m->plan.n_selections) return no_choice(m);
  const pk_tensor *selection = selection_of(m, name);
  if (!selection)
    return pk_fail(m, POCKTVM_BAD_INPUT, "'%s' has no channels to choose: it learns whole, in fixed "
                   "channels, or not at all", name);
  if (count != selection->size)
    return pk_fail(m, POCKTVM_BAD_INPUT, "'%s': %d indices given; exactly %lld channels learn in "
                   "this artifact", name, (int)count, (long long)selection->size);
  memcpy(m->chosen, indices, (size_t)count * sizeof *indices);
  sort(m->chosen, count);
  for (int32_t i = 0; i < count; i++) {
    const char *wrong = pk_bad_selection(selection, m->chosen, i);
    if (wrong)
      return pk_fail(m, POCKTVM_BAD_INPUT, "'%s': index %d is %s; give %lld different ones from 0 "
                     "to %lld", name, (int)m->chosen[i], wrong, (long long)selection->size,
                     (long long)target_of(selection)->shape[selection->select_axis] - 1);
  }
  int status = pk_fetch_state(m);
  if (status) return status;
  apply(m, selection);
  return pk_send_state(m);
}

static uint64_t next_random(uint64_t *state) {
  uint64_t x = *state += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

/* Every subset is as likely as another: each index is taken with the chance that it is needed. */
static void draw(pocktvm *m, const pk_tensor *selection, uint64_t *state) {
  int64_t extent = target_of(selection)->shape[selection->select_axis], taken = 0;
  for (int64_t i = 0; taken < selection->size; i++)
    if (next_random(state) % (uint64_t)(extent - i) < (uint64_t)(selection->size - taken))
      m->chosen[taken++] = (int32_t)i;
}

int pocktvm_resample(pocktvm *m, uint64_t seed) {
  if (!m->plan.n_selections) return no_choice(m);
  int status = pk_fetch_state(m);
  if (status) return status;
  for (int32_t i = 0; i < m->plan.n_tensors; i++) {
    if (tensor_at(i)->kind != PK_SELECTION) continue;
    draw(m, tensor_at(i), &seed); /* one stream for all, in the order of their names */
    apply(m, tensor_at(i));
  }
  return pk_send_state(m);
}
