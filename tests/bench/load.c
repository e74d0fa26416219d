/* The client side of the benchmark: one thread, epoll.
 *
 *     load json|stream PORT CONNECTIONS SECONDS BODY
 *
 * json: requests back to back on each connection; what counts is an answer, its delay is that of the whole request.
 * stream: one stream on each connection; what counts is an event, its delay is from the mock's making it ("~T" and its
 * CLOCK_MONOTONIC) to its reading here.
 * Prints "ready N" once all connections have had a first answer or event (N of them, if not all within 30 s), goes on
 * until a line comes on stdin, counts from there for SECONDS, prints "end" at once and then the figures as JSON.
 * Connections are opened a few at a time, so that none waits for a full accept queue.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { AT_ONCE = 32, DIGITS = 19, MARK = DIGITS + 2, KEPT = 32, EVENTS = 512, ANSWER = 65536 };
static const uint64_t SECOND = 1000000000u, PATIENCE = 30 * SECOND, SETTLING = SECOND / 5;

struct connection {
    int fd;
    bool connecting, ready;
    uint64_t began;
    size_t length; /* of `data`: an answer so far, or the end of what was read of a stream */
    char *data;
};

static int poller;
static struct sockaddr_in server;
static bool streaming;
static char *request;
static size_t request_length;
static struct connection *connections;
static int wanted, opened, ready_count, pending;
static uint64_t *delays;
static size_t delay_count, delay_capacity, errors;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static void note(uint64_t delay) {
    if (delay_count == delay_capacity) {
        delay_capacity = delay_capacity ? delay_capacity * 2 : 1 << 16;
        delays = realloc(delays, delay_capacity * sizeof *delays);
        if (!delays) abort();
    }
    delays[delay_count++] = delay;
}

static void mark_ready(struct connection *c) {
    if (c->ready) return;
    c->ready = true;
    ready_count++;
    pending--;
}

static void send_request(struct connection *c) {
    c->began = now();
    c->length = 0;
    if (send(c->fd, request, request_length, MSG_NOSIGNAL) != (ssize_t)request_length) errors++;
}

static void open_connection(struct connection *c) {
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    int one = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    c->connecting = true;
    if (c->fd < 0 || (connect(c->fd, (struct sockaddr *)&server, sizeof server) && errno != EINPROGRESS)) {
        perror("load: cannot connect");
        exit(1);
    }
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &e);
}

/* A connection that ended: an error, and a fresh one. */
static void reopen(struct connection *c) {
    static int told;
    if (told++ < 3 && c->length) fprintf(stderr, "load: cut after: %.*s\n", (int)(c->length > 300 ? 300 : c->length), c->data);
    errors++;
    close(c->fd);
    open_connection(c);
}

static bool is_ok(const char *data) {
    if (!strncmp(data, "HTTP/1.1 200", 12)) return true;
    static int told;
    if (told++ < 3) fprintf(stderr, "load: answered: %.400s\n", data);
    errors++;
    return false;
}

/* True when `data` holds a whole answer. */
static bool is_whole(const char *data, size_t length) {
    const char *end = memmem(data, length, "\r\n\r\n", 4);
    if (!end) return false;
    const char *field = strcasestr(data, "\ncontent-length:");
    if (field && field < end) return length - (size_t)(end + 4 - data) >= strtoul(field + 16, NULL, 10);
    return length >= 5 && !memcmp(data + length - 5, "0\r\n\r\n", 5);
}

static void read_answer(struct connection *c) {
    ssize_t got = recv(c->fd, c->data + c->length, ANSWER - c->length - 1, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        reopen(c);
        return;
    }
    c->length += (size_t)got;
    c->data[c->length] = 0;
    if (!is_whole(c->data, c->length)) return;
    if (is_ok(c->data)) note(now() - c->began);
    mark_ready(c);
    send_request(c);
}

static void read_stream(struct connection *c) {
    static char data[KEPT + 262144 + 1];
    memcpy(data, c->data, c->length);
    ssize_t got = recv(c->fd, data + c->length, sizeof data - 1 - KEPT, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        reopen(c);
        return;
    }
    uint64_t t = now();
    char *end = data + c->length + got, *from = data;
    *end = 0;
    if (!c->ready && !c->length) is_ok(data);
    for (char *mark; (mark = memchr(from, '~', (size_t)(end - from))) && end - mark >= MARK; from = mark + 1) {
        if (mark[1] != 'T') continue;
        uint64_t made = 0;
        for (int i = 2; i < MARK; i++) made = made * 10 + (uint64_t)(mark[i] - '0');
        note(t > made ? t - made : 0);
        mark_ready(c);
    }
    bool over = end - data >= 5 && !memcmp(end - 5, "0\r\n\r\n", 5);
    /* Kept: less than a whole mark, so that none counts twice. */
    size_t keep = (size_t)(end - data) < MARK - 1 ? (size_t)(end - data) : MARK - 1;
    memcpy(c->data, end - keep, keep);
    c->length = keep;
    if (over) send_request(c);
}

static void handle(struct connection *c, uint32_t events) {
    if (!c->connecting) {
        if (streaming) read_stream(c);
        else read_answer(c);
        return;
    }
    int failure = 0;
    socklen_t size = sizeof failure;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &failure, &size);
    if (failure) {
        fprintf(stderr, "load: cannot connect: %s\n", strerror(failure));
        exit(1);
    }
    if (!(events & EPOLLOUT)) return;
    c->connecting = false;
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &e);
    send_request(c);
}

static void turn(int milliseconds, bool *told) {
    static struct epoll_event events[EVENTS];
    while (opened < wanted && pending < AT_ONCE) {
        pending++;
        open_connection(&connections[opened++]);
    }
    int count = epoll_wait(poller, events, EVENTS, milliseconds);
    for (int i = 0; i < count; i++) {
        if (events[i].data.ptr) handle(events[i].data.ptr, events[i].events);
        else *told = true;
    }
}

static int by_size(const void *left, const void *right) {
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return a < b ? -1 : a > b;
}

static double share(double part) {
    if (!delay_count) return 0;
    size_t i = (size_t)((double)delay_count * part);
    return (double)delays[i < delay_count ? i : delay_count - 1] / 1000.0;
}

static void prepare(char **argv) {
    streaming = !strcmp(argv[1], "stream");
    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[2]))};
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    wanted = atoi(argv[3]);
    const char *before = *argv[6] ? "Authorization: Bearer " : "", *after = *argv[6] ? "\r\n" : "";
    request_length = (size_t)asprintf(&request,
                                      "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%s\r\nUser-Agent: load\r\n"
                                      "Accept: */*\r\n%s%s%sContent-Type: application/json\r\n"
                                      "Content-Length: %zu\r\n\r\n%s",
                                      argv[2], before, argv[6], after, strlen(argv[5]), argv[5]);
    connections = calloc((size_t)wanted, sizeof *connections);
    for (int i = 0; i < wanted; i++) connections[i].data = malloc(streaming ? KEPT : ANSWER);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    poller = epoll_create1(0);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(poller, EPOLL_CTL_ADD, STDIN_FILENO, &e);
}

int main(int argc, char **argv) {
    if (argc != 7) {
        fprintf(stderr, "usage: load json|stream PORT CONNECTIONS SECONDS BODY KEY\n");
        return 2;
    }
    prepare(argv);
    bool told = false;
    uint64_t begin = now();
    while (ready_count < wanted && now() - begin < PATIENCE) turn(100, &told);
    for (begin = now(); now() - begin < SETTLING;) turn(20, &told);
    printf("ready %d\n", ready_count);
    fflush(stdout);
    while (!told) turn(100, &told);
    epoll_ctl(poller, EPOLL_CTL_DEL, STDIN_FILENO, NULL);
    begin = now();
    uint64_t end = begin + (uint64_t)(atof(argv[4]) * 1e9), t = begin;
    delay_count = errors = 0;
    for (; t < end; t = now()) turn((int)((end - t) / 1000000u) + 1, &told);
    printf("end\n");
    fflush(stdout);
    qsort(delays, delay_count, sizeof *delays, by_size);
    printf("{\"connections\":%d,\"seconds\":%.4f,\"count\":%zu,\"errors\":%zu,\"p50_us\":%.1f,\"p99_us\":%.1f,\"max_us\":%.1f}\n",
           ready_count, (double)(t - begin) / 1e9, delay_count, errors, share(0.5), share(0.99), share(1.0));
    return 0;
}
