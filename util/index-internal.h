/*
 * Hash index: what its files share, and what its tests may touch
 *
 *   index.c         the design and its invariants; hashing and operations
 *   index-table.c   memory: tables, overflow buckets, accounting
 *   index-grow.c    replacing tables while they are in use
 *   index-walk.c    walks, statistics and the check of all invariants
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BALE_UTIL_INDEX_INTERNAL_H
#define BALE_UTIL_INDEX_INTERNAL_H

#include <glib.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "util/index.h"

#define BUCKET_SLOTS 7
#define TAG_BITS 14

#define VALUE_MASK BALE_INDEX_VALUE_MAX
#define TAG_SHIFT BALE_INDEX_VALUE_BITS
#define TAG_MASK (((UINT64_C(1) << TAG_BITS) - 1) << TAG_SHIFT)
#define TENTATIVE (UINT64_C(1) << 62)
#define LINK_DONE (UINT64_C(1) << 62)
#define FROZEN (UINT64_C(1) << 63)

/* 7 << 11 = 14336 is the largest span whose tags fit 14 bits. */
#define SHIFT_MAX 11
#define SPAN_MAX (BUCKET_SLOTS << SHIFT_MAX)

/*
 * A segment has 2^20 keys: its largest table is 9.6 MB, so that replacing it
 * needs little memory; its smallest one is 75 buckets.  Beyond 2^32 keys the
 * segments get larger rather than more.
 */
#define SEGMENT_BITS 20
#define SEGMENTS_MAX_BITS 12

/*
 * Keys per bucket.  With the hashes spread at random, a bucket with its
 * overflow costs at most 14.5 bytes per key between 5 and 10 keys per bucket,
 * and just under 13 at 7, where a table sized in advance starts.
 */
#define LOAD_GROW 10            /* above: double */
#define LOAD_SHRINK 2           /* below: halve */
#define LOAD_EXPECTED 8         /* at most, with the expected keys */

/* Churn leaves overflow buckets behind; above so many bytes per key: tidy. */
#define BYTES_PER_KEY_MAX 16

/* Overflow buckets in a slab, at most: 256 KiB. */
#define SLAB_BUCKETS_MAX 4096
#define SLAB_BUCKETS_MIN 7
#define SLAB_BUCKETS_SHIFT 4    /* a sixteenth of the table, between these */

/* From here on, memory comes as fresh pages, zero without touching them. */
#define MMAP_MIN_BYTES (64 * 1024)

/* ... and in huge ones, if the system has them. */
#define HUGE_MIN_BYTES (4 * 1024 * 1024)

/* Changes to wait after there was no memory for a table. */
#define RETRY_CHANGES 1024

#define SPINS_PER_YIELD 64
#define BACKOFF_SHIFT_MAX 8

/* Buckets and entries that a walk collects before it calls the visitor. */
#define WALK_BUCKETS 32

typedef _Atomic(uint64_t) Word;

typedef struct Bucket {
    Word slot[BUCKET_SLOTS];
    Word link;
} Bucket;

_Static_assert(sizeof(Bucket) == 64, "a bucket is one cache line");
_Static_assert(SPAN_MAX <= 1 << TAG_BITS, "tags fit");
_Static_assert(sizeof(void *) == 8, "links hold 48-bit addresses");

/* What an index and its retired tables have allocated; outlives the index. */
typedef struct Ledger {
    atomic_uint refs;
    Word bytes;
    Word peak_bytes;
    Word retired_bytes;
} Ledger;

/* Overflow buckets; the first bucket's room is taken by this header. */
typedef struct Slab Slab;

struct Slab {
    Slab *older;
    size_t bytes;
    uint64_t count;
    Word used;
};

_Static_assert(sizeof(Slab) <= sizeof(Bucket), "the header fits");

typedef struct Table Table;

struct Table {
    /* Never changed. */
    Bucket *buckets;
    uint64_t bucket_count;
    unsigned shift;
    size_t buckets_bytes;
    Ledger *ledger;

    /* Atomic; the successor is set once. */
    _Atomic(Table *) next;
    Word overflow;              /* buckets in chains */
    Word moved;                 /* changed by the mover only */
    _Atomic(Slab *) slab;       /* the newest; changed under the lock */
    Word spare_count;

    Word fresh_overflow;        /* overflow when the table was completed */

    /* Changed by the mover, when nobody else looks at it. */
    uint64_t retired_bytes;     /* counted in the ledger when retired */

    /* Under the lock. */
    pthread_mutex_t lock;
    Bucket *spare;              /* taken from a slab and not used, by link */
};

typedef struct Segment {
    _Alignas(64) _Atomic(Table *) table;
    _Alignas(64) _Atomic(int64_t) keys;
} Segment;

struct BaleIndex {
    /* Never changed. */
    unsigned key_bits;
    unsigned hash_bits;
    unsigned mix_shift;
    uint64_t hash_mask;
    unsigned shift_max;         /* of new and of emptied segments */
    uint64_t segment_count;
    BaleEpoch *epoch;
    Ledger *ledger;
    _Atomic(Segment *) *segments;

    /* Atomic: who may move, and what is on the move. */
    _Alignas(64) atomic_bool mover_busy;
    _Atomic(Segment *) moving;
    atomic_int retry_pause;

    /* Under mover_busy: the entries of the bucket on the move. */
    uint64_t *scratch;

    /* Atomic counters. */
    Word growths;
    Word rebuilds;
    Word shrinks;
    Word chunks_moved;
    Word entries_moved;
    Word waits;
    Word insert_conflicts;
    Word allocation_failures;
};

/*
 * For tests.  Memory that the index may still ask for, in allocations: each
 * one takes one off, and at zero they fail.  Negative, as in every program but
 * the tests: no limit.
 */
extern atomic_long bale_index_test_allocations;

/*
 * For tests: a place where another thread may come in between.  The stress test
 * compiles the files of the index with a definition that lets that happen.
 */
#ifndef BALE_INDEX_PAUSE
#define BALE_INDEX_PAUSE() ((void)0)
#endif

static inline void count(Word *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static inline uint64_t counted(Word *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

static inline uint64_t table_span(const Table *t)
{
    return (uint64_t)BUCKET_SLOTS << t->shift;
}

static inline Bucket *link_target(uint64_t link)
{
    return (Bucket *)(uintptr_t)(link & VALUE_MASK);
}

static inline uint64_t link_to(Bucket *b)
{
    return (uintptr_t)b;
}

static inline uint64_t hash_bucket(const Table *t, uint64_t hash)
{
    /* Division by a constant: a multiplication. */
    return (hash >> t->shift) / BUCKET_SLOTS;
}

static inline bool entry_live(uint64_t word)
{
    return (word & VALUE_MASK) != 0 && !(word & TENTATIVE);
}

static inline uint64_t entry_tag(uint64_t word)
{
    return (word & TAG_MASK) >> TAG_SHIFT;
}

static inline uint64_t entry_new(uint64_t tag, uint64_t value)
{
    return tag << TAG_SHIFT | value;
}

/* index-table.c */

/* Zeroed, aligned to a cache line; NULL if there is no memory. */
void *bale_index_memory_new(Ledger *ledger, size_t bytes);
/* @memory may be NULL; @bytes as at its allocation. */
void bale_index_memory_free(Ledger *ledger, void *memory, size_t bytes);

/* The caller owns the one reference.  NULL: no memory. */
Ledger *bale_index_ledger_new(void);
void bale_index_ledger_unref(Ledger *ledger);

/* NULL: no memory. */
Table *bale_index_table_new(Ledger *ledger, unsigned hash_bits,
                            unsigned shift);
void bale_index_table_free(Table *t);
/*
 * All of @t is used, at random: huge pages mean fewer misses.  Not while
 * requests fill it: the first touch of each would make one of them wait for
 * milliseconds.
 */
void bale_index_table_huge(Table *t);
/* Counts @t as retired and frees it when the epoch allows. */
void bale_index_table_retire(Table *t, BaleEpoch *epoch);

/* An empty bucket for a chain of @t, or NULL if there is no memory. */
Bucket *bale_index_overflow_new(Table *t);
/* Give back a bucket that did not make it into a chain. */
void bale_index_overflow_unused(Table *t, Bucket *b);

/* index-grow.c */

/* Before a change, outside of the epoch: do a share of the work, if any. */
void bale_index_help(BaleIndex *index);

/*
 * After the number of keys of @segment changed by @delta in @t, its table at
 * that moment: count, and begin to replace the table if it is due.  Inside the
 * epoch.
 */
void bale_index_changed(BaleIndex *index, Segment *segment, Table *t,
                        int64_t delta);

/* index.c */

/* The low hash_bits bits of the key that has this hash. */
uint64_t bale_index_unmix(const BaleIndex *index, uint64_t hash);

#endif
