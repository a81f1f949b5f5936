/* Preloaded into a process and all that it starts: what would leave this machine is written down
   in the file $NETWORK_LOG, a line for each, and refused. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void write_down(const char *call, const char *what) {
    const char *path = getenv("NETWORK_LOG");
    int file = path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666) : -1;
    char line[512];
    int length = snprintf(line, sizeof line, "%s %s by %s\n", call, what, program_invocation_name);
    if (file < 0) return;
    if (write(file, line, length < (int)sizeof line ? length : (int)sizeof line) < 0) abort();
    close(file);
}

/* Whether an address is of this machine; its text is left in `text`. */
static int is_here(const struct sockaddr *address, char *text, size_t size) {
    const void *bytes;
    size_t length;
    if (address->sa_family == AF_INET) {
        bytes = &((const struct sockaddr_in *)address)->sin_addr, length = 4;
        if ((ntohl(*(const uint32_t *)bytes) >> 24) == 127 || !*(const uint32_t *)bytes) return 1;
    } else if (address->sa_family == AF_INET6) {
        const struct in6_addr *six = &((const struct sockaddr_in6 *)address)->sin6_addr;
        bytes = six, length = 16;
        if (IN6_IS_ADDR_LOOPBACK(six) || IN6_IS_ADDR_UNSPECIFIED(six)) return 1;
        if (IN6_IS_ADDR_V4MAPPED(six) && six->s6_addr[12] == 127) return 1;
    } else {
        return 1;
    }
    inet_ntop(address->sa_family, bytes, text, size);
    struct ifaddrs *all = NULL;
    int here = 0;
    if (getifaddrs(&all)) return 0;
    for (struct ifaddrs *one = all; one && !here; one = one->ifa_next) {
        if (!one->ifa_addr || one->ifa_addr->sa_family != address->sa_family) continue;
        const void *own = length == 4
            ? (const void *)&((struct sockaddr_in *)one->ifa_addr)->sin_addr
            : (const void *)&((struct sockaddr_in6 *)one->ifa_addr)->sin6_addr;
        here = !memcmp(own, bytes, length);
    }
    freeifaddrs(all);
    return here;
}

/* A name of this machine, or an address, which needs no look-up. */
static int is_own_name(const char *name) {
    char host[256] = "", bytes[16];
    if (!name || !*name || !strcmp(name, "localhost")) return 1;
    gethostname(host, sizeof host - 1);
    return !strcmp(name, host) || inet_pton(AF_INET, name, bytes) == 1 ||
           inet_pton(AF_INET6, name, bytes) == 1;
}

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **) =
        dlsym(RTLD_NEXT, "getaddrinfo");
    if (is_own_name(name)) return real(name, service, hints, found);
    write_down("getaddrinfo", name);
    return EAI_FAIL;
}

struct hostent *gethostbyname(const char *name) {
    struct hostent *(*real)(const char *) = dlsym(RTLD_NEXT, "gethostbyname");
    if (is_own_name(name)) return real(name);
    write_down("gethostbyname", name);
    h_errno = NO_RECOVERY;
    return NULL;
}

int gethostbyname_r(const char *name, struct hostent *host, char *buffer, size_t size,
                    struct hostent **found, int *error) {
    int (*real)(const char *, struct hostent *, char *, size_t, struct hostent **, int *) =
        dlsym(RTLD_NEXT, "gethostbyname_r");
    if (is_own_name(name)) return real(name, host, buffer, size, found, error);
    write_down("gethostbyname_r", name);
    *found = NULL;
    *error = NO_RECOVERY;
    return ENOENT;
}

/* A socket of datagrams that is given an address has sent nothing yet: programs do so to learn their
   own. Ray does with that of a name server, and without an answer stays on this machine. */
int connect(int socket, const struct sockaddr *address, socklen_t length) {
    int (*real)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    int kind = 0;
    socklen_t size = sizeof kind;
    char text[64] = "";
    if (is_here(address, text, sizeof text)) return real(socket, address, length);
    getsockopt(socket, SOL_SOCKET, SO_TYPE, &kind, &size);
    if (kind == SOCK_DGRAM && ((const struct sockaddr_in *)address)->sin_port != htons(53))
        return real(socket, address, length);
    if (kind == SOCK_DGRAM) {
        errno = ENETUNREACH;
        return -1;
    }
    write_down("connect", text);
    errno = ENETUNREACH;
    return -1;
}

ssize_t sendto(int socket, const void *data, size_t size, int flags, const struct sockaddr *address,
               socklen_t length) {
    ssize_t (*real)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) =
        dlsym(RTLD_NEXT, "sendto");
    char text[64] = "";
    if (!address || is_here(address, text, sizeof text))
        return real(socket, data, size, flags, address, length);
    write_down("sendto", text);
    errno = ENETUNREACH;
    return -1;
}
