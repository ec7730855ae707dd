// Preloaded into a command: counts its file operations under one folder, writes them down, and lets the n-th go wrong.
//
//   CRASH_ROOT   the folder; nothing outside it is looked at
//   CRASH_LOG    a file that gets every operation with its bytes, for the disk to be rebuilt from (sweep.py)
//   CRASH_FAULT  at operation number CRASH_AT, counted from 1:
//                kill    the process ends before it
//                tear    half of what it writes arrives, then the process ends; as kill where it writes nothing
//                enospc  it and all later ones that need room fail: the disk stays full
//                eio     it fails, once
//                brief   half of what it writes is taken, and the next write fails: the disk was full for a moment
//                short   reads and writes, all of them, move half of what they are asked to
//
// What is counted are calls of glibc's functions. What a program does by system calls of its own is not seen (Rust's rustix
// renames so); sweep.py finds such a rename by the inode. What could not be rebuilt ends the process with code 99: writing by
// a shared mapping, or from file to file within the kernel.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum fault { NONE, KILL, TEAR, ENOSPACE, EINOUT, BRIEF, SHORT };
enum { TORN = -1, HALVED = -2 }; // beside numbers of errors

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static char root[PATH_MAX];
static size_t root_size; // 0: nothing is counted
static enum fault fault;
static long at, count;
static int full; // for a moment
static int record = -1;

// Functions of the C library that are called from here without being counted.
#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) {
    void *function = dlsym(RTLD_NEXT, name);
    if (!function) abort();
    return function;
}

// Read the environment again, and count from nought: for a process that was forked after the library was loaded.
__attribute__((constructor)) void crash_arm(void) {
    static const char *const names[] = {"", "kill", "tear", "enospc", "eio", "brief", "short"};
    const char *folder = getenv("CRASH_ROOT"), *log = getenv("CRASH_LOG"), *what = getenv("CRASH_FAULT"), *n = getenv("CRASH_AT");
    count = 0, at = n ? atol(n) : 0, fault = NONE, full = 0, record = -1, root_size = 0;
    if (!folder || !*folder) return;
    for (int i = KILL; what && i <= SHORT; i++)
        if (!strcmp(what, names[i])) fault = i;
    if (log) record = REAL(open64)(log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    root_size = strlen(strncpy(root, folder, PATH_MAX - 1));
    // not for the commands that this one runs: they would count from nought and begin the log again
    unsetenv("CRASH_ROOT"), unsetenv("CRASH_LOG"), unsetenv("CRASH_FAULT"), unsetenv("CRASH_AT");
}

static int below(const char *path) {
    return !strncmp(path, root, root_size) && (path[root_size] == '/' || !path[root_size]);
}

// The absolute path behind a descriptor; whether it is under the root.
static int of_fd(int fd, char *path) {
    if (!root_size) return 0;
    int before = errno;
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n < 0 ? 0 : n] = 0;
    errno = before;
    return below(path);
}

static int of_path(int folder, const char *name, char *path) {
    if (!root_size || !name) return 0;
    if (*name == '/') {
        snprintf(path, PATH_MAX, "%s", name);
    } else {
        char base[PATH_MAX];
        if (folder != AT_FDCWD) of_fd(folder, base);
        else if (!getcwd(base, sizeof base)) return 0;
        if (snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) return 0;
    }
    for (size_t n = strlen(path); n > 1 && path[n - 1] == '/'; n--) path[n - 1] = 0;
    return below(path);
}

static void tell(const char *what, char kind, const char *path) {
    char line[PATH_MAX + 64];
    int n = snprintf(line, sizeof line, "crash: %s at operation %ld: %c %s\n", what, count, kind, path);
    (void)!REAL(write)(2, line, n);
}

static void die(const char *what, char kind, const char *path) {
    tell(what, kind, path);
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

// Count an operation, with the lock held until `done`: an errno to fail with, TORN, HALVED, or 0 to do it.
static int begin(char kind, const char *path) {
    pthread_mutex_lock(&lock);
    count++;
    if (fault == SHORT) return kind == 'W' ? HALVED : 0;
    if (full && kind == 'W') {
        full = 0;
        tell("no space", kind, path);
        return ENOSPC;
    }
    if (fault == NONE || count < at || (count > at && fault != ENOSPACE)) return 0;
    if (fault == TEAR && kind == 'W') return TORN;
    if (fault == BRIEF && kind == 'W') {
        full = 1;
        tell("half", kind, path);
        return HALVED;
    }
    if (fault == KILL || fault == TEAR) die("kill", kind, path);
    if (fault == ENOSPACE && !strchr("CWMRLYTS", kind)) return 0;
    tell(fault == ENOSPACE ? "no space" : "input/output error", kind, path);
    return fault == ENOSPACE ? ENOSPC : EIO;
}

struct entry { // of the log, before its two paths and its bytes
    int64_t kind, ok, inode, number, first_size, second_size, bytes;
};

// Write an operation down. `number`: flags of an open, offset of a write, size of a truncation.
static void done(char kind, int ok, const char *first, const char *second, int64_t number, const struct iovec *data, int pieces) {
    int before = errno;
    if (record >= 0) {
        struct stat64 stat;
        int64_t inode = REAL(lstat64)(kind == 'R' || kind == 'L' ? second : first, &stat) ? 0 : (int64_t)stat.st_ino;
        int64_t bytes = 0;
        for (int i = 0; i < pieces; i++) bytes += data[i].iov_len;
        struct entry entry = {kind, ok, inode, number, strlen(first), strlen(second), bytes};
        ssize_t (*put)(int, const void *, size_t) = REAL(write);
        (void)!put(record, &entry, sizeof entry);
        (void)!put(record, first, entry.first_size);
        (void)!put(record, second, entry.second_size);
        for (int i = 0; i < pieces; i++) (void)!put(record, data[i].iov_base, data[i].iov_len);
    }
    pthread_mutex_unlock(&lock);
    errno = before;
}

static void refuse(const char *what) {
    char line[128];
    int n = snprintf(line, sizeof line, "crash: %s cannot be rebuilt from a log; teach tests/crash/fault.c\n", what);
    (void)!REAL(write)(2, line, n);
    _exit(99);
}

// --- one name, or two ---

#define SIMPLE(kind, folder, name, second, number, call)                                                                         \
    char path[PATH_MAX];                                                                                                         \
    if (!of_path(folder, name, path)) return call;                                                                               \
    int wrong = begin(kind, path);                                                                                               \
    int result = wrong > 0 ? (errno = wrong, -1) : call;                                                                         \
    done(kind, result >= 0, path, second, number, NULL, 0);                                                                      \
    return result

#define PAIR(kind, folder, name, other, target, call)                                                                            \
    char second[PATH_MAX];                                                                                                       \
    of_path(other, target, second);                                                                                              \
    SIMPLE(kind, folder, name, second, 0, call)

int mkdir(const char *p, mode_t m) { SIMPLE('M', AT_FDCWD, p, "", 0, REAL(mkdir)(p, m)); }
int mkdirat(int d, const char *p, mode_t m) { SIMPLE('M', d, p, "", 0, REAL(mkdirat)(d, p, m)); }
int rmdir(const char *p) { SIMPLE('D', AT_FDCWD, p, "", 0, REAL(rmdir)(p)); }
int unlink(const char *p) { SIMPLE('U', AT_FDCWD, p, "", 0, REAL(unlink)(p)); }
int remove(const char *p) { SIMPLE('U', AT_FDCWD, p, "", 0, REAL(remove)(p)); }
int unlinkat(int d, const char *p, int f) { SIMPLE(f & AT_REMOVEDIR ? 'D' : 'U', d, p, "", 0, REAL(unlinkat)(d, p, f)); }
int truncate(const char *p, off_t n) { SIMPLE('T', AT_FDCWD, p, "", n, REAL(truncate)(p, n)); }
int truncate64(const char *p, off64_t n) { SIMPLE('T', AT_FDCWD, p, "", n, REAL(truncate64)(p, n)); }
int symlink(const char *t, const char *p) { SIMPLE('Y', AT_FDCWD, p, t, 0, REAL(symlink)(t, p)); }
int symlinkat(const char *t, int d, const char *p) { SIMPLE('Y', d, p, t, 0, REAL(symlinkat)(t, d, p)); }
int rename(const char *a, const char *b) { PAIR('R', AT_FDCWD, a, AT_FDCWD, b, REAL(rename)(a, b)); }
int renameat(int d, const char *a, int e, const char *b) { PAIR('R', d, a, e, b, REAL(renameat)(d, a, e, b)); }
int renameat2(int d, const char *a, int e, const char *b, unsigned f) { PAIR('R', d, a, e, b, REAL(renameat2)(d, a, e, b, f)); }
int link(const char *a, const char *b) { PAIR('L', AT_FDCWD, a, AT_FDCWD, b, REAL(link)(a, b)); }
int linkat(int d, const char *a, int e, const char *b, int f) { PAIR('L', d, a, e, b, REAL(linkat)(d, a, e, b, f)); }

// --- opening; what only reads is not counted ---

#define OPEN(folder, name, flags, call)                                                                                          \
    mode_t mode = 0;                                                                                                             \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                                                                                       \
        va_list rest;                                                                                                            \
        va_start(rest, flags);                                                                                                   \
        mode = va_arg(rest, mode_t);                                                                                             \
        va_end(rest);                                                                                                            \
    }                                                                                                                            \
    if (((flags) & O_ACCMODE) == O_RDONLY && !((flags) & (O_CREAT | O_TRUNC))) return call;                                      \
    if (((flags) & O_TMPFILE) == O_TMPFILE) return call; /* a file without a name: nothing of it stays */                        \
    SIMPLE((flags) & O_CREAT ? 'C' : 'O', folder, name, "", flags, call)

int open(const char *p, int f, ...) { OPEN(AT_FDCWD, p, f, REAL(open)(p, f, mode)); }
int open64(const char *p, int f, ...) { OPEN(AT_FDCWD, p, f, REAL(open64)(p, f, mode)); }
int openat(int d, const char *p, int f, ...) { OPEN(d, p, f, REAL(openat)(d, p, f, mode)); }
int openat64(int d, const char *p, int f, ...) { OPEN(d, p, f, REAL(openat64)(d, p, f, mode)); }
int creat(const char *p, mode_t m) { return open(p, O_CREAT | O_WRONLY | O_TRUNC, m); }
int creat64(const char *p, mode_t m) { return open64(p, O_CREAT | O_WRONLY | O_TRUNC, m); }

#define FOPEN(call)                                                                                                              \
    char path[PATH_MAX];                                                                                                         \
    int kept = *m == 'r';                                                                                                        \
    if ((kept && !strchr(m, '+')) || !of_path(AT_FDCWD, p, path)) return call;                                                   \
    char kind = kept ? 'O' : 'C';                                                                                                \
    int wrong = begin(kind, path);                                                                                               \
    FILE *result = wrong > 0 ? (errno = wrong, NULL) : call;                                                                     \
    done(kind, result != NULL, path, "", kept ? 0 : O_CREAT | (*m == 'w' ? O_TRUNC : 0), NULL, 0);                              \
    return result

FILE *fopen(const char *p, const char *m) { FOPEN(REAL(fopen)(p, m)); }
FILE *fopen64(const char *p, const char *m) { FOPEN(REAL(fopen64)(p, m)); }

// --- bytes ---

// Half of the bytes, by a call that does not move the offset; never a direct one, which takes whole pages only.
static void tear(int fd, int64_t offset, const struct iovec *data, int pieces, const char *path) {
    size_t whole = 0;
    for (int i = 0; i < pieces; i++) whole += data[i].iov_len;
    size_t left = whole / 2;
    int flags = fcntl(fd, F_GETFL);
    fcntl(fd, F_SETFL, flags & ~(O_DIRECT | O_APPEND));
    for (int i = 0; left && i < pieces; i++) {
        size_t n = data[i].iov_len < left ? data[i].iov_len : left;
        (void)!REAL(pwrite64)(fd, data[i].iov_base, n, offset);
        offset += n, left -= n;
    }
    die("half", 'W', path);
}

static int64_t place(int fd) { // where a write begins: at the end of a file that is appended to
    struct stat64 stat;
    if (fcntl(fd, F_GETFL) & O_APPEND && !REAL(fstat64)(fd, &stat)) return stat.st_size;
    return REAL(lseek64)(fd, 0, SEEK_CUR);
}

// What a call moves that moves half: whole pages where it is a direct one, and all of what cannot be halved.
static size_t halved(int fd, size_t whole) {
    size_t unit = fcntl(fd, F_GETFL) & O_DIRECT ? 4096 : 1, half = whole / 2 / unit * unit;
    return half ? half : whole;
}

static ssize_t write_half(int fd, const struct iovec *data, int pieces, int64_t offset) {
    size_t whole = 0;
    for (int i = 0; i < pieces; i++) whole += data[i].iov_len;
    struct iovec some[pieces > 0 ? pieces : 1];
    int n = 0;
    for (size_t left = halved(fd, whole); left && n < pieces; left -= some[n++].iov_len) {
        some[n] = data[n];
        if (some[n].iov_len > left) some[n].iov_len = left;
    }
    return offset < 0 ? REAL(writev)(fd, some, n) : REAL(pwritev64)(fd, some, n, offset);
}

// `offset` < 0: at the file's own. `piece` holds what the caller wrote, cut to what was taken.
#define WRITE(fd, vector, pieces, given, call)                                                                                   \
    char path[PATH_MAX];                                                                                                         \
    if (!of_fd(fd, path)) return call;                                                                                           \
    int wrong = begin('W', path);                                                                                                \
    int64_t offset = (given) < 0 ? place(fd) : (given);                                                                          \
    if (wrong == TORN) tear(fd, offset, vector, pieces, path);                                                                   \
    ssize_t result = wrong > 0 ? (errno = wrong, -1) : wrong == HALVED ? write_half(fd, vector, pieces, given) : call;           \
    struct iovec taken[pieces > 0 ? pieces : 1];                                                                                 \
    size_t left = result < 0 ? 0 : result;                                                                                       \
    for (int i = 0; i < pieces; i++) {                                                                                           \
        taken[i] = (vector)[i];                                                                                                  \
        taken[i].iov_len = taken[i].iov_len < left ? taken[i].iov_len : left;                                                    \
        left -= taken[i].iov_len;                                                                                                \
    }                                                                                                                            \
    done('W', result >= 0, path, "", offset, taken, pieces);                                                                     \
    return result

#define WRITE_ONE(given, call)                                                                                                   \
    struct iovec all = {(void *)b, n};                                                                                           \
    WRITE(fd, &all, 1, given, call)

ssize_t write(int fd, const void *b, size_t n) { WRITE_ONE(-1, REAL(write)(fd, b, n)); }
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) { WRITE_ONE(o, REAL(pwrite)(fd, b, n, o)); }
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) { WRITE_ONE(o, REAL(pwrite64)(fd, b, n, o)); }
ssize_t writev(int fd, const struct iovec *v, int n) { WRITE(fd, v, n, -1, REAL(writev)(fd, v, n)); }
ssize_t pwritev(int fd, const struct iovec *v, int n, off_t o) { WRITE(fd, v, n, o, REAL(pwritev)(fd, v, n, o)); }
ssize_t pwritev64(int fd, const struct iovec *v, int n, off64_t o) { WRITE(fd, v, n, o, REAL(pwritev64)(fd, v, n, o)); }

// Reading is not counted.
static size_t asked(int fd, size_t n) {
    char path[PATH_MAX];
    return fault == SHORT && of_fd(fd, path) ? halved(fd, n) : n;
}

#define READ_PIECES(name, ...)                                                                                                   \
    struct iovec one = {v->iov_base, n == 1 ? asked(fd, v->iov_len) : 0};                                                        \
    return REAL(name)(fd, n == 1 ? &one : v, n, __VA_ARGS__)

ssize_t read(int fd, void *b, size_t n) { return REAL(read)(fd, b, asked(fd, n)); }
ssize_t pread(int fd, void *b, size_t n, off_t o) { return REAL(pread)(fd, b, asked(fd, n), o); }
ssize_t pread64(int fd, void *b, size_t n, off64_t o) { return REAL(pread64)(fd, b, asked(fd, n), o); }
ssize_t preadv(int fd, const struct iovec *v, int n, off_t o) { READ_PIECES(preadv, o); }
ssize_t preadv64(int fd, const struct iovec *v, int n, off64_t o) { READ_PIECES(preadv64, o); }
ssize_t preadv2(int fd, const struct iovec *v, int n, off_t o, int f) { READ_PIECES(preadv2, o, f); }
ssize_t preadv64v2(int fd, const struct iovec *v, int n, off64_t o, int f) { READ_PIECES(preadv64v2, o, f); }

// A C stream gives its bytes to the kernel by calls that are not seen; here it gives them at once.
static size_t put(const void *b, size_t size, size_t n, FILE *f) {
    size_t result = REAL(fwrite)(b, size, n, f);
    return REAL(fflush)(f) ? 0 : result;
}

size_t fwrite(const void *b, size_t size, size_t number, FILE *f) {
    char path[PATH_MAX];
    int fd = fileno(f);
    if (!of_fd(fd, path)) return REAL(fwrite)(b, size, number, f);
    int wrong = begin('W', path);
    struct iovec all = {(void *)b, size * number};
    int64_t offset = place(fd);
    if (wrong == TORN) tear(fd, offset, &all, 1, path);
    size_t result = wrong > 0 ? (errno = wrong, 0) : put(b, size, number, f); // a stream writes on by itself
    all.iov_len = result * size;
    done('W', wrong <= 0, path, "", offset, &all, 1);
    return result;
}

#define ON_FD(kind, number, call)                                                                                                \
    char path[PATH_MAX];                                                                                                         \
    if (!of_fd(fd, path)) return call;                                                                                           \
    int wrong = begin(kind, path);                                                                                               \
    int result = wrong > 0 ? (errno = wrong, -1) : call;                                                                         \
    done(kind, result >= 0, path, "", number, NULL, 0);                                                                          \
    return result

int fsync(int fd) { ON_FD('S', 0, REAL(fsync)(fd)); }
int fdatasync(int fd) { ON_FD('S', 0, REAL(fdatasync)(fd)); }
int ftruncate(int fd, off_t n) { ON_FD('T', n, REAL(ftruncate)(fd, n)); }
int ftruncate64(int fd, off64_t n) { ON_FD('T', n, REAL(ftruncate64)(fd, n)); }

// --- what a log cannot hold ---

#define REFUSED(fd, what, call)                                                                                                  \
    char path[PATH_MAX];                                                                                                         \
    if (of_fd(fd, path)) refuse(what);                                                                                           \
    return call

#define MAPPED(call)                                                                                                             \
    char path[PATH_MAX];                                                                                                         \
    if (root_size && (flags & MAP_SHARED) && (prot & PROT_WRITE) && of_fd(fd, path)) refuse("a shared, writable mapping");       \
    return call

void *mmap(void *a, size_t n, int prot, int flags, int fd, off_t o) { MAPPED(REAL(mmap)(a, n, prot, flags, fd, o)); }
void *mmap64(void *a, size_t n, int prot, int flags, int fd, off64_t o) { MAPPED(REAL(mmap64)(a, n, prot, flags, fd, o)); }
ssize_t sendfile(int fd, int in, off_t *o, size_t n) { REFUSED(fd, "sendfile", REAL(sendfile)(fd, in, o, n)); }
ssize_t sendfile64(int fd, int in, off64_t *o, size_t n) { REFUSED(fd, "sendfile", REAL(sendfile64)(fd, in, o, n)); }
int fallocate(int fd, int m, off_t o, off_t n) { REFUSED(fd, "fallocate", REAL(fallocate)(fd, m, o, n)); }
int posix_fallocate(int fd, off_t o, off_t n) { REFUSED(fd, "posix_fallocate", REAL(posix_fallocate)(fd, o, n)); }
ssize_t copy_file_range(int in, off64_t *i, int fd, off64_t *o, size_t n, unsigned f) {
    REFUSED(fd, "copy_file_range", REAL(copy_file_range)(in, i, fd, o, n, f));
}
