/*
 * The store: open, create, read, write, flush, check.  This header is the
 * manual of the storage engine; docs/architecture.md tells how it works inside.
 *
 * A store keeps compressed clusters of disk images in the pages of a
 * log-structured device (extstore/device.h).  It owns its worker threads,
 * which start when it is opened or created and end when it is closed.
 *
 * Acknowledgement contract
 * - A completed write is visible to every later read of that image.  It may be
 *   lost in a crash, sector by sector, until it is flushed.
 * - A completed flush (or write with BALE_FUA) means that everything completed
 *   before the flush was submitted survives SIGKILL, a crash of the system and
 *   a power cut, on a device that honours its own flush.
 * - A completed create, delete, snapshot, rollback, resize, clear or
 *   checkpoint is durable, as is whatever else changes an image as a whole.
 * - Damage is answered with -EIO and a report, never with wrong data.
 * - A full store answers -ENOSPC, to the request that found no room.
 * - The first failed device flush or write-back poisons the open store: from
 *   then on writes and flushes fail with -EIO, and reads serve verified data
 *   only, until the store was closed and opened again or bale_store_revive()
 *   has written everything again that was not durable yet.
 *
 * Threads
 * - Requests (read, write, zero, flush) may be submitted from any thread and
 *   never block.  Their completion runs once, on an engine or device thread or
 *   inside the submitting call, with no engine lock held; it must not block.
 * - All other functions may block on the device.  They must not be called from
 *   a completion, nor from a thread that the device needs for its completions.
 * - bale_image_status and the getters neither block nor do device I/O, except
 *   that status may wait for a part of the index to be loaded once.
 *
 * Units: offsets and lengths are bytes.  Requests have any alignment and must
 * lie inside the image, and reads and writes are at most BALE_REQUEST_MAX long
 * (-EINVAL else).
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_EXTSTORE_STORE_H
#define BALE_EXTSTORE_STORE_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "extstore/codec.h"
#include "extstore/device.h"
#include "util/workers.h" /* BALE_WORKERS_MAX */

typedef struct BaleStore BaleStore;
typedef struct BaleImage BaleImage;

/* Completion of a request; @ret is 0 or a negative errno. */
typedef void BaleDone(void *opaque, int ret);

/* --- limits and defaults (docs/format.md, "Caps") --- */

#define BALE_CLUSTER_SIZE_MIN     4096u
#define BALE_CLUSTER_SIZE_MAX     (2u << 20)
#define BALE_CLUSTER_SIZE_DEFAULT 65536u
#define BALE_PAGE_SIZE_UNIT       (2ull << 20)  /* a page is a multiple */
#define BALE_PAGE_SIZE_MAX        (1ull << 30)
#define BALE_PAGE_SIZE_DEFAULT    (64ull << 20)
#define BALE_PAGE_CLUSTERS_MIN    4u    /* page_size >= 4 * cluster_size */
#define BALE_MAX_SIZE_PAGES_MIN   8u    /* that a maximum size has room for */
#define BALE_IMAGE_CLUSTERS_MAX   (1ull << 36)
#define BALE_IMAGE_SIZE_MAX       (1ull << 60)
#define BALE_BACKING_NAME_MAX     4095u /* bytes without the final NUL */
#define BALE_IMAGE_NAME_MAX       255u  /* bytes; also of a snapshot */
#define BALE_LAYER_DEPTH_MAX      256u  /* layers of one image */
#define BALE_REQUEST_MAX          (64u << 20) /* bytes of one read or write */

/*
 * What opening a store on a device of N bytes takes at most, whatever lies on
 * it, beside the cache and the compression threads' buffers:
 *
 *   memory   BALE_OPEN_MEMORY_BASE + BALE_OPEN_MEMORY_FACTOR * N for layers,
 *            unfinished clusters and indexes (16 bytes a cluster; three times
 *            as much while an index is replaced by a larger one), and 8 * N
 *            for lists of what was found
 *   work     BALE_OPEN_READ_BASE + BALE_OPEN_READ_FACTOR * N bytes read, and
 *            so many verified; BALE_OPEN_CLUSTERS_BASE clusters, and one more
 *            for each BALE_OPEN_CLUSTER_BYTES of N, set by records
 *
 * What would take more does not open, unless BaleOpenOptions.repair is set.
 * Checkpoints make sure that no store of ours does.
 */
#define BALE_OPEN_MEMORY_BASE     (128ull << 20)
#define BALE_OPEN_MEMORY_FACTOR   16u
#define BALE_OPEN_READ_BASE       (1ull << 30)
#define BALE_OPEN_READ_FACTOR     64u
#define BALE_OPEN_CLUSTERS_BASE   (1ull << 28)
#define BALE_OPEN_CLUSTER_BYTES   16u

/* Error domain of open, create and check. */
#define BALE_STORE_ERROR (bale_store_error_quark())
GQuark bale_store_error_quark(void);
typedef enum BaleStoreErrorCode {
    BALE_STORE_ERROR_NOT_A_STORE, /* no superblock there: -EINVAL */
    BALE_STORE_ERROR_UNSUPPORTED, /* newer version, unknown feature: -ENOTSUP */
    BALE_STORE_ERROR_CORRUPT,     /* damaged beyond opening: -EIO */
    BALE_STORE_ERROR_INVALID,     /* an option out of range: -EINVAL */
    BALE_STORE_ERROR_IO,          /* the device failed: -EIO */
    BALE_STORE_ERROR_NO_SPACE,    /* -ENOSPC */
    BALE_STORE_ERROR_NO_MEMORY,   /* -ENOMEM */
    BALE_STORE_ERROR_READ_ONLY,   /* -EROFS */
} BaleStoreErrorCode;

/* The negative errno that fits @err, as listed above; -EIO for others. */
int bale_error_to_errno(const GError *err);

/* --- creating and opening --- */

typedef struct BaleCreateOptions {
    const char *image;       /* its name, borrowed; NULL: the unnamed one */
    uint64_t size;           /* of the image, bytes */
    uint32_t cluster_size;   /* bytes, power of two; 0: default */
    uint64_t page_size;      /* bytes, multiple of 2 MiB; 0: default, see
                              * bale_create_page_size() */
    BaleCodec codec;         /* for new clusters of the image */
    int level;               /* of the codec; 0: the codec's default */
    const char *backing_file;   /* borrowed; NULL: none.  Opaque to the engine,
                                 * which never opens it. */
    const char *backing_format; /* borrowed; NULL: not given */
    uint64_t max_size;       /* of the store, bytes; 0: no limit */
} BaleCreateOptions;

/*
 * The page size that @o stands for.  By default it is smaller if @room, bytes
 * (0: unlimited), or the store's maximum size is so small that there would be
 * but a few pages.
 */
uint64_t bale_create_page_size(const BaleCreateOptions *o, uint64_t room);

/* Check @o without touching a device.  False with @errp set if out of range. */
bool bale_create_options_check(const BaleCreateOptions *o, GError **errp);

/*
 * Write an empty store with one image to @dev, durably.  @dev is
 * borrowed.  What was on the device before is lost, but only once the options
 * have been checked.
 */
bool bale_store_create(BaleDevice *dev, const BaleCreateOptions *o,
                       GError **errp);

/* Called from an engine thread when the store is poisoned. */
typedef void BaleFailedNotify(void *opaque, const char *reason);

/* Called from the thread in which bale_store_revive() was successful. */
typedef void BaleRevivedNotify(void *opaque);

/* Called from an engine thread when damage is found while serving a request. */
typedef void BaleDamageNotify(void *opaque, const char *what);

typedef struct BaleOpenOptions {
    bool read_only;
    bool repair;             /* open for writing although marked corrupt: only
                              * bale_store_check() with BALE_CHECK_FIX_ALL makes
                              * other writes possible */
    unsigned workers;        /* compression threads; 0: one for each core */
    uint64_t checkpoint_bytes; /* appended between two checkpoints of a store
                              * in use; 0: as many as seems good */
    uint64_t cache_size;     /* bytes of decompressed clusters kept; 0: none;
                              * BALE_CACHE_SIZE_DEFAULT is a good start, more
                              * than BALE_CACHE_SIZE_MAX is refused */
    uint32_t ahead_bytes;    /* of zeroes, written at a time into the room that
                              * small flushes will take; 0: as many as seems
                              * good; BALE_AHEAD_NONE: none */
    uint32_t mutable_clusters; /* that wait in memory, of each image, at least
                              * 4; 0: as many as a store may have.  For tests:
                              * what has more cannot be opened with less */
    uint64_t max_size;       /* in place of the stored one, bytes; 0: the
                              * stored one; BALE_MAX_SIZE_NONE: none */
    BaleFailedNotify *failed; /* optional */
    BaleRevivedNotify *revived; /* optional */
    BaleDamageNotify *damage; /* optional */
    void *notify_opaque;
} BaleOpenOptions;

#define BALE_CACHE_SIZE_DEFAULT (16ull << 20)
#define BALE_CACHE_SIZE_MAX     (1ull << 40)
#define BALE_MAX_SIZE_NONE      UINT64_MAX
#define BALE_AHEAD_NONE         UINT32_MAX

/*
 * Open the store on @dev.  @dev is transferred on success only: it is closed
 * by bale_store_close().  Nothing is written to the device before the first
 * write request.  A store that was not closed cleanly is recovered by a scan.
 */
BaleStore *bale_store_open(BaleDevice *dev, const BaleOpenOptions *o,
                           GError **errp);

/*
 * Flush, write what makes the next open quick, close the device, end the
 * threads, free @store.  No request is under way and no image is open.  False
 * with @errp set if not everything could be made durable; @store is gone all
 * the same, and the next open recovers what a flush had acknowledged.
 */
bool bale_store_close(BaleStore *store, GError **errp);

/*
 * The same without destroying @store: afterwards the device holds a cleanly
 * closed store.  The next write request opens it for writing again.
 */
bool bale_store_checkpoint(BaleStore *store, GError **errp);

/* Is the store poisoned?  Any thread; does not block. */
bool bale_store_poisoned(BaleStore *store);

/*
 * Make a poisoned store well again without closing it.  A failed flush is not
 * tried again: everything that no flush has proven is written again, from
 * memory or from what the device still holds of it, if that verifies; then the
 * device is flushed.  When this returns true nothing that was acknowledged is
 * lost, it is all durable but for what still waits in the mutable region, and
 * requests work.  When it returns false, with @errp set, the store is poisoned
 * as before.  Does nothing to a store that is well.  May block on the device.
 */
bool bale_store_revive(BaleStore *store, GError **errp);

/*
 * Flush, and write a checkpoint without ending the session, while requests go
 * on: an open after a crash begins there.  The store does so by itself now and
 * then; a flush never needs it.  Nothing happens if the store is closed cleanly
 * already.
 */
bool bale_store_checkpoint_running(BaleStore *store, GError **errp);

/*
 * Change between reading and writing.  To read-only: checkpoints first.  The
 * caller makes sure that the device accepts writes.  No write is under way.
 */
bool bale_store_set_read_only(BaleStore *store, bool read_only, GError **errp);

/*
 * Change the size of the cache, which forgets everything; at most
 * BALE_CACHE_SIZE_MAX.
 */
void bale_store_set_cache_size(BaleStore *store, uint64_t bytes);

/*
 * Change the number of compression threads; 0: one for each core.  On error it
 * stays what it was.  Does not wait for those that are too many.
 */
bool bale_store_set_workers(BaleStore *store, unsigned workers, GError **errp);

/*
 * Limit what the store may take to @bytes, from now on and when it is opened
 * again; 0: no limit but the device's.  At the limit writers get -ENOSPC once
 * compaction finds nothing to give back; a little is kept for what frees space
 * and for closing.  A limit below what is in use is right as well: nothing is
 * lost, and nothing more is written until enough was freed.  Durable when it
 * returns true.
 */
bool bale_store_set_max_size(BaleStore *store, uint64_t bytes, GError **errp);

/* True if first bytes of a device could belong to a store (probing). */
bool bale_store_probe(const void *buf, size_t len);

/* --- information --- */

typedef struct BaleStoreInfo {
    uint8_t uuid[16];
    uint32_t version;
    uint32_t cluster_size;
    uint64_t page_size;
    uint64_t max_size;        /* that counts now, bytes; 0: no limit */
    uint64_t generation;      /* of the newest superblock */
    bool clean;               /* was closed cleanly when opened */
    bool corrupt;             /* the corrupt bit is set */
    bool read_only;
    bool poisoned;
    uint64_t recovered_records; /* taken from a scan at this open */
    uint64_t torn_bytes;        /* dropped behind the barriers at this open */
    uint64_t damaged_records;   /* found at this open, below a barrier */
} BaleStoreInfo;

void bale_store_get_info(BaleStore *store, BaleStoreInfo *info);

#define BALE_HIST_BUCKETS 40

/* Latencies of one kind of request, nanoseconds. */
typedef struct BaleLatency {
    uint64_t count, sum, mean, p50, p95, p99, max;
} BaleLatency;

/* The pages of one bucket (fresh data, metadata, copies of compaction). */
typedef struct BaleBucketStats {
    uint64_t pages, live_bytes, dead_bytes;
} BaleBucketStats;

#define BALE_STATS_BUCKETS 3

/*
 * All members are uint64_t.  "Now" marks what bale_store_reset_stats() does
 * not touch; the others count from the open or the last reset.
 */
typedef struct BaleStoreStats {
    /*
     * The regions, now.  What is in the mutable region (mutable_bytes of it)
     * has no place in the log yet.  The others are positions in the log, bytes
     * since the open, that never go back:
     *
     *     durable_bytes <= stable_bytes <= sealed_bytes <= tail_bytes
     *
     * From stable_bytes to tail_bytes is the read-only region: in write
     * buffers, which take more records from sealed_bytes on.  From
     * durable_bytes to stable_bytes is the stable region: on the device, but
     * not flushed.  The durable region is what lies below.
     */
    uint64_t tail_bytes, sealed_bytes, stable_bytes, durable_bytes;
    uint64_t mutable_clusters, mutable_bytes; /* now */

    /* Pages, now; dead bytes are what is in use and not live. */
    uint64_t pages_free, pages_active, pages_sealed, pages_freeing;
    uint64_t live_bytes, used_bytes, dead_bytes;
    uint64_t overhead_bytes;           /* part of the dead ones that compaction
                                        * would not get rid of */
    BaleBucketStats buckets[BALE_STATS_BUCKETS];

    uint64_t records_appended, zero_records;
    uint64_t patches, patch_bytes;     /* appended by flushes; record bytes */
    uint64_t patches_live, patches_live_bytes; /* now: a recovery needs them */
    uint64_t logical_bytes;            /* guest bytes compressed */
    uint64_t stored_bytes;             /* record bytes appended for them */
    uint64_t segments, segment_bytes, padding_bytes;
    uint64_t ahead_bytes;       /* of zeroes written ahead of small flushes */
    uint64_t flushes, device_flushes, revivals;
    uint64_t write_amplification_permille; /* segment_bytes, with padding,
                                        * directories, checkpoints and copies,
                                        * per 1000 stored_bytes */
    uint64_t reads, read_bytes, writes, write_bytes, zeroes, zero_bytes;
    uint64_t reads_held;        /* small ones, until the device had fewer */
    uint64_t reads_at_once;     /* as many of these the device may have, now;
                                 * 0: any number */
    uint64_t read_modify_writes, memory_hits; /* hits: in write buffers */
    uint64_t incompressible;           /* clusters stored as they are */
    uint64_t unchanged_clusters;       /* not stored: see
                                        * bale_image_set_skip_unchanged() */
    uint64_t checksum_errors;

    /* The cluster cache; a miss is a demand read that found nothing. */
    uint64_t cache_hits, cache_misses;
    uint64_t cache_admissions, cache_rejections; /* to what is kept longer */
    uint64_t cache_entries, cache_bytes, cache_max_bytes; /* now */
    uint64_t readahead, readahead_bytes; /* requests; their length */
    uint64_t readahead_hits;           /* clusters that were then read */

    uint64_t checkpoints, checkpoint_bytes, checkpoint_ns, checkpoints_failed;
    uint64_t checkpoint_kept_bytes;    /* not written: nothing had changed */
    uint64_t compacted_pages, compacted_records, compacted_bytes;
    uint64_t compact_examined_bytes;
    uint64_t compact_running;          /* compactions under way, now */
    uint64_t compact_pending_bytes;    /* of pages that the background would
                                        * compact, now */
    uint64_t compact_paced_ns;         /* that it kept back for its rate, and
                                        * for requests */
    uint64_t writes_held_ns;           /* that writers were kept back for it */
    uint64_t space_waits;              /* times that a full store was waited
                                        * for */

    /* The index, now; its load is keys per slot of the primary buckets. */
    uint64_t index_entries, index_bytes, index_peak_bytes;
    uint64_t index_buckets, index_overflow_buckets, index_load_permille;
    uint64_t index_growing;            /* tables being replaced: 0 or 1 */
    uint64_t index_growths, index_rebuilds, index_shrinks, index_waits;
    /* Epochs, now. */
    uint64_t epoch, epoch_pending, epoch_readers, epoch_executed;

    /* Queues, now. */
    uint64_t reads_in_flight, writes_in_flight; /* requests of callers */
    uint64_t workers, workers_running, workers_queued;
    uint64_t write_buffers, write_buffers_in_flight;
    uint64_t write_buffers_waits;      /* appends that found none; counts */

    BaleLatency read_latency, write_latency, flush_latency;
    uint64_t read_ns[BALE_HIST_BUCKETS], write_ns[BALE_HIST_BUCKETS];
    uint64_t flush_ns[BALE_HIST_BUCKETS];  /* bucket i: below 2^(i+1) ns */
} BaleStoreStats;

void bale_store_get_stats(BaleStore *store, BaleStoreStats *stats);
void bale_store_reset_stats(BaleStore *store);
/* The device that @store owns; borrowed, valid until close. */
BaleDevice *bale_store_device(BaleStore *store);

/* --- images --- */

typedef struct BaleImageInfo {
    uint64_t size;            /* bytes */
    uint32_t cluster_size;    /* bytes */
    BaleCodec codec;
    int level;
    uint32_t layer;
    uint32_t layers;          /* how many there are under each other */
    bool read_only;
    bool has_backing_file;
    char name[BALE_IMAGE_NAME_MAX + 1];
    char backing_file[BALE_BACKING_NAME_MAX + 1];
    char backing_format[64];
    uint64_t allocated_clusters; /* that hold a record (data or zero); with
                                  * several layers an upper bound */
} BaleImageInfo;

/*
 * Open the image @name; NULL is the unnamed one, and NAME@SNAPSHOT is a
 * snapshot, which can only be read.  An image that is open already is the same
 * object once more.  Close it with bale_image_close() when no request on it is
 * under way.
 */
BaleImage *bale_image_open(BaleStore *store, const char *name, GError **errp);
void bale_image_close(BaleImage *image);
void bale_image_get_info(BaleImage *image, BaleImageInfo *info);
uint64_t bale_image_size(BaleImage *image);

/*
 * Reads what lies under the image where it has no cluster of its own.  The
 * engine calls it, from any thread, for reads of unallocated clusters and to
 * complete partial writes; it must not block, and calls @done once.  Bytes past
 * the end of what lies under are zeroes.  Without one they are all zeroes.
 */
typedef void BaleBackingRead(void *opaque, uint64_t offset, void *buf,
                             size_t len, BaleDone *done, void *done_opaque);
void bale_image_set_backing_read(BaleImage *image, BaleBackingRead *read,
                                 void *opaque);

/*
 * Optional: does anything lie under the image now?  Called from any thread,
 * for a request under way; the answer may change only while there is none.
 * Without it the answer is yes as soon as there is a BaleBackingRead, and
 * partial writes of unallocated clusters read and rewrite the whole cluster.
 */
typedef bool BaleBackingPresent(void *opaque);
void bale_image_set_backing_present(BaleImage *image,
                                    BaleBackingPresent *present);

/*
 * With @skip a write of a whole cluster first reads what the image shows there
 * (of its own, its layers, or what lies under it) and, if that is the same, is
 * over: nothing is stored.  So copying a whole disk over an older copy takes
 * only the space of what has changed, and stores nothing in the top layer but
 * that.  It costs reading the older copy.  Any thread.
 */
void bale_image_set_skip_unchanged(BaleImage *image, bool skip);

/*
 * In a store that is marked corrupt something is lost that has no name any
 * more: any cluster may have had newer data.  So reads fail with -EIO, and
 * bale_image_status() calls everything data; with @salvage they show what is
 * left, which may be old.  Before the first request.
 */
void bale_image_set_salvage(BaleImage *image, bool salvage);

typedef enum BaleRequestFlags {
    BALE_FUA     = 1 << 0, /* durable when it completes */
    BALE_DISCARD = 1 << 1, /* zero: where nothing lies under the image, drop
                            * the clusters instead of marking them zero */
} BaleRequestFlags;

/*
 * Requests.  @iov and the memory behind it are borrowed until @done; the sum
 * of the lengths is the length of the request.
 */
void bale_image_read(BaleImage *image, uint64_t offset,
                     const struct iovec *iov, int iovcnt, BaleDone *done,
                     void *opaque);
void bale_image_write(BaleImage *image, uint64_t offset,
                      const struct iovec *iov, int iovcnt, unsigned flags,
                      BaleDone *done, void *opaque);
/* Make [@offset, @offset + @len) read as zeroes. */
void bale_image_zero(BaleImage *image, uint64_t offset, uint64_t len,
                     unsigned flags, BaleDone *done, void *opaque);
void bale_store_flush(BaleStore *store, BaleDone *done, void *opaque);

typedef enum BaleClusterStatus {
    BALE_CLUSTER_UNALLOCATED, /* what lies under it shows through */
    BALE_CLUSTER_ZERO,
    BALE_CLUSTER_DATA,
} BaleClusterStatus;

/*
 * The status at @offset (inside the image), and in *@run how many of the @len
 * bytes from there have the same one (at least 1).  0 or a negative errno.
 */
int bale_image_status(BaleImage *image, uint64_t offset, uint64_t len,
                      BaleClusterStatus *status, uint64_t *run);

/* Blocking forms for threads that may wait. */
int bale_image_read_sync(BaleImage *image, uint64_t offset, void *buf,
                         size_t len);
int bale_image_write_sync(BaleImage *image, uint64_t offset, const void *buf,
                          size_t len, unsigned flags);
int bale_image_zero_sync(BaleImage *image, uint64_t offset, uint64_t len,
                         unsigned flags);
int bale_store_flush_sync(BaleStore *store);

/*
 * Blocking and durable when they return true.  Resizing down drops what is cut
 * off.  What growing adds is not allocated: it reads as zeroes or, where
 * something longer lies under the image, shows that until it is zeroed.  The
 * caller has no write to the cut range under way.
 */
bool bale_image_resize(BaleImage *image, uint64_t size, GError **errp);
bool bale_image_set_backing(BaleImage *image, const char *backing_file,
                            const char *backing_format, GError **errp);
/* Drop all clusters: the whole image shows what lies under it. */
bool bale_image_clear(BaleImage *image, GError **errp);

/*
 * --- many images, snapshots ---
 *
 * An image's name is 1 to BALE_IMAGE_NAME_MAX bytes of UTF-8 without control
 * characters and without '@'; NULL and "" stand for the unnamed image.  A
 * snapshot's name is the same; wherever one is asked for, its id in digits will
 * do.
 *
 * All of these may block, are durable when they return true, and change nothing
 * when they return false (unless the store is poisoned).  Snapshots and clones
 * take the same time whatever an image's size: the clusters that an image has
 * so far stay in a layer that is frozen, and it goes on in a new one.  Space of
 * what is deleted comes back by compaction.
 */

typedef struct BaleImageOptions {
    const char *name;           /* borrowed, as are all of these */
    uint64_t size;              /* bytes */
    BaleCodec codec;
    int level;
    const char *backing_file;   /* NULL: none */
    const char *backing_format; /* NULL: not given */
} BaleImageOptions;

bool bale_image_create(BaleStore *store, const BaleImageOptions *o,
                       GError **errp);
/* With its snapshots.  Neither it nor one of them may be open. */
bool bale_image_delete(BaleStore *store, const char *name, GError **errp);
bool bale_image_rename(BaleStore *store, const char *name,
                       const char *new_name, GError **errp);
/* From then on writes fail with -EROFS, also where it is open. */
bool bale_image_set_read_only(BaleStore *store, const char *name,
                              bool read_only, GError **errp);
/* A new image that shows what @name, or its @snapshot (or NULL), shows now. */
bool bale_image_clone(BaleStore *store, const char *name,
                      const char *snapshot, const char *new_name,
                      GError **errp);

typedef struct BaleFlattenOptions {
    bool (*progress)(void *opaque, uint64_t done, uint64_t total);
    void *opaque;
} BaleFlattenOptions;

/*
 * Copy what the image shows of other layers into its own, which then lies over
 * nothing.  It may be in use.  @o may be NULL; its progress may be, or return
 * false to stop, which is no error.
 */
bool bale_image_flatten(BaleStore *store, const char *name,
                        const BaleFlattenOptions *o, GError **errp);

typedef struct BaleSnapshotInfo {
    const char *name;        /* borrowed */
    uint64_t date_s;         /* since 1970; 0: now */
    uint32_t date_ns;
    uint64_t vm_clock_ns;
} BaleSnapshotInfo;

bool bale_snapshot_create(BaleStore *store, const char *image,
                          const BaleSnapshotInfo *info, GError **errp);
/* It may not be open.  Clusters that others need stay. */
bool bale_snapshot_delete(BaleStore *store, const char *image,
                          const char *snapshot, GError **errp);
/*
 * The image shows again what the snapshot shows, and has its size.  What was
 * written since is lost.  No request on the image is under way.
 */
bool bale_snapshot_rollback(BaleStore *store, const char *image,
                            const char *snapshot, GError **errp);

typedef struct BaleImageListEntry {
    char *name;
    uint32_t id;
    uint64_t size;           /* bytes */
    uint64_t own_bytes;      /* about; of records that only it can change */
    uint32_t layers, snapshots;
    bool read_only;
    BaleCodec codec;
    int level;
    uint64_t date_s;         /* 0: not known */
} BaleImageListEntry;

typedef struct BaleSnapshotListEntry {
    char *name;
    uint32_t id;
    uint64_t size;
    uint64_t own_bytes;
    uint64_t date_s;
    uint32_t date_ns;
    uint64_t vm_clock_ns;
} BaleSnapshotListEntry;

/* BaleImageListEntry; free with g_array_unref(). */
GArray *bale_image_list(BaleStore *store);
/* BaleSnapshotListEntry, oldest first; NULL: there is no such image. */
GArray *bale_snapshot_list(BaleStore *store, const char *image,
                           GError **errp);

/* --- compaction --- */

typedef struct BaleCompactOptions {
    uint64_t rate;     /* bytes examined a second; 0: unlimited */
    /* Optional: the rate, in place of @rate; may change. */
    uint64_t (*get_rate)(void *opaque);
    /* Optional: told about every 2 MiB or so; return false to stop. */
    bool (*progress)(void *opaque, uint64_t done, uint64_t total);
    void *opaque;
} BaleCompactOptions;

/*
 * Move what is live out of fragmented pages and give their space back.  The
 * store may be in use meanwhile; writers who find no space, and checkpoints,
 * come first.  (In the background the same happens by itself, once a sixth of
 * the store is garbage.)  True also when it was stopped.
 */
bool bale_store_compact(BaleStore *store, const BaleCompactOptions *o,
                        GError **errp);

/*
 * Compaction in the background: off (then it is done only for who finds no
 * space), or on, at @rate bytes examined a second at most (0: unlimited).  At
 * first it is on and unlimited.  It makes way for requests in any case.
 */
void bale_store_set_compact(BaleStore *store, bool on, uint64_t rate);

/* --- check --- */

typedef enum BaleCheckFlags {
    BALE_CHECK_DATA     = 1 << 0, /* read and verify every record's payload */
    BALE_CHECK_FIX_LEAKS = 1 << 1,
    BALE_CHECK_FIX_ALL  = 1 << 2, /* rebuild the index by scan, restore
                                   * superblock copies, clear the corrupt bit */
} BaleCheckFlags;

typedef struct BaleCheckResult {
    uint64_t damaged;          /* records that cannot be read */
    uint64_t leaked_pages;     /* allocated but unreachable */
    uint64_t wrong_counters;
    uint64_t bad_superblocks;
    uint64_t fixed;
    uint64_t clusters_total, clusters_allocated, clusters_compressed;
    uint64_t checked_records, checked_bytes;
    uint64_t end_offset;       /* one past the last byte in use */
    bool corrupt;              /* marked so, before any repair */
} BaleCheckResult;

/*
 * One finding, in one line (image, cluster, page, offset) or, with @what NULL,
 * progress: @done of @total bytes.  Return false to stop the check.
 */
typedef bool BaleCheckReport(void *opaque, const char *what, uint64_t done,
                             uint64_t total);

/*
 * Check an open store; it may be in use.  False with @errp set only when the
 * check itself could not be done; findings are in @result.
 */
bool bale_store_check(BaleStore *store, unsigned flags,
                      BaleCheckReport *report, void *opaque,
                      BaleCheckResult *result, GError **errp);

#endif
