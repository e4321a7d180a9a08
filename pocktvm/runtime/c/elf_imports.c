/* What a library that elf_loader.c maps may take from this program: the libc functions that the
 * runtime and TVM's kernels call. A library that wants more is refused by name. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <link.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include "elf_loader.h"

static Dl_info place;
static struct dl_phdr_info segments;

void elf_describe(const char *path, const char *base, const void *phdr, int n_phdr) {
  place = (Dl_info){.dli_fname = strdup(path), .dli_fbase = (void *)(uintptr_t)base};
  segments.dlpi_addr = (uintptr_t)base;
  segments.dlpi_name = place.dli_fname;
  segments.dlpi_phdr = phdr;
  segments.dlpi_phnum = (uint16_t)n_phdr;
}

/* A static libc knows of no library; ours is the only one. */
static int library_address(const void *address, Dl_info *info) {
  (void)address;
  *info = place;
  return 1;
}

static int each_library(int (*visit)(struct dl_phdr_info *, size_t, void *), void *data) {
  return visit(&segments, sizeof segments, data);
}

int *__errno_location(void);
int __sched_cpucount(size_t, const cpu_set_t *);

typedef struct {
  const char *name;
  void (*function)(void);
} import;

#define OURS(name) {#name, (void (*)(void))name}
#define MATH(name) OURS(name), OURS(name##f)

static const import imports[] = {
    {"dladdr", (void (*)(void))library_address},
    {"dl_iterate_phdr", (void (*)(void))each_library},
    OURS(__errno_location), OURS(__sched_cpucount),
    /* memory and strings */
    OURS(malloc), OURS(calloc), OURS(realloc), OURS(free), OURS(posix_memalign), OURS(memcpy),
    OURS(memmove), OURS(memset), OURS(memcmp), OURS(bcmp), OURS(memchr), OURS(strlen), OURS(strnlen),
    OURS(strcmp), OURS(strncmp), OURS(strcpy), OURS(strncpy), OURS(strcat), OURS(strchr),
    OURS(strrchr), OURS(strstr), OURS(strdup), OURS(strerror), OURS(strtol), OURS(strtoll),
    OURS(strtoul), OURS(strtoull), OURS(strtod), OURS(atoi), OURS(snprintf), OURS(vsnprintf),
    OURS(qsort), OURS(bsearch), OURS(dirname), OURS(basename), OURS(abort),
    /* files */
    OURS(open), OURS(close), OURS(read), OURS(write), OURS(pread), OURS(pwrite), OURS(lseek),
    OURS(stat), OURS(fstat), OURS(fsync), OURS(ftruncate), OURS(flock), OURS(fcntl), OURS(rename),
    OURS(unlink), OURS(access), OURS(statvfs), OURS(fstatvfs), OURS(getpid), OURS(sysconf),
    OURS(mmap), OURS(munmap), OURS(madvise), OURS(mprotect),
    /* time and threads */
    OURS(clock_gettime), OURS(nanosleep), OURS(sched_yield), OURS(sched_getaffinity), OURS(sched_setaffinity),
    OURS(pthread_create), OURS(pthread_join), OURS(pthread_mutex_init), OURS(pthread_mutex_lock),
    OURS(pthread_mutex_unlock), OURS(pthread_mutex_destroy), OURS(pthread_cond_init),
    OURS(pthread_cond_wait), OURS(pthread_cond_signal), OURS(pthread_cond_broadcast),
    OURS(pthread_cond_destroy),
    /* what kernels compute with */
    MATH(exp), MATH(exp2), MATH(expm1), MATH(log), MATH(log2), MATH(log10), MATH(log1p), MATH(pow),
    MATH(sqrt), MATH(cbrt), MATH(fma), MATH(fmod), MATH(fabs), MATH(fmax), MATH(fmin), MATH(floor),
    MATH(ceil), MATH(round), MATH(trunc), MATH(rint), MATH(nearbyint), MATH(sin), MATH(cos),
    MATH(tan), MATH(asin), MATH(acos), MATH(atan), MATH(atan2), MATH(sinh), MATH(cosh), MATH(tanh),
    MATH(asinh), MATH(acosh), MATH(atanh), MATH(erf), MATH(erfc), MATH(ldexp), MATH(copysign),
    MATH(hypot), MATH(tgamma), MATH(lgamma),
};

void *elf_import(const char *name) {
  for (size_t i = 0; i < sizeof imports / sizeof *imports; i++) {
    if (strcmp(imports[i].name, name) != 0) continue;
    void *address;
    memcpy(&address, &imports[i].function, sizeof address);
    return address;
  }
  return NULL;
}
