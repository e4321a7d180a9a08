/* Finds and opens the model's library. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef __linux__
#include <elf.h>
#include <link.h>
#endif

#include "runner.h"

#ifdef POCKTVM_OWN_LOADER
#include "elf_loader.h"
#endif

#ifdef __APPLE__
#define LIBRARY "model.dylib"
#else
#define LIBRARY "model.so"
#endif

#ifdef POCKTVM_STATIC

int pk_load_library(const char *artifact, pk_api *api, char *folder, size_t room) {
  *api = (pk_api){pocktvm_open, pocktvm_close, pocktvm_step,   pocktvm_predict,   pocktvm_save,
                  pocktvm_load, pocktvm_tensor, pocktvm_select, pocktvm_resample,
                  pocktvm_plan, pocktvm_last_error};
  snprintf(folder, room, "%s", artifact);
  return 0;
}

#else

#ifdef __linux__
/* The loader of a truncated library dies of SIGBUS instead of saying so. Section headers are the
 * last thing in a file that zig links, segments before them. */
static int check_whole(const char *path) {
  ElfW(Ehdr) head;
  struct stat facts;
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0 || fstat(fd, &facts)) {
    int reason = errno;
    if (fd >= 0) close(fd);
    return pk_complain("cannot open %s: %s; is this an artifact folder?", path, strerror(reason));
  }
  ssize_t n = pread(fd, &head, sizeof head, 0);
  close(fd);
  if (n < (ssize_t)sizeof head || memcmp(head.e_ident, ELFMAG, SELFMAG))
    return pk_complain("%s is not a library (%lld bytes); build the artifact again", path,
                       (long long)facts.st_size);
  if ((int64_t)head.e_shoff + (int64_t)head.e_shnum * head.e_shentsize > (int64_t)facts.st_size)
    return pk_complain("%s is truncated (%lld bytes); copy or build the artifact again", path,
                       (long long)facts.st_size);
  return 0;
}
#else
static int check_whole(const char *path) {
  return access(path, R_OK) ? pk_complain("cannot open %s: %s", path, strerror(errno)) : 0;
}
#endif

#ifdef POCKTVM_OWN_LOADER
static void *open_library(const char *path) { return elf_open(path); }
static void *find_symbol(void *library, const char *name) { return elf_symbol(library, name); }
static const char *why_not(void) { return elf_error(); }
#else
static void *open_library(const char *path) { return dlopen(path, RTLD_NOW | RTLD_LOCAL); }
static void *find_symbol(void *library, const char *name) { return dlsym(library, name); }
static const char *why_not(void) { return dlerror(); }
#endif

static int find(void *library, const char *name, void *slot) {
  void *symbol = find_symbol(library, name);
  memcpy(slot, &symbol, sizeof symbol); /* ISO C knows no cast from data to function pointers */
  return symbol ? 0 : -1;
}

static int find_all(void *library, pk_api *api) {
  return find(library, "pocktvm_open", &api->open) | find(library, "pocktvm_close", &api->close) |
         find(library, "pocktvm_step", &api->step) |
         find(library, "pocktvm_predict", &api->predict) |
         find(library, "pocktvm_save", &api->save) | find(library, "pocktvm_load", &api->load) |
         find(library, "pocktvm_tensor", &api->tensor) |
         find(library, "pocktvm_select", &api->select) |
         find(library, "pocktvm_resample", &api->resample) |
         find(library, "pocktvm_plan", &api->plan) |
         find(library, "pocktvm_last_error", &api->last_error);
}

int pk_load_library(const char *artifact, pk_api *api, char *folder, size_t room) {
  char path[4200];
  struct stat facts;
  int is_folder = stat(artifact, &facts) == 0 && S_ISDIR(facts.st_mode);
  const char *slash = strrchr(artifact, '/');
  if (is_folder) {
    snprintf(folder, room, "%s", artifact);
    snprintf(path, sizeof path, "%s/" LIBRARY, artifact);
  } else {
    snprintf(folder, room, "%.*s", slash ? (int)(slash - artifact) : 1, slash ? artifact : ".");
    snprintf(path, sizeof path, "%s%s", slash ? "" : "./", artifact);
  }
  if (check_whole(path)) return 1;
  void *library = open_library(path);
  if (!library) return pk_complain("cannot load %s: %s", path, why_not());
  if (find_all(library, api))
    return pk_complain("%s is a library, but not a model of pocktvm", path);
  if (api->plan(NULL)->abi != POCKTVM_ABI)
    return pk_complain("%s speaks version %d of pocktvm.h, this runner version %d; use the "
                       "pocktvm-run beside it", path, (int)api->plan(NULL)->abi, POCKTVM_ABI);
  return 0;
}

#endif
