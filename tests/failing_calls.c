/* Lets system calls fail, for LD_PRELOAD. In the environment, FAULT says what: "mmap -shm 19 2 1" lets mmap() fail with
   error 19 on each file whose name ends with "-shm", from the third call on, once. It may be changed while it runs: to
   the same once more, by some word after it. Nothing waits for the disk, because no test with it is about power cuts. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

static int fails(const char *function, const char *name) {
    static char last[256];
    static int calls;
    char failing[32], suffix[64];
    int number, first, count;
    const char *fault = getenv("FAULT");
    if (!fault || sscanf(fault, "%31s %63s %d %d %d", failing, suffix, &number, &first, &count) != 5) return 0;
    if (strcmp(fault, last)) {
        snprintf(last, sizeof last, "%s", fault);
        calls = 0;
    }
    size_t length = strlen(name), end = strlen(suffix);
    if (strcmp(failing, function) || length < end || strcmp(name + length - end, suffix)) return 0;
    int call = calls++;
    if (call < first || call >= first + count) return 0;
    errno = number;
    return 1;
}

static int fails_at(const char *function, int descriptor) {
    char link[64], name[4096];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, name, sizeof name - 1);
    errno = before;
    if (length < 0) return 0;
    name[length] = 0;
    return fails(function, name);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define MMAP(name, offset_type) \
    void *name(void *start, size_t length, int protection, int flags, int descriptor, offset_type offset) { \
        if (descriptor >= 0 && fails_at("mmap", descriptor)) return MAP_FAILED; \
        return NEXT(name)(start, length, protection, flags, descriptor, offset); \
    }
#define PWRITE(name, offset_type) \
    ssize_t name(int descriptor, const void *bytes, size_t length, offset_type offset) { \
        return fails_at("pwrite", descriptor) ? -1 : NEXT(name)(descriptor, bytes, length, offset); \
    }
#define FTRUNCATE(name, offset_type) \
    int name(int descriptor, offset_type length) { \
        return fails_at("ftruncate", descriptor) ? -1 : NEXT(name)(descriptor, length); \
    }
#define FCNTL(name) \
    int name(int descriptor, int command, ...) { \
        va_list rest; \
        va_start(rest, command); \
        void *argument = va_arg(rest, void *); \
        va_end(rest); \
        int is_lock = command == F_SETLK || command == F_GETLK; \
        return is_lock && fails_at("fcntl", descriptor) ? -1 : NEXT(name)(descriptor, command, argument); \
    }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        return fails("open", path) ? -1 : NEXT(name)(path, flags, mode); \
    }

int fsync(int descriptor) { return 0; }
int fdatasync(int descriptor) { return 0; }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)
FCNTL(fcntl)
FCNTL(fcntl64)
OPEN(open)
OPEN(open64)
