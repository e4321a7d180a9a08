/* The lock beside a checkpoint: <path>.lock, with its holder's process number inside. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

static int lock_file(const char *path, pid_t *holder) {
  for (;;) {
    struct stat ours, there;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) return -1;
    if (flock(fd, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK) {
      char text[32] = "";
      if (pread(fd, text, sizeof text - 1, 0) > 0) *holder = (pid_t)atoi(text);
      close(fd);
      return errno = EWOULDBLOCK, -1;
    } /* a file system without locks: go on without */
    if (fstat(fd, &ours) == 0 && stat(path, &there) == 0 && ours.st_ino == there.st_ino) {
      char text[32];
      int n = snprintf(text, sizeof text, "%ld\n", (long)getpid());
      if (ftruncate(fd, 0) || pwrite(fd, text, (size_t)n, 0) != n) { /* only a courtesy */
      }
      return fd;
    }
    close(fd); /* the last holder removed it between our open and our lock */
  }
}

int pk_lock(pocktvm *m, const char *path) {
  if (m->lock_fd >= 0 && strcmp(m->locked_file, path) == 0) return POCKTVM_OK;
  pk_unlock(m);
  size_t room = strlen(path) + 6;
  m->lock_path = malloc(room);
  m->locked_file = strdup(path);
  if (!m->lock_path || !m->locked_file) return pk_fail(m, POCKTVM_NO_MEMORY, "no memory");
  snprintf(m->lock_path, room, "%s.lock", path);
  pid_t holder = 0;
  m->lock_fd = lock_file(m->lock_path, &holder);
  if (m->lock_fd >= 0) return POCKTVM_OK;
  if (errno == EWOULDBLOCK)
    return pk_fail(m, POCKTVM_BUSY, "checkpoint %s is in use by another trainer (process %ld); "
                   "stop that one, or save to another file", path, (long)holder);
  return pk_fail(m, POCKTVM_IO, "cannot write beside %s: %s", path, strerror(errno));
}

void pk_unlock(pocktvm *m) {
  if (m->lock_fd >= 0) {
    unlink(m->lock_path); /* while it is still ours */
    close(m->lock_fd);
  }
  free(m->lock_path);
  free(m->locked_file);
  m->lock_fd = -1;
  m->lock_path = m->locked_file = NULL;
}
