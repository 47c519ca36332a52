// The long link of scripts/bench/link.py: a proxy on loopback that holds bytes back as 35 ms and 1 Gbit/s would, and
// counts what passes. Compiled, because two cores are shared with all that is measured, and because a timer that is
// a millisecond late would be 3 % of the round trip.
//   wire PORT    says its own port, forwards to PORT; then one order per line, each answered by the counts so far:
//     shape MICROSECONDS BYTES    delay each way, and bytes a second each way for all connections (0: no limit)
//     count
//
// Invariant: no byte is delivered before it could have been there: it waits its turn for the bandwidth, then the delay,
// and on a new connection the round trip of the handshake before. (TCP's slow start is left out, for everybody alike.)
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PAIRS 512
#define PIECE (64 << 10)
#define HEAD 16384
// On its way in one direction of one connection: more than delay times bandwidth.
#define QUEUED_MAX (8 << 20)
// How far the queue before the bandwidth may grow, in nanoseconds, as a router's would.
#define AHEAD_MAX 10000000

typedef int64_t ns_t;
enum { UP, DOWN };

struct piece {
    struct piece *next;
    ns_t due;
    size_t len, done;
    char bytes[];
};

struct way {
    int from, to, eof, shut;
    struct piece *first, *last;
    size_t queued;
};

struct pair {
    int used;
    ns_t opened;
    struct way way[2];
    // The requests as they pass: the head that is being gathered, or what is left of a body.
    char head[HEAD];
    size_t head_len;
    uint64_t body_left;
};

static struct pair pairs[PAIRS];
static int top; // all that are used lie below
static ns_t delay, horizon[2];
static double rate;
static uint64_t passed[2], put, got, asked, others, bodies, connections;

static ns_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (ns_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

// A whole head has passed: which request it is, and how long its body.
static void request(struct pair *p) {
    uint64_t length = 0;
    p->head[p->head_len] = 0;
    for (char *line = strstr(p->head, "\r\n"); line; line = strstr(line + 2, "\r\n"))
        if (!strncasecmp(line + 2, "content-length:", 15)) length = strtoull(line + 17, NULL, 10);
    if (!strncmp(p->head, "PUT ", 4)) put++, bodies += length;
    else if (!strncmp(p->head, "GET ", 4)) got++;
    else if (!strncmp(p->head, "HEAD ", 5)) asked++;
    else others++;
    p->head_len = 0;
    p->body_left = length;
}

static void look(struct pair *p, const char *bytes, size_t len) {
    while (len > 0) {
        if (p->body_left > 0) {
            size_t n = len < p->body_left ? len : p->body_left;
            p->body_left -= n, bytes += n, len -= n;
            continue;
        }
        if (p->head_len == HEAD - 1) die("a head that is too long");
        p->head[p->head_len++] = *bytes++, len--;
        if (p->head_len >= 4 && !memcmp(p->head + p->head_len - 4, "\r\n\r\n", 4)) request(p);
    }
}

static void end(struct pair *p) {
    close(p->way[UP].from);
    close(p->way[UP].to);
    for (int d = UP; d <= DOWN; d++)
        for (struct piece *piece = p->way[d].first, *next; piece; piece = next) next = piece->next, free(piece);
    memset(p, 0, sizeof *p);
}

static int has_room(const struct way *w, int direction, ns_t t) {
    return !w->eof && w->queued < QUEUED_MAX && horizon[direction] - t < AHEAD_MAX;
}

// Takes one piece in; 0 when the connection is broken.
static int take(struct pair *p, int direction) {
    struct way *w = &p->way[direction];
    static char buffer[PIECE];
    const int one = 1;
    ssize_t n = recv(w->from, buffer, PIECE, MSG_DONTWAIT);
    if (n < 0) return errno == EAGAIN || errno == EINTR;
    // s3s-fs lets the kernel hold back the second of two small writes (Nagle), such as a body behind its head, until
    // the first is acknowledged, which by default is 40 ms later. Has to be said again after each piece.
    setsockopt(w->from, IPPROTO_TCP, TCP_QUICKACK, &one, sizeof one);
    w->eof = n == 0;
    struct piece *piece = malloc(sizeof *piece + (size_t)n);
    if (!piece) die("memory");
    ns_t t = now();
    if (horizon[direction] < t) horizon[direction] = t;
    if (rate > 0) horizon[direction] += (ns_t)(1e9 * (double)n / rate);
    ns_t soonest = direction == UP ? p->opened + 3 * delay : 0;
    piece->due = horizon[direction] + delay > soonest ? horizon[direction] + delay : soonest;
    piece->next = NULL, piece->len = (size_t)n, piece->done = 0;
    memcpy(piece->bytes, buffer, (size_t)n);
    if (direction == UP) look(p, buffer, (size_t)n);
    passed[direction] += (uint64_t)n;
    w->queued += (size_t)n;
    if (w->last) w->last->next = piece;
    else w->first = piece;
    w->last = piece;
    return 1;
}

// Delivers what is due; 0 when the connection is broken.
static int deliver(struct way *w, ns_t t) {
    while (w->first && w->first->due <= t) {
        struct piece *piece = w->first;
        while (piece->done < piece->len) {
            ssize_t n = send(w->to, piece->bytes + piece->done, piece->len - piece->done, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (n < 0) return errno == EAGAIN || errno == EINTR;
            piece->done += (size_t)n;
        }
        if (piece->len == 0) shutdown(w->to, SHUT_WR), w->shut = 1;
        w->queued -= piece->len;
        w->first = piece->next;
        if (!w->first) w->last = NULL;
        free(piece);
    }
    return 1;
}

static struct sockaddr_in place(int port) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return at;
}

static void welcome(int listener, int target) {
    int one = 1, from = accept(listener, NULL, NULL), to = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = place(target);
    struct pair *p = pairs;
    while (p < pairs + PAIRS && p->used) p++;
    if (from < 0 || to < 0 || p == pairs + PAIRS || connect(to, (struct sockaddr *)&at, sizeof at) != 0) {
        close(from), close(to);
        return;
    }
    setsockopt(from, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(to, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (p - pairs >= top) top = (int)(p - pairs) + 1;
    p->used = 1, p->opened = now(), connections++;
    p->way[UP] = (struct way){.from = from, .to = to};
    p->way[DOWN] = (struct way){.from = to, .to = from};
}

static void obey(void) {
    char line[256];
    long long micros;
    if (!fgets(line, sizeof line, stdin)) exit(0);
    if (sscanf(line, "shape %lld %lf", &micros, &rate) == 2) delay = micros * 1000;
    printf("{\"up\": %lu, \"down\": %lu, \"put\": %lu, \"get\": %lu, \"head\": %lu, \"other\": %lu, "
           "\"bodies\": %lu, \"connections\": %lu}\n",
           passed[UP], passed[DOWN], put, got, asked, others, bodies, connections);
    fflush(stdout);
}

// When `way` has to be looked at again by itself.
static ns_t wake(const struct way *w, int direction, ns_t t, ns_t until) {
    if (w->first && w->first->due > t && w->first->due < until) until = w->first->due;
    ns_t again = horizon[direction] - AHEAD_MAX;
    if (!w->eof && w->queued < QUEUED_MAX && again > t && again < until) until = again;
    return until;
}

// One look at everything: what can be delivered, what can be taken in. Gives until when to sleep.
static ns_t turn(struct pollfd *fds, nfds_t *count) {
    static int begin;
    ns_t t = now(), until = t + 1000000000;
    begin = top ? (begin + 1) % top : 0; // nobody is always the first to get the bandwidth
    *count = 2;
    for (int k = 0; k < top; k++) {
        struct pair *p = &pairs[(begin + k) % top];
        for (int d = UP; p->used && d <= DOWN; d++) {
            if ((has_room(&p->way[d], d, t) && !take(p, d)) || !deliver(&p->way[d], now())) end(p);
        }
        if (p->used && p->way[UP].shut && p->way[DOWN].shut) end(p);
        for (int d = UP; p->used && d <= DOWN; d++) {
            struct way *w = &p->way[d];
            until = wake(w, d, t, until);
            if (has_room(w, d, now())) fds[(*count)++] = (struct pollfd){.fd = w->from, .events = POLLIN};
            if (w->first && w->first->due <= t) fds[(*count)++] = (struct pollfd){.fd = w->to, .events = POLLOUT};
        }
    }
    return until;
}

int main(int count, char **words) {
    static struct pollfd fds[2 + 4 * PAIRS];
    struct sockaddr_in at = place(0);
    socklen_t len = sizeof at;
    int listener = socket(AF_INET, SOCK_STREAM, 0), target = count == 2 ? atoi(words[1]) : 0;
    if (!target) return fprintf(stderr, "usage: wire PORT\n"), 2;
    if (bind(listener, (struct sockaddr *)&at, len) != 0 || listen(listener, 256) != 0) die("listen");
    getsockname(listener, (struct sockaddr *)&at, &len);
    printf("{\"port\": %d}\n", ntohs(at.sin_port));
    fflush(stdout);
    setvbuf(stdin, NULL, _IONBF, 0); // what poll says of it must be all there is
    fds[0] = (struct pollfd){.fd = 0, .events = POLLIN};
    fds[1] = (struct pollfd){.fd = listener, .events = POLLIN};
    for (;;) {
        nfds_t used;
        ns_t sleep = turn(fds, &used) - now();
        if (sleep < 0) sleep = 0;
        struct timespec wait = {.tv_sec = sleep / 1000000000, .tv_nsec = sleep % 1000000000};
        if (ppoll(fds, used, &wait, NULL) < 0 && errno != EINTR) die("poll");
        if (fds[0].revents) obey();
        if (fds[1].revents) welcome(listener, target);
    }
}
