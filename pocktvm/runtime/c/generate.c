/* A batch for runs without data, and the order of samples for runs with it.
 *
 * Integers only up to the last exact multiplication: every target makes the same bits. */
#include <string.h>

#include "runner.h"

static uint32_t mix(uint32_t h) { /* murmur3's finalizer: every bit of h reaches every other */
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  return h ^ h >> 16;
}

int64_t pk_input_size(const pocktvm_input *input) {
  int64_t size = 1;
  for (int32_t i = 0; i < input->ndim; i++) size *= input->shape[i];
  return size;
}

int pk_dtype_bytes(int32_t dtype) {
  static const int nbytes[] = {4, 4, 8, 1, 1};
  return dtype >= 0 && dtype <= POCKTVM_UINT8_NHWC ? nbytes[dtype] : 0;
}

void pk_generate(const pocktvm_plan_info *plan, int32_t input, uint64_t seed, void *out) {
  const pocktvm_input *facts = &plan->inputs[input];
  int64_t size = pk_input_size(facts), bound = facts->bound ? facts->bound : 2;
  uint32_t key = mix((uint32_t)seed * 0x9e3779b1u + (uint32_t)input + 1);
  int signs = facts->is_label && strncmp(plan->loss, "cosine_embedding", 16) == 0;
  for (int64_t i = 0; i < size; i++) {
    uint32_t h = mix((uint32_t)i * 0x9e3779b1u ^ key);
    float unit = (float)(h >> 8) * 0x1p-24f; /* [0, 1), exact */
    if (signs && facts->dtype == POCKTVM_INT32)
      ((int32_t *)out)[i] = h & 1 ? 1 : -1;
    else if (facts->dtype == POCKTVM_INT32)
      ((int32_t *)out)[i] = (int32_t)(h % (uint64_t)bound);
    else if (signs)
      ((float *)out)[i] = h & 1 ? 1 : -1;
    else if (facts->is_label)
      ((float *)out)[i] = unit; /* also a probability, where the loss wants one */
    else
      ((float *)out)[i] = (unit - 0.5f) * 3.4641016f; /* variance 1 */
  }
}

/* The i-th sample of an epoch: a keyed permutation of [0, n) that needs no memory (a Feistel
 * network on the next power of four, walked until it lands inside). */
int64_t pk_shuffled(int64_t i, int64_t n, uint64_t seed, uint64_t epoch) {
  uint32_t key = mix((uint32_t)seed ^ mix((uint32_t)(seed >> 32) ^ mix((uint32_t)epoch + 1)));
  int half = 1;
  while ((int64_t)1 << 2 * half < n) half++;
  uint32_t mask = (uint32_t)(((uint64_t)1 << half) - 1);
  do {
    uint32_t left = (uint32_t)(i >> half), right = (uint32_t)i & mask;
    for (uint32_t round = 0; round < 4; round++) {
      uint32_t next = left ^ (mix(right ^ mix(key + round)) & mask);
      left = right;
      right = next;
    }
    i = (int64_t)left << half | right;
  } while (i >= n);
  return i;
}
