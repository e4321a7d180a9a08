/* Times one kernel: the program that tuning sends to a device over ssh.
 *
 *   time_kernel THREADS [once] <inputs >result
 *
 * stdin has the inputs' bytes in argument order. The result is one line, nanoseconds of the median
 * call, and the outputs' bytes; with `once`, of the second call alone. `candidate.h` is generated: the arguments and the kernel's name. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "internal.h"

#include "candidate.h"

/* Calls are grouped until a group takes ENOUGH, and groups are repeated for about BUDGET. */
enum { ENOUGH_NS = 200000, BUDGET_NS = 150000000, MIN_GROUPS = 5, MAX_GROUPS = 200 };

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static int call(pk_any *args) {
  pk_any result = {0};
  int failed = CANDIDATE(NULL, args, N_ARGS, &result);
  if (failed) fprintf(stderr, "the kernel failed: %s\n", pk_kernel_error());
  return failed;
}

/* Nanoseconds of one call: the median of groups; negative when a call fails. */
static double median_ns(pk_any *args, int once_only) {
  static double groups[MAX_GROUPS];
  int64_t start = now();
  if (call(args)) return -1;
  int64_t once = now() - start;
  if (once_only) return (double)once; /* an emulator counts between the two questions */
  int64_t each = ENOUGH_NS / (once > 0 ? once : 1) + 1;
  int count = 0;
  for (int64_t end = now() + BUDGET_NS; count < MAX_GROUPS; count++) {
    if (count >= MIN_GROUPS && now() > end) break;
    start = now();
    for (int64_t i = 0; i < each; i++)
      if (call(args)) return -1;
    groups[count] = (double)(now() - start) / (double)each;
  }
  qsort(groups, (size_t)count, sizeof groups[0], by_value);
  return groups[count / 2];
}

int main(int argc, char **argv) {
  pk_dltensor tensors[N_ARGS];
  pk_any args[N_ARGS];
  for (int i = 0; i < N_ARGS; i++) {
    const candidate_arg *arg = &candidate_args[i];
    void *data = NULL;
    if (posix_memalign(&data, 64, (size_t)(arg->nbytes ? arg->nbytes : 1))) {
      fprintf(stderr, "no memory for %lld bytes\n", (long long)arg->nbytes);
      return 1;
    }
    memset(data, 0, (size_t)arg->nbytes);
    if (i < N_INPUTS && fread(data, 1, (size_t)arg->nbytes, stdin) != (size_t)arg->nbytes) {
      fprintf(stderr, "the inputs were cut short\n");
      return 1;
    }
    tensors[i] = (pk_dltensor){data, {1, 0}, arg->ndim, arg->dtype, arg->shape, NULL, 0};
    args[i] = (pk_any){PK_ANY_DLTENSOR, 0, {.pointer = &tensors[i]}};
  }
  int threads = argc > 1 ? atoi(argv[1]) : 0;
  pk_pool *pool = pk_pool_open(threads > 0 ? threads : pk_online_cpus(), 0);
  if (!pool) return 1;
  pk_use_pool(pool);
  if (call(args)) return 1;
  /* the outputs of the first call: a kernel that adds to what it finds would change them later */
  static char *saved[N_ARGS];
  for (int i = N_INPUTS; i < N_INPUTS + N_OUTPUTS; i++) {
    saved[i] = malloc((size_t)candidate_args[i].nbytes + 1);
    if (!saved[i]) return 1;
    memcpy(saved[i], tensors[i].data, (size_t)candidate_args[i].nbytes);
  }
  double ns = median_ns(args, argc > 2 && !strcmp(argv[2], "once"));
  pk_pool_close(pool);
  if (ns < 0) return 1;
  printf("%.1f\n", ns);
  for (int i = N_INPUTS; i < N_INPUTS + N_OUTPUTS; i++)
    if (fwrite(saved[i], 1, (size_t)candidate_args[i].nbytes, stdout) !=
        (size_t)candidate_args[i].nbytes)
      return 1;
  return fflush(stdout) ? 1 : 0;
}
