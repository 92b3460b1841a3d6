/*
 * Sequential cache: small, unaligned, mostly sequential writes become whole
 * aligned clusters.
 *
 * The cache holds bytes that were written but not yet written out.  It knows
 * nothing about where they go: a user puts writes in, asks for clusters that
 * are due, writes them out by whatever means, and says how that went.  It is
 * used by the QEMU filter driver and, as the mutable region of the log, by the
 * storage engine.
 *
 * A cluster is *open* while more of it is expected, and *finished* once it is
 * complete or once max_streams other clusters were written to more recently.
 * Any write is legal: a rewrite, an overlap, a gap, several clusters at once;
 * writing to an unfilled finished cluster opens it again.
 *
 * Life of a write-out: a begin function takes a cluster's bytes out of reach
 * of later writes and hands them over as a BaleSeqcacheOut, without copying.
 * Later writes to the same cluster go to a new buffer.  Reads see the newer
 * bytes over those in write-out.  bale_seqcache_out_done() with success
 * forgets the bytes; with failure it puts them back, under whatever was
 * written meanwhile, as a *failed* cluster, which no begin function offers
 * before bale_seqcache_retry().  A cluster is in write-out once at a time.
 *
 * Order: every accepted write gets the next number of one sequence.  All
 * writes accepted so far are written out when bale_seqcache_oldest_seq()
 * exceeds the number that bale_seqcache_seq() returned; that is how to flush.
 *
 * Threads: no function locks or blocks.  Callers serialise all calls on one
 * cache (an AioContext, a mutex).  Between a begin function and
 * bale_seqcache_out_done() the owner of a BaleSeqcacheOut may use the
 * bale_seqcache_out_*() accessors and the buffer without that lock.
 *
 * Memory: cluster buffers are exactly cluster_size bytes long, aligned as
 * asked, and bounded by max_bytes in number times size; each costs 1/8 of its
 * size more for the map of its bytes, and twice that while a cluster with
 * gaps is in write-out.  Beyond that the answer is "full" rather than growth.
 * Allocation failure is reported, never fatal.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_UTIL_SEQCACHE_H
#define BALE_UTIL_SEQCACHE_H

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define BALE_SEQCACHE_MIN_CLUSTER_BYTES ((size_t)512)
#define BALE_SEQCACHE_MAX_CLUSTER_BYTES ((size_t)4 << 20)
#define BALE_SEQCACHE_MAX_ALIGN_BYTES   ((size_t)1 << 20)
#define BALE_SEQCACHE_MAX_BYTES         ((uint64_t)1 << 40)
#define BALE_SEQCACHE_MAX_STREAMS       65536u

/* No byte at or past this offset can be cached. */
#define BALE_SEQCACHE_MAX_OFFSET        ((uint64_t)INT64_MAX)

typedef struct BaleSeqcache BaleSeqcache;

/* A cluster in write-out.  Owned by the cache; borrowed until out_done. */
typedef struct BaleSeqcacheOut BaleSeqcacheOut;

typedef struct BaleSeqcacheOptions {
    size_t cluster_bytes; /* power of two, MIN_CLUSTER to MAX_CLUSTER */
    size_t align_bytes;   /* of the buffers in memory; power of two, 1 to
                           * MAX_ALIGN */
    uint64_t max_bytes;   /* buffers altogether; rounded down to clusters, at
                           * least two of them */
    unsigned max_streams; /* open clusters, 1 to MAX_STREAMS */
} BaleSeqcacheOptions;

typedef struct BaleSeqcacheStats {
    /* What is there now. */
    uint64_t open_clusters;     /* more is expected */
    uint64_t finished_clusters; /* waiting for write-out */
    uint64_t failed_clusters;   /* write-out failed, waiting for retry */
    uint64_t out_clusters;      /* in write-out */
    uint64_t dirty_bytes;       /* cached and not in write-out */
    uint64_t out_bytes;         /* in write-out */
    uint64_t memory_bytes;      /* in cluster buffers in use */
    uint64_t max_memory_bytes;  /* the bound on it */

    /* What has happened since creation or reset. */
    uint64_t writes;            /* calls that accepted at least a byte */
    uint64_t write_bytes;       /* bytes accepted */
    uint64_t merges;            /* pieces that joined a cached cluster */
    uint64_t overwritten_bytes; /* accepted over bytes that were cached and
                                 * not in write-out */
    uint64_t read_hits;         /* cached runs copied */
    uint64_t read_hit_bytes;
    uint64_t displaced;         /* open clusters finished for want of streams */
    uint64_t full;              /* writes answered "full" */
    uint64_t no_memory;         /* calls that failed with -ENOMEM */
    uint64_t outs;              /* write-outs begun */
    uint64_t outs_whole;        /* … of complete clusters */
    uint64_t outs_done;         /* … that succeeded */
    uint64_t outs_failed;
    uint64_t outs_done_bytes;   /* bytes of successful ones */
    uint64_t discarded_bytes;   /* cached bytes dropped by discard */
} BaleSeqcacheStats;

/*
 * Make a cache.  NULL with @error set if an option is out of bounds or memory
 * is short.  @options is borrowed for the call.
 */
BaleSeqcache *bale_seqcache_new(const BaleSeqcacheOptions *options,
                                GError **error);

/*
 * Drop everything cached and the cache.  No cluster may be in write-out.
 * NULL is allowed.
 */
void bale_seqcache_free(BaleSeqcache *sc);

/*
 * Change the bounds.  Nothing cached is dropped: while there is more than the
 * new bound the cache is full.  Displaces open clusters as needed.
 */
void bale_seqcache_set_limits(BaleSeqcache *sc, uint64_t max_bytes,
                              unsigned max_streams);

size_t bale_seqcache_cluster_bytes(const BaleSeqcache *sc);

/*
 * Put @len bytes, which begin @skip bytes into the vector, at @offset.
 * @now_ns is the time on the caller's clock, for bale_seqcache_begin_older();
 * if it goes backwards it counts as standing still.  *@accepted is always
 * set: the first so many bytes are in the cache, with success all of them.
 *
 * -EAGAIN: full.  Write something out, then come back with the rest.
 * -ENOMEM: like full if anything is cached, else hopeless.
 * -EINVAL: the range ends beyond BALE_SEQCACHE_MAX_OFFSET.
 */
int bale_seqcache_write(BaleSeqcache *sc, uint64_t offset,
                        const struct iovec *iov, int niov, size_t skip,
                        size_t len, int64_t now_ns, size_t *accepted);

/* The same from one buffer. */
int bale_seqcache_write_buf(BaleSeqcache *sc, uint64_t offset, const void *buf,
                            size_t len, int64_t now_ns, size_t *accepted);

/*
 * Read at most @len (not 0) bytes at @offset to @skip bytes into the vector.
 * True: the first *@run bytes are cached and were copied.  False: the first
 * *@run bytes are not cached, and nothing was copied.  In both cases *@run is
 * as long as possible, 1 to @len.
 */
bool bale_seqcache_read(BaleSeqcache *sc, uint64_t offset, size_t len,
                        const struct iovec *iov, int niov, size_t skip,
                        size_t *run);

bool bale_seqcache_read_buf(BaleSeqcache *sc, uint64_t offset, size_t len,
                            void *buf, size_t *run);

/* What bale_seqcache_read() would answer, without copying or counting. */
bool bale_seqcache_lookup(const BaleSeqcache *sc, uint64_t offset, uint64_t len,
                          uint64_t *run);

/*
 * Begin functions.  Each begins the write-out of one cluster and returns it,
 * or returns NULL: with *@err 0 if there is none, with *@err -ENOMEM if memory
 * was short (the cluster stays where it was).  They skip clusters that are in
 * write-out already or held, and, except begin_at, failed ones.
 */

/* The cluster that has been finished for longest. */
BaleSeqcacheOut *bale_seqcache_begin_finished(BaleSeqcache *sc, int *err);

/* Where the cluster starts that bale_seqcache_begin_finished() would begin, and
 * how many of its bytes are cached; false: there is none. */
bool bale_seqcache_peek_finished(const BaleSeqcache *sc, uint64_t *offset,
                                 size_t *bytes);

/* Where the clusters start that it would begin one after the other, at most
 * @max; how many. */
unsigned bale_seqcache_list_finished(const BaleSeqcache *sc,
                                     uint64_t *offsets, unsigned max);

/* The cluster with the oldest byte, open or finished, if that byte's number
 * is at most @seq; UINT64_MAX for any. */
BaleSeqcacheOut *bale_seqcache_begin_upto(BaleSeqcache *sc, uint64_t seq,
                                          int *err);

/* The same, if the byte was written at or before @time_ns. */
BaleSeqcacheOut *bale_seqcache_begin_older(BaleSeqcache *sc, int64_t time_ns,
                                           int *err);

/* The cluster that contains @offset. */
BaleSeqcacheOut *bale_seqcache_begin_at(BaleSeqcache *sc, uint64_t offset,
                                        int *err);

/* The cluster that starts at @offset, if it is finished and complete: to write
 * out neighbours together. */
BaleSeqcacheOut *bale_seqcache_begin_complete_at(BaleSeqcache *sc,
                                                 uint64_t offset, int *err);

/* Where the cluster starts. */
uint64_t bale_seqcache_out_offset(const BaleSeqcacheOut *out);

/*
 * The cluster's buffer, cluster_bytes long.  Bytes in one of its ranges must
 * not be changed; all others are indeterminate and the caller's to use until
 * out_done (to fill the gaps by reading, or to pad).
 */
uint8_t *bale_seqcache_out_data(BaleSeqcacheOut *out);

/* Bytes that were cached when the write-out began. */
size_t bale_seqcache_out_bytes(const BaleSeqcacheOut *out);

/*
 * The next range of such bytes at or after *@start (bytes from the start of
 * the cluster): false if there is none, else *@start and *@len describe it.
 * Ranges are maximal.  Iterate with *@start += *@len.  A discard meanwhile
 * does not change them.
 */
bool bale_seqcache_out_range(const BaleSeqcacheOut *out, size_t *start,
                             size_t *len);

/* The write-out ended; @out is gone afterwards. */
void bale_seqcache_out_done(BaleSeqcache *sc, BaleSeqcacheOut *out,
                            bool success);

/* Failed clusters become finished again, the oldest first. */
void bale_seqcache_retry(BaleSeqcache *sc);

/*
 * Forget cached bytes in the range, also those in write-out: they are not read
 * any more and a failing write-out does not bring them back.  What the
 * write-out does below is for the caller to order.
 */
void bale_seqcache_discard(BaleSeqcache *sc, uint64_t offset, uint64_t len);

void bale_seqcache_discard_all(BaleSeqcache *sc);

/*
 * Clusters that intersect the range and are cached now are not offered for
 * write-out until bale_seqcache_release() with the same range.  Ranges held
 * at one time must not share a cluster; of their clusters, the caller must not
 * write to one that is not cached.  Does not stop a write-out that has begun.
 */
void bale_seqcache_hold(BaleSeqcache *sc, uint64_t offset, uint64_t len);
void bale_seqcache_release(BaleSeqcache *sc, uint64_t offset, uint64_t len);
/* Is the cluster that contains @offset cached and held? */
bool bale_seqcache_is_held(const BaleSeqcache *sc, uint64_t offset);

/* Is a cluster that intersects the range in write-out? */
bool bale_seqcache_in_out(const BaleSeqcache *sc, uint64_t offset,
                          uint64_t len);

/* The number of the newest accepted write; 0 before the first. */
uint64_t bale_seqcache_seq(const BaleSeqcache *sc);

/* A lower bound on the number of the oldest cached byte, in write-out or not
 * (exact unless bytes were overwritten or discarded); UINT64_MAX: none. */
uint64_t bale_seqcache_oldest_seq(const BaleSeqcache *sc);

/* When the oldest byte that is neither in write-out nor failed was written;
 * INT64_MAX if there is none. */
int64_t bale_seqcache_oldest_time(const BaleSeqcache *sc);

/* The offset after the last cached byte; 0 if nothing is cached. */
uint64_t bale_seqcache_end(const BaleSeqcache *sc);

/* Clusters that begin_finished may offer, now or when they are not held. */
size_t bale_seqcache_finished_clusters(const BaleSeqcache *sc);

void bale_seqcache_get_stats(const BaleSeqcache *sc, BaleSeqcacheStats *stats);
void bale_seqcache_reset_stats(BaleSeqcache *sc);

/*
 * Check every invariant; takes time in proportion to what is cached.  NULL if
 * all hold, else a static sentence on the first that does not.
 */
const char *bale_seqcache_check(const BaleSeqcache *sc);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(BaleSeqcache, bale_seqcache_free)

#endif
