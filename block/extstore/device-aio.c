/*
 * The default device: libaio with O_DIRECT on a regular file or block device.
 *
 * The way of a get or store: it enters the pending list; whoever holds the
 * `submitting` role moves batches from there into the kernel, at most
 * AIO_DEPTH at once, so a caller never waits for a free place; the reaper
 * thread takes completions, puts what must be continued back into the pending
 * list, calls the others back, and submits again.  A thread between plug and
 * unplug only enters requests, which are submitted together at the unplug.
 *
 * Where the kernel's queue cannot be had, or with the page cache (on which
 * libaio would block the caller), a few worker threads take the requests from
 * the same pending list and use pread and pwrite.
 *
 * Flushes have a thread of their own.  It answers all flushes that wait with
 * one fdatasync().  Who asks for a flush and would only wait does it itself, if
 * no other is under way; and a get or store, too: two threads less to be
 * woken.  The first flush that fails makes all later ones fail: the
 * kernel reports lost pages once and then forgets them, so asking again would
 * be answered with a lie.
 *
 * Invariants
 *   1. A request is in exactly one place: the pending list, a submitter's
 *      batch, the kernel, or the hands of the thread that completes it.
 *   2. in_flight counts those in a batch or in the kernel; it is at most
 *      AIO_DEPTH.
 *   3. If the pending list is not empty and nobody is submitting, then either
 *      in_flight > 0, so that the reaper will submit; or a thread is plugged
 *      and will; or starved is set, and the reaper tries again by the clock.
 *
 * Threads: started at open, joined at destroy, all signals blocked in them.
 * Completions arrive on the reaper, a worker or the flush thread; when the
 * kernel refuses a request, on the submitter's.  Locks: `lock`, a leaf, never
 * held across a system call on the file or across a completion.
 *
 * Errors: as device.h says.  O_DIRECT and file system oddities are handled by
 * device-file.c, early ends of transfers by bale_transfer_step().
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <libaio.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "device-file-internal.h"
#include "device-internal.h"

/* Transfers in the kernel at once. */
#define AIO_DEPTH 128

/* Transfers submitted, and completions taken, by one system call. */
#define AIO_BATCH 64

/* Threads that do the transfers where libaio does not. */
#define AIO_WORKERS 4

/*
 * Tries, 1 ms apart, to submit to a kernel that accepts nothing although
 * nothing is under way, before the oldest request fails.
 */
#define AIO_STARVED_MAX 2000

/* Devices that one thread can have plugged at once; more just do not batch. */
#define AIO_PLUGS 4

typedef enum AioKind {
    AIO_GET,
    AIO_STORE,
    AIO_FLUSH,
} AioKind;

/* Lives in the private words of a BaleDeviceIo. */
typedef struct AioRequest {
    struct iocb iocb; /* first, so that a completion finds the request */
    struct AioRequest *next;
    BaleTransfer transfer;
    AioKind kind;
    int ret;
} AioRequest;

G_STATIC_ASSERT(sizeof(AioRequest) <= sizeof(((BaleDeviceIo *)0)->priv));

typedef struct AioList {
    AioRequest *head;
    AioRequest *last; /* undefined when empty */
} AioList;

typedef struct AioDevice {
    BaleDevice dev; /* first */

    /* Never changed after open. */
    BaleFile file;
    bool kernel;  /* libaio; else the workers */
    io_context_t context;
    int event_fd; /* readable: completions, a starved queue, or the end */
    GThread *reaper;
    GThread *workers[AIO_WORKERS];
    GThread *flusher;

    /* Under lock. */
    pthread_mutex_t lock;
    pthread_cond_t work;       /* for the workers: pending or stop */
    pthread_cond_t flush_work; /* for the flusher: flushes or stop */
    AioList pending;
    AioList flushes;
    unsigned in_flight;
    bool submitting;
    bool starved;
    unsigned starved_tries;
    bool stop;
    bool flushing; /* somebody is in fdatasync() */

    /* Only who has set flushing. */
    int flush_error;

    /* Atomic: threads inside store, get, flush or unplug. */
    unsigned callers;

    BaleDeviceCounters counters;
} AioDevice;

/* ---- requests --------------------------------------------------------- */

static AioRequest *request_of(BaleDeviceIo *io)
{
    return (AioRequest *)&io->priv;
}

static BaleDeviceIo *io_of(AioRequest *request)
{
    return (BaleDeviceIo *)((char *)request - offsetof(BaleDeviceIo, priv));
}

static void list_append(AioList *list, AioRequest *request)
{
    request->next = NULL;
    if (list->head) {
        list->last->next = request;
    } else {
        list->head = request;
    }
    list->last = request;
}

static void list_prepend(AioList *list, AioRequest *request)
{
    request->next = list->head;
    if (!list->head) {
        list->last = request;
    }
    list->head = request;
}

static AioRequest *list_take(AioList *list)
{
    AioRequest *request = list->head;

    if (request) {
        list->head = request->next;
    }
    return request;
}

static void request_complete(AioDevice *aio, AioRequest *request, int ret)
{
    static const BaleDeviceCall calls[] = {
        [AIO_GET] = BALE_DEVICE_GET,
        [AIO_STORE] = BALE_DEVICE_STORE,
        [AIO_FLUSH] = BALE_DEVICE_FLUSH,
    };
    BaleDeviceIo *io = io_of(request);

    bale_device_count_end(&aio->counters, calls[request->kind], io->len,
                          request->transfer.start_ns, ret);
    io->done(io, ret);
}

static void complete_all(AioDevice *aio, AioList *list)
{
    AioRequest *request;

    while ((request = list_take(list))) {
        request_complete(aio, request, request->ret);
    }
}

/*
 * The kernel answered an attempt with @res.  True if @request is over, with
 * its ret set.
 */
static bool request_step(AioDevice *aio, AioRequest *request, ssize_t res)
{
    BaleDeviceIo *io = io_of(request);
    bool is_store = request->kind == AIO_STORE;
    size_t done = request->transfer.done;

    res = bale_fault_hook(is_store ? BALE_FAULT_WRITE : BALE_FAULT_READ,
                          io->offset + done, io->len - done, res);
    return bale_transfer_step(&request->transfer, io, is_store,
                              aio->file.direct ? aio->file.block_size : 1,
                              res, &aio->counters, &request->ret);
}

/* ---- plugging --------------------------------------------------------- */

static _Thread_local struct {
    const AioDevice *aio;
    unsigned depth;
} plugs[AIO_PLUGS];

static bool is_plugged(const AioDevice *aio)
{
    for (unsigned i = 0; i < AIO_PLUGS; i++) {
        if (plugs[i].aio == aio) {
            return true;
        }
    }
    return false;
}

static void plug(const AioDevice *aio)
{
    unsigned to = AIO_PLUGS;

    for (unsigned i = 0; i < AIO_PLUGS; i++) {
        if (plugs[i].aio == aio) {
            to = i;
            break;
        }
        if (!plugs[i].aio && to == AIO_PLUGS) {
            to = i;
        }
    }
    if (to < AIO_PLUGS) {
        plugs[to].aio = aio;
        plugs[to].depth++;
    }
}

static void unplug(const AioDevice *aio)
{
    for (unsigned i = 0; i < AIO_PLUGS; i++) {
        if (plugs[i].aio == aio) {
            if (--plugs[i].depth == 0) {
                plugs[i].aio = NULL;
            }
            return;
        }
    }
}

/* ---- libaio ----------------------------------------------------------- */

static void wake_reaper(AioDevice *aio)
{
    uint64_t one = 1;
    ssize_t res;

    do {
        res = write(aio->event_fd, &one, sizeof(one));
    } while (res < 0 && errno == EINTR);
    /* EAGAIN: the counter is full, so it is readable, which is the aim. */
    g_assert(res == sizeof(one) || errno == EAGAIN);
}

static void request_prepare(AioDevice *aio, AioRequest *request)
{
    BaleDeviceIo *io = io_of(request);
    size_t done = request->transfer.done;
    uint8_t *buf = (uint8_t *)io->buf + done;

    if (request->kind == AIO_STORE) {
        io_prep_pwrite(&request->iocb, aio->file.fd, buf, io->len - done,
                       (long long)(io->offset + done));
    } else {
        io_prep_pread(&request->iocb, aio->file.fd, buf, io->len - done,
                      (long long)(io->offset + done));
    }
    io_set_eventfd(&request->iocb, aio->event_fd);
}

/* Move pending requests into @batch, as many as may be in flight. */
static unsigned take_batch_locked(AioDevice *aio, struct iocb **batch)
{
    unsigned n = 0;

    while (n < AIO_BATCH && aio->in_flight + n < AIO_DEPTH &&
           aio->pending.head) {
        AioRequest *request = list_take(&aio->pending);

        request_prepare(aio, request);
        batch[n++] = &request->iocb;
    }
    aio->in_flight += n;
    return n;
}

/* The kernel did not take batch[from .. n - 1]: back to the pending list. */
static void return_batch_locked(AioDevice *aio, struct iocb **batch,
                                unsigned from, unsigned n)
{
    for (unsigned i = n; i > from; i--) {
        list_prepend(&aio->pending, (AioRequest *)batch[i - 1]);
    }
    aio->in_flight -= n - from;
}

/*
 * Nothing was taken.  Returns true if the head of the pending list is to be
 * given up, because it has been tried often enough.
 */
static bool starved_locked(AioDevice *aio)
{
    if (aio->in_flight > 0) {
        return false; /* the next completion tries again */
    }
    if (++aio->starved_tries >= AIO_STARVED_MAX) {
        aio->starved_tries = 0;
        return true;
    }
    aio->starved = true;
    wake_reaper(aio);
    return false;
}

static void submit_pending(AioDevice *aio)
{
    struct iocb *batch[AIO_BATCH];
    AioList failed = { 0 };

    pthread_mutex_lock(&aio->lock);
    while (!aio->submitting && aio->pending.head &&
           aio->in_flight < AIO_DEPTH) {
        unsigned n = take_batch_locked(aio, batch);
        ssize_t res;
        unsigned taken;
        bool give_up = false;

        aio->submitting = true;
        pthread_mutex_unlock(&aio->lock);
        res = bale_fault_hook(BALE_FAULT_SUBMIT, 0, n, 0);
        if (res == 0) {
            res = io_submit(aio->context, n, batch);
        }
        pthread_mutex_lock(&aio->lock);
        aio->submitting = false;

        taken = res > 0 ? (unsigned)res : 0;
        g_assert(taken <= n);
        return_batch_locked(aio, batch, taken, n);
        if (taken > 0) {
            aio->starved_tries = 0;
            continue;
        }
        if (res == 0 || res == -EAGAIN || res == -EINTR) {
            bale_device_count_retry(&aio->counters);
            give_up = starved_locked(aio);
            res = -EIO;
        } else {
            give_up = true; /* the first of the batch is refused for good */
        }
        if (!give_up) {
            break;
        }
        aio->pending.head->ret = (int)res;
        list_append(&failed, list_take(&aio->pending));
    }
    pthread_mutex_unlock(&aio->lock);
    complete_all(aio, &failed);
}

/* Take what is complete; false when there was nothing. */
static bool reap(AioDevice *aio)
{
    struct io_event events[AIO_BATCH];
    struct timespec no_time = { 0 };
    AioList over = { 0 }, again = { 0 };
    AioRequest *request;
    int n = io_getevents(aio->context, 0, AIO_BATCH, events, &no_time);

    if (n <= 0) {
        g_assert(n == 0 || n == -EINTR);
        return n < 0;
    }
    /*
     * Taking the lock first also tells ThreadSanitizer, which cannot see
     * through the kernel, that the submitter was here before.
     */
    pthread_mutex_lock(&aio->lock);
    g_assert(aio->in_flight >= (unsigned)n);
    aio->in_flight -= (unsigned)n;
    pthread_mutex_unlock(&aio->lock);
    for (int i = 0; i < n; i++) {
        request = (AioRequest *)events[i].obj;
        if (request_step(aio, request, (ssize_t)(long)events[i].res)) {
            list_append(&over, request);
        } else {
            bale_transfer_backoff(&request->transfer);
            list_append(&again, request);
        }
    }
    if (again.head) {
        pthread_mutex_lock(&aio->lock);
        while ((request = list_take(&again))) {
            list_prepend(&aio->pending, request);
        }
        pthread_mutex_unlock(&aio->lock);
    }

    /* Keep the device busy while the completions run. */
    submit_pending(aio);
    plug(aio);
    complete_all(aio, &over);
    unplug(aio);
    submit_pending(aio);
    return true;
}

static gpointer reaper_thread(gpointer opaque)
{
    AioDevice *aio = opaque;
    bool stop = false;

    while (!stop) {
        uint64_t count;
        ssize_t res = read(aio->event_fd, &count, sizeof(count));
        bool starved;

        g_assert(res == sizeof(count) || errno == EINTR);
        while (reap(aio)) {
            /* More may have completed meanwhile. */
        }
        pthread_mutex_lock(&aio->lock);
        starved = aio->starved;
        aio->starved = false;
        stop = aio->stop;
        pthread_mutex_unlock(&aio->lock);
        if (starved) {
            g_usleep(1000);
            submit_pending(aio);
        }
    }
    return NULL;
}

/* ---- workers ---------------------------------------------------------- */

static ssize_t attempt(AioDevice *aio, AioRequest *request)
{
    BaleDeviceIo *io = io_of(request);
    size_t done = request->transfer.done;
    uint8_t *buf = (uint8_t *)io->buf + done;
    off_t offset = (off_t)(io->offset + done);
    ssize_t res;

    if (request->kind == AIO_STORE) {
        res = pwrite(aio->file.fd, buf, io->len - done, offset);
    } else {
        res = pread(aio->file.fd, buf, io->len - done, offset);
    }
    return res < 0 ? -errno : res;
}

/* All of a transfer, on this thread. */
static void transfer_now(AioDevice *aio, AioRequest *request)
{
    while (!request_step(aio, request, attempt(aio, request))) {
        bale_transfer_backoff(&request->transfer);
    }
    request_complete(aio, request, request->ret);
}

static gpointer worker_thread(gpointer opaque)
{
    AioDevice *aio = opaque;

    pthread_mutex_lock(&aio->lock);
    while (true) {
        AioRequest *request = list_take(&aio->pending);

        if (!request) {
            if (aio->stop) {
                break;
            }
            pthread_cond_wait(&aio->work, &aio->lock);
            continue;
        }
        pthread_mutex_unlock(&aio->lock);
        transfer_now(aio, request);
        pthread_mutex_lock(&aio->lock);
    }
    pthread_mutex_unlock(&aio->lock);
    return NULL;
}

/* ---- flush ------------------------------------------------------------ */

static void flush_now(AioDevice *aio)
{
    int ret;

    if (aio->file.read_only || aio->flush_error) {
        return;
    }
    /*
     * Also when it was interrupted: nobody knows what it has written.  And an
     * errno that invites to try again would be bad advice.
     */
    ret = fdatasync(aio->file.fd) < 0 ? -errno : 0;
    ret = (int)bale_fault_hook(BALE_FAULT_SYNC, 0, 0, ret);
    if (ret < 0) {
        aio->flush_error =
            ret == -EINTR || ret == -EAGAIN ? -EIO : ret;
    }
}

static gpointer flusher_thread(gpointer opaque)
{
    AioDevice *aio = opaque;

    pthread_mutex_lock(&aio->lock);
    while (true) {
        AioList flushes = aio->flushes;

        if (!flushes.head || aio->flushing) {
            if (!flushes.head && aio->stop) {
                break;
            }
            pthread_cond_wait(&aio->flush_work, &aio->lock);
            continue;
        }
        aio->flushes.head = NULL;
        aio->flushing = true;
        pthread_mutex_unlock(&aio->lock);
        flush_now(aio);
        for (AioRequest *r = flushes.head; r; r = r->next) {
            r->ret = aio->flush_error;
        }
        pthread_mutex_lock(&aio->lock);
        aio->flushing = false;
        pthread_mutex_unlock(&aio->lock);
        complete_all(aio, &flushes);
        pthread_mutex_lock(&aio->lock);
    }
    pthread_mutex_unlock(&aio->lock);
    return NULL;
}

/* Flush on this thread, unless others flush, or wait for the flusher. */
static bool flush_in_place(AioDevice *aio, AioRequest *request)
{
    bool alone;

    pthread_mutex_lock(&aio->lock);
    alone = !aio->flushing && !aio->flushes.head;
    aio->flushing |= alone;
    pthread_mutex_unlock(&aio->lock);
    if (!alone) {
        return false;
    }
    flush_now(aio);
    request->ret = aio->flush_error;
    pthread_mutex_lock(&aio->lock);
    aio->flushing = false;
    pthread_cond_signal(&aio->flush_work);
    pthread_mutex_unlock(&aio->lock);
    request_complete(aio, request, request->ret);
    return true;
}

/* ---- the vtable ------------------------------------------------------- */

/*
 * A request may complete, and its owner go on to destroy the device, while
 * the thread that submitted it is still on its way out of here.  The last
 * thing that such a thread touches is the count of callers, for which destroy
 * waits.
 */
static void callers_add(AioDevice *aio)
{
    __atomic_fetch_add(&aio->callers, 1, __ATOMIC_RELAXED);
}

static void callers_remove(AioDevice *aio)
{
    __atomic_fetch_sub(&aio->callers, 1, __ATOMIC_RELEASE);
}

static void callers_wait(AioDevice *aio)
{
    while (__atomic_load_n(&aio->callers, __ATOMIC_ACQUIRE) > 0) {
        g_usleep(100);
    }
}

static void aio_enter(AioDevice *aio, BaleDeviceIo *io, AioKind kind)
{
    AioRequest *request = request_of(io);

    request->kind = kind;
    request->ret = 0;
    request->transfer = (BaleTransfer) {
        .start_ns = bale_device_count_begin(&aio->counters),
    };
    if (kind == AIO_FLUSH) {
        if (io->may_block && flush_in_place(aio, request)) {
            return;
        }
        pthread_mutex_lock(&aio->lock);
        list_append(&aio->flushes, request);
        pthread_cond_signal(&aio->flush_work);
        pthread_mutex_unlock(&aio->lock);
        return;
    }

    g_assert(io->len > 0 && io->len % aio->file.block_size == 0);
    g_assert(io->offset % aio->file.block_size == 0);
    g_assert((uintptr_t)io->buf % aio->file.block_size == 0 ||
             !aio->file.direct);
    if (kind == AIO_STORE && aio->file.read_only) {
        request_complete(aio, request, -EROFS);
        return;
    }
    if (io->len > INT64_MAX || io->offset > INT64_MAX - io->len) {
        request_complete(aio, request, -EFBIG);
        return;
    }
    if (io->may_block) {
        transfer_now(aio, request);
        return;
    }
    pthread_mutex_lock(&aio->lock);
    list_append(&aio->pending, request);
    if (!aio->kernel) {
        pthread_cond_signal(&aio->work);
    }
    pthread_mutex_unlock(&aio->lock);
    if (aio->kernel && !is_plugged(aio)) {
        submit_pending(aio);
    }
}

static void aio_request(BaleDevice *dev, BaleDeviceIo *io, AioKind kind)
{
    AioDevice *aio = (AioDevice *)dev;

    callers_add(aio);
    aio_enter(aio, io, kind);
    callers_remove(aio);
}

static void aio_store(BaleDevice *dev, BaleDeviceIo *io)
{
    aio_request(dev, io, AIO_STORE);
}

static void aio_get(BaleDevice *dev, BaleDeviceIo *io)
{
    aio_request(dev, io, AIO_GET);
}

static void aio_flush(BaleDevice *dev, BaleDeviceIo *io)
{
    aio_request(dev, io, AIO_FLUSH);
}

static void aio_plug(BaleDevice *dev)
{
    plug((AioDevice *)dev);
}

static void aio_unplug(BaleDevice *dev)
{
    AioDevice *aio = (AioDevice *)dev;

    callers_add(aio);
    unplug(aio);
    if (aio->kernel && !is_plugged(aio)) {
        submit_pending(aio);
    }
    callers_remove(aio);
}

static void aio_get_info(BaleDevice *dev, BaleDeviceInfo *info)
{
    AioDevice *aio = (AioDevice *)dev;
    int64_t size = bale_file_size(&aio->file);

    *info = (BaleDeviceInfo) {
        .name = "aio",
        .block_size = aio->file.block_size,
        .size = size < 0 ? 0 : (uint64_t)size,
        .max_size = aio->file.is_block ? (uint64_t)MAX(size, 0) : UINT64_MAX,
        .read_only = aio->file.read_only,
        .fixed_size = aio->file.is_block,
        /* What a block device answers after a discard is its own affair. */
        .release_zeroes = !aio->file.is_block,
    };
}

static int aio_allocate(BaleDevice *dev, uint64_t offset, uint64_t len)
{
    AioDevice *aio = (AioDevice *)dev;

    return bale_device_count_call(&aio->counters, BALE_DEVICE_ALLOCATE,
                                  bale_file_allocate(&aio->file, offset, len));
}

static int aio_release(BaleDevice *dev, uint64_t offset, uint64_t len)
{
    AioDevice *aio = (AioDevice *)dev;

    return bale_device_count_call(&aio->counters, BALE_DEVICE_RELEASE,
                                  bale_file_release(&aio->file, offset, len));
}

static int aio_truncate(BaleDevice *dev, uint64_t size)
{
    return bale_file_truncate(&((AioDevice *)dev)->file, size);
}

static void aio_get_stats(BaleDevice *dev, BaleDeviceStats *stats)
{
    bale_device_counters_get(&((AioDevice *)dev)->counters, stats);
}

static void aio_reset_stats(BaleDevice *dev)
{
    bale_device_counters_reset(&((AioDevice *)dev)->counters);
}

/* "backend": how transfers are made, for people and tests. */
static int aio_command(BaleDevice *dev, const char *command, char **reply)
{
    AioDevice *aio = (AioDevice *)dev;

    *reply = NULL;
    if (strcmp(command, "backend") != 0) {
        return -ENOTSUP;
    }
    *reply = g_strdup_printf("%s, %s", aio->kernel ? "libaio" : "threads",
                             aio->file.direct ? "O_DIRECT" : "page cache");
    return 0;
}

static void stop_threads(AioDevice *aio)
{
    pthread_mutex_lock(&aio->lock);
    g_assert(!aio->pending.head && !aio->flushes.head && !aio->in_flight);
    aio->stop = true;
    pthread_cond_broadcast(&aio->work);
    pthread_cond_broadcast(&aio->flush_work);
    pthread_mutex_unlock(&aio->lock);
    if (aio->reaper) {
        wake_reaper(aio);
        g_thread_join(aio->reaper);
    }
    for (unsigned i = 0; i < AIO_WORKERS; i++) {
        if (aio->workers[i]) {
            g_thread_join(aio->workers[i]);
        }
    }
    if (aio->flusher) {
        g_thread_join(aio->flusher);
    }
}

static void aio_destroy(BaleDevice *dev)
{
    AioDevice *aio = (AioDevice *)dev;

    callers_wait(aio);
    stop_threads(aio);
    if (aio->kernel) {
        io_destroy(aio->context);
    }
    if (aio->event_fd >= 0) {
        close(aio->event_fd);
    }
    bale_file_close(&aio->file);
    pthread_mutex_destroy(&aio->lock);
    pthread_cond_destroy(&aio->work);
    pthread_cond_destroy(&aio->flush_work);
    g_free(aio);
}

static const BaleDeviceOps aio_ops = {
    .interface_version = BALE_DEVICE_INTERFACE,
    .destroy = aio_destroy,
    .get_info = aio_get_info,
    .allocate = aio_allocate,
    .release = aio_release,
    .truncate = aio_truncate,
    .store = aio_store,
    .get = aio_get,
    .flush = aio_flush,
    .plug = aio_plug,
    .unplug = aio_unplug,
    .get_stats = aio_get_stats,
    .reset_stats = aio_reset_stats,
    .command = aio_command,
};

/* ---- opening ---------------------------------------------------------- */

/* Prepare libaio; without it the workers do the transfers. */
static void set_up_kernel(AioDevice *aio)
{
    int ret = (int)bale_fault_hook(BALE_FAULT_SETUP, 0, AIO_DEPTH, 0);

    if (ret == 0) {
        ret = io_setup(AIO_DEPTH, &aio->context);
    }
    if (ret == 0) {
        aio->event_fd = eventfd(0, EFD_CLOEXEC);
        aio->kernel = aio->event_fd >= 0;
        if (!aio->kernel) {
            ret = -errno;
            io_destroy(aio->context);
        }
    }
    if (ret < 0) {
        g_message("'%s': no asynchronous I/O from the kernel (%s), using "
                  "threads", aio->file.filename, g_strerror(-ret));
    }
}

/* Signals are for the threads of the program that we are in. */
static bool start_threads(AioDevice *aio, GError **errp)
{
    sigset_t all, before;
    bool ok;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    aio->flusher = g_thread_try_new("bale-flush", flusher_thread, aio, errp);
    ok = aio->flusher != NULL;
    if (ok && aio->kernel) {
        aio->reaper = g_thread_try_new("bale-aio", reaper_thread, aio, errp);
        ok = aio->reaper != NULL;
    }
    for (unsigned i = 0; ok && !aio->kernel && i < AIO_WORKERS; i++) {
        aio->workers[i] = g_thread_try_new("bale-io", worker_thread, aio,
                                           errp);
        ok = aio->workers[i] != NULL;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return ok;
}

BaleDevice *bale_device_aio_open(const char *filename, unsigned flags,
                                 GError **errp)
{
    AioDevice *aio = g_new0(AioDevice, 1);

    aio->dev.ops = &aio_ops;
    aio->event_fd = -1;
    if (!bale_file_open(&aio->file, filename, flags, errp)) {
        g_free(aio);
        return NULL;
    }
    pthread_mutex_init(&aio->lock, NULL);
    pthread_cond_init(&aio->work, NULL);
    pthread_cond_init(&aio->flush_work, NULL);
    if (aio->file.direct) {
        set_up_kernel(aio);
    }
    if (!start_threads(aio, errp)) {
        g_prefix_error(errp, "'%s': ", filename);
        aio_destroy(&aio->dev);
        return NULL;
    }
    return &aio->dev;
}
