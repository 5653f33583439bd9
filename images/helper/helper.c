/* The resident helper: runs inside a guest, and starts programs there for the host.
 *
 * It talks over the virtio-serial port "vmsandbox.helper" (or, `helper FD`, over a descriptor it has inherited).
 * In both directions frames follow one another; numbers are little endian:
 *
 *     u32 size of what follows (at most 5 + 65536), u8 kind, u32 channel, payload
 *
 * A channel is a program or a connection; the host chooses its number, and uses no number twice.
 *
 * Host to guest:
 *   p PING     at most 64 bytes, which P brings back
 *   c CLOCK    i64 seconds, i64 nanoseconds: set the clock; empty: only read it.  R: i32 errno, i64 s, i64 ns
 *   s SEED     at most 512 random bytes for the kernel's generator.  R: i32 errno
 *   h HOSTNAME a name.  R: i32 errno
 *   f FILE     path \0 and what it is to hold.  R: i32 errno
 *   x SPAWN    user \0 cwd \0 u16 argc, argc times ARG \0, u16 envc, envc times NAME=VALUE \0.  S or F
 *              ("" are: as the helper itself; the user's home)
 *   X SPAWN    what comes before the payload of the following X or x of this channel; 2 MiB in all
 *   u CONNECT  the path of a Unix stream socket, whose bytes are then input and stream 1.  S (pid 0) or F
 *   i INPUT    bytes for the program; at most 65536 that A has not acknowledged
 *   e END      of the input, after what is buffered
 *   w WINDOW   u8 stream (1 stdout, 2 stderr), u32 bytes consumed; each stream begins with a credit of 1 MiB
 *   k SIGNAL   i32 for the program's process group
 *   d DROP     close our ends and forget the channel; the program goes on
 * Guest to host:
 *   H HELLO    (channel 0) u32 version
 *   S STARTED  u32 pid
 *   F FAILED   u8 stage (1 user, 2 cwd, 3 exec or connect, 4 resources), i32 errno; the channel is free
 *   o OUTPUT   u8 stream, at most 32768 bytes
 *   q          u8 stream that has ended
 *   a ACK      u32 bytes of input written, or thrown away because nobody reads them
 *   b BROKEN   nobody reads the input any more
 *   z EXIT     i32 status, or minus the signal
 *   P, R       replies; R with EINVAL also to what is unknown or malformed
 *
 * A program's channel is free after z and the q of both streams, a connection's after q and the end of the input.
 * Frames for a channel that is not in use mean nothing: they have crossed its end on the way.
 *
 * One thread without signal handlers, and nothing blocks.  Frames to the host collect in `out`; as long as there is no room in it (the host
 * does not read), nothing is read from anybody.  So all memory is static, but for a SPAWN that comes in parts.
 *
 * It is linked statically, with musl or glibc, and runs on any Linux of its architecture, whatever libraries that has.  So it has no name
 * service of its own: users and their groups come from /etc/passwd and /etc/group.  A user who is in neither place but known to the system
 * (LDAP, systemd's dynamic users) is looked up by the guest's own `getent` and `id`, which may take SECONDS.  Not seen are only further groups
 * that such a service gives to a user who is in /etc/passwd.  Without a line there, root is uid 0 with / and /bin/sh.
 *
 * `helper --about` prints one line with the version of the protocol, and nothing else happens: who asks learns that it runs here.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#define _TIME_BITS 64
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/random.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    VERSION = 1,
    CHANNELS = 256,
    HEADER = 9,
    PAYLOAD = 65536,       /* of a frame, at most */
    CHUNK = 32768,         /* of output */
    INPUT = 65536,         /* what the host may have outstanding */
    CREDIT = 1 << 20,
    SPAWN = 2 << 20,
    ROOM = 4096,           /* more than any frame but OUTPUT needs, which takes what there is */
    GROUPS = 65536,        /* of a user; the kernel takes no more */
    SECONDS = 5,           /* to look a user up elsewhere; nobody else is served meanwhile */
};

struct channel {
    uint32_t number;
    enum { FREE, GATHERING, PROGRAM, CONNECTION } state;
    pid_t pid;             /* also the process group */
    bool exited, end;      /* reaped; the host has sent END */
    int fd[3];             /* our ends, or -1; those of a connection are 0 and 1 */
    uint64_t credit[3];
    size_t start, have;    /* what is in `input` */
    uint32_t acked;        /* not yet told */
    char *parts;           /* of a SPAWN */
    size_t gathered;
    int refused;           /* the errno of a SPAWN of which parts are still to come */
    char input[INPUT];
};

static struct channel channels[CHANNELS];
static int used;           /* all channels from here on are free */
static uint32_t overflow;  /* the channel of a SPAWN in parts for which there was none, or 0 */
static int port, null, signals;
static bool inherited;     /* the port is not a virtio port */
static bool adjusted;      /* our oom_score_adj is not that of our children */
static bool hung;          /* no host is connected */
static bool stalled;       /* something was left undone for want of room */
static bool reaping;
static char in[2 * (HEADER + PAYLOAD)], out[8 * CHUNK];
static size_t in_have, out_have;

/* ---- Frames to the host: what calls these has looked whether there is room() ---- */

static uint64_t get(const char *at, int size)
{
    uint64_t value = 0;
    while (size--)
        value = value << 8 | (unsigned char)at[size];
    return value;
}

static void put(char *at, uint64_t value, int size)
{
    for (; size--; value >>= 8)
        *at++ = (char)value;
}

static bool room(void)
{
    return sizeof out - out_have >= ROOM;
}

static char *header(int kind, uint32_t number, size_t size)
{
    char *at = out + out_have;
    put(at, size + 5, 4);
    at[4] = (char)kind;
    put(at + 5, number, 4);
    out_have += HEADER + size;
    return at + HEADER;
}

static void frame32(int kind, uint32_t number, uint32_t value)
{
    put(header(kind, number, 4), value, 4);
}

static void flush(void)
{
    size_t sent = 0;
    while (sent < out_have) {
        ssize_t n = write(port, out + sent, out_have - sent);
        if (n > 0)
            sent += n;
        else if (errno == EAGAIN)
            break;
        else
            exit(1);
    }
    memmove(out, out + sent, out_have -= sent);
}

/* ---- Channels ---- */

static struct channel *find(uint32_t number)
{
    for (struct channel *c = channels; c < channels + used; c++)
        if (c->state != FREE && c->number == number)
            return c;
    return NULL;
}

static struct channel *claim(uint32_t number)
{
    struct channel *c = channels;
    while (c < channels + CHANNELS && c->state != FREE)
        c++;
    if (c == channels + CHANNELS)
        return NULL;
    memset(c, 0, offsetof(struct channel, input));
    c->number = number;
    c->state = GATHERING;
    c->fd[0] = c->fd[1] = c->fd[2] = -1;
    if (used <= c - channels)
        used = c - channels + 1;
    return c;
}

static void shut(struct channel *c, int stream)
{
    if (c->fd[stream] < 0)
        return;
    if (c->state == CONNECTION && stream == 0)
        shutdown(c->fd[0], SHUT_WR);
    close(c->fd[stream]);
    c->fd[stream] = -1;
}

static void release(struct channel *c)
{
    for (int s = 0; s < 3; s++)
        shut(c, s);
    free(c->parts);
    c->state = FREE;
    while (used && channels[used - 1].state == FREE)
        used--;
}

/* Free the channel if it has come to its end. */
static void settle(struct channel *c)
{
    if (c->fd[1] < 0 && c->fd[2] < 0 && (c->state == PROGRAM ? c->exited : c->state == CONNECTION && c->fd[0] < 0))
        release(c);
}

static void fail(uint32_t number, int stage, int error)
{
    char *at = header('F', number, 5);
    put(at, stage, 1);
    put(at + 1, error, 4);
}

/* Hand the program what is buffered for it, as far as it takes it. */
static void feed(struct channel *c)
{
    while (c->have && c->fd[0] >= 0) {
        ssize_t n = write(c->fd[0], c->input + c->start, c->have);
        if (n >= 0) {
            c->start += n;
            c->have -= n;
            c->acked += n;
        } else if (errno == EAGAIN) {
            return;
        } else {
            shut(c, 0);
            header('b', c->number, 0);
        }
    }
    c->acked += c->have;
    c->start = c->have = 0;
    if (c->end)
        shut(c, 0);
    settle(c);
}

/* Read from the program: once, or, if it has ended, to the end. */
static void drain(struct channel *c, int stream, bool ended)
{
    do {
        size_t size = sizeof out - out_have - ROOM / 2;    /* q, too, has to fit */
        if (!room() || !c->credit[stream])
            return;
        if (size > CHUNK)
            size = CHUNK;
        if (size > c->credit[stream])
            size = c->credit[stream];
        ssize_t n = read(c->fd[stream], out + out_have + HEADER + 1, size);
        if (n > 0) {
            *header('o', c->number, 1 + n) = (char)stream;
            c->credit[stream] -= n;
        } else if (n < 0 && errno == EAGAIN) {
            return;
        } else {
            shut(c, stream);
            *header('q', c->number, 1) = (char)stream;
            settle(c);
            return;
        }
    } while (ended);
}

static void reap(void)
{
    int status;
    pid_t pid;
    while (reaping && room() && (reaping = (pid = waitpid(-1, &status, WNOHANG)) > 0))
        for (struct channel *c = channels; c < channels + used; c++)
            if (c->state == PROGRAM && !c->exited && c->pid == pid) {
                c->exited = true;
                frame32('z', c->number, WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status));
                settle(c);
                break;
            }
    stalled |= reaping;
}

/* ---- Starting programs ---- */

struct user {
    uid_t uid;
    gid_t gid;
    const char *name, *home, *shell;
};

struct job {
    struct user user;
    bool become;           /* another user, or root in full */
    gid_t *groups;
    int ngroups;
    const char *home, *cwd, *path;
    char **argv, **envp;   /* there is room before the first argument */
    int fd[3], told;       /* its standard streams; where it tells why it does not start */
    int stage, error;
};

/* In the child of vfork(), which may share our memory: nothing but system calls. */
static void execute(struct job *job, char *file)
{
    char **argv = job->argv;
    execve(file, argv, job->envp);
    if (errno != ENOEXEC)
        return;
    argv[0] = file;    /* a script without an interpreter */
    *--argv = (char *)"/bin/sh";
    execve(*argv, argv, job->envp);
}

/* Look for the program along the job's PATH, and execute it.  Sets errno. */
static void search(struct job *job)
{
    char found[PATH_MAX], *name = job->argv[0];
    size_t length = strlen(name);
    int error = ENOENT;

    if (strchr(name, '/')) {
        execute(job, name);
        return;
    }
    for (const char *at = job->path, *end; length; at = end + 1) {
        end = at + strcspn(at, ":");
        size_t size = end - at;
        if (size + 1 + length < sizeof found) {
            memcpy(found, at, size);
            found[size] = '/';    /* an empty one means here */
            strcpy(size ? found + size + 1 : found, name);
            execute(job, found);
            if (errno == EACCES)
                error = EACCES;
            else if (errno != ENOENT && errno != ENOTDIR && errno != ENODEV && errno != ESTALE && errno != ETIMEDOUT)
                return;
        }
        if (!*end)
            break;
    }
    errno = error;
}

static __attribute__((noinline)) void become(struct job *job)
{
    const struct user *user = &job->user;
    struct sigaction action = {.sa_handler = SIG_DFL};
    sigset_t none;
    int fd, why[2] = {1, 0};

    sigemptyset(&none);
    sigaction(SIGPIPE, &action, NULL);    /* no other is ignored or handled, see main() */
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
    for (int s = 0; s < 3; s++)
        dup2(job->fd[s], s);
    if (adjusted && (fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC)) >= 0)
        (void)!write(fd, "0", 1);
    if (job->become) {
        for (int s = 0; s < 3; s++)    /* so that it can open /dev/stdout */
            (void)!fchown(s, user->uid, user->gid);
        if (setgroups(job->ngroups, job->groups) || setresgid(user->gid, user->gid, user->gid) || setresuid(user->uid, user->uid, user->uid))
            goto failed;
    }
    why[0] = 2;
    if ((chdir(job->home) && chdir("/")) || (*job->cwd && chdir(job->cwd)))
        goto failed;
    why[0] = 3;
    search(job);
failed:
    why[1] = errno;
    (void)!write(job->told, why, sizeof why);
    _exit(127);
}

/* Start the job.  Returns its process, or -1, and then job->stage and job->error say why. */
static pid_t launch(struct job *job)
{
    int told[2], why[2];
    pid_t pid;

    job->stage = 4;
    if (pipe2(told, O_CLOEXEC)) {
        job->error = errno;
        return -1;
    }
    job->told = told[1];
    if ((pid = vfork()) == 0)
        become(job);
    job->error = pid < 0 ? errno : 0;
    close(told[1]);    /* with it, the pipe ends as soon as the program has started */
    if (pid > 0 && read(told[0], why, sizeof why) == sizeof why) {
        waitpid(pid, NULL, 0);
        job->stage = why[0];
        job->error = why[1];
        pid = -1;
    }
    close(told[0]);
    return pid;
}

/* Start the job on the channel.  Returns whether it runs; else job->stage and job->error say why not. */
static bool start(struct channel *c, struct job *job)
{
    int pipes[3][2] = {{-1, -1}, {-1, -1}, {-1, -1}};

    c->pid = -1;
    c->state = PROGRAM;
    for (int s = 0; s < 3; s++) {
        if (pipe2(pipes[s], O_CLOEXEC)) {
            job->stage = 4;
            job->error = errno;
            goto done;
        }
        c->fd[s] = pipes[s][s == 0];
        job->fd[s] = pipes[s][s != 0];
        fcntl(c->fd[s], F_SETFL, O_NONBLOCK);
    }
    c->pid = launch(job);
done:
    for (int s = 0; s < 3; s++)
        if (pipes[s][0] >= 0)
            close(job->fd[s]);
    return c->pid > 0;
}

/* ---- Users ---- */

/* Run a program of the guest.  Returns what it has written, up to a size and as long as that takes at most SECONDS. */
static char *answer(const char *program, const char *first, const char *second)
{
    static char text[CHUNK], path[] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    char *argv[] = {NULL, (char *)program, (char *)first, (char *)second, NULL}, *envp[] = {path, NULL};
    struct job job = {.home = "/", .cwd = "", .path = path + 5, .argv = argv + 1, .envp = envp};
    struct timespec now, end;
    size_t have = 0;
    int ends[2];

    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += SECONDS;
    if (!pipe2(ends, O_CLOEXEC)) {
        job.fd[0] = job.fd[2] = null;
        job.fd[1] = ends[1];
        pid_t pid = launch(&job);
        close(ends[1]);
        while (pid > 0 && have < sizeof text - 1) {
            struct pollfd readable = {.fd = ends[0], .events = POLLIN};
            clock_gettime(CLOCK_MONOTONIC, &now);
            long left = (end.tv_sec - now.tv_sec) * 1000 + (end.tv_nsec - now.tv_nsec) / 1000000;
            ssize_t n = left > 0 && poll(&readable, 1, left) > 0 ? read(ends[0], text + have, sizeof text - 1 - have) : 0;
            if (n <= 0)
                break;
            have += n;
        }
        close(ends[0]);
        if (pid > 0) {
            kill(-pid, SIGKILL);    /* what has written all that it has to say may go, too */
            waitpid(pid, NULL, 0);
        }
    }
    text[have] = 0;
    return text;
}

/* The next line of a file, without its end, or NULL; it is good until the next call with this buffer. */
static char *next(FILE *file, char **buffer, size_t *size)
{
    ssize_t length = file ? getline(buffer, size, file) : -1;
    if (length < 0) {
        if (file)
            fclose(file);
        return NULL;
    }
    (*buffer)[strcspn(*buffer, "\n")] = 0;
    return *buffer;
}

static bool number(const char *text, uint32_t *value)
{
    char *end;
    unsigned long long found = strtoull(text, &end, 10);
    *value = found;
    return *text >= '0' && *text <= '9' && !*end && found < UINT32_MAX;
}

/* Split a line at its colons.  Returns whether it has that many fields, and is no comment and no entry for NIS. */
static bool split(char *line, char **fields, int count)
{
    line += strspn(line, " \t");
    for (int i = 0; i < count; i++)
        if (!(fields[i] = strsep(&line, ":")))
            return false;
    return *fields[0] && !strchr("#+-", *fields[0]);
}

/* Read a line like those of /etc/passwd. */
static bool is_user(char *line, struct user *user)
{
    char *fields[7];
    if (!split(line, fields, 7) || !number(fields[2], &user->uid) || !number(fields[3], &user->gid))
        return false;
    user->name = fields[0];
    user->home = fields[5];
    user->shell = fields[6];
    return true;
}

/* Find a user in /etc/passwd, by name; with an empty one our own, by number. */
static bool find_user(const char *name, struct user *user)
{
    static char *buffer;
    static size_t size;
    FILE *file = fopen("/etc/passwd", "re");
    for (char *line; (line = next(file, &buffer, &size));)
        if (is_user(line, user) && (*name ? !strcmp(user->name, name) : user->uid == geteuid())) {
            fclose(file);
            return true;
        }
    return false;
}

/* Add a further group to those of a job. */
static void add_group(struct job *job, gid_t group)
{
    if (group != job->user.gid && job->ngroups < GROUPS)
        job->groups[job->ngroups++] = group;
}

/* Find the further groups of a user in /etc/group. */
static void find_groups(struct job *job)
{
    static char *buffer;
    static size_t size;
    FILE *file = fopen("/etc/group", "re");
    for (char *line, *fields[4], *member; (line = next(file, &buffer, &size));) {
        uint32_t group;
        if (!split(line, fields, 4) || !number(fields[2], &group))
            continue;
        while ((member = strsep(&fields[3], ",")))
            if (!strcmp(member, job->user.name)) {
                add_group(job, group);
                break;
            }
    }
}

/* Find the user of a job, and the groups.  Returns 0 or an errno. */
static int look_up(struct job *job, const char *name)
{
    static char buffer[CHUNK];
    bool elsewhere = false;

    if (!find_user(name, &job->user)) {
        if (!geteuid() && (!*name || !strcmp(name, "root"))) {
            job->user = (struct user){.name = "root", .home = "/", .shell = "/bin/sh"};
        } else if (*name != '-' && name[strspn(name, "0123456789")]) {    /* no option, no number, not empty */
            strcpy(buffer, answer("getent", "passwd", name));
            buffer[strcspn(buffer, "\n")] = 0;
            if (!is_user(buffer, &job->user))
                return ENOENT;
            elsewhere = true;
        } else {
            return ENOENT;
        }
    }
    job->become = !geteuid() || job->user.uid != geteuid();
    job->groups[0] = job->user.gid;
    job->ngroups = 1;
    if (!job->become)
        return 0;
    if (!elsewhere) {
        find_groups(job);
        return 0;
    }
    for (char *at = answer("id", "-G", name), *end;; at = end) {
        unsigned long group = strtoul(at, &end, 10);
        if (end == at)
            return 0;
        add_group(job, group);
    }
}

/* Take a string, or a number of 16 bits, from a payload; what is missing makes it too short for good. */
static char *string(char **at, char *end)
{
    char *it = *at, *nul = it > end ? NULL : memchr(it, 0, end - it);
    *at = nul ? nul + 1 : end + 1;
    return nul ? it : NULL;
}

static unsigned count(char **at, char *end)
{
    char *it = *at;
    *at = it > end - 2 ? end + 1 : it + 2;
    return *at > end ? 0 : get(it, 2);
}

static void spawn(struct channel *c, char *at, size_t size)
{
    static gid_t groups[GROUPS];
    static char defaults[5][4096 + 16];
    const char *names[5] = {"HOME=", "USER=", "LOGNAME=", "SHELL=", "PATH="};
    struct job job = {.groups = groups, .stage = 4, .error = EINVAL};
    char *end = at + size, *name = string(&at, end), **list = NULL;
    unsigned argc, envc = 0, n = 0;

    job.cwd = string(&at, end);
    argc = count(&at, end);
    list = malloc((size + 17) * sizeof *list);    /* no string without a byte */
    if (!list) {
        job.error = ENOMEM;
        goto failed;
    }
    job.argv = list + 1;
    for (unsigned i = 0; i < argc && at <= end; i++)
        job.argv[i] = string(&at, end);
    envc = count(&at, end);
    if (at > end || !argc)
        goto failed;
    job.argv[argc] = NULL;
    job.envp = job.argv + argc + 1;
    while (n < envc && at <= end)
        job.envp[n++] = string(&at, end);
    if (at != end)
        goto failed;

    job.stage = 1;
    if ((job.error = look_up(&job, name)))
        goto failed;
    job.home = *job.user.home ? job.user.home : "/";

    const char *values[5] = {
        job.home, job.user.name, job.user.name, *job.user.shell ? job.user.shell : "/bin/sh",
        job.user.uid ? "/usr/local/bin:/usr/bin:/bin:/usr/games"
                     : "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"};
    for (int d = 0; d < 5; d++) {
        unsigned i = 0;
        while (i < envc && strncmp(job.envp[i], names[d], strlen(names[d])))
            i++;
        if (i == envc) {
            snprintf(defaults[d], sizeof defaults[d], "%s%s", names[d], values[d]);
            job.envp[i = n++] = defaults[d];
        }
        job.path = job.envp[i] + strlen(names[d]);    /* of the last of them */
    }
    job.envp[n] = NULL;
    if (start(c, &job)) {
        c->credit[1] = c->credit[2] = CREDIT;
        frame32('S', c->number, c->pid);
        free(list);
        return;
    }
failed:
    free(list);
    fail(c->number, job.stage, job.error);
    release(c);
}

/* A SPAWN, or a part of one. */
static void gather(uint32_t number, char *data, size_t size, bool last)
{
    struct channel *c = find(number);
    if (!c && !(c = claim(number))) {
        if (last)
            fail(number, 4, EMFILE);
        else
            overflow = number;
        return;
    }
    if (last && !c->parts && !c->refused) {
        spawn(c, data, size);
        return;
    }
    char *parts = NULL;
    if (c->gathered + size > SPAWN)
        c->refused = E2BIG;
    else if (!c->refused && !(parts = realloc(c->parts, c->gathered + size + 1)))
        c->refused = ENOMEM;
    if (parts) {
        memcpy(parts + c->gathered, data, size);
        c->parts = parts;
        c->gathered += size;
    }
    if (last && !c->refused) {
        c->parts = NULL;    /* the channel may be free before we are done with them */
        spawn(c, parts, c->gathered);
        free(parts);
    } else if (last) {
        fail(number, 4, c->refused);
        release(c);
    }
}

static void connect_to(uint32_t number, const char *path, size_t size)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct channel *c;
    int fd, copy;

    if (!size || memchr(path, 0, size)) {
        fail(number, 4, EINVAL);
    } else if (size >= sizeof address.sun_path) {
        fail(number, 3, ENAMETOOLONG);
    } else if (!(c = claim(number))) {
        fail(number, 4, EMFILE);
    } else {
        memcpy(address.sun_path, path, size);
        fd = c->fd[1] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        copy = c->fd[0] = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 3);
        if (copy < 0 || connect(fd, (struct sockaddr *)&address, sizeof address)) {
            fail(number, copy < 0 ? 4 : 3, errno);
            release(c);
            return;
        }
        c->state = CONNECTION;
        c->credit[1] = CREDIT;
        frame32('S', number, 0);
    }
}

/* ---- Frames from the host ---- */

static int seed(char *data, size_t size)
{
    union { struct rand_pool_info info; char room[sizeof(struct rand_pool_info) + 512]; } pool;
    int fd, error = 0;
    if (size > 512)
        return EINVAL;
    pool.info.entropy_count = size * 8;
    pool.info.buf_size = size;
    memcpy(pool.room + offsetof(struct rand_pool_info, buf), data, size);
    if ((fd = open("/dev/random", O_RDWR | O_CLOEXEC)) < 0 || ioctl(fd, RNDADDENTROPY, &pool) || ioctl(fd, RNDRESEEDCRNG))
        error = errno;
    if (fd >= 0)
        close(fd);
    explicit_bzero(&pool, sizeof pool);
    explicit_bzero(data, size);
    return error;
}

/* Blocks as long as the disk does: that is for small files, which stay in memory at first. */
static int write_file(const char *path, size_t size)
{
    const char *data = memchr(path, 0, size);
    int fd, error = 0;

    if (!data || data == path)
        return EINVAL;
    size -= ++data - path;
    if ((fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644)) < 0)
        return errno;
    while (size && !error) {
        ssize_t done = write(fd, data, size);
        if (done < 0)
            error = errno;
        else
            data += done, size -= done;
    }
    return close(fd) && !error ? errno : error;
}

static int set_clock(int64_t seconds, int64_t nanoseconds)
{
    struct timespec time = {.tv_sec = seconds, .tv_nsec = nanoseconds};
    if (time.tv_sec != seconds || time.tv_nsec != nanoseconds)    /* fields of 32 bits */
        return EINVAL;
    return clock_settime(CLOCK_REALTIME, &time) ? errno : 0;
}

/* Set a timer on each CPU that has expired already, so that the kernel programs the timer of each CPU anew.
 * QEMU before 10.2 does not load the timers of riscv64, and the kernel would wait for them for ever. */
static void start_timers(void)
{
#ifdef __riscv
    struct timespec past = {.tv_nsec = 1};
    cpu_set_t all, one;
    if (sched_getaffinity(0, sizeof all, &all))
        return;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &all)) {
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            sched_setaffinity(0, sizeof one, &one);
            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &past, NULL);
        }
    sched_setaffinity(0, sizeof all, &all);
#endif
}

static void handle(int kind, uint32_t number, char *data, size_t size)
{
    struct channel *c = find(number);
    struct timespec now;
    int error = EINVAL, stream;
    char *at;

    switch (kind) {
    case 'p':
        if (size > 64)
            break;
        memcpy(header('P', number, size), data, size);
        return;
    case 'c':
        if (size != 0 && size != 16)
            break;
        error = size ? set_clock(get(data, 8), get(data + 8, 8)) : 0;
        start_timers();
        clock_gettime(CLOCK_REALTIME, &now);
        at = header('R', number, 20);
        put(at, error, 4);
        put(at + 4, now.tv_sec, 8);
        put(at + 12, now.tv_nsec, 8);
        return;
    case 's':
        error = seed(data, size);
        break;
    case 'h':
        error = !size ? EINVAL : sethostname(data, size) ? errno : 0;
        break;
    case 'f':
        error = write_file(data, size);
        break;
    case 'X':
    case 'x':
        if (c && c->state != GATHERING)
            break;
        if (kind == 'x' && overflow && overflow == number) {
            overflow = 0;
            fail(number, 4, EMFILE);
        } else if (!overflow || overflow != number) {
            gather(number, data, size, kind == 'x');
        }
        return;
    case 'u':
        if (c)
            break;
        connect_to(number, data, size);
        return;
    case 'i':
        if (c && c->have + size > INPUT)
            break;
        if (!c)
            return;
        if (c->start + c->have + size > INPUT) {
            memmove(c->input, c->input + c->start, c->have);
            c->start = 0;
        }
        memcpy(c->input + c->start + c->have, data, size);
        c->have += size;
        feed(c);
        return;
    case 'e':
        if (c) {
            c->end = true;
            feed(c);
        }
        return;
    case 'w':
        stream = size == 5 ? *data : 0;
        if (stream != 1 && stream != 2)
            break;
        if (c)
            c->credit[stream] += get(data + 1, 4);
        return;
    case 'k':
        if (size != 4)
            break;
        if (c && c->state == PROGRAM)
            kill(-c->pid, (int)get(data, 4));
        return;
    case 'd':
        if (c)
            release(c);
        return;
    }
    frame32('R', number, error);
}

/* Handle the frames that are complete, as long as there is room for what they bring about. */
static void frames(void)
{
    size_t at = 0, had = in_have;
    while (in_have - at >= 4) {
        uint32_t size = get(in + at, 4);
        if (size > 5 + PAYLOAD)
            exit(1);
        if (in_have - at < 4 + size)
            break;
        if (!room()) {
            stalled = true;
            break;
        }
        if (size < 5)
            frame32('R', 0, EINVAL);
        else
            handle(in[at + 4], get(in + at + 5, 4), in + at + HEADER, size - 5);
        at += 4 + size;
    }
    if (at) {
        memmove(in, in + at, in_have -= at);
        if (in_have > 4 && in[4] == 's')    /* no copy of a part of a SEED stays */
            explicit_bzero(in + in_have, had - in_have);
    }
}

static void fill(void)
{
    while (in_have < sizeof in) {
        ssize_t n = read(port, in + in_have, sizeof in - in_have);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0 || (n == 0 && inherited))
            exit(n < 0);
        in_have += n;
        if ((hung = n == 0))
            return;
    }
}

/* ---- The port ---- */

/* The name of the first entry of a folder whose file of some name holds `text`; good until the next call. */
static const char *look(const char *folder, const char *name, const char *text)
{
    static char found[256];
    DIR *list = opendir(folder);
    *found = 0;
    for (struct dirent *entry; list && !*found && (entry = readdir(list));) {
        char path[512], content[64] = "";
        if (*entry->d_name == '.')
            continue;
        snprintf(path, sizeof path, "%s/%s/%s", folder, entry->d_name, name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        (void)!read(fd, content, sizeof content - 1);
        close(fd);
        if (!strcmp(content, text))
            snprintf(found, sizeof found, "%s", entry->d_name);
    }
    if (list)
        closedir(list);
    return *found ? found : NULL;
}

/* Tell who waits: systemd, and whoever reads our standard output to its end. */
static void ready(void)
{
    const char *path = getenv("NOTIFY_SOCKET");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (path && strlen(path) < sizeof address.sun_path) {
        int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        strcpy(address.sun_path, path);
        if (*path == '@')
            *address.sun_path = 0;
        sendto(fd, "READY=1", 7, MSG_NOSIGNAL, (struct sockaddr *)&address, offsetof(struct sockaddr_un, sun_path) + strlen(path));
        close(fd);
    }
    dup2(null, 1);
    clearenv();
}

static int open_port(void)
{
    for (int i = 0; i < 120; i++) {
        const char *name = look("/sys/class/virtio-ports", "name", "vmsandbox.helper\n");
        if (name) {
            char device[512];
            snprintf(device, sizeof device, "/dev/%s", name);
            int fd = open(device, O_RDWR | O_NONBLOCK | O_CLOEXEC);
            if (fd >= 0)
                return fd;
        }
        /* A port comes a moment after its controller.  Nobody is kept waiting for long. */
        if (!name && !look("/sys/bus/virtio/devices", "device", "0x0003\n"))
            break;
        if (i == 25)
            ready();
        usleep(i < 25 ? 20000 : 100000);
    }
    ready();
    exit(0);
}

/* ---- */

static void turn(void)
{
    static struct pollfd fds[2 + 3 * CHANNELS];
    static unsigned first;    /* who is served first, lest the last never are */
    int n = 2;

    fds[0] = (struct pollfd){.fd = hung ? -1 : port, .events = (room() ? POLLIN : 0) | (out_have ? POLLOUT : 0)};
    fds[1] = (struct pollfd){.fd = signals, .events = POLLIN};
    for (struct channel *c = channels; c < channels + used; c++)
        for (int s = 0; s < 3; s++, n++) {
            bool watch = s ? c->credit[s] > 0 : c->have || c->state == CONNECTION;
            fds[n].fd = c->state != FREE && watch ? c->fd[s] : -1;
            fds[n].events = s ? POLLIN : c->have ? POLLOUT : 0;
        }
    if (poll(fds, room() ? n : 1, stalled && room() ? 0 : hung ? 100 : -1) < 0)
        return;
    if (!room())
        n = 1;
    hung = fds[0].revents & POLLHUP && !(fds[0].revents & (POLLIN | POLLOUT));
    stalled = false;
    if (fds[0].revents & POLLIN)
        fill();
    first++;
    for (int k = 0; k < n - 2; k++) {
        int i = (first + k) % (n - 2), s = i % 3, what = fds[2 + i].revents;
        struct channel *c = &channels[i / 3];
        if (!what || c->fd[s] < 0 || !room())
            continue;
        if (s) {
            drain(c, s, what & POLLHUP);
        } else {
            if (what & (POLLERR | POLLHUP) && c->state == CONNECTION) {
                shut(c, 0);    /* the other side has closed it altogether */
                header('b', c->number, 0);
            }
            feed(c);
        }
    }
    if (n > 1 && fds[1].revents) {
        struct signalfd_siginfo info;
        reaping = read(signals, &info, sizeof info) > 0;
    }
    if (reaping)
        reap();
    frames();
    for (struct channel *c = channels; c < channels + used; c++)
        if (c->acked && c->state != FREE) {
            if (!room()) {
                stalled = true;
                break;
            }
            frame32('a', c->number, c->acked);
            c->acked = 0;
        }
    flush();
}

int main(int argc, char **argv)
{
    sigset_t chld;
    struct sigaction action = {.sa_handler = SIG_DFL};

    if (argc > 1 && !strcmp(argv[1], "--about")) {
        printf("pytest-vmsandbox helper, protocol %d\n", VERSION);
        return 0;
    }
    while ((null = open("/dev/null", O_RDWR | O_CLOEXEC)) >= 0 && null < 3)
        ;
#ifdef SYS_close_range
    syscall(SYS_close_range, 3, ~0U, 4 /* CLOSE_RANGE_CLOEXEC */);
#endif
    for (int number = 1; number < NSIG; number++)
        sigaction(number, &action, NULL);
    action.sa_handler = SIG_IGN;
    sigaction(SIGPIPE, &action, NULL);
    sigemptyset(&chld);
    sigaddset(&chld, SIGCHLD);
    sigprocmask(SIG_SETMASK, &chld, NULL);
    signals = signalfd(-1, &chld, SFD_CLOEXEC | SFD_NONBLOCK);
    umask(022);
    int fd = open("/proc/self/oom_score_adj", O_RDWR | O_CLOEXEC);
    adjusted = write(fd, "-1000", 5) > 0;
    close(fd);

    inherited = argc > 1;
    port = inherited ? atoi(argv[1]) : open_port();
    if (fcntl(port, F_SETFD, FD_CLOEXEC) || fcntl(port, F_SETFL, O_RDWR | O_NONBLOCK))
        return 1;
    frame32('H', 0, VERSION);
    flush();
    ready();
    for (;;)
        turn();
}
