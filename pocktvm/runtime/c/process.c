/* What the runtime asks of the operating system about its own process. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef __linux__
#include <link.h>
#endif

#include "internal.h"

enum { STACK_BYTES = 64 << 10 }; /* kernels keep packed tiles of up to this size there */

int64_t pk_resident_bytes(void) {
  char text[128];
  int fd = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  ssize_t n = read(fd, text, sizeof text - 1);
  close(fd);
  if (n <= 0) return 0;
  text[n] = 0;
  char *second = strchr(text, ' ');
  return second ? strtoll(second, NULL, 10) * sysconf(_SC_PAGESIZE) : 0;
}

void pk_prefault(const char *start, int64_t nbytes) {
  int64_t page = sysconf(_SC_PAGESIZE);
  for (int64_t i = 0; i < nbytes; i += page) (void)*(const volatile char *)(start + i);
  if (nbytes > 0) (void)*(const volatile char *)(start + nbytes - 1);
}

#ifdef __linux__
/* Code is read from disk at its first use otherwise: a slow first step, and memory that a
 * measurement would take for the arena's. Ours, and the two libraries that kernels call. */
static int touch_code(struct dl_phdr_info *info, size_t size, void *data) {
  (void)size;
  const char *inside = data, *name = info->dlpi_name ? info->dlpi_name : "";
  int wanted = strstr(name, "/libm.so") || strstr(name, "/libc.so") || strstr(name, "/ld-musl");
  for (int pass = 0; pass < 2; pass++) {
    for (int i = 0; i < info->dlpi_phnum; i++) {
      const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
      if (segment->p_type != PT_LOAD || !(segment->p_flags & PF_X)) continue;
      const char *start = (const char *)(info->dlpi_addr + segment->p_vaddr);
      if (pass == 0)
        wanted |= inside >= start && inside < start + segment->p_filesz;
      else if (segment->p_flags & PF_R)
        pk_prefault(start, (int64_t)segment->p_filesz);
    }
    if (!wanted) return 0;
  }
  return 0;
}
#endif

void pk_prefault_code(void) {
#ifdef __linux__
  dl_iterate_phdr(touch_code, (void *)(uintptr_t)&pk_prefault_code);
#endif
}

void pk_prefault_stack(void) {
  volatile char stack[STACK_BYTES];
  for (int i = 0; i < STACK_BYTES; i += 4096) stack[i] = 0;
}

int pk_library_folder(char *folder, size_t room) {
  Dl_info info;
  if (!dladdr((void *)(uintptr_t)&pk_library_folder, &info) || !info.dli_fname) return -1;
  const char *slash = strrchr(info.dli_fname, '/');
  int n = slash ? snprintf(folder, room, "%.*s", (int)(slash - info.dli_fname), info.dli_fname)
                : snprintf(folder, room, ".");
  return n < 0 || (size_t)n >= room ? -1 : 0;
}
