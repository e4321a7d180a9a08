/* CUDA C compiled for a processor: what kernels use of the language, and one block's threads.
 *
 * A launch is replayed block by block. The threads of a block are fibres: each runs until it meets
 * a barrier or ends, then the next one runs, so that everything before a barrier has happened in
 * every thread before anything behind it does, as on a GPU. A barrier that some thread of the block
 * never reaches is an error here (on a GPU it would be undefined). */
#ifndef REPLAY_H
#define REPLAY_H
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  unsigned x, y, z;
} replay_dim3;

typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;

extern "C" replay_dim3 threadIdx, blockIdx, blockDim, gridDim;
extern "C" void replay_barrier(void);

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __restrict__
#define __syncthreads() replay_barrier()

template <typename A, typename B>
static inline auto min(A a, B b) -> decltype(a + b) { return a < b ? a : b; }
template <typename A, typename B>
static inline auto max(A a, B b) -> decltype(a + b) { return a > b ? a : b; }
#define __expf expf
#define __logf logf
#define __powf powf
#define __sinf sinf
#define __cosf cosf
static inline float __int_as_float(int x) { float f; memcpy(&f, &x, 4); return f; }

typedef struct {
  const char *name;
  void *function;
  int n_args;
} replay_kernel;

/* generated beside the kernels; ends with a name of NULL */
extern "C" const replay_kernel replay_kernels[];

/* Blocks, and the threads of each, run last to first: a result that needs an order, where a barrier
 * is missing, shows itself by changing. */
extern "C" void replay_backwards(int on);

/* 0, or what went wrong */
extern "C" const char *replay_launch(const char *name, const unsigned grid[3],
                                     const unsigned block[3], void **addresses);
#endif
