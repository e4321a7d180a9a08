/* Replays one launch; see replay.h. */
#include "replay.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

enum { MAX_THREADS = 1024, STACK_BYTES = 64 << 10, MAX_ARGS = 32 };

replay_dim3 threadIdx, blockIdx, blockDim, gridDim;

typedef struct {
  jmp_buf at;
  int started, done;
} fibre;

static fibre fibres[MAX_THREADS];
static char *stacks;
static jmp_buf scheduler;
static int current, at_barrier, backwards;
static const replay_kernel *kernel;
static void **pointers;
static char message[256];

static void call(void) {
  void **p = pointers;
  void *f = kernel->function;
#define P(i) p[i]
#define A4(i) P(i), P(i + 1), P(i + 2), P(i + 3)
#define T4 void *, void *, void *, void *
  /* arguments beyond the function's own are ignored by both calling conventions */
  ((void (*)(T4, T4, T4, T4, T4, T4, T4, T4))f)(A4(0), A4(4), A4(8), A4(12), A4(16), A4(20), A4(24),
                                                A4(28));
}

static void enter(void) {
  call();
  fibres[current].done = 1;
  _longjmp(scheduler, 1);
}

static void start(int index) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks + (size_t)index * STACK_BYTES;
  context.uc_stack.ss_size = STACK_BYTES;
  context.uc_link = NULL;
  makecontext(&context, enter, 0);
  fibres[index].started = 1;
  setcontext(&context);
}

void replay_barrier(void) {
  if (blockDim.x * blockDim.y * blockDim.z == 1) return;
  at_barrier++;
  if (!_setjmp(fibres[current].at)) _longjmp(scheduler, 1);
}

static void place(int index) {
  current = index;
  threadIdx.x = (unsigned)index % blockDim.x;
  threadIdx.y = (unsigned)index / blockDim.x % blockDim.y;
  threadIdx.z = (unsigned)index / (blockDim.x * blockDim.y);
}

/* Runs every thread of a block up to its next barrier or its end; 0 when all have ended. */
static int advance(int count) {
  volatile int turn;
  int done = 0;
  at_barrier = 0;
  for (turn = 0; turn < count; turn++) {
    int i = backwards ? count - 1 - turn : turn;
    if (fibres[i].done) continue;
    place(i);
    if (!_setjmp(scheduler)) {
      if (!fibres[i].started)
        start(i);
      else
        _longjmp(fibres[i].at, 1);
    }
  }
  for (int i = 0; i < count; i++) done += fibres[i].done;
  if (at_barrier && done) {
    snprintf(message, sizeof message, "%s: %d of %d threads wait at a barrier the others passed by",
             kernel->name, at_barrier, count);
    return -1;
  }
  return done < count;
}

static int run_block(int count) {
  int state;
  memset(fibres, 0, (size_t)count * sizeof *fibres);
  while ((state = advance(count)) > 0) {
  }
  return state;
}

__attribute__((visibility("default"))) void replay_backwards(int on) { backwards = on; }

static const char *refuse(const char *name, const char *why) {
  snprintf(message, sizeof message, "%s: %s", name, why);
  return message;
}

__attribute__((visibility("default")))
const char *replay_launch(const char *name, const unsigned grid[3], const unsigned block[3],
                          void **addresses) {
  static void *all[MAX_ARGS];
  uint64_t count = (uint64_t)block[0] * block[1] * block[2];
  for (kernel = replay_kernels; kernel->name && strcmp(kernel->name, name); kernel++) {
  }
  if (!kernel->name) return refuse(name, "no such function");
  if (count == 0 || count > MAX_THREADS || block[2] > 64) return refuse(name, "a block of that size");
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffffu || grid[1] > 65535 ||
      grid[2] > 65535)
    return refuse(name, "a grid of that size");
  if (!stacks && !(stacks = (char *)malloc((size_t)MAX_THREADS * STACK_BYTES)))
    return refuse(name, "no memory");
  memcpy(all, addresses, (size_t)kernel->n_args * sizeof *all);
  pointers = all;
  blockDim = {block[0], block[1], block[2]};
  gridDim = {grid[0], grid[1], grid[2]};
  uint64_t n_blocks = (uint64_t)grid[0] * grid[1] * grid[2];
  for (uint64_t turn = 0; turn < n_blocks; turn++) {
    uint64_t b = backwards ? n_blocks - 1 - turn : turn;
    blockIdx = {(unsigned)(b % grid[0]), (unsigned)(b / grid[0] % grid[1]),
                (unsigned)(b / grid[0] / grid[1])};
    if (run_block((int)count) < 0) return message;
  }
  return NULL;
}
