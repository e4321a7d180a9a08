/* Reading memory: GB/s at which `argv[1]` threads sum arrays far larger than any cache. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define FLOATS (48L << 20) /* 192 MB a thread */
#define WIDTH 16
#define LANES 8

typedef float vector __attribute__((vector_size(4 * WIDTH), aligned(4 * WIDTH)));

static void *work(void *data)
{
    vector sum[LANES] = {0};
    const vector *at = data;
    for (long i = 0; i < FLOATS / WIDTH; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            sum[lane] += at[i + lane];
    for (int lane = 1; lane < LANES; lane++)
        sum[0] += sum[lane];
    ((float *)data)[0] = sum[0][0];
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
    float **data = calloc(threads, sizeof *data);
    double best = 0;
    for (int i = 0; i < threads; i++) {
        data[i] = aligned_alloc(4096, FLOATS * sizeof(float));
        if (!data[i])
            return 1;
        for (long k = 0; k < FLOATS; k++) /* every page of its own */
            data[i][k] = 1e-9f;
    }
    for (int repeat = 0; repeat < 4; repeat++) {
        double start = now();
        for (int i = 0; i < threads; i++)
            pthread_create(id + i, 0, work, data[i]);
        for (int i = 0; i < threads; i++)
            pthread_join(id[i], 0);
        double rate = 1e-9 * FLOATS * sizeof(float) * threads / (now() - start);
        best = rate > best ? rate : best;
    }
    printf("%.1f\n", best);
    return 0;
}
