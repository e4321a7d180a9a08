/* The handful of symbols TVM's kernels expect of a runtime.
 *
 * Every kernel object declares three weak pointer variables that TVM's loader would fill; the
 * strong definitions here take their place at link time, so nothing is filled at run time. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <pthread.h>

#include "internal.h"

#ifdef POCKTVM_NO_TLS /* a target whose loader knows no thread-local storage: one thread calls us */
#define PK_THREAD_LOCAL
#else
#define PK_THREAD_LOCAL _Thread_local
#endif

static PK_THREAD_LOCAL pk_pool *current_pool;
static char kernel_error[512];

void pk_use_pool(pk_pool *pool) { current_pool = pool; }

const char *pk_kernel_error(void) { return kernel_error; }

__attribute__((visibility("hidden"))) void TVMFFIErrorSetRaisedFromCStrParts(
    const char *kind, const char **parts, int32_t n_parts) {
  size_t used = (size_t)snprintf(kernel_error, sizeof kernel_error, "%s: ", kind ? kind : "error");
  for (int32_t i = 0; i < n_parts && used < sizeof kernel_error; i++)
    if (parts[i])
      used += (size_t)snprintf(kernel_error + used, sizeof kernel_error - used, "%s", parts[i]);
}

static int launch(int (*task)(int, void *, void *), void *data, int n_tasks) {
  return pk_pool_run(current_pool, task, data, n_tasks);
}

/* Scratch memory of kernels that bring no workspace argument. Our rules never ask for it; a block
 * is kept once it was needed, so a step in its steady state allocates nothing. */
enum { MAX_BLOCKS = 64 };
static struct {
  void *data;
  uint64_t nbytes;
  int used;
} blocks[MAX_BLOCKS];
static pthread_mutex_t blocks_mutex = PTHREAD_MUTEX_INITIALIZER;

static void *allocate(uint64_t nbytes) {
  void *data = NULL;
  return posix_memalign(&data, 64, (size_t)(nbytes ? nbytes : 1)) ? NULL : data;
}

static void *alloc_workspace(int device_type, int device_id, uint64_t nbytes, int code, int bits) {
  (void)device_type, (void)device_id, (void)code, (void)bits;
  pthread_mutex_lock(&blocks_mutex);
  int best = -1, empty = -1;
  for (int i = 0; i < MAX_BLOCKS; i++) {
    if (!blocks[i].data && empty < 0) empty = i;
    if (!blocks[i].data || blocks[i].used || blocks[i].nbytes < nbytes) continue;
    if (best < 0 || blocks[i].nbytes < blocks[best].nbytes) best = i;
  }
  if (best < 0 && empty >= 0 && (blocks[empty].data = allocate(nbytes))) {
    best = empty;
    blocks[best].nbytes = nbytes;
  }
  void *data = best < 0 ? NULL : blocks[best].data;
  if (best >= 0) blocks[best].used = 1;
  pthread_mutex_unlock(&blocks_mutex);
  return data ? data : allocate(nbytes);
}

static int free_workspace(int device_type, int device_id, void *data) {
  (void)device_type, (void)device_id;
  pthread_mutex_lock(&blocks_mutex);
  for (int i = 0; i < MAX_BLOCKS; i++)
    if (blocks[i].data == data) {
      blocks[i].used = 0;
      data = NULL;
    }
  pthread_mutex_unlock(&blocks_mutex);
  free(data); /* NULL unless the table was full */
  return 0;
}

__attribute__((visibility("hidden"))) int (*__TVMBackendParallelLaunch)(
    int (*)(int, void *, void *), void *, int) = launch;
__attribute__((visibility("hidden"))) void *(*__TVMBackendAllocWorkspace)(
    int, int, uint64_t, int, int) = alloc_workspace;
__attribute__((visibility("hidden"))) int (*__TVMBackendFreeWorkspace)(
    int, int, void *) = free_workspace;
