// The operations that scripts/bench.sh times, as plain system calls: the same for every file system, and with no
// interpreter between them. Each prints two numbers: seconds by the monotonic clock, and how many operations were done.
// With a LIMIT it ends after so many seconds, whatever is left to do: a slow file system must not hold up the run.
//   work create DIR N SIZE                     N new files of SIZE bytes: open, write, close
//   work make DIR N SIZE THREADS FSYNC LIMIT   the same by threads, each in a directory DIR/0..; FSYNC: 0 or 1
//   work write FILE BYTES                      1 MiB writes, then fsync
//   work read FILE                             1 MiB reads to the end
//   work random FILE N [LIMIT]                 N reads of 4 KiB at random places
//   work overwrite FILE N LIMIT                N writes of 8 KiB at random places, fdatasync after each 16
//   work append FILE N SIZE LIMIT              N times: SIZE bytes at the end, fdatasync
//   work copy FROM TO BYTES                    copy_file_range, by read and write where there is none, then fsync
//   work walk DIR                              lstat of everything below
//   work files DIR                             the content of every file below
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MIB (1u << 20)
#define THREADS_MAX 256

static unsigned char buffer[2 * MIB];
static uint64_t state = 0x9E3779B97F4A7C15u;
static double deadline = 1e18;

static uint64_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

// Random, so that no file system gains by compressing it.
static void fill(void) {
    for (size_t i = 0; i + 8 <= sizeof buffer; i += 8) {
        uint64_t word = next();
        memcpy(buffer + i, &word, 8);
    }
}

static long create(const char *dir, long count, size_t size, int sync) {
    char path[4096];
    long i;
    for (i = 0; i < count && now() < deadline; i++) {
        snprintf(path, sizeof path, "%s/file-%07ld", dir, i);
        int fd = open(path, O_CREAT | O_EXCL | O_WRONLY, 0644);
        if (fd < 0 || write(fd, buffer + i % 4096, size) != (ssize_t)size) die(path);
        if ((sync && fsync(fd) != 0) || close(fd) != 0) die(path);
    }
    return i;
}

struct job {
    pthread_t thread;
    char dir[4096];
    long count;
    size_t size;
    int sync;
};

static void *create_some(void *words) {
    struct job *job = words;
    job->count = create(job->dir, job->count, job->size, job->sync);
    return NULL;
}

static long make(const char *dir, long count, size_t size, int threads, int sync) {
    static struct job jobs[THREADS_MAX];
    long done = 0;
    if (threads < 1 || threads > THREADS_MAX) die("threads");
    for (int i = 0; i < threads; i++) {
        jobs[i].count = count / threads, jobs[i].size = size, jobs[i].sync = sync;
        snprintf(jobs[i].dir, sizeof jobs[i].dir, "%s/%d", dir, i);
        if (mkdir(jobs[i].dir, 0755) != 0) die(jobs[i].dir);
    }
    for (int i = 0; i < threads; i++) {
        if (pthread_create(&jobs[i].thread, NULL, create_some, &jobs[i]) != 0) die("pthread_create");
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(jobs[i].thread, NULL);
        done += jobs[i].count;
    }
    return done;
}

static long write_file(const char *path, long long bytes) {
    int fd = open(path, O_CREAT | O_TRUNC | O_WRONLY, 0644);
    if (fd < 0) die(path);
    for (long long done = 0; done < bytes; done += MIB) {
        memcpy(buffer, &done, sizeof done); // no two blocks are the same
        if (write(fd, buffer, MIB) != MIB) die(path);
    }
    if (fsync(fd) != 0 || close(fd) != 0) die(path);
    return (long)(bytes / MIB);
}

static long read_file(const char *path) {
    int fd = open(path, O_RDONLY);
    ssize_t n;
    long done = 0;
    if (fd < 0) die(path);
    while ((n = read(fd, buffer, MIB)) > 0) done++;
    if (n < 0 || close(fd) != 0) die(path);
    return done;
}

static off_t random_place(off_t size, off_t unit) { return (off_t)(next() % (uint64_t)(size / unit)) * unit; }

static long read_random(const char *path, long count) {
    struct stat info;
    int fd = open(path, O_RDONLY);
    long i;
    if (fd < 0 || fstat(fd, &info) != 0) die(path);
    for (i = 0; i < count && now() < deadline; i++) {
        if (pread(fd, buffer, 4096, random_place(info.st_size, 4096)) != 4096) die(path);
    }
    return i;
}

static long overwrite(const char *path, long count) {
    struct stat info;
    int fd = open(path, O_WRONLY);
    long i;
    if (fd < 0 || fstat(fd, &info) != 0) die(path);
    for (i = 0; i < count && now() < deadline; i++) {
        memcpy(buffer, &i, sizeof i);
        if (pwrite(fd, buffer + 8 * (i % 64), 8192, random_place(info.st_size, 8192)) != 8192) die(path);
        if (i % 16 == 15 && fdatasync(fd) != 0) die(path);
    }
    if (fdatasync(fd) != 0 || close(fd) != 0) die(path);
    return i;
}

static long append(const char *path, long count, size_t size) {
    int fd = open(path, O_CREAT | O_APPEND | O_WRONLY, 0644);
    long i;
    if (fd < 0) die(path);
    for (i = 0; i < count && now() < deadline; i++) {
        if (write(fd, buffer + i % 4096, size) != (ssize_t)size || fdatasync(fd) != 0) die(path);
    }
    if (close(fd) != 0) die(path);
    return i;
}

static long copy(const char *from, const char *to, long long bytes) {
    int in = open(from, O_RDONLY), out = open(to, O_CREAT | O_TRUNC | O_WRONLY, 0644), plain = 0;
    if (in < 0 || out < 0) die(to);
    for (long long left = bytes; left > 0;) {
        ssize_t n = plain ? read(in, buffer, MIB) : copy_file_range(in, NULL, out, NULL, (size_t)left, 0);
        if (n < 0 && !plain && (errno == ENOSYS || errno == EOPNOTSUPP || errno == EXDEV || errno == EINVAL)) {
            plain = 1;
            continue;
        }
        if (n <= 0 || (plain && write(out, buffer, (size_t)n) != n)) die(to);
        left -= n;
    }
    if (fsync(out) != 0 || close(out) != 0 || close(in) != 0) die(to);
    return (long)(bytes / MIB);
}

static long visited;

static int look(const char *path, const struct stat *info, int kind, struct FTW *where) {
    (void)path, (void)info, (void)where;
    visited++;
    return kind == FTW_NS || kind == FTW_DNR;
}

static int open_and_read(const char *path, const struct stat *info, int kind, struct FTW *where) {
    (void)where;
    if (kind == FTW_F && S_ISREG(info->st_mode)) {
        read_file(path);
        visited++;
    }
    return kind == FTW_NS || kind == FTW_DNR;
}

static long walk(const char *dir, __nftw_func_t visit) {
    if (nftw(dir, visit, 64, FTW_PHYS) != 0) die(dir);
    return visited;
}

static long work(const char *what, char **words, int count) {
    const char *path = count > 0 ? words[0] : "";
    long number = count > 1 ? atol(words[1]) : 0, second = count > 2 ? atol(words[2]) : 0;
    if (!strcmp(what, "create") && count == 3) return create(path, number, (size_t)second, 0);
    if (!strcmp(what, "make") && count == 6) {
        deadline = now() + atof(words[5]);
        return make(path, number, (size_t)second, atoi(words[3]), atoi(words[4]));
    }
    if (!strcmp(what, "write") && count == 2) return write_file(path, atoll(words[1]));
    if (!strcmp(what, "read") && count == 1) return read_file(path);
    if (!strcmp(what, "random") && (count == 2 || count == 3)) {
        if (count == 3) deadline = now() + atof(words[2]);
        return read_random(path, number);
    }
    if (!strcmp(what, "overwrite") && count == 3) {
        deadline = now() + atof(words[2]);
        return overwrite(path, number);
    }
    if (!strcmp(what, "append") && count == 4) {
        deadline = now() + atof(words[3]);
        return append(path, number, (size_t)second);
    }
    if (!strcmp(what, "copy") && count == 3) return copy(path, words[1], atoll(words[2]));
    if (!strcmp(what, "walk") && count == 1) return walk(path, look);
    if (!strcmp(what, "files") && count == 1) return walk(path, open_and_read);
    fprintf(stderr, "usage: see the head of work.c\n");
    exit(2);
}

int main(int count, char **words) {
    fill();
    double begin = now();
    long done = work(count > 1 ? words[1] : "", words + 2, count - 2);
    printf("%.6f %ld\n", now() - begin, done);
    return 0;
}
