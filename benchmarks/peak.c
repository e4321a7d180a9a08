/* Fused multiply-adds on registers alone: GFLOP/s this machine gives `argv[1]` threads.
   Ten accumulators hide the latency of two FMA pipes; VEC is the vector's width in bytes. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

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

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

int main(int argc, char **argv)
{
    int threads = argc > 1 ? atoi(argv[1]) : 1;
    pthread_t *id = calloc(threads, sizeof *id);
    float *result = calloc(threads, 64);
    double best = 0;
    for (int repeat = 0; repeat < 5; repeat++) {
        double start = now();
        for (int i = 0; i < threads; i++)
            pthread_create(id + i, 0, work, result + 16 * i);
        for (int i = 0; i < threads; i++)
            pthread_join(id[i], 0);
        double rate = 2.0 * ACCUMULATORS * (VEC / 4) * ROUNDS * threads / (now() - start) / 1e9;
        best = rate > best ? rate : best;
    }
    printf("%.1f\n", best);
    return result[0] > 1e9f; /* the sums must be seen to be used */
}
