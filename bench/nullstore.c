/* An S3 server that stores nothing: a PUT is read and dropped, a GET is so many bytes of one buffer by sendfile, anything else is
   an empty answer. It costs next to nothing, so that what is measured through it is the client. One thread a connection. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <unistd.h>

#define OBJECT (64L << 20)
static int object_fd;

static int say(int fd, const char *text) { return send(fd, text, strlen(text), MSG_NOSIGNAL | MSG_MORE) < 0; }

static const char *header(const char *head, const char *name) {
    for (const char *line = head; (line = strstr(line, "\r\n")); ) {
        line += 2;
        if (!strncasecmp(line, name, strlen(name))) return line + strlen(name);
    }
    return NULL;
}

static int get(int fd, const char *head) {
    long first = 0, last = OBJECT - 1;
    const char *range = header(head, "range: bytes=");
    if (range) sscanf(range, "%ld-%ld", &first, &last);
    char text[256];
    sprintf(text, "HTTP/1.1 %s\r\nETag: \"0\"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
            "Content-Range: bytes %ld-%ld/%ld\r\nContent-Length: %ld\r\n\r\n",
            range ? "206 Partial Content" : "200 OK", first, last, OBJECT, last - first + 1);
    if (say(fd, text)) return 1;
    for (off_t at = first; at <= last;)
        if (sendfile(fd, object_fd, &at, last + 1 - at) <= 0) return 1;
    return 0;
}

static int put(int fd, const char *head, long had, char *dropped) {
    const char *length = header(head, "content-length: ");
    for (long left = (length ? atol(length) : 0) - had; left > 0;) {
        long n = recv(fd, dropped, left < 1 << 20 ? left : 1 << 20, 0);
        if (n <= 0) return 1;
        left -= n;
    }
    return send(fd, "HTTP/1.1 200 OK\r\nETag: \"0\"\r\nContent-Length: 0\r\n\r\n", 49, MSG_NOSIGNAL) < 0;
}

static void *connection(void *arg) {
    int fd = (int)(long)arg, had = 0;
    char head[16384], *dropped = malloc(1 << 20), *end;
    for (int done = 0; !done;) {
        while (head[had] = 0, !(end = strstr(head, "\r\n\r\n"))) {
            long n = recv(fd, head + had, sizeof head - 1 - had, 0); /* 0 as well where the head is full */
            if (n <= 0) goto out;
            had += n;
        }
        end[2] = 0; /* headers end here; what follows is body */
        long body = head + had - (end + 4);
        done = !strncmp(head, "GET", 3) ? get(fd, head) : put(fd, head, body, dropped);
        had = 0; /* these clients send nothing before they have their answer */
    }
out:
    free(dropped);
    close(fd);
    return NULL;
}

void serve(int listening) {
    object_fd = memfd_create("object", 0);
    if (ftruncate(object_fd, OBJECT)) return;
    memset(mmap(NULL, OBJECT, PROT_WRITE, MAP_SHARED, object_fd, 0), 7, OBJECT);
    for (int fd; (fd = accept(listening, NULL, NULL)) >= 0;) {
        pthread_t thread;
        pthread_create(&thread, NULL, connection, (void *)(long)fd);
        pthread_detach(thread);
    }
}
