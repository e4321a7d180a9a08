"""The thread pool alone: every task once, failures reported, no lost wake-up."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pocktvm.codegen.link import C_FOLDER

SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include "internal.h"
const pk_model pk_the_model;
void pk_prefault_stack(void) {}
static int counts[512], jobs;
static int count(int task, void *env, void *data) {
  (void)env;
  counts[task]++; /* one owner: the sanitizer sees it if there are two */
  return *(int *)data == task;
}
int main(int argc, char **argv) {
  for (int threads = 1; threads <= 6; threads++) {
    pk_pool *pool = pk_pool_open(threads, argc > 2);
    for (int job = 0; job < atoi(argv[1]); job++) {
      int n = job % 3 ? job % 37 + 1 : 0, failing = job % 11 == 0 ? n / 2 : -1;
      int made = n ? n : threads;
      int failed = pk_pool_run(pool, count, &failing, n) != 0;
      if (failed != (failing >= 0)) return printf("job %d failed %d\n", job, failed), 1;
      for (int i = 0; i < 512; i++) {
        if (counts[i] != (i < made)) return printf("job %d task %d: %d\n", job, i, counts[i]), 1;
        counts[i] = 0;
      }
      if (job % 500 == 0) usleep(3000); /* the workers park */
      jobs++;
    }
    int none = -1; /* more tasks than a ticket can count */
    if (pk_pool_run(pool, count, &none, 70000) || counts[69999] != 1) return 2;
    for (int i = 0; i < 70000; i++) counts[i] = 0;
    pk_pool_close(pool);
  }
  printf("%d jobs\n", jobs);
}
"""

# Two pinned threads: each on one core, not on the same, and the caller is free again after close.
HOLDING = r"""
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <unistd.h>
#include "internal.h"
const pk_model pk_the_model;
void pk_prefault_stack(void) {}
static int cpu[2], width[2];
static volatile int here;
static int note(int task, void *env, void *data) {
  cpu_set_t set;
  (void)env, (void)data;
  sched_getaffinity(0, sizeof set, &set);
  width[task] = CPU_COUNT(&set);
  cpu[task] = sched_getcpu();
  __sync_fetch_and_add(&here, 1);
  while (here < 2) sched_yield(); /* so that each thread takes one task */
  return 0;
}
int main(void) {
  int before = pk_online_cpus();
  if (before < 2) return puts("held 1, apart 1, free 1"), 0;
  pk_pool *pool = pk_pool_open(2, 1);
  pk_pool_run(pool, note, 0, 2);
  pk_pool_close(pool);
  printf("held %d, apart %d, free %d\n", width[0] == 1 && width[1] == 1, cpu[0] != cpu[1],
         pk_online_cpus() == before);
}
"""


def run_source(tmp_path, source):
    built = build(tmp_path, source=source)
    assert built.returncode == 0, built.stderr
    return subprocess.run([tmp_path / "pool"], capture_output=True, text=True, timeout=60).stdout


def build(tmp_path, *flags, source=SOURCE):
    (tmp_path / "pool.c").write_text(source.replace("counts[512]", "counts[70000]"))
    sources = [str(C_FOLDER / f"{name}.c") for name in ("threads", "affinity")]
    command = [sys.executable, "-m", "ziglang", "cc", "-std=gnu11", "-O2", "-Wall", "-Wextra",
               "-Werror", f"-I{C_FOLDER}", str(tmp_path / "pool.c"), *sources,
               "-lpthread", *flags, "-o", str(tmp_path / "pool")]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True)


def run(tmp_path, jobs, *flags):
    command = [tmp_path / "pool", str(jobs), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{6 * jobs} jobs\n"


def test_every_task_runs_once(tmp_path):
    built = build(tmp_path)
    assert built.returncode == 0, built.stderr
    run(tmp_path, 3000)
    run(tmp_path, 500, "pin")
    held = run_source(tmp_path, HOLDING)
    assert held == "held 1, apart 1, free 1\n"


@pytest.mark.slow
def test_no_data_race(tmp_path):
    """Under the thread sanitizer."""
    built = build(tmp_path, "-fsanitize=thread", "-g")
    if built.returncode:
        pytest.skip(f"no thread sanitizer here: {built.stderr[-200:]}")
    run(tmp_path, 1000)
