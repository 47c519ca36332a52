// The operations that scripts/bench.sh times, as plain system calls: the same for every file system, and with no
// interpreter between them. Each prints one number: seconds by the monotonic clock.
//   work create DIR N SIZE   N new files of SIZE bytes: open, write, close
//   work write FILE BYTES    1 MiB writes, then fsync
//   work read FILE           1 MiB reads to the end
//   work random FILE N       N reads of 4 KiB at random places
//   work walk DIR            lstat of everything below
#define _GNU_SOURCE
#include <fcntl.h>
#include <ftw.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MIB (1u << 20)

static uint64_t state = 0x9E3779B97F4A7C15u;

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
static void fill(unsigned char *buffer, size_t size) {
    for (size_t i = 0; i + 8 <= size; i += 8) {
        uint64_t word = next();
        memcpy(buffer + i, &word, 8);
    }
}

static void create(const char *dir, long count, size_t size, unsigned char *buffer) {
    char path[4096];
    for (long i = 0; i < count; i++) {
        snprintf(path, sizeof path, "%s/file-%07ld", dir, i);
        int fd = open(path, O_CREAT | O_EXCL | O_WRONLY, 0644);
        if (fd < 0 || write(fd, buffer + i % 4096, size) != (ssize_t)size || close(fd) != 0) die(path);
    }
}

static void write_file(const char *path, long long bytes, unsigned char *buffer) {
    int fd = open(path, O_CREAT | O_TRUNC | O_WRONLY, 0644);
    if (fd < 0) die(path);
    for (long long done = 0; done < bytes; done += MIB) {
        memcpy(buffer, &done, sizeof done); // no two blocks are the same
        if (write(fd, buffer, MIB) != MIB) die(path);
    }
    if (fsync(fd) != 0 || close(fd) != 0) die(path);
}

static void read_file(const char *path, unsigned char *buffer) {
    int fd = open(path, O_RDONLY);
    ssize_t n;
    if (fd < 0) die(path);
    while ((n = read(fd, buffer, MIB)) > 0) {
    }
    if (n < 0) die(path);
}

static void read_random(const char *path, long count, unsigned char *buffer) {
    struct stat info;
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &info) != 0) die(path);
    for (long i = 0; i < count; i++) {
        off_t at = (off_t)(next() % (uint64_t)(info.st_size / 4096)) * 4096;
        if (pread(fd, buffer, 4096, at) != 4096) die(path);
    }
}

static int visit(const char *path, const struct stat *info, int kind, struct FTW *where) {
    (void)path, (void)info, (void)where;
    return kind == FTW_NS || kind == FTW_DNR;
}

int main(int count, char **words) {
    static unsigned char buffer[2 * MIB];
    const char *what = count > 2 ? words[1] : "";
    long number = count > 3 ? atol(words[3]) : 0;
    fill(buffer, sizeof buffer);
    double begin = now();
    if (!strcmp(what, "create") && count == 5) create(words[2], number, (size_t)atol(words[4]), buffer);
    else if (!strcmp(what, "write") && count == 4) write_file(words[2], atoll(words[3]), buffer);
    else if (!strcmp(what, "read") && count == 3) read_file(words[2], buffer);
    else if (!strcmp(what, "random") && count == 4) read_random(words[2], number, buffer);
    else if (!strcmp(what, "walk") && count == 3) {
        if (nftw(words[2], visit, 64, FTW_PHYS) != 0) die(words[2]);
    } else {
        fprintf(stderr, "usage: work create DIR N SIZE | write FILE BYTES | read FILE | random FILE N | walk DIR\n");
        return 2;
    }
    printf("%.6f\n", now() - begin);
    return 0;
}
