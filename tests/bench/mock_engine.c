/* A mock of `vllm serve` that costs next to nothing: one thread, epoll, nothing computed.
 *
 *     mock_engine MODEL --port=N --served-model-name NAME... [any other option, ignored]
 *
 * GET /health, GET /v1/models, GET /stats; every POST is answered with a completion of about 480 bytes, or, where the
 * body holds "stream": true, with server-sent events of about 200 bytes, each in a chunk and a write of its own.
 * A body may hold the text "~bench n=N us=U wait=W" anywhere in its first 64 KiB (a field that is free text passes
 * every proxy): N events, U microseconds apart (0: as fast as the reader takes them), the answer's first byte W
 * microseconds late. Each event carries the CLOCK_MONOTONIC of its making: "~T" and 19 digits, nanoseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
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

enum { KEPT_BODY = 65536, BACKLOG_BYTES = 1 << 20, DIGITS = 19, BURST = 64, EVENTS = 512 };
enum state { HEAD, BODY, CHUNKED, WAITING, STREAMING };
enum part { SIZE, EXTENSION, DATA, DATA_END, TRAILER };

struct buffer {
    char *data;
    size_t length, capacity;
};

struct connection {
    int fd;
    enum state state;
    unsigned generation; /* timers of an earlier request or connection are void */
    bool open, keep_alive, wants_out, streams, ending;
    struct buffer in, body, out;
    size_t sent;      /* of `out` */
    size_t body_left; /* of the body, or of a chunk of it */
    enum part part;
    bool trailer_line;
    char path[128];
    bool get;
    long events_left;
    uint64_t interval, wait; /* nanoseconds */
    struct connection *next_free;
};

struct timer {
    uint64_t due;
    struct connection *connection;
    unsigned generation;
};

static int poller;
static struct timer *timers;
static size_t timer_count, timer_capacity;
static struct connection *free_connections;
static char event_text[1024], models_text[4096], completion_text[1024];
static int event_length, event_stamp, models_length, completion_length;
static struct {
    uint64_t open, requests, streams, aborts, last_abort, sent, body_bytes;
} stats;

static void process_input(struct connection *c);

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void append(struct buffer *b, const char *data, size_t length) {
    if (b->length + length + 1 > b->capacity) {
        b->capacity = (b->length + length + 1) * 2;
        b->data = realloc(b->data, b->capacity);
        if (!b->data) abort();
    }
    memcpy(b->data + b->length, data, length);
    b->length += length;
    b->data[b->length] = 0;
}

static void set_timer(uint64_t due, struct connection *c) {
    if (timer_count == timer_capacity) {
        timer_capacity = timer_capacity ? timer_capacity * 2 : 1024;
        timers = realloc(timers, timer_capacity * sizeof *timers);
        if (!timers) abort();
    }
    size_t i = timer_count++;
    for (; i && timers[(i - 1) / 2].due > due; i = (i - 1) / 2) timers[i] = timers[(i - 1) / 2];
    timers[i] = (struct timer){due, c, c->generation};
}

static struct timer pop_timer(void) {
    struct timer first = timers[0], last = timers[--timer_count];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < timer_count; i = child) {
        if (child + 1 < timer_count && timers[child + 1].due < timers[child].due) child++;
        if (timers[child].due >= last.due) break;
        timers[i] = timers[child];
    }
    timers[i] = last;
    return first;
}

static void close_connection(struct connection *c) {
    if (c->state == WAITING || c->state == STREAMING) {
        stats.aborts++;
        stats.last_abort = now();
    }
    if (c->state == STREAMING) stats.streams--;
    stats.open--;
    close(c->fd);
    c->open = false;
    c->generation++;
    c->next_free = free_connections;
    free_connections = c;
}

static void watch(struct connection *c, bool out) {
    if (c->wants_out == out) return;
    c->wants_out = out;
    struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP | (out ? EPOLLOUT : 0u), .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &e);
}

/* True when all of `out` is sent; false when the peer takes no more now, or is gone. */
static bool flush(struct connection *c) {
    while (c->sent < c->out.length) {
        ssize_t sent = send(c->fd, c->out.data + c->sent, c->out.length - c->sent, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EAGAIN) watch(c, true);
            else close_connection(c);
            return false;
        }
        c->sent += (size_t)sent;
        stats.sent += (uint64_t)sent;
    }
    c->out.length = c->sent = 0;
    watch(c, false);
    return true;
}

static void next_request(struct connection *c) {
    if (c->state == STREAMING) stats.streams--;
    c->state = HEAD;
    c->generation++;
    c->ending = c->streams = false;
    c->body.length = 0;
    if (!c->keep_alive) close_connection(c);
}

static void answer(struct connection *c, const char *kind, const char *body, int length) {
    char head[256];
    int used = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: %s\r\ncontent-length: %d\r\n%s\r\n",
                        kind, length, c->keep_alive ? "" : "connection: close\r\n");
    append(&c->out, head, (size_t)used);
    append(&c->out, body, (size_t)length);
    c->ending = true;
    if (flush(c)) next_request(c);
}

static void put_event(struct connection *c) {
    append(&c->out, event_text, (size_t)event_length);
    char *digit = c->out.data + c->out.length - event_length + event_stamp + DIGITS;
    uint64_t t = now();
    for (int i = 0; i < DIGITS; i++, t /= 10) *--digit = (char)('0' + t % 10);
    if (--c->events_left == 0) {
        append(&c->out, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n", 24);
        c->ending = true;
    }
}

static void unpaced(struct connection *c) {
    for (int i = 0; i < BURST; i++) {
        if (!c->ending) put_event(c);
        if (!flush(c)) return;
        if (c->ending) {
            next_request(c);
            return;
        }
    }
    set_timer(now(), c);
}

static void paced(struct connection *c, uint64_t due) {
    if (c->out.length - c->sent < BACKLOG_BYTES) put_event(c);
    bool ending = c->ending;
    unsigned generation = c->generation;
    bool sent = flush(c);
    if (c->generation != generation) return;
    if (ending) {
        if (sent) next_request(c);
        return;
    }
    uint64_t next = due + c->interval, t = now();
    set_timer(next < t ? t : next, c);
}

static void respond(struct connection *c, uint64_t due) {
    stats.requests++;
    if (!c->streams) {
        c->state = HEAD;
        answer(c, "application/json", completion_text, completion_length);
        return;
    }
    static const char head[] = "HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                               "transfer-encoding: chunked\r\n\r\n";
    append(&c->out, head, sizeof head - 1);
    c->state = STREAMING;
    stats.streams++;
    if (c->interval) paced(c, due);
    else unpaced(c);
}

static void tick(struct connection *c, uint64_t due) {
    if (c->state == WAITING) respond(c, due);
    else if (c->state == STREAMING && c->interval) paced(c, due);
    else if (c->state == STREAMING && !c->wants_out) unpaced(c);
    if (c->open && c->state == HEAD && c->in.length) process_input(c);
}

static bool asks_for_stream(const char *body) {
    const char *p = strstr(body, "\"stream\"");
    if (!p) return false;
    p += strlen("\"stream\"");
    p += strspn(p, " \t\r\n:");
    return !strncmp(p, "true", 4);
}

static void route(struct connection *c) {
    if (c->get) {
        c->state = HEAD;
        if (!strcmp(c->path, "/health")) answer(c, "text/plain", "", 0);
        else if (!strcmp(c->path, "/v1/models")) answer(c, "application/json", models_text, models_length);
        else if (!strcmp(c->path, "/stats")) {
            char text[512];
            int length = snprintf(text, sizeof text,
                                  "{\"open\":%lu,\"requests\":%lu,\"streams\":%lu,\"aborts\":%lu,\"last_abort_ns\":%lu,"
                                  "\"sent\":%lu,\"body_bytes\":%lu}",
                                  stats.open, stats.requests, stats.streams, stats.aborts, stats.last_abort, stats.sent,
                                  stats.body_bytes);
            answer(c, "application/json", text, length);
        } else answer(c, "application/json", "{}", 2);
        return;
    }
    const char *body = c->body.length ? c->body.data : "";
    c->streams = asks_for_stream(body);
    long count = 100, interval = 20000, wait = 0;
    const char *p = strstr(body, "~bench ");
    if (p) sscanf(p, "~bench n=%ld us=%ld wait=%ld", &count, &interval, &wait);
    c->events_left = count > 0 ? count : 1;
    c->interval = (uint64_t)interval * 1000u;
    c->state = WAITING;
    if (wait) set_timer(now() + (uint64_t)wait * 1000u, c);
    else respond(c, now());
}

static const char *header(const char *head, const char *end, const char *name) {
    size_t length = strlen(name);
    for (const char *p = head; p < end;) {
        const char *next = memmem(p, (size_t)(end - p), "\r\n", 2);
        if (!next) next = end;
        if ((size_t)(next - p) > length && p[length] == ':' && !strncasecmp(p, name, length)) {
            p += length + 1;
            return p + strspn(p, " \t");
        }
        p = next + 2;
    }
    return NULL;
}

/* Reads a request's head; returns the bytes used, 0 while it is incomplete. */
static size_t read_head(struct connection *c, const char *data, size_t length) {
    const char *end = memmem(data, length, "\r\n\r\n", 4);
    if (!end) return 0;
    const char *space = memchr(data, ' ', (size_t)(end - data));
    const char *line = memmem(data, (size_t)(end + 2 - data), "\r\n", 2);
    if (!space || space > line) {
        close_connection(c);
        return 0;
    }
    size_t path = strcspn(space + 1, " ?");
    if (path >= sizeof c->path) path = sizeof c->path - 1;
    memcpy(c->path, space + 1, path);
    c->path[path] = 0;
    c->get = !strncmp(data, "GET ", 4);
    const char *value = header(line + 2, end, "connection");
    c->keep_alive = line[-1] == '1' && !(value && !strncasecmp(value, "close", 5));
    if (header(line + 2, end, "expect")) {
        static const char go_on[] = "HTTP/1.1 100 Continue\r\n\r\n";
        append(&c->out, go_on, sizeof go_on - 1);
        if (!flush(c)) return 0;
    }
    value = header(line + 2, end, "content-length");
    c->body_left = value ? strtoul(value, NULL, 10) : 0;
    value = header(line + 2, end, "transfer-encoding");
    if (value && !strncasecmp(value, "chunked", 7)) {
        c->state = CHUNKED;
        c->part = SIZE;
        c->body_left = 0;
        c->trailer_line = false;
    } else if (c->body_left) c->state = BODY;
    else route(c);
    return (size_t)(end + 4 - data);
}

static size_t read_body(struct connection *c, const char *data, size_t length) {
    size_t used = length < c->body_left ? length : c->body_left;
    size_t room = KEPT_BODY - c->body.length;
    append(&c->body, data, used < room ? used : room);
    stats.body_bytes += used;
    c->body_left -= used;
    return used;
}

static size_t read_chunked(struct connection *c, const char *data, size_t length) {
    size_t used = 0;
    while (used < length) {
        if (c->part == DATA) {
            used += read_body(c, data + used, length - used);
            if (!c->body_left) c->part = DATA_END;
            continue;
        }
        char byte = data[used++];
        if (c->part == SIZE && byte != '\r' && byte != '\n') {
            if (byte == ';') c->part = EXTENSION;
            else c->body_left = c->body_left * 16 + (size_t)(byte <= '9' ? byte - '0' : (byte | 32) - 'a' + 10);
        } else if (c->part == TRAILER && byte != '\r' && byte != '\n') c->trailer_line = true;
        if (byte != '\n') continue;
        if (c->part == SIZE || c->part == EXTENSION) c->part = c->body_left ? DATA : TRAILER;
        else if (c->part == DATA_END) c->part = SIZE;
        else if (c->trailer_line) c->trailer_line = false;
        else {
            route(c);
            return used;
        }
    }
    return used;
}

static size_t consume(struct connection *c, const char *data, size_t length) {
    size_t used = 0;
    while (c->open && used < length) {
        size_t step = 0;
        if (c->state == HEAD) step = read_head(c, data + used, length - used);
        else if (c->state == CHUNKED) step = read_chunked(c, data + used, length - used);
        else if (c->state == BODY) {
            step = read_body(c, data + used, length - used);
            if (!c->body_left) route(c);
        }
        if (!step) break;
        used += step;
    }
    return used;
}

static void process_input(struct connection *c) {
    size_t used = consume(c, c->in.data, c->in.length);
    if (!c->open) return;
    memmove(c->in.data, c->in.data + used, c->in.length - used);
    c->in.length -= used;
}

static void readable(struct connection *c) {
    static char data[262144];
    for (;;) {
        ssize_t got = recv(c->fd, data, sizeof data, 0);
        if (got < 0 && errno == EAGAIN) return;
        if (got <= 0) {
            close_connection(c);
            return;
        }
        if (c->in.length) {
            append(&c->in, data, (size_t)got);
            process_input(c);
        } else {
            size_t used = consume(c, data, (size_t)got);
            if (c->open && used < (size_t)got) append(&c->in, data + used, (size_t)got - used);
        }
        if (!c->open || (size_t)got < sizeof data) return;
    }
}

static void writable(struct connection *c) {
    if (!flush(c)) return;
    if (c->ending) next_request(c);
    else if (c->state == STREAMING && !c->interval) unpaced(c);
    if (c->open && c->state == HEAD && c->in.length) process_input(c);
}

static void accept_all(int listener) {
    for (int i = 0; i < 256; i++) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), one = 1;
        if (fd < 0) return;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct connection *c = free_connections;
        if (c) free_connections = c->next_free;
        else if (!(c = calloc(1, sizeof *c))) abort();
        c->fd = fd;
        c->open = true;
        c->state = HEAD;
        c->wants_out = c->ending = c->streams = false;
        c->in.length = c->out.length = c->body.length = c->sent = 0;
        stats.open++;
        struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP, .data.ptr = c};
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &e);
    }
}

static void prepare_texts(char **names, int count) {
    char event[512], padding[320];
    int length = snprintf(event, sizeof event,
                          "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
                          "\"model\":\"%.40s\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"~T%0*d some words\"},"
                          "\"finish_reason\":null}]}\n\n",
                          names[0], DIGITS, 0);
    event_length = snprintf(event_text, sizeof event_text, "%x\r\n%s\r\n", length, event);
    event_stamp = (int)(strstr(event_text, "~T") + 2 - event_text);
    memset(padding, 'y', sizeof padding);
    completion_length = snprintf(completion_text, sizeof completion_text,
                                 "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1700000000,"
                                 "\"model\":\"%.40s\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\","
                                 "\"content\":\"%.220s\"},\"logprobs\":null,\"finish_reason\":\"stop\"}],"
                                 "\"usage\":{\"prompt_tokens\":10,\"completion_tokens\":16,\"total_tokens\":26}}",
                                 names[0], padding);
    models_length = snprintf(models_text, sizeof models_text, "{\"object\":\"list\",\"data\":[");
    for (int i = 0; i < count; i++)
        models_length += snprintf(models_text + models_length, sizeof models_text - (size_t)models_length,
                                  "%s{\"id\":\"%.400s\",\"object\":\"model\",\"created\":1,\"owned_by\":\"vllm\","
                                  "\"root\":\"mock\",\"max_model_len\":4096}",
                                  i ? "," : "", names[i]);
    models_length += snprintf(models_text + models_length, sizeof models_text - (size_t)models_length, "]}");
}

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 8192)) {
        perror("mock_engine: cannot listen");
        exit(1);
    }
    return fd;
}

int main(int argc, char **argv) {
    static char *names[8];
    static char fallback[] = "mock";
    int count = 0, port = 0;
    for (int i = 1; i < argc; i++) {
        if (!strncmp(argv[i], "--port=", 7)) port = atoi(argv[i] + 7);
        if (!strcmp(argv[i], "--served-model-name"))
            while (i + 1 < argc && count < 8 && strncmp(argv[i + 1], "--", 2)) names[count++] = argv[++i];
    }
    if (!count) names[count++] = fallback;
    signal(SIGPIPE, SIG_IGN);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prepare_texts(names, count);
    int listener = listen_on(port);
    poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &e);
    static struct epoll_event events[EVENTS];
    for (;;) {
        struct timespec left, *timeout = NULL;
        if (timer_count) {
            uint64_t t = now(), wait = timers[0].due > t ? timers[0].due - t : 0;
            left = (struct timespec){(time_t)(wait / 1000000000u), (long)(wait % 1000000000u)};
            timeout = &left;
        }
        int ready = epoll_pwait2(poller, events, EVENTS, timeout, NULL);
        bool arrivals = false; /* last: a connection closed above must not be reused for the same batch of events */
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c) arrivals = true;
            else {
                if (c->open && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR | EPOLLRDHUP)) readable(c);
                if (c->open && events[i].events & EPOLLOUT) writable(c);
            }
        }
        if (arrivals) accept_all(listener);
        uint64_t t = timer_count ? now() : 0;
        for (int i = 0; i < 4096 && timer_count && timers[0].due <= t; i++) {
            struct timer timer = pop_timer();
            if (timer.generation == timer.connection->generation) tick(timer.connection, timer.due);
        }
    }
}
