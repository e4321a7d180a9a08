/* Reading memory: GB/s at which `argv[1]` threads sum arrays far larger than any cache. */
#include "rounds.h"

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

int main(int argc, char **argv)
{
    int threads = argc > 1 ? atoi(argv[1]) : 1;
    void **data = calloc(threads, sizeof *data);
    for (int i = 0; i < threads; i++) {
        float *own = data[i] = aligned_alloc(4096, FLOATS * sizeof(float));
        if (!own)
            return 1;
        for (long k = 0; k < FLOATS; k++) /* every page of its own */
            own[k] = 1e-9f;
    }
    double seconds = fastest(4, threads, work, data);
    printf("%.1f\n", 1e-9 * FLOATS * sizeof(float) * threads / seconds);
    return 0;
}
