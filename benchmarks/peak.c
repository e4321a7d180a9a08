/* Fused multiply-adds on registers alone: GFLOP/s this machine gives `argv[1]` threads.
   Ten accumulators hide the latency of two FMA pipes; VEC is the vector's width in bytes. */
#include "rounds.h"

#ifndef VEC
#define VEC 32
#endif
#define ACCUMULATORS 10
#define ROUNDS 20000000L

typedef float vector __attribute__((vector_size(VEC)));

static void *work(void *result)
{
    vector a[ACCUMULATORS], x, y;
    for (int lane = 0; lane < VEC / 4; lane++) {
        x[lane] = 0.999f;
        y[lane] = 1e-6f;
    }
    for (int i = 0; i < ACCUMULATORS; i++)
        a[i] = x;
    for (long round = 0; round < ROUNDS; round++)
        for (int i = 0; i < ACCUMULATORS; i++)
            a[i] = a[i] * x + y;
    for (int i = 1; i < ACCUMULATORS; i++)
        a[0] += a[i];
    *(float *)result = a[0][0];
    return 0;
}

int main(int argc, char **argv)
{
    int threads = argc > 1 ? atoi(argv[1]) : 1;
    float *result = calloc(threads, 64);
    void **data = calloc(threads, sizeof *data);
    for (int i = 0; i < threads; i++)
        data[i] = result + 16 * i; /* a cache line of its own */
    double seconds = fastest(5, threads, work, data);
    printf("%.1f\n", 1e-9 * 2 * ACCUMULATORS * (VEC / 4) * ROUNDS * threads / seconds);
    return result[0] > 1e9f; /* the sums must be seen to be used */
}
