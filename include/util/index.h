/*
 * Hash index: cluster number -> 48-bit value, latch-free, grown online
 *
 * One index serves one layer.  Keys are numbers below 2^key_bits; values are
 * 48-bit and not zero (zero stands for "absent" everywhere in this interface).
 * The index stores keys exactly: a lookup never has to consult a record.
 *
 * Threads: every function may be called by any number of threads at once,
 * except bale_index_new(), bale_index_free(), bale_index_foreach_value() and
 * bale_index_check().  Each
 * operation on one key is linearizable.  Operations enter the epoch
 * themselves; it does not matter whether the caller is inside already.
 * Superseded tables are retired through the epoch: somebody has to call
 * bale_epoch_poll() now and then.
 *
 * Growth: the index grows, tidies and shrinks itself.  The work is done in
 * chunks of BALE_INDEX_CHUNK_BUCKETS buckets by the calls that change the
 * index (each moves at most one chunk), or by bale_index_grow_step() when it
 * is idle.  Neither readers nor writers wait for more than the one bucket that
 * is on the move.
 *
 * Memory: at most 16 bytes per key at the loads that growth keeps (5 to 10
 * keys per bucket), plus one table of one segment while that is being
 * replaced.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BALE_UTIL_INDEX_H
#define BALE_UTIL_INDEX_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

#include "util/epoch.h"

#define BALE_INDEX_KEY_BITS_MAX 44
#define BALE_INDEX_VALUE_BITS 48
#define BALE_INDEX_VALUE_MAX ((UINT64_C(1) << BALE_INDEX_VALUE_BITS) - 1)
#define BALE_INDEX_CHUNK_BUCKETS 64
#define BALE_INDEX_HISTOGRAM_SIZE 16

typedef struct BaleIndex BaleIndex;

typedef struct BaleIndexStats {
    uint64_t keys;
    uint64_t segments;          /* parts of the key space in use */
    uint64_t buckets;           /* 64-byte primary buckets, without overflow */
    uint64_t overflow_buckets;
    uint64_t bytes;             /* everything, retired tables included */
    uint64_t peak_bytes;        /* highest value of @bytes so far */
    uint64_t retired_bytes;     /* part of @bytes that waits for the epoch */
    bool growing;               /* a table is being replaced right now */
    uint64_t growing_done;      /* its buckets moved so far, of ... */
    uint64_t growing_total;
    uint64_t growths;           /* tables replaced by one twice the size */
    uint64_t rebuilds;          /* ... of the same size (to shed overflow) */
    uint64_t shrinks;           /* ... half the size */
    uint64_t chunks_moved;
    uint64_t entries_moved;
    uint64_t waits;             /* writers that met a bucket on the move */
    uint64_t insert_conflicts;  /* insertions that met a twin and began anew */
    uint64_t allocation_failures;
} BaleIndexStats;

/*
 * Create an index of keys below 2^@key_bits (1 to BALE_INDEX_KEY_BITS_MAX).
 * @expected_keys sizes it in advance for so many keys, spread over the whole
 * key space; 0 starts small.  @epoch is borrowed and must outlive the index.
 * NULL: no memory.
 */
BaleIndex *bale_index_new(unsigned key_bits, uint64_t expected_keys,
                          BaleEpoch *epoch);

/* Nobody may be using @index, which may be NULL.  Frees at once. */
void bale_index_free(BaleIndex *index);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(BaleIndex, bale_index_free)

/* The value of @key, or 0 if there is none.  Never blocks, never fails. */
uint64_t bale_index_find(BaleIndex *index, uint64_t key);

/*
 * @key is going to be looked for or changed soon: fetch what the processor has
 * to wait for.  Only where nobody else changes the index, or in the epoch.
 */
void bale_index_prefetch(BaleIndex *index, uint64_t key);

/*
 * If the value of @key is @expected, make it @desired.  @expected 0: insert
 * only if absent; @desired 0: remove.
 *
 * Returns 0; -EAGAIN if the value was another one; -ENOMEM (only for an
 * insertion) with nothing changed.  @current, if not NULL, receives the value
 * found: @expected on success and the other value with -EAGAIN; it is not
 * touched with -ENOMEM.
 */
int bale_index_update(BaleIndex *index, uint64_t key, uint64_t expected,
                      uint64_t desired, uint64_t *current);

/*
 * Make the value of @key @value, whatever it was; 0 removes.  @old, if not
 * NULL, receives the value replaced (0: none).  Returns 0, or -ENOMEM (only
 * when @key was absent and @value is not 0) with nothing changed, not even
 * *@old.
 */
int bale_index_set(BaleIndex *index, uint64_t key, uint64_t value,
                   uint64_t *old);

/* How many keys, aligned to that number, bale_index_load() takes at most. */
uint64_t bale_index_load_keys(const BaleIndex *index);

/*
 * Insert the keys from @first_key on that are not 0 in @values[@n], which are
 * of one aligned group of bale_index_load_keys() keys.  Quick if there is no
 * key in that group yet.  Nobody else uses the group; other groups may be
 * loaded at the same time.  0 or -ENOMEM, with some of the keys inserted.
 */
int bale_index_load(BaleIndex *index, uint64_t first_key,
                    const uint64_t *values, uint64_t n);

/* Return false to stop the walk. */
typedef bool BaleIndexVisit(uint64_t key, uint64_t value, void *opaque);

/*
 * Visit every key, in no particular order.  Exact when nobody changes the
 * index.  Otherwise fuzzy: a key that is present all the time is visited
 * exactly once, with a value that it had at some moment of the walk; a key
 * that comes or goes meanwhile is visited at most once.
 *
 * @visit is called outside of the epoch and of any lock: it may do I/O and use
 * the index.  Returns false if @visit stopped the walk.
 */
bool bale_index_foreach(BaleIndex *index, BaleIndexVisit *visit, void *opaque);

/*
 * The same for the keys from @first_key to @last_key (both included).  Cost:
 * like a full walk, but limited to the segments of the key space that the
 * range touches.
 */
bool bale_index_foreach_range(BaleIndex *index, uint64_t first_key,
                              uint64_t last_key, BaleIndexVisit *visit,
                              void *opaque);

/*
 * Tell @visit every value, in no order, as quickly as memory can be read.
 * Nobody may be changing the index.
 */
typedef void BaleIndexVisitValue(uint64_t value, void *opaque);
void bale_index_foreach_value(BaleIndex *index, BaleIndexVisitValue *visit,
                              void *opaque);

/*
 * Remove every key from @first_key on (truncation).  @removed, which may be
 * NULL, is told each key with the value it had, exactly once, after it is
 * gone; its result is ignored.  Keys inserted meanwhile by others may
 * survive.  Returns the number of keys removed.
 */
uint64_t bale_index_remove_from(BaleIndex *index, uint64_t first_key,
                                BaleIndexVisit *removed, void *opaque);

/*
 * Move one chunk of the table being replaced, or begin a replacement that is
 * due.  Returns true if there is more to do.
 */
bool bale_index_grow_step(BaleIndex *index);

/* Only the member @bytes of the above, for who asks often. */
uint64_t bale_index_bytes(BaleIndex *index);

/* Cheap: counters and one step per segment. */
void bale_index_get_stats(BaleIndex *index, BaleIndexStats *stats);

/*
 * Count the primary buckets by the keys that they and their overflow buckets
 * hold; the last element counts all the fuller ones.  Reads all of the index.
 */
void bale_index_get_histogram(BaleIndex *index,
                              uint64_t histogram[BALE_INDEX_HISTOGRAM_SIZE]);

/*
 * Check every invariant stated in util/index.c, printing to stderr what is
 * wrong.  The index must be quiet.
 */
bool bale_index_check(BaleIndex *index);

#endif
