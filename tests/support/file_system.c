/* Preloaded, it makes the file system below $SHIM_FOLDER one that lacks what $SHIM_LACKS names, words with commas:
   flock=ERRNO, fsync-folder, rename-folder, link, and stale: every file's first read is answered by ESTALE. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *lacks(const char *word) {
  const char *words = getenv("SHIM_LACKS");
  const char *found = words ? strstr(words, word) : NULL;
  return found ? found + strlen(word) : NULL;
}

static int below(const char *path) {
  const char *folder = getenv("SHIM_FOLDER");
  return folder && !strncmp(path, folder, strlen(folder));
}

static int open_below(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return below(path);
}

static int is_folder(const char *path) {
  struct stat status;
  return !stat(path, &status) && S_ISDIR(status.st_mode);
}

static int refuse(int number) {
  errno = number;
  return -1;
}

int flock(int fd, int operation) {
  static int (*real)(int, int);
  if (!real) real = dlsym(RTLD_NEXT, "flock");
  const char *number = lacks("flock=");
  if (number && !(operation & LOCK_UN) && open_below(fd)) return refuse(atoi(number));
  return real(fd, operation);
}

int fsync(int fd) {
  static int (*real)(int);
  if (!real) real = dlsym(RTLD_NEXT, "fsync");
  struct stat status;
  if (lacks("fsync-folder") && open_below(fd) && !fstat(fd, &status) && S_ISDIR(status.st_mode)) return refuse(EINVAL);
  return real(fd);
}

int rename(const char *from, const char *to) {
  static int (*real)(const char *, const char *);
  if (!real) real = dlsym(RTLD_NEXT, "rename");
  if (lacks("rename-folder") && below(from) && is_folder(from)) return refuse(ENOSYS);
  return real(from, to);
}

int link(const char *from, const char *to) {
  static int (*real)(const char *, const char *);
  if (!real) real = dlsym(RTLD_NEXT, "link");
  if (lacks("link") && below(to)) return refuse(EPERM);
  return real(from, to);
}

static int is_stale(int fd) {
  static ino_t seen[64];
  static int count;
  struct stat status;
  if (!lacks("stale") || !open_below(fd) || fstat(fd, &status)) return 0;
  for (int i = 0; i < count; i++)
    if (seen[i] == status.st_ino) return 0;
  if (count < 64) seen[count++] = status.st_ino;
  return 1;
}

ssize_t pread64(int fd, void *buffer, size_t size, off64_t offset) {
  static ssize_t (*real)(int, void *, size_t, off64_t);
  if (!real) real = dlsym(RTLD_NEXT, "pread64");
  return is_stale(fd) ? refuse(ESTALE) : real(fd, buffer, size, offset);
}

ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t offset) {
  static ssize_t (*real)(int, const struct iovec *, int, off64_t);
  if (!real) real = dlsym(RTLD_NEXT, "preadv64");
  return is_stale(fd) ? refuse(ESTALE) : real(fd, parts, count, offset);
}

ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
  static ssize_t (*real)(int, const struct iovec *, int, off64_t, int);
  if (!real) real = dlsym(RTLD_NEXT, "preadv64v2");
  return is_stale(fd) ? refuse(ESTALE) : real(fd, parts, count, offset, flags);
}
