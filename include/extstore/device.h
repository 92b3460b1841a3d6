/*
 * Device plug-ins: where a store's bytes live.
 *
 * A store sees its device as one linear range of bytes.  The first
 * BALE_SUPER_SIZE bytes are the super area; after it come pages of equal size.
 * A device implements the small versioned vtable below; the engine drives it.
 * The shape (create_instance with an interface version, get_info, allocate,
 * release, store, get, flush, get_stats, reset_stats and an escape for
 * commands of one's own) follows memcached's storage-engine interface.
 *
 * Threads: store, get and flush are called from any thread, also several at
 * once, must not block on the device (but see may_block), and complete exactly
 * once through io->done, from any thread, possibly before they return.  All
 * other functions may block; they are called from engine threads, never from a
 * thread that a completion of this device needs in order to run.
 *
 * Errors: 0 or a negative errno.  A device answers short transfers, EINTR and
 * EAGAIN itself: a completion with 0 means that every byte was transferred.  A
 * read past the end of the device yields zeroes.  A completed store may be
 * lost in a crash until a flush that was issued after its completion has
 * completed with 0.  A failed flush is never retried by the device.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_EXTSTORE_DEVICE_H
#define BALE_EXTSTORE_DEVICE_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

/* Interface version that this header describes. */
#define BALE_DEVICE_INTERFACE 1

/* Name of the function that a plug-in's shared object exports. */
#define BALE_DEVICE_CREATE_SYMBOL "bale_device_create_instance"

typedef struct BaleDevice BaleDevice;
typedef struct BaleDeviceIo BaleDeviceIo;
typedef struct BaleDeviceOps BaleDeviceOps;

/* Completion: @ret is 0 or a negative errno.  @io is the engine's again. */
typedef void BaleDeviceDone(BaleDeviceIo *io, int ret);

/*
 * One transfer.  The engine owns it and keeps it alive and unchanged until
 * @done was called.  @offset, @len and @buf are multiples of the device's
 * block size (for flush, @buf and @len are unused).
 */
struct BaleDeviceIo {
    uint64_t offset; /* bytes from the start of the device */
    void *buf;       /* borrowed until @done */
    size_t len;      /* bytes */
    BaleDeviceDone *done;
    /*
     * Whoever submits this has nothing to do but wait for it: a device may do
     * all of it, and complete it, before the call returns.
     */
    bool may_block;
    /* For the device's own use between submission and completion. */
    union {
        uint64_t words[16];
        void *pointers[16];
    } priv;
};

typedef struct BaleDeviceInfo {
    const char *name;      /* kind of device, "aio", "bdrv" …; static */
    uint32_t block_size;   /* bytes; alignment of offset, len and memory;
                            * a power of two from 512 to 65536 */
    uint64_t size;         /* bytes that exist now */
    uint64_t max_size;     /* bytes it can grow to; UINT64_MAX: unlimited */
    bool read_only;
    bool fixed_size;       /* a block device: allocate cannot grow it */
    bool release_zeroes;   /* a released range reads as zeroes, durably after
                            * the next flush */
} BaleDeviceInfo;

/* Latency histograms have one bucket for each power of two of nanoseconds. */
#define BALE_DEVICE_HIST_BUCKETS 40

typedef struct BaleDeviceStats {
    uint64_t gets, stores, flushes, allocates, releases; /* calls finished */
    uint64_t get_bytes, store_bytes;
    uint64_t errors;       /* completions with an error */
    uint64_t retries;      /* short transfers, EINTR, EAGAIN answered inside */
    uint64_t queue_depth;  /* transfers under way now */
    uint64_t get_ns[BALE_DEVICE_HIST_BUCKETS];
    uint64_t store_ns[BALE_DEVICE_HIST_BUCKETS];
    uint64_t flush_ns[BALE_DEVICE_HIST_BUCKETS];
} BaleDeviceStats;

struct BaleDeviceOps {
    /* The interface version that the device was compiled against. */
    uint32_t interface_version;

    /* Release everything.  No transfer is under way. */
    void (*destroy)(BaleDevice *dev);

    void (*get_info)(BaleDevice *dev, BaleDeviceInfo *info);

    /*
     * Optional (may be NULL).  Called once a store's geometry is known, before
     * any access past the super area: pages of @page_size bytes start at
     * @super_size.
     */
    int (*set_geometry)(BaleDevice *dev, uint64_t super_size,
                        uint64_t page_size);

    /*
     * Make sure that [@offset, @offset + @len) exists and, as far as the
     * device can promise it, that stores into it cannot fail for lack of
     * space.  -ENOSPC when there is no room.
     */
    int (*allocate)(BaleDevice *dev, uint64_t offset, uint64_t len);

    /*
     * The contents of [@offset, @offset + @len) are not needed any more: give
     * the space back to the host (punch hole, discard).  The device keeps its
     * size.  -ENOTSUP if the device cannot.
     */
    int (*release)(BaleDevice *dev, uint64_t offset, uint64_t len);

    /*
     * Optional (may be NULL).  Set the size of a growable device: cut it, or
     * let it grow without a promise of space.
     */
    int (*truncate)(BaleDevice *dev, uint64_t size);

    void (*store)(BaleDevice *dev, BaleDeviceIo *io);
    void (*get)(BaleDevice *dev, BaleDeviceIo *io);
    void (*flush)(BaleDevice *dev, BaleDeviceIo *io);

    /*
     * Optional (may be NULL).  The engine brackets a batch of store and get
     * calls made by one thread, so that the device can submit them together.
     * The device may hold them back until unplug: the thread must not wait
     * for one of them before.
     */
    void (*plug)(BaleDevice *dev);
    void (*unplug)(BaleDevice *dev);

    void (*get_stats)(BaleDevice *dev, BaleDeviceStats *stats);
    void (*reset_stats)(BaleDevice *dev);

    /*
     * Escape for commands of the device's own.  *@reply is a newly allocated
     * string that the caller frees, or NULL.  -ENOTSUP: unknown command.
     */
    int (*command)(BaleDevice *dev, const char *command, char **reply);
};

/* An instance: a device's own struct begins with this. */
struct BaleDevice {
    const BaleDeviceOps *ops;
};

/* How to open; also the flags argument of create_instance. */
typedef enum BaleDeviceFlags {
    BALE_DEVICE_READ_ONLY = 1 << 0,
    BALE_DEVICE_CREATE    = 1 << 1, /* make the file, mode 0600; it must not
                                     * exist unless TRUNCATE is given too */
    BALE_DEVICE_TRUNCATE  = 1 << 2, /* empty an existing file */
    BALE_DEVICE_BUFFERED  = 1 << 3, /* page cache instead of O_DIRECT */
    BALE_DEVICE_NO_LOCK   = 1 << 4, /* do not lock against other openers */
} BaleDeviceFlags;

/*
 * What a plug-in exports under BALE_DEVICE_CREATE_SYMBOL.  @interface is the
 * engine's BALE_DEVICE_INTERFACE; a plug-in that does not know it returns NULL
 * with @errp set.  @target and @flags are the user's; @target is borrowed.
 */
typedef BaleDevice *BaleDeviceCreateInstance(uint32_t interface,
                                             const char *target,
                                             unsigned flags, GError **errp);

/*
 * The default device: libaio and O_DIRECT on a regular file or a block device,
 * which is locked (writers exclusively, readers shared; for the life of the
 * device) unless BALE_DEVICE_NO_LOCK.  Falls back to buffered I/O, with one
 * warning through g_warning(), where the file system refuses O_DIRECT.
 * Errors name the file and say what is wrong.
 */
BaleDevice *bale_device_aio_open(const char *filename, unsigned flags,
                                 GError **errp);

/*
 * Load the shared object @plugin, check its interface version, and create an
 * instance for @target.  The object stays loaded for the life of the process.
 */
BaleDevice *bale_device_plugin_open(const char *plugin, const char *target,
                                    unsigned flags, GError **errp);

/* Blocking forms for engine threads: submit, wait for the completion. */
int bale_device_get_sync(BaleDevice *dev, uint64_t offset, void *buf,
                         size_t len);
int bale_device_store_sync(BaleDevice *dev, uint64_t offset, const void *buf,
                           size_t len);
int bale_device_flush_sync(BaleDevice *dev);

/* Destroy @dev; NULL is allowed. */
void bale_device_close(BaleDevice *dev);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(BaleDevice, bale_device_close)

#endif
