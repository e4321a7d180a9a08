/* Which cores this process may use, and holding a thread to one of them.
 *
 * Off unless asked for: on a quiet device the scheduler does well, but where fast and slow cores lie
 * together, or another program moves our threads about, a held thread keeps its caches. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "internal.h"

#ifdef __linux__
/* The core's speed beside the others' as the kernel knows it; 1024 where all are alike. */
static int capacity_of(int cpu) {
  char path[64], text[16] = "";
  snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/cpu_capacity", cpu);
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return 1024;
  int value = read(file, text, sizeof text - 1) > 0 ? atoi(text) : 0;
  close(file);
  return value > 0 ? value : 1024;
}

int pk_online_cpus(void) {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  long n = sysconf(_SC_NPROCESSORS_ONLN);
  return n < 1 ? 1 : (int)n;
}

int pk_fast_cpus(int *cpus, int most) {
  int capacity[CPU_SETSIZE], n = 0;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 0;
  for (int cpu = 0; cpu < CPU_SETSIZE && n < most; cpu++) {
    if (!CPU_ISSET(cpu, &set)) continue;
    int mine = capacity_of(cpu), at = n++;
    for (; at > 0 && capacity[at - 1] < mine; at--) {
      capacity[at] = capacity[at - 1];
      cpus[at] = cpus[at - 1];
    }
    capacity[at] = mine;
    cpus[at] = cpu;
  }
  return n;
}

int pk_hold(const int *cpus, int n) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int i = 0; i < n; i++) CPU_SET(cpus[i], &set);
  return sched_setaffinity(0, sizeof set, &set);
}
#else
int pk_online_cpus(void) {
  long n = sysconf(_SC_NPROCESSORS_ONLN);
  return n < 1 ? 1 : (int)n;
}

int pk_fast_cpus(int *cpus, int most) {
  (void)cpus, (void)most;
  return 0; /* macOS chooses cores by a thread's quality of service, not by number */
}

int pk_hold(const int *cpus, int n) {
  (void)cpus, (void)n;
  return -1;
}
#endif
