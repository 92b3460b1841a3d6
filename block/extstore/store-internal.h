/*
 * The inside of a store: what its parts share.  docs/architecture.md tells the
 * whole; this header tells who owns which field.
 *
 *     request.c     requests on clusters: write, zero, flush
 *     request-read.c  and read
 *     read-gate.c   how many small reads the device is given at once
 *     readahead.c   what to read before it is asked for
 *     image.c       images: their records, their status
 *     layer.c       layers: which record holds a cluster
 *     mutable.c     clusters written in part, on a seqcache
 *     patch.c       what of these the log has as patches
 *     patch-pack.c  and how these are compressed
 *     cache.c       decompressed clusters in memory
 *     log.c         appends records to pages through write buffers; flushes
 *     log-segment.c what a segment is while it is in a write buffer
 *     ahead.c       zeroes in the room that small flushes will take
 *     page.c        the page table: allocates, counts, frees pages
 *     recover*.c    reads a checkpoint, or rebuilds the state by a scan
 *     checkpoint.c  writes a checkpoint and superblocks
 *     store.c       create, open, close
 *     stats.c       what it tells about itself in numbers
 *     revive.c      writes again what a failed store had not made durable
 *     compact.c     moves what is live out of a fragmented page
 *     compact-run.c which page, when, how fast
 *     maintain.c    the thread that compacts and gives pages back
 *     check.c       check and repair
 *
 * Locks, in the order in which they may be taken: session_lock, range_lock,
 * the mutable region's, the cache's, log_lock.  No lock is held while the
 * device is called or a completion runs, but for session_lock.
 * docs/locking.md is the reference.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_EXTSTORE_STORE_INTERNAL_H
#define BALE_EXTSTORE_STORE_INTERNAL_H

#include <glib.h>
#include <pthread.h>

#include "extstore/store.h"
#include "format.h"
#include "read-gate-internal.h"
#include "util/epoch.h"
#include "util/histogram.h"
#include "util/index.h"
#include "util/workers.h"

/* Bytes of one write buffer, unless clusters need larger ones. */
#define WRITE_BUFFER_SIZE (2u << 20)
/* Write buffers of a store: open ones, in flight, and being filled. */
#define WRITE_BUFFERS_MAX 8u
/* Sequential readers of an image that are told apart. */
#define READ_STREAMS 8u
/* Space is asked of the device in steps of so many write buffers. */
#define ALLOCATE_BUFFERS 4u
#define PAGE_NONE UINT64_MAX

typedef struct BalePage BalePage;
typedef struct BaleWriteBuffer BaleWriteBuffer;
typedef struct BaleFlushWaiter BaleFlushWaiter;
typedef struct BaleCache BaleCache;
typedef struct BaleMutable BaleMutable;
typedef struct BalePatchTable BalePatchTable;
typedef struct BaleLayer BaleLayer;

/* --- pages (page.c); all fields under log_lock --- */

typedef enum BalePageState {
    BALE_PAGE_FREE,      /* on the free list, or beyond the device's end */
    BALE_PAGE_ACTIVE,    /* appended to by one bucket */
    BALE_PAGE_SEALED,    /* holds records, is not appended to */
    BALE_PAGE_DEAD,      /* waits for a flush */
    BALE_PAGE_REPLACED,  /* waits for barriers to be appended */
    BALE_PAGE_BARRED,    /* waits for a flush of these */
    BALE_PAGE_MARKING,   /* its header is being marked as freed */
    BALE_PAGE_MARKED,    /* waits for a flush */
    BALE_PAGE_RELEASING, /* its space is being given back */
} BalePageState;

struct BalePage {
    uint64_t version;       /* 0 while free */
    uint64_t end;           /* of the last segment given out, in the page */
    uint64_t allocated;     /* bytes of the page that the device has promised */
    uint64_t proven;        /* a flush has proven everything below */
    uint64_t live_bytes;
    uint64_t overhead;      /* headers, directories, padding, tombstones: what
                             * compaction would not get rid of; a lower bound */
    uint64_t order;         /* of opening, in this process; 0: before it */
    uint64_t first_seq;
    uint64_t tombstone_seq; /* highest of a drop, a shrinking image; 0 */
    uint64_t free_flush;    /* DEAD, BARRED, MARKED: request to wait for */
    uint32_t in_flight;     /* its write buffers not yet on the device */
    uint32_t readers;       /* reads under way, of device or buffers */
    uint8_t bucket;
    uint8_t state;
    bool compact_stuck;     /* something in it cannot be moved */
    bool compacting;        /* somebody is at it */
    bool barrier_pending;   /* proven is to be written, see barrier_page */
    uint64_t barrier_page;  /* 1 + the page whose segment says what is proven
                             * here; 0: a checkpoint does, or nothing */
#define BARRIER_PAGE_UNKNOWN UINT64_MAX
};

/* --- write buffers (log.c) --- */

struct BaleWriteBuffer {
    BaleStore *store;
    uint8_t *buf;        /* WRITE_BUFFER bytes, aligned to a block */
    unsigned number;     /* in the store's list of buffers */
    /* Set when the buffer is opened, then constant while in use. */
    uint64_t page;
    uint64_t version;
    uint64_t offset;     /* in the page, of buf[0] */
    uint32_t segment;    /* where in buf the segment begins */
    uint32_t limit;      /* the segment ends at or before this */
    uint32_t first;      /* where the records begin */
    uint64_t seq;        /* of fresh data: the next one when it was opened */
    uint32_t barriers;
    uint8_t bucket;
    BaleBarrier barrier[BALE_BARRIERS_MAX];
    /* Atomic: what its appends add to. */
    uint64_t live;       /* bytes that the page does not count yet */
    int32_t copying;     /* records - appends that are done; 0 - them while it
                          * is open */
    /* Under log_lock, and constant once it is sealed. */
    uint32_t used;       /* bytes of buf given out to records */
    uint32_t records;
    uint32_t len;        /* bytes to write */
    uint64_t last_seq;   /* of its segment, if that has no records */
    uint64_t id;         /* order of sealing, 0 before */
    /* Under log_lock. */
    uint32_t asked;      /* bytes that the device was asked to write */
    uint32_t pins;       /* readers */
    bool stable;
    bool failed;
    BaleDeviceIo io;
    BaleWriteBuffer *next; /* free list, or list to submit */
};

/* --- zeroes ahead of small flushes (ahead.c); all fields under log_lock --- */

typedef struct BaleAhead {
    uint32_t bytes;     /* at a time, never changed; 0: none at all */
    int64_t credit;     /* bytes that small flushes have left for it */
    uint32_t step;      /* bytes the last time; 0: it did not go on */
    uint64_t page, version; /* where; PAGE_NONE: nowhere yet */
    uint64_t end;       /* in that page, of the zeroes that were written */
    bool busy;          /* [from, from + len) is being written, or failed to */
    bool failed;
    uint64_t from, len;
    uint8_t *zeroes;    /* made as needed */
    BaleDeviceIo io;
} BaleAhead;

/* --- the store --- */

typedef struct BaleWorkerCodec {
    BaleCodecContext *context;
    uint8_t codec;
    int8_t level;
} BaleWorkerCodec;

/* Codecs and levels that a worker keeps contexts for. */
#define WORKER_CODECS_MAX 4u

typedef struct BaleWorkerContext {
    BaleCodecContext *codec; /* decompresses */
    BaleWorkerCodec codecs[WORKER_CODECS_MAX]; /* made as needed */
    unsigned next_codec;
    uint32_t cluster_size;
    uint8_t *cluster; /* one cluster */
    uint8_t *packed;  /* compressed output, one cluster */
} BaleWorkerContext;

/* What a layer knows of BALE_CHUNK_CLUSTERS clusters. */
typedef struct BaleChunk {
    uint32_t entries;     /* of the index; atomic */
    bool changed;         /* since the newest checkpoint copied it; atomic */
    /* That copy, address 0: none.  Changed by who writes a checkpoint. */
    uint32_t payload_len;
    uint64_t address, version;
} BaleChunk;

/* A set of clusters (layer.c). */
#define BALE_CHUNK_GROUP 128u

struct BaleLayer {
    BaleStore *store;        /* constant, as is id */
    uint32_t id;
    BaleIndex *index;        /* cluster -> value; latch-free */
    /*
     * Its chunks, in groups that are made when they are needed: a huge layer
     * that holds nothing is small.
     */
    BaleChunk **chunk_groups; /* BALE_CHUNK_GROUP of them or NULL; atomic */
    uint64_t chunks;
    uint64_t size;           /* bytes; changes under session_lock */
    /* What lies under it; atomic, see layers_seq. */
    BaleLayer *parent;
    uint64_t parent_clusters; /* only those below are seen; 0: no parent */
    uint32_t generation;     /* higher than the parent's */
    unsigned refs;           /* atomic: the store's, a check's */
    bool gone;               /* atomic: not the store's any more */
    BaleLayer *target;       /* gone: merged into this, only for a moment */
    uint64_t target_clusters;
    uint64_t counted;        /* by a listing, under admin_lock */
    BalePatchTable *patches; /* only while a scan is applied */
};

/* Somebody reads in sequence; a small read that fits none makes a new one. */
typedef struct BaleReadStream {
    uint64_t next;           /* where the next read is expected */
    uint64_t ahead;          /* what was read ahead ends here */
    uint64_t used;           /* stream_clock of the last read */
    uint32_t window;         /* bytes to be ahead by */
    uint32_t hits;           /* reads that came where expected */
} BaleReadStream;

struct BaleImage {
    BaleStore *store;
    uint32_t id;             /* constant, as are these */
    uint32_t snapshot;       /* 0, or this shows a snapshot of that id */
    bool own_only;           /* shows only the layer on top (check.c) */
    uint8_t codec;
    int8_t level;
    BaleLayer *top;          /* atomic; changes under session_lock */
    BaleImageRecord record;  /* under log_lock */
    bool read_only;          /* atomic */
    bool skip_unchanged;     /* atomic */
    bool salvage;            /* set before requests */
    unsigned openers;        /* under log_lock */

    BaleBackingRead *backing_read; /* set before requests */
    BaleBackingPresent *backing_present;
    void *backing_opaque;

    pthread_mutex_t range_lock;       /* orders writes that share clusters */
    struct BaleRequest *ranges_active;
    struct BaleRequest *ranges_waiting, **ranges_waiting_tail;

    BaleMutable *mutable_region;
    uint64_t size;           /* atomic copy of record.size */

    pthread_mutex_t stream_lock; /* guards what follows; a leaf */
    BaleReadStream streams[READ_STREAMS];
    uint64_t stream_clock;   /* small reads so far */
    uint32_t ahead_max;      /* bytes; what all streams may read ahead */
    uint64_t ahead_used, ahead_wasted; /* when ahead_max was last looked at */
};

/* Bytes that a token bucket lacks (or has, below 0), as of then. */
typedef struct BalePaceDebt {
    double bytes;
    int64_t then_us;
} BalePaceDebt;

typedef struct BaleCheckpointRecord {
    uint64_t address;
    uint32_t len;
} BaleCheckpointRecord;

struct BaleStore {
    /* Constant after open. */
    BaleDevice *dev;
    BaleDeviceInfo dev_info;
    BaleOpenOptions options;
    uint64_t identity;
    uint32_t cluster_size;
    uint32_t cluster_bits;
    uint64_t page_size;
    uint32_t buffer_size;
    BaleWorkers *workers;
    BaleEpoch *epoch;
    BaleCache *cache;
    BaleWorkerContext inline_context; /* of who has set inline_busy */
    int inline_busy;         /* atomic bool */
    BaleReadGate read_gate;
    bool was_clean;
    uint64_t recovered_records, torn_bytes, damaged_records;

    /*
     * What the store holds.  Changes under admin_lock, session_lock for writing
     * and log_lock; any of them is enough to look.
     */
    pthread_mutex_t admin_lock;
    BaleCatalogue *catalogue;
    GPtrArray *images;       /* BaleImage: those opened so far; owned */
    GPtrArray *old_images;   /* of those, what was deleted; owned */
    GHashTable *layers;      /* id -> BaleLayer */
    uint64_t layers_seq;     /* atomic; odd: pointers between layers change */
    uint64_t catalogue_address; /* of its newest record; log_lock */

    /*
     * Held for reading by whoever appends and updates the index, for writing
     * by a checkpoint.  Guards super and session.
     */
    pthread_rwlock_t session_lock;
    BaleSuper super;
    bool session;            /* the superblocks say "not clean" */
    bool read_only;
    GArray *checkpoint;      /* BaleCheckpointRecord of the newest one */
    GArray *previous;        /* and of the one before */
    bool previous_loaded;    /* recovery used that; the superblocks name the
                              * newest, which is damaged, until the next one */
    uint64_t session_generation; /* in page versions; log_lock */
    uint32_t page_count;     /* pages opened in this session; log_lock */
    uint64_t page_order;     /* pages opened in this process; log_lock */

    int failed;              /* atomic: 0, or the -errno that poisoned us */
    int corrupt;             /* atomic bool */
    bool checkpoint_damaged; /* when the store was opened */
    GPtrArray *recover_reports; /* char *, while it is being opened */
    /* What opening may take, and takes: recover-limit.c. */
    uint64_t limit_memory, limit_read, limit_clusters;
    uint64_t limit_reserved, read_bytes, set_clusters;
    const char *limit_exceeded; /* static; NULL: nothing */

    pthread_mutex_t log_lock;
    pthread_cond_t log_cond; /* a buffer is free, a page opened, progress */
    uint64_t next_seq;       /* when open[] of fresh data was opened, if there
                              * is one: bale_log_next_seq() */
    GArray *pages;           /* BalePage */
    GArray *free_pages;      /* uint64_t, a stack */
    GArray *barrier_pages;   /* uint64_t: barrier_pending */
    GArray *dying_pages;     /* uint64_t: DEAD to RELEASING */
    uint64_t active[BALE_BUCKETS];      /* page or PAGE_NONE */
    bool preparing[BALE_BUCKETS];       /* somebody prepares room */
    BaleWriteBuffer *open[BALE_BUCKETS];
    uint64_t room[BALE_BUCKETS]; /* atomic; of open[]: log-internal.h */
    BaleWriteBuffer *free_buffers;
    GPtrArray *buffers;      /* all of them; does not move */
    uint64_t sealed_id;      /* id of the newest sealed buffer */
    GQueue in_flight;        /* sealed buffers in order of id, until stable */
    GQueue unproven;         /* UnprovenEnd: stable, not yet flushed */
    uint64_t durable_id;     /* everything up to this id was flushed */
    /* Bytes of the log up to sealed_id, the newest stable id, durable_id. */
    uint64_t sealed_end, stable_end, durable_end;
    bool flushing;
    uint64_t flushing_id, flushing_request;
    uint64_t flush_request;  /* number of the newest flush request */
    uint64_t flushed_request;
    BaleFlushWaiter *flush_waiters, **flush_waiters_tail;
    BaleDeviceIo flush_io;
    BaleAhead ahead;
    uint64_t garbage_bytes;  /* since maintenance was last asked to look */
    unsigned background;     /* see bale_background_begin() */
    unsigned flush_forced;   /* whoever wants a device flush in any case */
    /* Appends that may not be in the index yet, before and after a mark. */
    unsigned appending[2];   /* atomic */
    unsigned append_phase;   /* atomic; where those that begin now are counted,
                              * set under log_lock */
    uint64_t appended;       /* atomic; bytes of records, but for metadata;
                              * zeroes count for more: maintain.c */

    /* The maintenance thread; under log_lock. */
    pthread_cond_t maintain_cond;
    pthread_t maintain_thread;
    bool maintain_started, maintain_stop, maintain_idle;
    bool maintain_release;   /* pages are MARKING or RELEASING */
    bool maintain_look;      /* there may be a page to compact */
    bool dying_flush;        /* flush for pages that died, however few */
    unsigned maintain_pauses;
    /* Set under log_lock, but read by any append: atomic. */
    bool checkpoint_due;
    uint64_t checkpoint_base;  /* appended when the newest began */
    uint64_t checkpoint_cost;  /* bytes of it that had to be written */
    uint64_t checkpoint_size;  /* bytes of it */
    uint64_t checkpoint_seen;  /* appended when the thread last looked */
    uint64_t checkpoint_time_us;
    uint64_t checkpoint_asked, checkpoint_answered; /* by command */
    int checkpoint_ret;
    bool stepping, step_wanted; /* somebody, the thread: see maintain.c */
    /* Who waits for room; each asks once more, and is answered. */
    unsigned space_waiters;
    uint64_t space_asked, space_answered;
    bool space_made;         /* the newest answer */
    uint64_t fresh_pages;    /* opened for fresh data, so far */
    uint64_t pages_freed;    /* so far */
    uint64_t max_size;       /* that counts, bytes; 0: none */
    uint64_t max_pages;      /* in use: for fresh data, with the reserve */
    uint64_t over_pages;     /* for others: more, if there are more already */
    /* Compaction; also under log_lock. */
    bool compact_off;
    uint64_t compact_rate;   /* bytes examined a second; 0: no bound */
    BalePaceDebt compact_debt; /* of the background */
    bool compact_gently;     /* atomic: callers read: make small transfers */
    unsigned compact_commands;  /* under way */
    unsigned compact_held;   /* pages that they are at */
    uint64_t compact_turns;  /* pages that they have let go of */
    unsigned compact_running; /* atomic: compactions under way */

    unsigned patch_pauses;     /* atomic: see bale_patches_pause() */
    uint64_t reads_in_flight;  /* atomic: requests of callers */
    uint64_t writes_in_flight; /* atomic */
    BaleStoreStats stats;    /* atomic, but for those under log_lock */
    BaleHistogram read_hist, write_hist, flush_hist;
};

static inline void stat_add(uint64_t *counter, uint64_t n)
{
    __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

static inline int store_failed(BaleStore *s)
{
    return __atomic_load_n(&s->failed, __ATOMIC_ACQUIRE);
}

/* The nanosecond clock of the latency histograms. */
static inline uint64_t bale_now_ns(void)
{
    return g_get_monotonic_time() * 1000;
}

static inline uint64_t page_address(BaleStore *s, uint64_t page)
{
    return BALE_SUPER_SIZE + page * s->page_size;
}

/*
 * Wait for one completion: BaleSync sync = BALE_SYNC_INIT; pass
 * bale_sync_done and &sync; then bale_sync_wait().  (store.c)
 */
typedef struct BaleSync {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool done;
    int ret;
} BaleSync;

#define BALE_SYNC_INIT                                                       \
    {                                                                        \
        PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false, 0        \
    }

void bale_sync_done(void *opaque, int ret);
int bale_sync_wait(BaleSync *sync);

/* page.c: under log_lock */
BalePage *bale_page(BaleStore *s, uint64_t page);
bool bale_address_split(BaleStore *s, uint64_t address, uint64_t *page,
                        uint64_t *offset);
/* Make sure that the table describes @pages pages; -ENOMEM. */
int bale_page_table_grow(BaleStore *s, uint64_t pages);
/* What a page table says of @page: version 0 if it is free. */
void bale_page_entry(BaleStore *s, uint64_t page, BalePageEntry *e);
void bale_page_live_add(BaleStore *s, uint64_t address, uint64_t bytes);
void bale_page_live_sub(BaleStore *s, uint64_t address, uint64_t bytes);
/* Begin to free @page if nothing in it is needed any more. */
void bale_page_consider(BaleStore *s, uint64_t page);
/* All pages, after the set of pages in use has become smaller or newer. */
void bale_page_consider_all(BaleStore *s);
/* A flush request has completed: move dying pages on. */
void bale_page_flushed(BaleStore *s);
/* So do pages that waited for it: no barrier is left to be appended. */
void bale_page_barriers_appended(BaleStore *s);
/* Does a dying page wait for that? */
bool bale_page_wants_barriers(BaleStore *s);
void bale_page_revived(BaleStore *s);
/* Rebuild the stack of free pages from the states of the pages. */
void bale_page_free_list_rebuild(BaleStore *s);
/* Under log_lock, or nobody else is there yet: limit the store to @bytes. */
void bale_page_set_max_size(BaleStore *s, uint64_t bytes);
/* Could @bytes of metadata be written without touching the reserve? */
bool bale_page_has_room(BaleStore *s, uint64_t bytes);
/* Could fresh data take another page?  With session_lock, under log_lock. */
bool bale_page_has_fresh(BaleStore *s);
/* Pages that are not free, or that somebody is just taking. */
uint64_t bale_pages_in_use(BaleStore *s);
/* Not under log_lock: make @bucket's active page have room for a segment. */
int bale_page_prepare(BaleStore *s, BaleBucket bucket, uint32_t need);
/* Do the @len bytes at @address lie in a metadata page in use?  Which? */
bool bale_page_has_metadata(BaleStore *s, uint64_t address, uint32_t len,
                            uint64_t *page);
/* Does a page other than @page hold records older than @seq? */
bool bale_page_older_exists(BaleStore *s, uint64_t page, uint64_t seq);

typedef struct BaleLogMark {
    uint64_t next_seq; /* of what is appended after the mark */
    uint64_t pages;    /* in the table */
    uint64_t appended; /* bytes */
} BaleLogMark;

/* maintain.c */
int bale_maintain_start(BaleStore *s);
void bale_maintain_stop(BaleStore *s);
void bale_maintain_pause(BaleStore *s);
void bale_maintain_resume(BaleStore *s);
/* Under log_lock: there is something to release, or to look for. */
void bale_maintain_signal(BaleStore *s, bool release, bool look);
/* Paused, or on the thread itself: release what can be released now. */
void bale_maintain_settle(BaleStore *s);
/* The same until no page is dying, as far as a few flushes do it. */
int bale_maintain_free(BaleStore *s);
/* @r, @bytes long, was appended; a checkpoint may be due.  Takes log_lock. */
void bale_maintain_appended(BaleStore *s, uint32_t bytes,
                            const BaleRecord *r);
/* Under log_lock: a checkpoint has what came before @mark; NULL: it has all. */
void bale_maintain_checkpointed(BaleStore *s, const BaleLogMark *mark);
/* Under log_lock, for the thread: wait for its turn, which comes first. */
void bale_maintain_step_begin(BaleStore *s);
/* Under log_lock, for others.  False: paused, or the store has failed. */
bool bale_maintain_step_join(BaleStore *s);
/* Under log_lock. */
void bale_maintain_step_end(BaleStore *s);
/* Under log_lock, on the thread, in a step: do what cannot wait for the end of
 * a compaction.  False: there was nothing. */
bool bale_maintain_errand(BaleStore *s);
/* Under log_lock, on the thread, in a step, which ends meanwhile: wait until a
 * compaction on command is done with its page.  False: there is none. */
bool bale_maintain_await_command(BaleStore *s);
/* Wait until the thread has done what it can for pages that die; do some wait
 * for another flush? */
bool bale_maintain_drain(BaleStore *s);
/* Under log_lock: is there anything for the thread to do, now? */
bool bale_maintain_has_work(BaleStore *s);
/* On the thread, which is on a long errand: should it stop that? */
bool bale_maintain_wanted(BaleStore *s);
/* How it went for somebody who finds no room; zero-initialise. */
typedef struct BaleSpaceWait {
    unsigned rounds;      /* since it last looked better */
    uint64_t used;        /* pages in use then, the fewest so far */
    uint64_t fresh_pages; /* the store's, then */
} BaleSpaceWait;

/*
 * An attempt has ended with *@ret.  If it found no room (-ENOSPC) wait until
 * something was done to make some; true: try again.  False: it was something
 * else, or there is no room and none can be made; *@ret is what to return,
 * which is -EIO for a store that has failed.  Not with session_lock, nor in a
 * step.
 *
 *     do {
 *         ret = one_attempt();
 *     } while (bale_maintain_try_again(s, &wait, &ret));
 */
bool bale_maintain_try_again(BaleStore *s, BaleSpaceWait *wait, int *ret);

/* compact.c */
typedef bool BaleCompactGo(void *opaque);
/*
 * Compact @page, of which the caller has made itself a reader, with its
 * compacting set; both are undone.  @go is asked before each window.
 */
int bale_compact_page(BaleStore *s, uint64_t page, BaleCompactGo *go,
                      void *opaque);

/* compact-run.c: on the maintenance thread, in a step; false: nothing done */
bool bale_compact_background(BaleStore *s);
bool bale_compact_for_space(BaleStore *s);
/* Do callers read, so that transfers of a compaction have to be small? */
bool bale_compact_gently(BaleStore *s);
/* Under log_lock: bytes that the background would look at now. */
uint64_t bale_compact_pending(BaleStore *s);

/* ahead.c; under log_lock but for bale_ahead_write() */
void bale_ahead_init(BaleStore *s);
void bale_ahead_destroy(BaleStore *s);
/* @wb was sealed for a @flush, or because it was full. */
void bale_ahead_sealed(BaleStore *s, const BaleWriteBuffer *wb, bool flush);
/* Where in @page zeroes are being written: no segment may reach there. */
uint64_t bale_ahead_bound(BaleStore *s, uint64_t page);
/* Did that fail, so that none ever may? */
bool bale_ahead_spoilt(BaleStore *s, uint64_t page);
/* Begin to write zeroes if it is time. */
void bale_ahead_write(BaleStore *s);
/* The session is over: wait, and forget what is zero.  Drops log_lock. */
void bale_ahead_settle(BaleStore *s);
/* @bytes were written for what small flushes have saved. */
void bale_ahead_spend(BaleStore *s, uint64_t bytes);

/* log.c */
void bale_log_init(BaleStore *s);
/* Under log_lock: the end of the last record that was given a place. */
uint64_t bale_log_tail(BaleStore *s);
/* Under log_lock: what is appended from now on is not numbered lower. */
uint64_t bale_log_next_seq(BaleStore *s);
/* Under log_lock: let the pages count what open buffers hold of them. */
void bale_log_fold(BaleStore *s);
/* Under log_lock: the boundaries of the regions are in order. */
void bale_log_assert_regions(BaleStore *s);
void bale_log_destroy(BaleStore *s);
/*
 * Append one record.  @r: type, codec, layer, count, cluster, payload_len and
 * seq (0: take the next one; it is stored back); the rest is filled in.
 * @live is added to the page's live bytes.  *@address: where the record is; it
 * can be read from there at once.  Blocks while no write buffer is free.
 */
int bale_log_append(BaleStore *s, BaleBucket bucket, BaleRecord *r,
                    const void *payload, uint64_t live, uint64_t *address);
/* The same for who must not wait.  -EAGAIN: it would have to. */
int bale_log_append_now(BaleStore *s, BaleBucket bucket, BaleRecord *r,
                        const void *payload, uint64_t live,
                        uint64_t *address);
void bale_log_flush(BaleStore *s, BaleDone *done, void *opaque);
/*
 * Between true and false this thread asks for a flush, of the log or what comes
 * before it, and then waits for that: a device may use it meanwhile.
 */
void bale_log_wait_here(bool wait);
int bale_log_flush_sync(BaleStore *s);
/* A device flush even if the log has nothing to flush. */
int bale_log_flush_forced(BaleStore *s);
/*
 * Append the barriers that wait for the next segments, in segments that may
 * hold nothing else.  On the maintenance thread or with that paused: it may
 * not wait for anybody who waits for that.
 */
int bale_log_append_barriers(BaleStore *s);

/*
 * Appending together with setting the index to what was appended: a section
 * that begins before a mark is in the old phase as long as it runs.
 */
void bale_log_enter(BaleStore *s);
void bale_log_leave(BaleStore *s);
/* Is this thread in such a section?  They do not nest. */
bool bale_log_inside(void);
/* Under log_lock: are there sections of before the newest mark? */
bool bale_log_old_phase(BaleStore *s);

/*
 * Note where the log ends: what is appended from now on lies behind the ends
 * in @table, which has room for @pages.  False: no room, or an old phase.
 */
bool bale_log_mark(BaleStore *s, BalePageEntry *table, uint64_t pages,
                   BaleLogMark *mark);
/* Seal @bucket's open segment, so that the next record begins a new one. */
void bale_log_seal(BaleStore *s, BaleBucket bucket);
/* Stop appending to the active page of @bucket. */
void bale_log_seal_page(BaleStore *s, BaleBucket bucket);
/*
 * If the record at @address is in a write buffer, pin that and return where
 * the record begins in memory, with *@avail the bytes behind it.  Else NULL.
 * Under log_lock.
 */
const uint8_t *bale_log_pin(BaleStore *s, uint64_t address,
                            BaleWriteBuffer **pinned, size_t *avail);
void bale_log_unpin(BaleStore *s, BaleWriteBuffer *wb);
void bale_store_poison(BaleStore *s, int err, const char *what);
/* Wait until no write and no flush of the log is under way. */
void bale_log_settle(BaleStore *s);
/* The sealed buffer whose segment begins at @offset of @page, or NULL. */
BaleWriteBuffer *bale_log_sealed(BaleStore *s, uint64_t page, uint64_t offset);
/* Everything sealed is durable, and the store not poisoned any more. */
void bale_log_revived(BaleStore *s);

/* revive.c: with session_lock held for writing; 0 or a negative errno */
int bale_log_prove_again(BaleStore *s);

/* checkpoint.c */
int bale_session_begin(BaleStore *s);
bool bale_checkpoint_write(BaleStore *s, GError **errp);
/* The same while the store is in use; on the maintenance thread.  -EAGAIN:
 * given up because something else wants the thread. */
int bale_checkpoint_running(BaleStore *s);
/* Write all superblocks, in two rounds. */
int bale_supers_write(BaleStore *s);

/* store.c */
/* Say that @what failed with @ret, a negative errno.  False. */
bool bale_error_set(GError **errp, int ret, const char *what);
/*
 * Something goes on that uses the store and that nobody waits for: read-ahead,
 * a write-out.  After _end() the store may be gone.
 */
void bale_background_begin(BaleStore *s);
void bale_background_end(BaleStore *s);
/* Wait until nothing of that kind goes on. */
void bale_store_quiesce(BaleStore *s);

/* recover.c */
bool bale_recover(BaleStore *s, GError **errp);

/* layer.c */
static inline uint64_t bale_size_clusters(uint64_t size,
                                          uint32_t cluster_size)
{
    return size / cluster_size + !!(size % cluster_size);
}

/* The layer with @id, or NULL. */
BaleLayer *bale_layer_get(BaleStore *s, uint32_t id);
/*
 * The layer that has what records of layer @id hold, now; only *@clusters of it
 * count.  NULL: they are garbage.
 */
BaleLayer *bale_layer_of_record(BaleStore *s, uint32_t id,
                                uint64_t *clusters);
/* A new layer, which is not yet the store's.  NULL: no memory. */
BaleLayer *bale_layer_new(BaleStore *s, uint32_t id, uint64_t size);
void bale_layer_free(BaleLayer *layer);
void bale_layer_unref(BaleLayer *layer);
/* ... when nobody walks through it any more. */
void bale_layer_unref_later(BaleLayer *layer);
uint64_t bale_layer_clusters(const BaleLayer *layer);
/* What is known of chunk @n; NULL: it has no entries.  In the epoch. */
BaleChunk *bale_layer_chunk(BaleLayer *layer, uint64_t n);
/* The same, made if it is not there; NULL: no memory. */
BaleChunk *bale_layer_chunk_make(BaleLayer *layer, uint64_t n);
/* The first chunk from @n on that has entries, or layer->chunks. */
uint64_t bale_layer_next_chunk(BaleLayer *layer, uint64_t n);
/*
 * Make room for @size, which may need a larger index: -ENOMEM.  No write is
 * under way, or session_lock is held for writing.
 */
int bale_layer_reserve(BaleLayer *layer, uint64_t size);
uint64_t bale_layer_find(BaleLayer *layer, uint64_t cluster);
/* Set an index entry and keep its chunk; 0 or -ENOMEM. */
int bale_layer_index_set(BaleLayer *layer, uint64_t cluster, uint64_t value,
                         uint64_t *old);
/* Set an entry that is absent; @undo: remove it if it has that value. */
int bale_layer_index_adopt(BaleLayer *layer, uint64_t cluster, uint64_t value,
                           bool undo);
/* The index does not point at @old any more (0: it pointed at nothing). */
void bale_layer_account_old(BaleLayer *layer, uint64_t cluster, uint64_t old);
/* Point @cluster at @copy if it still points at @value; counts either way. */
void bale_layer_index_move(BaleLayer *layer, uint64_t cluster, uint64_t value,
                           uint64_t copy);
/* Forget the clusters from @cluster on. */
void bale_layer_clear_from(BaleLayer *layer, uint64_t cluster);
/* What the image shows of its layers. */
uint64_t bale_image_find(BaleImage *image, uint64_t cluster);
/* May there be clusters of our own in the chunk with @cluster? */
bool bale_image_chunk_used(BaleImage *image, uint64_t cluster);

/* Has the layer on top something of its own there? */
bool bale_image_find_top(BaleImage *image, uint64_t cluster);
/* May what the image shows be in a record of layer @id? */
bool bale_image_shows_layer(BaleImage *image, uint32_t id);
/* Must reads fail, as the store is marked corrupt? */
bool bale_image_is_doubtful(BaleImage *image);

/* catalogue.c */
/* Append @cat's record; in a session, session_lock held.  -EFBIG: too long. */
int bale_catalogue_append(BaleStore *s, const BaleCatalogue *cat,
                          bool shrinks);
/* Remove layers that nothing needs; merge those that only a child needs. */
void bale_catalogue_collect(BaleCatalogue *cat);
/* Recovery: make @next, which is transferred, the store's.  -ENOMEM. */
int bale_catalogue_install(BaleStore *s, BaleCatalogue *next);
/* The same in use, durably; under admin_lock. */
int bale_catalogue_commit(BaleStore *s, BaleCatalogue *next);

/* admin.c: the same as bale_error_set(); @too_many is what -EFBIG means. */
bool bale_admin_error(GError **errp, int ret, const char *what,
                      const char *too_many);

/* bitmap.c: what becomes of the bitmaps of image @id when that changes. */
void bale_bitmaps_spoil(BaleCatalogue *cat, uint32_t id);
void bale_bitmaps_forget(BaleCatalogue *cat, uint32_t id);
/* What to call @e in a report. */
void bale_bitmap_describe(const BaleCatalogue *cat, const BaleBitmapEntry *e,
                          char *name, size_t len);

/* image.c */
BaleImage *bale_image_new(BaleStore *s, BaleLayer *top, GError **errp);
/* Show what @cat says; under session_lock and log_lock. */
void bale_image_follow(BaleImage *image, const BaleCatalogue *cat);
void bale_image_free(BaleImage *image);
/* The context that compresses for @image; "none" if there is no memory. */
BaleCodecContext *bale_worker_codec(BaleWorkerContext *wc, BaleImage *image);
/* Does the range lie inside the image? */
bool bale_image_contains(BaleImage *image, uint64_t offset, uint64_t len);
/* Does anything lie under the image? */
bool bale_image_has_backing(BaleImage *image);
/*
 * Make whole clusters read as zeroes; with @discard and nothing under the image
 * only those that were written.  On a worker that holds their range.
 */
int bale_image_zero_clusters(BaleImage *image, uint64_t first, uint64_t count,
                             bool discard);
/* May the caller append now?  0, with session_lock held for reading. */
int bale_store_write_begin(BaleStore *s);
/* The same for who must not wait.  False: not now, or never. */
bool bale_store_write_begin_now(BaleStore *s);
void bale_store_write_end(BaleStore *s);
/*
 * Verify the record at @buf (of which @avail bytes may be read) as the data of
 * @cluster, and decompress it to @dst, one cluster long.
 */
int bale_image_unpack(BaleImage *image, BaleWorkerContext *wc,
                      uint64_t address, uint64_t version, uint64_t cluster,
                      const uint8_t *buf, size_t avail, uint8_t *dst);

/*
 * Give the layer on top its own copies of the clusters of the range, at most
 * BALE_REQUEST_MAX, that it does not have.
 */
void bale_image_copy_up(BaleImage *image, uint64_t offset, uint64_t len,
                        BaleDone *done, void *opaque);

/* Append what @data, one cluster, compresses to; on a worker. */
int bale_image_put_cluster(BaleImage *image, BaleWorkerContext *wc,
                           uint64_t cluster, const uint8_t *data);
/*
 * The same in two steps.  First, on a worker: make the record @r of it, whose
 * *@payload is @data or at @packed, which has room for a cluster.
 */
int bale_image_pack_cluster(BaleImage *image, BaleWorkerContext *wc,
                            uint64_t cluster, const uint8_t *data,
                            uint8_t *packed, BaleRecord *r,
                            const uint8_t **payload);
/*
 * Then append that, and point the index at it; with @aside next to what
 * compaction copies, if there is room.
 */
int bale_image_put_packed(BaleImage *image, BaleRecord *r,
                          const uint8_t *payload, bool aside);
/*
 * Read what is stored of @cluster, without the mutable region and without what
 * lies under the image: zeroes if nothing is.  With @in_place the caller would
 * only wait for it.
 */
void bale_image_read_stored(BaleImage *image, uint64_t cluster, uint8_t *buf,
                            bool in_place, BaleDone *done, void *opaque);

/*
 * request-read.c: do some of what reads wait for workers for, who may all wait
 * for the caller.  False: there was nothing.  It may wait for the device.
 */
bool bale_reads_help(BaleStore *s);

/* mutable.c */
typedef struct BaleMutableRun {
    uint32_t start, len; /* in the range asked for */
} BaleMutableRun;

BaleMutable *bale_mutable_new(BaleImage *image);
void bale_mutable_free(BaleMutable *m);
/* Adds what is cached, in write-out or not, and its patches. */
void bale_mutable_count(BaleMutable *m, BaleStoreStats *stats);
/*
 * Take @len bytes that begin @at bytes into @iov (NULL: zeroes), less the
 * *@done that were taken before.  They lie in one cluster.  -EAGAIN: full;
 * @retry is pushed to the workers when it makes sense to call again.
 */
int bale_mutable_put(BaleMutable *m, uint64_t offset, const struct iovec *iov,
                     int iovcnt, uint64_t at, size_t len, size_t *done,
                     BaleWork *retry);
/*
 * The caller has locked the range, whole clusters, and will write it: keep
 * what is cached there from being written out meanwhile.  It is read, and
 * flushes wait for it, until bale_mutable_settle(): only when the new contents
 * are in the index can it be forgotten (@written), and if they never get there
 * it is still what was acknowledged.  False: a write-out is under way there;
 * @retry is pushed when it makes sense to call again.
 */
bool bale_mutable_claim(BaleMutable *m, uint64_t offset, uint64_t len,
                        BaleWork *retry);
void bale_mutable_settle(BaleMutable *m, uint64_t offset, uint64_t len,
                         bool written);
bool bale_mutable_cached(BaleMutable *m, uint64_t offset, uint64_t len);
/* The offset after the last cached byte; 0 if nothing is cached. */
uint64_t bale_mutable_end(BaleMutable *m);
/*
 * Copy what is cached of the range, which lies in one cluster, to the same
 * places of *@buf, and list the pieces in *@runs; both are made as needed and
 * belong to the caller.  The number of bytes; SIZE_MAX: no memory.
 */
size_t bale_mutable_read(BaleMutable *m, uint64_t offset, uint32_t len,
                         uint8_t **buf, GArray **runs);
/* Is anything in the region that bale_mutable_flush() has to do with? */
bool bale_mutable_waiting(BaleMutable *m, bool write_out);
/*
 * Put into the log what was put here before, then flush that.  Small pieces
 * become patches, and stay here, unless @write_out.
 */
void bale_mutable_flush(BaleMutable *m, bool write_out, BaleDone *done,
                        void *opaque);
/*
 * Of an image that nobody has open: until bale_mutable_thaw() nothing goes from
 * the region to the log, and flushes wait.
 */
void bale_mutable_freeze(BaleMutable *m);
void bale_mutable_thaw(BaleMutable *m);
/* Forget bytes.  What patches say of whole clusters is hidden by now. */
void bale_mutable_discard(BaleMutable *m, uint64_t offset, uint64_t len);
/* The first cluster in [@first, @end) with patches that count, or @end. */
uint64_t bale_mutable_next_patched(BaleMutable *m, uint64_t first,
                                   uint64_t end);
bool bale_mutable_any_patched(BaleMutable *m);
/* Does the patch at @address count? */
bool bale_mutable_patch_live(BaleMutable *m, uint64_t cluster,
                             uint64_t address);
/* It has been copied; the page counters follow. */
void bale_mutable_patch_move(BaleMutable *m, uint64_t cluster,
                             uint64_t address, uint32_t len, uint64_t copy);
typedef void BalePatchVisit(void *opaque, uint64_t address, uint32_t live);
/* Between these two; whoever holds several of these locks is a check. */
void bale_mutable_lock(BaleMutable *m);
void bale_mutable_unlock(BaleMutable *m);
void bale_mutable_foreach_patch(BaleMutable *m, BalePatchVisit *visit,
                                void *opaque);
/*
 * Recovery, before there are requests: take the patches of the image over from
 * @t, and lay them over what is cached.  Damaged ones make their clusters
 * unreadable.  -EFBIG: more than the caps of the format; -ENOMEM.
 */
int bale_mutable_recover_load(BaleMutable *m, BalePatchTable *t);
/*
 * Write out the mutable regions of all images, then flush the log.  Afterwards
 * nothing that was written before is in a patch.
 */
void bale_store_write_out(BaleStore *s, BaleDone *done, void *opaque);
int bale_store_write_out_sync(BaleStore *s);
/*
 * Between these no patch is appended: flushes write whole clusters.  For who
 * needs a log without patches that count: pause, write out, look, resume.
 */
void bale_patches_pause(BaleStore *s);
void bale_patches_resume(BaleStore *s);
/* The images opened so far, to be freed by the caller; takes log_lock. */
BaleImage **bale_store_images(BaleStore *s, guint *n);
/* Of them, the one whose top layer is @layer, or NULL; takes log_lock. */
BaleImage *bale_image_of_layer(BaleStore *s, uint32_t layer);

/* cache.c */
/* NULL: no memory.  @stats: where it counts; @bytes may be 0. */
BaleCache *bale_cache_new(uint64_t bytes, uint32_t cluster_size,
                          BaleStoreStats *stats);
void bale_cache_free(BaleCache *cache);
/* Forgets everything. */
void bale_cache_set_size(BaleCache *cache, uint64_t bytes);
/* 0: nothing is kept. */
uint64_t bale_cache_max_bytes(BaleCache *cache);
/* Copy out of the cluster's cached content, if it is that of @value. */
bool bale_cache_get(BaleCache *cache, uint64_t cluster, uint64_t value,
                    uint32_t offset, void *dst, uint32_t len);
bool bale_cache_has(BaleCache *cache, uint64_t cluster, uint64_t value);
/* A buffer of one cluster, or NULL.  It is given back, or put. */
uint8_t *bale_cache_buffer_get(BaleCache *cache);
void bale_cache_buffer_put(BaleCache *cache, uint8_t *buf);

typedef enum BaleCacheUse {
    BALE_CACHE_RANDOM,
    BALE_CACHE_SCAN,  /* somebody reads in sequence */
    BALE_CACHE_AHEAD, /* nobody has asked for it yet */
} BaleCacheUse;

/*
 * Keep @buf, which was decompressed from the record of @value, unless @image
 * has moved on from that.  @buf is taken over.
 */
void bale_cache_put(BaleCache *cache, BaleImage *image, uint64_t cluster,
                    uint64_t value, uint8_t *buf, BaleCacheUse use);

typedef struct BaleCacheWaiter {
    struct BaleCacheWaiter *next;
} BaleCacheWaiter;

/* Zero-initialise; only cache.c looks inside. */
typedef struct BaleCacheLoad {
    void *shard;      /* NULL: not begun */
    struct BaleCacheLoad **list;
    uint64_t cluster, value;
    BaleCacheWaiter *waiters;
    struct BaleCacheLoad *next;
} BaleCacheLoad;

/*
 * What one request is about to load another need not load as well.  True: go
 * on, and call bale_cache_load_end() after the put or the failure.  False:
 * somebody is loading it; if @waiter is not NULL it is among those that his
 * bale_cache_load_end() returns, who may then look again.
 */
bool bale_cache_load_begin(BaleCache *cache, BaleCacheLoad *load,
                           uint64_t cluster, uint64_t value,
                           BaleCacheWaiter *waiter);
/* Nothing if it was not begun. */
BaleCacheWaiter *bale_cache_load_end(BaleCacheLoad *load);
/* @layer has the same content at another place now. */
void bale_cache_move(BaleCache *cache, BaleLayer *layer, uint64_t cluster,
                     uint64_t from, uint64_t to);
void bale_cache_drop(BaleCache *cache, uint64_t cluster, uint64_t value);
/* Fills in what is "now". */
void bale_cache_get_stats(BaleCache *cache, BaleStoreStats *stats);
/* Clusters read ahead that were asked for, or dropped unread, so far. */
void bale_cache_ahead(BaleCache *cache, uint64_t *used, uint64_t *wasted);

#endif
