/* A pool of threads for TVM's parallel loops.
 *
 * A job is a function and a number of tasks. The caller publishes it under a new generation number
 * and takes tasks itself; workers take the others. A task is claimed by compare-and-swap on one
 * word that holds (generation, number of tasks, next task), so a worker that wakes late can neither run a task of a
 * job that is over nor miss one. Which thread runs a task never changes a result: kernels split
 * their loops by output, not by thread.
 *
 * Workers spin briefly between jobs (regions follow each other within microseconds inside a step),
 * then park on a condition variable. A pool of one thread has no workers and touches no atomics.
 * A pinned pool holds its i-th thread, the caller being the first, to the i-th fastest core. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "internal.h"

/* ~50 us of polling: longer than the serial gaps inside a step, shorter than a time slice. */
enum { SPINS = 2000, SPINS_BEFORE_YIELD = 20000, MAX_TASKS = 0xffff, MAX_CPUS = 256 };

typedef int (*pk_task)(int, void *, void *);

typedef struct {
  void *sync_handle;
  int32_t n_tasks;
} parallel_env;

struct pk_pool {
  int threads; /* the caller's included */
  pthread_t *workers;
  int n_cpus; /* 0: not pinned */
  int cpus[MAX_CPUS]; /* fastest first */
  _Atomic int started; /* workers that have taken their number */
  _Alignas(64) _Atomic uint64_t ticket; /* generation << 32 | tasks << 16 | next task */
  _Atomic(pk_task) task;
  _Atomic(void *) data;
  _Alignas(64) _Atomic int remaining;
  _Atomic int failed;
  _Alignas(64) _Atomic int parked;
  _Atomic int closing;
  pthread_mutex_t mutex;
  pthread_cond_t wake;
};

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb" ::: "memory"); /* ~10 ns; yield is a nop on most cores */
#elif defined(__arm__)
  __asm__ volatile("yield" ::: "memory");
#endif
}

static uint64_t ticket_of(uint32_t generation, int n_tasks) {
  return (uint64_t)generation << 32 | (uint64_t)n_tasks << 16;
}

/* Runs tasks of this generation until none is left. */
static void take_tasks(pk_pool *pool, uint32_t generation) {
  pk_task task = atomic_load_explicit(&pool->task, memory_order_relaxed);
  void *data = atomic_load_explicit(&pool->data, memory_order_relaxed);
  uint64_t ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
  for (;;) {
    int n_tasks = (int)(ticket >> 16 & MAX_TASKS), next = (int)(ticket & MAX_TASKS);
    if ((uint32_t)(ticket >> 32) != generation || next >= n_tasks) return;
    /* success proves that the job was not over, so the two fields above were its own */
    if (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket + 1)) continue;
    parallel_env env = {NULL, n_tasks};
    if (task(next, &env, data)) atomic_store(&pool->failed, 1);
    atomic_fetch_sub(&pool->remaining, 1);
    ticket = atomic_load(&pool->ticket);
  }
}

static uint32_t generation_of(pk_pool *pool) { return (uint32_t)(atomic_load(&pool->ticket) >> 32); }

/* Waits for a generation other than `seen`; returns it. */
static uint32_t wait_for_job(pk_pool *pool, uint32_t seen) {
  for (int i = 0; i < SPINS; i++) {
    uint32_t now = generation_of(pool);
    if (now != seen || atomic_load_explicit(&pool->closing, memory_order_relaxed)) return now;
    relax();
  }
  pthread_mutex_lock(&pool->mutex);
  atomic_fetch_add(&pool->parked, 1);
  while (generation_of(pool) == seen && !atomic_load(&pool->closing))
    pthread_cond_wait(&pool->wake, &pool->mutex);
  atomic_fetch_sub(&pool->parked, 1);
  pthread_mutex_unlock(&pool->mutex);
  return generation_of(pool);
}

static void *work(void *argument) {
  pk_pool *pool = argument;
  uint32_t seen = 0;
  if (pool->n_cpus) pk_hold(&pool->cpus[1 + atomic_fetch_add(&pool->started, 1)], 1);
  pk_prefault_stack();
  while (!atomic_load(&pool->closing)) {
    seen = wait_for_job(pool, seen);
    take_tasks(pool, seen);
  }
  return NULL;
}

static void wake_parked(pk_pool *pool) {
  if (!atomic_load(&pool->parked)) return;
  pthread_mutex_lock(&pool->mutex);
  pthread_cond_broadcast(&pool->wake);
  pthread_mutex_unlock(&pool->mutex);
}

static int run_alone(pk_task task, void *data, int n_tasks) {
  parallel_env env = {NULL, n_tasks};
  int failed = 0;
  for (int i = 0; i < n_tasks; i++) failed |= task(i, &env, data);
  return failed ? -1 : 0;
}

int pk_pool_run(pk_pool *pool, pk_task task, void *data, int n_tasks) {
  int threads = pool ? pool->threads : 1;
  if (n_tasks <= 0) n_tasks = threads; /* TVM's "as many as there are" */
  if (threads == 1 || n_tasks == 1 || n_tasks > MAX_TASKS) return run_alone(task, data, n_tasks);
  uint32_t generation = generation_of(pool) + 1;
  /* the old generation has no task left, so nobody runs while the fields change */
  atomic_store_explicit(&pool->task, task, memory_order_relaxed);
  atomic_store_explicit(&pool->data, data, memory_order_relaxed);
  atomic_store_explicit(&pool->failed, 0, memory_order_relaxed);
  atomic_store_explicit(&pool->remaining, n_tasks, memory_order_relaxed);
  atomic_store(&pool->ticket, ticket_of(generation, n_tasks));
  wake_parked(pool);
  take_tasks(pool, generation);
  for (int i = 0; atomic_load(&pool->remaining) > 0; i++) {
    if (i < SPINS_BEFORE_YIELD)
      relax();
    else
      sched_yield(); /* a worker was preempted: give it a core */
  }
  return atomic_load(&pool->failed) ? -1 : 0;
}

int pk_pool_threads(const pk_pool *pool) { return pool->threads; }

pk_pool *pk_pool_open(int threads, int pin) {
  void *memory = NULL;
  if (posix_memalign(&memory, 64, sizeof(pk_pool))) return NULL;
  pk_pool *pool = memory;
  *pool = (pk_pool){.threads = 1};
  if (pin) pool->n_cpus = pk_fast_cpus(pool->cpus, MAX_CPUS);
  if (pool->n_cpus < threads) pool->n_cpus = 0; /* threads that share a core want to move */
  if (pool->n_cpus) pk_hold(pool->cpus, 1);
  if (threads <= 1) return pool;
  pthread_mutex_init(&pool->mutex, NULL);
  pthread_cond_init(&pool->wake, NULL);
  pool->workers = calloc((size_t)threads - 1, sizeof(pthread_t));
  /* where the system gives fewer threads, train with those */
  while (pool->workers && pool->threads < threads &&
         pthread_create(&pool->workers[pool->threads - 1], NULL, work, pool) == 0)
    pool->threads++;
  return pool;
}

void pk_pool_close(pk_pool *pool) {
  if (!pool) return;
  if (pool->workers) {
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->closing, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->threads - 1; i++) pthread_join(pool->workers[i], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->workers);
  }
  if (pool->n_cpus) pk_hold(pool->cpus, pool->n_cpus);
  free(pool);
}
