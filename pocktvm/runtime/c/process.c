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
typedef struct {
  const char *inside, *skip;
  int64_t skip_bytes;
} walk;

/* Code is read from disk at its first use otherwise: a slow first step, and memory that a
 * measurement would take for the arena's. */
static int touch_segments(struct dl_phdr_info *info, size_t size, void *data) {
  (void)size;
  const walk *w = data;
  int found = 0;
  for (int pass = 0; pass < 2; pass++) {
    for (int i = 0; i < info->dlpi_phnum; i++) {
      const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
      if (segment->p_type != PT_LOAD || !(segment->p_flags & PF_R)) continue;
      const char *start = (const char *)(info->dlpi_addr + segment->p_vaddr);
      const char *end = start + segment->p_filesz;
      if (pass == 0) {
        found |= w->inside >= start && w->inside < end;
      } else if (w->skip >= start && w->skip < end) {
        pk_prefault(start, w->skip - start);
        const char *after = w->skip + w->skip_bytes;
        if (after < end) pk_prefault(after, end - after);
      } else {
        pk_prefault(start, end - start);
      }
    }
    if (!found) return 0;
  }
  return 1;
}
#endif

void pk_prefault_library(const char *skip, int64_t skip_bytes) {
#ifdef __linux__
  walk w = {(const char *)(uintptr_t)&pk_prefault, skip, skip_bytes};
  dl_iterate_phdr(touch_segments, &w);
#else
  (void)skip, (void)skip_bytes;
#endif
}

int pk_library_folder(char *folder, size_t room) {
  Dl_info info;
  if (!dladdr((void *)(uintptr_t)&pk_library_folder, &info) || !info.dli_fname) return -1;
  const char *slash = strrchr(info.dli_fname, '/');
  int n = slash ? snprintf(folder, room, "%.*s", (int)(slash - info.dli_fname), info.dli_fname)
                : snprintf(folder, room, ".");
  return n < 0 || (size_t)n >= room ? -1 : 0;
}
