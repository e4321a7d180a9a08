/* The caller's arrays into the arena: narrowed, normalised, and refused before anything changes.
 *
 * The loops are branch-light so that compilers vectorise them: a check costs less than the copy. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"

static int64_t size_of(const pocktvm_input *input) {
  int64_t size = 1;
  for (int32_t i = 0; i < input->ndim; i++) size *= input->shape[i];
  return size;
}

/* "[3, 0, 12, 5]": where the flat index lies. */
static const char *position(const pocktvm_input *input, int64_t flat, char *text, size_t room) {
  int64_t index[POCKTVM_MAX_DIMS];
  for (int32_t i = input->ndim; i-- > 0;) {
    index[i] = flat % input->shape[i];
    flat /= input->shape[i];
  }
  size_t used = (size_t)snprintf(text, room, "[");
  for (int32_t i = 0; i < input->ndim && used < room; i++)
    used += (size_t)snprintf(text + used, room - used, i ? ", %lld" : "%lld", (long long)index[i]);
  if (used < room) snprintf(text + used, room - used, "]");
  return text;
}

static int copy_floats(pocktvm *m, const pocktvm_input *input, const float *from, float *to) {
  int64_t size = size_of(input);
  uint32_t wild = 0;
  for (int64_t i = 0; i < size; i++) {
    uint32_t bits;
    memcpy(&bits, &from[i], 4);
    wild |= (bits & 0x7f800000u) == 0x7f800000u;
    to[i] = from[i];
  }
  if (!wild) return POCKTVM_OK;
  int64_t i = 0;
  char where[128];
  while (isfinite(from[i])) i++;
  return pk_fail(m, POCKTVM_BAD_INPUT, "input '%s' is %s at %s; clean the data (every value must "
                 "be finite)", input->name, isnan(from[i]) ? "NaN" : "infinite",
                 position(input, i, where, sizeof where));
}

static int refuse_integer(pocktvm *m, const pocktvm_input *input, int64_t value, int64_t at) {
  char where[128], ignore[64] = "";
  if (input->has_ignore_index)
    snprintf(ignore, sizeof ignore, " (or %lld, which is ignored)", (long long)input->ignore_index);
  int64_t low = input->bound ? 0 : INT32_MIN, high = input->bound ? input->bound - 1 : INT32_MAX;
  return pk_fail(m, POCKTVM_BAD_INPUT, "input '%s' is %lld at %s; this model takes %lld to %lld%s",
                 input->name, (long long)value, position(input, at, where, sizeof where),
                 (long long)low, (long long)high, ignore);
}

static int copy_integers(pocktvm *m, const pocktvm_input *input, const pocktvm_array *array,
                         int32_t *to) {
  int64_t size = size_of(input);
  int64_t low = input->bound ? 0 : INT32_MIN, high = input->bound ? input->bound - 1 : INT32_MAX;
  for (int64_t i = 0; i < size; i++) {
    int64_t value = array->dtype == POCKTVM_INT64 ? ((const int64_t *)array->data)[i]
                                                  : ((const int32_t *)array->data)[i];
    int ignored = input->has_ignore_index && value == input->ignore_index;
    if ((value < low || value > high) && !ignored) return refuse_integer(m, input, value, i);
    to[i] = (int32_t)value;
  }
  return POCKTVM_OK;
}

/* (u8 - mean[c]) * scale[c] for every of the 256 values: the loop below is one load. */
static void normalised(const pocktvm_input *input, int32_t channel, float *table) {
  for (int value = 0; value < 256; value++)
    table[value] = ((float)value - input->mean[channel]) * input->scale[channel];
}

static void copy_images(const pocktvm_input *input, const uint8_t *from, int channels_last,
                        float *to) {
  int64_t channels = input->ndim > 1 ? input->shape[1] : 1, pixels = 1;
  int64_t images = size_of(input) / channels;
  for (int32_t i = 2; i < input->ndim; i++) pixels *= input->shape[i];
  images /= pixels;
  for (int64_t c = 0; c < channels; c++) {
    float table[256];
    normalised(input, (int32_t)(c % input->channels), table);
    for (int64_t n = 0; n < images; n++) {
      const uint8_t *image = from + n * channels * pixels + (channels_last ? c : c * pixels);
      float *plane = to + (n * channels + c) * pixels;
      int64_t stride = channels_last ? channels : 1;
      for (int64_t i = 0; i < pixels; i++) plane[i] = table[image[i * stride]];
    }
  }
}

int pk_copy_input(pocktvm *m, const pocktvm_input *input, const pocktvm_array *array, char *dest) {
  int32_t given = array->dtype;
  if (!array->data) return pk_fail(m, POCKTVM_BAD_INPUT, "input '%s' is NULL", input->name);
  if (input->dtype == POCKTVM_INT32 && (given == POCKTVM_INT32 || given == POCKTVM_INT64))
    return copy_integers(m, input, array, (int32_t *)dest);
  if (input->dtype == POCKTVM_FLOAT32 && given == POCKTVM_FLOAT32)
    return copy_floats(m, input, array->data, (float *)dest);
  if (input->dtype == POCKTVM_FLOAT32 && (given == POCKTVM_UINT8 || given == POCKTVM_UINT8_NHWC)) {
    if (!input->channels)
      return pk_fail(m, POCKTVM_BAD_INPUT, "input '%s' is uint8, but this model was built without "
                     "mean and scale; give float32, or build it with them", input->name);
    copy_images(input, array->data, given == POCKTVM_UINT8_NHWC, (float *)dest);
    return POCKTVM_OK;
  }
  static const char *const names[] = {"float32", "int32", "int64", "uint8", "uint8 (NHWC)"};
  const char *name = given >= 0 && given <= POCKTVM_UINT8_NHWC ? names[given] : "of unknown dtype";
  return pk_fail(m, POCKTVM_BAD_INPUT, "input '%s' is %s; this model takes %s", input->name, name,
                 input->dtype == POCKTVM_INT32 ? "int32 or int64" : "float32 or uint8 images");
}
