// In front of libc: calls that change a disk are counted while armed, and from the so manyth on they fail.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/types.h>
#include <sys/uio.h>

static volatile int armed, failing_from, error_number, calls;

void failing_arm(int from, int number) { calls = 0; failing_from = from; error_number = number; armed = 1; }
int failing_disarm(void) { armed = 0; return calls; }

static int fails(void) {
  if (!armed || ++calls < failing_from) return 0;
  errno = error_number;
  return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *data, size_t size) { return file > 2 && fails() ? -1 : NEXT(write)(file, data, size); }
ssize_t writev(int file, const struct iovec *data, int count) { return fails() ? -1 : NEXT(writev)(file, data, count); }
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
  return fails() ? -1 : NEXT(pwrite64)(file, data, size, at);
}
extern int fsync(int);
extern int rename(const char *, const char *);
extern int mkdir(const char *, mode_t);
extern int ftruncate64(int, off64_t);
extern int fchmodat(int, const char *, mode_t, int);
int fsync(int file) { return fails() ? -1 : NEXT(fsync)(file); }
int rename(const char *from, const char *to) { return fails() ? -1 : NEXT(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { return fails() ? -1 : NEXT(mkdir)(path, mode); }
int ftruncate64(int file, off64_t size) { return fails() ? -1 : NEXT(ftruncate64)(file, size); }

int open64(const char *path, int flags, ...) {
  mode_t mode = 0;
  if (flags & O_CREAT) {
    va_list more;
    va_start(more, flags);
    mode = va_arg(more, mode_t);
    va_end(more);
    if (fails()) return -1;
  }
  return NEXT(open64)(path, flags, mode);
}
