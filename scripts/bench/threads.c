// The operations that scripts/bench/link.py and scripts/bench/growth.py time, as plain system calls: many threads at
// once, and names that are known by their numbers, so that nothing has to be listed to find them. Each prints seconds.
//   threads fsync DIR THREADS N SIZE       each thread N new files of SIZE random bytes, each with an fsync
//   threads create DIR N SIZE              N new files: open, write, close
//   threads grow ROOT FROM TO              the empty files number FROM to TO, PER_DIRECTORY in a directory
//   threads lookup|stat ROOT DIRECTORY...  of all files in these: lstat by name; attributes asked anew of names known
//   threads scatter ROOT TOTAL N SEED      lstat of N of the files, drawn from all; their directories are known
//   threads touch ROOT TOTAL N SEED        chmod of the same
//   threads write FILE BYTES               1 MiB writes of random bytes, then fsync
//   threads pattern FILE FROM BYTES        the same from FROM on with bytes of which about a twentieth is random
//   threads overwrite FILE N SEED          N writes of 8 KiB at random places, fdatasync after each 16
//   threads random FILE N SEED             N reads of 4 KiB at random places
//   threads readtree DIR                   reads all files below
//
// Invariant: the same SEED draws the same places; random bytes are new with each call, so that nobody gains by
// comparing or compressing them.
#define _GNU_SOURCE
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
#define PER_DIRECTORY 1000
#define BLOCK 8192

static uint64_t state;
static double begin;
static unsigned char buffer[2 * MIB];

static uint64_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static void seed(uint64_t number) {
    state = (number + 1) * 0x9E3779B97F4A7C15u;
    for (int i = 0; i < 8; i++) next();
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

static void fill(unsigned char *bytes, size_t size) {
    for (size_t i = 0; i + 8 <= size; i += 8) {
        uint64_t word = next();
        memcpy(bytes + i, &word, 8);
    }
}

static void new_file(const char *path, const unsigned char *bytes, size_t size, int durable) {
    int fd = open(path, O_CREAT | O_EXCL | O_WRONLY, 0644);
    if (fd < 0 || write(fd, bytes, size) != (ssize_t)size) die(path);
    if ((durable && fsync(fd) != 0) || close(fd) != 0) die(path);
}

struct maker {
    pthread_t thread;
    const char *dir;
    int number;
    long count;
    size_t size;
};

static void *make(void *given) {
    const struct maker *m = given;
    char path[4096];
    for (long i = 0; i < m->count; i++) {
        snprintf(path, sizeof path, "%s/file-%03d-%06ld", m->dir, m->number, i);
        new_file(path, buffer + (i * 61 + m->number * 509) % (MIB - 64), m->size, 1);
    }
    return NULL;
}

static void make_durable(const char *dir, int threads, long count, size_t size) {
    struct maker *all = calloc((size_t)threads, sizeof *all);
    for (int i = 0; i < threads; i++) {
        all[i] = (struct maker){.dir = dir, .number = i, .count = count, .size = size};
        if (pthread_create(&all[i].thread, NULL, make, &all[i]) != 0) die("thread");
    }
    for (int i = 0; i < threads; i++) pthread_join(all[i].thread, NULL);
    free(all);
}

static void name_dir(char *path, const char *root, long directory) {
    snprintf(path, 4096, "%s/d%06ld", root, directory);
}

static void name_file(char *path, const char *root, long number) {
    snprintf(path, 4096, "%s/d%06ld/file-%04ld", root, number / PER_DIRECTORY, number % PER_DIRECTORY);
}

static void grow(const char *root, long from, long to) {
    char path[4096];
    for (long i = from; i < to; i++) {
        name_dir(path, root, i / PER_DIRECTORY);
        if ((i == from || i % PER_DIRECTORY == 0) && mkdir(path, 0755) != 0 && i % PER_DIRECTORY == 0) die(path);
        name_file(path, root, i);
        // One request less than open and close: it is the volume that has to grow, not the time.
        if (mknod(path, S_IFREG | 0644, 0) != 0) die(path);
    }
}

static void ask(const char *root, long directory, int anew) {
    struct stat info;
    struct statx more;
    char path[4096];
    for (long i = directory * PER_DIRECTORY; i < (directory + 1) * PER_DIRECTORY; i++) {
        name_file(path, root, i);
        int wrong = anew ? statx(AT_FDCWD, path, AT_STATX_FORCE_SYNC | AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS, &more)
                         : lstat(path, &info);
        if (wrong) die(path);
    }
}

static long common(long a, long b) {
    return b ? common(b, a % b) : a;
}

static void scatter(const char *root, long total, long count, int touch) {
    struct stat info;
    char path[4096];
    for (long i = 0; i < total / PER_DIRECTORY; i++) {
        name_dir(path, root, i);
        if (lstat(path, &info) != 0) die(path);
    }
    // None twice: a step that has no divisor in common with the total, about the golden section of it.
    long at = (long)(next() % (uint64_t)total), step = (long)((double)total * 0.618) | 1;
    while (common(total, step) != 1) step += 2;
    begin = now();
    for (long i = 0; i < count; i++, at = (at + step) % total) {
        name_file(path, root, at);
        if (touch ? chmod(path, 0600) : lstat(path, &info)) die(path);
    }
}

static void write_file(const char *path, off_t from, long long bytes, int pattern) {
    int fd = open(path, O_CREAT | O_WRONLY, 0644);
    if (fd < 0) die(path);
    for (long long done = 0; done < bytes; done += MIB) {
        // Each 4 KiB has a beginning of its own: wherever a file system looks whether it shrinks, it finds the same.
        for (size_t at = 0; pattern && at < MIB; at += 4096) fill(buffer + at, 160);
        if (!pattern) fill(buffer, MIB);
        if (pwrite(fd, buffer, MIB, from + done) != MIB) die(path);
    }
    if (fsync(fd) != 0 || close(fd) != 0) die(path);
}

static void anywhere(const char *path, long count, size_t size, int writes) {
    struct stat info;
    int fd = open(path, writes ? O_RDWR : O_RDONLY);
    if (fd < 0 || fstat(fd, &info) != 0) die(path);
    for (long i = 0; i < count; i++) {
        off_t at = (off_t)(next() % ((uint64_t)info.st_size / size) * size);
        const unsigned char *bytes = buffer + next() % MIB;
        ssize_t done = writes ? pwrite(fd, bytes, size, at) : pread(fd, buffer, size, at);
        if (done != (ssize_t)size || (writes && (i + 1) % 16 == 0 && fdatasync(fd) != 0)) die(path);
    }
    if (close(fd) != 0) die(path);
}

static int visit(const char *path, const struct stat *info, int kind, struct FTW *where) {
    (void)info, (void)where;
    if (kind != FTW_F || !S_ISREG(info->st_mode)) return kind == FTW_NS || kind == FTW_DNR;
    int fd = open(path, O_RDONLY);
    ssize_t n;
    if (fd < 0) die(path);
    while ((n = read(fd, buffer, MIB)) > 0) {
    }
    return n < 0 || close(fd) != 0;
}

static int work(const char *what, const char *place, int count, char **words) {
    long number[4] = {0};
    for (int i = 0; i < count && i < 4; i++) number[i] = atol(words[i]);
    if (!strcmp(what, "fsync") && count == 3) make_durable(place, (int)number[0], number[1], (size_t)number[2]);
    else if (!strcmp(what, "create") && count == 2) {
        char path[4096];
        for (long i = 0; i < number[0]; i++) {
            snprintf(path, sizeof path, "%s/file-%07ld", place, i);
            new_file(path, buffer + i * 61 % MIB, (size_t)number[1], 0);
        }
    } else if (!strcmp(what, "grow") && count == 2) grow(place, number[0], number[1]);
    else if ((!strcmp(what, "lookup") || !strcmp(what, "stat")) && count >= 1) {
        for (int i = 0; i < count; i++) ask(place, atol(words[i]), what[0] == 's');
    } else if ((!strcmp(what, "scatter") || !strcmp(what, "touch")) && count == 3) {
        seed((uint64_t)number[2]);
        scatter(place, number[0], number[1], what[0] == 't');
    } else if (!strcmp(what, "write") && count == 1) write_file(place, 0, number[0], 0);
    else if (!strcmp(what, "pattern") && count == 2) {
        memset(buffer, 'x', MIB);
        write_file(place, number[0], number[1], 1);
    } else if ((!strcmp(what, "overwrite") || !strcmp(what, "random")) && count == 2) {
        seed((uint64_t)number[1]);
        anywhere(place, number[0], what[0] == 'o' ? BLOCK : 4096, what[0] == 'o');
    } else if (!strcmp(what, "readtree") && count == 0) {
        if (nftw(place, visit, 64, FTW_PHYS) != 0) die(place);
    } else return 2;
    return 0;
}

int main(int count, char **words) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    seed((uint64_t)t.tv_nsec ^ (uint64_t)t.tv_sec << 30 ^ (uint64_t)getpid() << 12);
    fill(buffer, sizeof buffer);
    begin = now();
    if (count < 3 || work(words[1], words[2], count - 3, words + 3) != 0) {
        fprintf(stderr, "usage: see the head of threads.c\n");
        return 2;
    }
    printf("%.6f\n", now() - begin);
    return 0;
}
