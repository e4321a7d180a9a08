/* What peak.c and bandwidth.c share: threads that all do the same work, timed together. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* Seconds of the fastest of `rounds` rounds, in each of which thread i does work(data[i]). */
static double fastest(int rounds, int threads, void *(*work)(void *), void **data)
{
    pthread_t *id = calloc(threads, sizeof *id);
    double best = 1e30;
    for (int round = 0; round < rounds; round++) {
        double start = now();
        for (int i = 0; i < threads; i++)
            pthread_create(id + i, 0, work, data[i]);
        for (int i = 0; i < threads; i++)
            pthread_join(id[i], 0);
        double seconds = now() - start;
        best = seconds < best ? seconds : best;
    }
    free(id);
    return best;
}
