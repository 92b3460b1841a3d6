/*
 * Hash index: walks, statistics, and the check of all invariants
 *
 * Walks go through the hashes of a segment in order, which is the same in
 * tables of any size; so they can leave the epoch after any bucket and go on in
 * another table.  The invariants are stated in index.c.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "index-internal.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

typedef struct Pair {
    uint64_t hash;
    uint64_t value;
} Pair;

/* Add the entries of the chain at @b with hashes from @low to below @high. */
static void chain_collect(Table *t, Bucket *b, uint64_t low, uint64_t high,
                          GArray *pairs)
{
    uint64_t base = hash_bucket(t, low) * table_span(t);
    uint64_t seen[SPAN_MAX / 64];

    /* A key that moves from slot to slot (removed, inserted) counts once. */
    memset(seen, 0, (table_span(t) + 63) / 64 * sizeof(*seen));
    do {
        for (unsigned i = 0; i < BUCKET_SLOTS; i++) {
            uint64_t word = atomic_load(&b->slot[i]);
            uint64_t tag = entry_tag(word);
            Pair pair = { base + tag, word & VALUE_MASK };

            BALE_INDEX_PAUSE();
            if (entry_live(word) && pair.hash >= low && pair.hash < high &&
                !(seen[tag / 64] >> (tag % 64) & 1)) {
                seen[tag / 64] |= UINT64_C(1) << (tag % 64);
                g_array_append_val(pairs, pair);
            }
        }
        b = link_target(atomic_load(&b->link));
    } while (b);
}

/*
 * Add the entries with hashes from @low to below @high, from @t or, where its
 * buckets are done, from its successors: as many deep as there were
 * replacements since the epoch was entered.
 */
static void table_collect(Table *t, uint64_t low, uint64_t high, GArray *pairs)
{
    while (low < high) {
        uint64_t i = hash_bucket(t, low);
        uint64_t end = MIN((i + 1) * table_span(t), high);
        Bucket *b = &t->buckets[i];

        if (!(atomic_load(&b->link) & LINK_DONE)) {
            chain_collect(t, b, low, end, pairs);
        } else {
            table_collect(atomic_load(&t->next), low, end, pairs);
        }
        low = end;
    }
}

bool bale_index_foreach_range(BaleIndex *index, uint64_t first_key,
                              uint64_t last_key, BaleIndexVisit *visit,
                              void *opaque)
{
    g_autoptr(GArray) pairs = g_array_new(FALSE, FALSE, sizeof(Pair));
    uint64_t key_max = (UINT64_C(1) << index->key_bits) - 1;
    uint64_t hashes = index->hash_mask + 1;

    last_key = MIN(last_key, key_max);
    if (first_key > last_key) {
        return true;
    }
    for (uint64_t s = first_key >> index->hash_bits;
         s <= last_key >> index->hash_bits; s++) {
        Segment *segment = atomic_load(&index->segments[s]);

        for (uint64_t low = 0; segment && low < hashes; ) {
            BaleEpochToken token = bale_epoch_enter(index->epoch);
            Table *t = atomic_load(&segment->table);
            uint64_t high = MIN(low + WALK_BUCKETS * table_span(t), hashes);

            g_array_set_size(pairs, 0);
            table_collect(t, low, high, pairs);
            bale_epoch_exit(index->epoch, token);
            low = high;

            for (guint i = 0; i < pairs->len; i++) {
                Pair *pair = &g_array_index(pairs, Pair, i);
                uint64_t key = s << index->hash_bits |
                               bale_index_unmix(index, pair->hash);

                if (key >= first_key && key <= last_key &&
                    !visit(key, pair->value, opaque)) {
                    return false;
                }
            }
        }
    }
    return true;
}

bool bale_index_foreach(BaleIndex *index, BaleIndexVisit *visit, void *opaque)
{
    return bale_index_foreach_range(index, 0, UINT64_MAX, visit, opaque);
}

/* The entries of the buckets from @first on. */
static void table_values(Table *t, uint64_t first, BaleIndexVisitValue *visit,
                         void *opaque)
{
    for (uint64_t i = first; i < t->bucket_count; i++) {
        Bucket *b = &t->buckets[i];

        do {
            for (unsigned s = 0; s < BUCKET_SLOTS; s++) {
                uint64_t word = atomic_load_explicit(&b->slot[s],
                                                     memory_order_relaxed);

                if (entry_live(word)) {
                    visit(word & VALUE_MASK, opaque);
                }
            }
            b = link_target(atomic_load_explicit(&b->link,
                                                 memory_order_relaxed));
        } while (b);
    }
}

void bale_index_foreach_value(BaleIndex *index, BaleIndexVisitValue *visit,
                              void *opaque)
{
    for (uint64_t i = 0; i < index->segment_count; i++) {
        Segment *segment = atomic_load(&index->segments[i]);

        if (segment) {
            Table *t = atomic_load(&segment->table);
            Table *next = atomic_load(&t->next);

            table_values(t, atomic_load(&t->moved), visit, opaque);
            if (next) {
                table_values(next, 0, visit, opaque); /* what was moved */
            }
        }
    }
}

typedef struct RemoveFrom {
    BaleIndex *index;
    BaleIndexVisit *removed;
    void *opaque;
    uint64_t keys;
} RemoveFrom;

static bool remove_one(uint64_t key, uint64_t value, void *opaque)
{
    RemoveFrom *r = opaque;
    uint64_t old = 0;
    int ret = bale_index_set(r->index, key, 0, &old);

    assert(ret == 0);
    (void)ret;
    if (old) {
        r->keys++;
        if (r->removed) {
            r->removed(key, old, r->opaque);
        }
    }
    return true;
}

uint64_t bale_index_remove_from(BaleIndex *index, uint64_t first_key,
                                BaleIndexVisit *removed, void *opaque)
{
    RemoveFrom r = { index, removed, opaque, 0 };

    bale_index_foreach_range(index, first_key, UINT64_MAX, remove_one, &r);
    return r.keys;
}

/* Statistics and check */

uint64_t bale_index_bytes(BaleIndex *index)
{
    return atomic_load(&index->ledger->bytes);
}

void bale_index_get_stats(BaleIndex *index, BaleIndexStats *stats)
{
    BaleEpochToken token = bale_epoch_enter(index->epoch);
    Segment *moving = atomic_load(&index->moving);
    int64_t keys = 0;

    *stats = (BaleIndexStats) {
        .bytes = atomic_load(&index->ledger->bytes),
        .peak_bytes = atomic_load(&index->ledger->peak_bytes),
        .retired_bytes = atomic_load(&index->ledger->retired_bytes),
        .growths = counted(&index->growths),
        .rebuilds = counted(&index->rebuilds),
        .shrinks = counted(&index->shrinks),
        .chunks_moved = counted(&index->chunks_moved),
        .entries_moved = counted(&index->entries_moved),
        .waits = counted(&index->waits),
        .insert_conflicts = counted(&index->insert_conflicts),
        .allocation_failures = counted(&index->allocation_failures),
    };
    for (uint64_t i = 0; i < index->segment_count; i++) {
        Segment *segment = atomic_load(&index->segments[i]);

        if (segment) {
            Table *t = atomic_load(&segment->table);

            keys += atomic_load(&segment->keys);
            stats->segments++;
            stats->buckets += t->bucket_count;
            stats->overflow_buckets += atomic_load(&t->overflow);
            if (segment == moving && atomic_load(&t->next)) {
                stats->growing = true;
                stats->growing_done = atomic_load(&t->moved);
                stats->growing_total = t->bucket_count;
            }
        }
    }
    stats->keys = MAX(keys, 0);
    bale_epoch_exit(index->epoch, token);
}

void bale_index_get_histogram(BaleIndex *index,
                              uint64_t histogram[BALE_INDEX_HISTOGRAM_SIZE])
{
    g_autoptr(GArray) pairs = g_array_new(FALSE, FALSE, sizeof(Pair));

    memset(histogram, 0, BALE_INDEX_HISTOGRAM_SIZE * sizeof(*histogram));
    for (uint64_t s = 0; s < index->segment_count; s++) {
        Segment *segment = atomic_load(&index->segments[s]);
        uint64_t low = 0;

        while (segment && low <= index->hash_mask) {
            BaleEpochToken token = bale_epoch_enter(index->epoch);
            Table *t = atomic_load(&segment->table);
            uint64_t high = MIN(low + table_span(t), index->hash_mask + 1);

            g_array_set_size(pairs, 0);
            table_collect(t, low, high, pairs);
            bale_epoch_exit(index->epoch, token);
            histogram[MIN(pairs->len, BALE_INDEX_HISTOGRAM_SIZE - 1)]++;
            low = high;
        }
    }
}

typedef struct Check {
    BaleIndex *index;
    uint64_t segment;           /* number, for messages */
    uint64_t keys;              /* live entries that are the truth */
    bool ok;
} Check;

static void check_failed(Check *check, const char *what, uint64_t number)
{
    fprintf(stderr, "index: segment %" PRIu64 ": %s %" PRIu64 "\n",
            check->segment, what, number);
    check->ok = false;
}

/* One chain: invariants 1 to 5, and 8 for the marks. */
static uint64_t check_chain(Check *check, Table *t, uint64_t i, bool done,
                            bool truth)
{
    uint64_t seen[SPAN_MAX / 64] = { 0 };
    uint64_t overflow = 0;
    Bucket *b = &t->buckets[i];
    bool primary = true;

    do {
        uint64_t link = atomic_load(&b->link);

        for (unsigned s = 0; s < BUCKET_SLOTS; s++) {
            uint64_t word = atomic_load(&b->slot[s]);
            uint64_t tag = entry_tag(word);

            if (((word & FROZEN) != 0) != done) {
                check_failed(check, "wrong frozen mark in bucket", i);
            }
            if (done) {
                continue;
            }
            if (word & TENTATIVE) {
                check_failed(check, "tentative entry in bucket", i);
            } else if ((word & VALUE_MASK) == 0 && word != 0) {
                check_failed(check, "empty entry with a tag in bucket", i);
            } else if (word != 0) {
                if (tag >= table_span(t) ||
                    i * table_span(t) + tag > check->index->hash_mask) {
                    check_failed(check, "tag too large in bucket", i);
                } else if (seen[tag / 64] >> (tag % 64) & 1) {
                    check_failed(check, "tag twice in bucket", i);
                } else {
                    seen[tag / 64] |= UINT64_C(1) << (tag % 64);
                }
                check->keys += truth;
            }
        }
        if (((link & FROZEN) != 0) != done ||
            ((link & LINK_DONE) != 0) != (done && primary)) {
            check_failed(check, "wrong marks on a link of bucket", i);
        }
        b = link_target(link);
        overflow += b != NULL;
        primary = false;
        if (overflow > t->bucket_count + atomic_load(&t->overflow)) {
            check_failed(check, "endless chain in bucket", i);
            break;
        }
    } while (b);
    return overflow;
}

/* Invariants 6 and 7: what is done, and where the truth is. */
static void check_table(Check *check, Table *t, uint64_t moved, bool truth)
{
    uint64_t overflow = 0;

    if (t->bucket_count != hash_bucket(t, check->index->hash_mask) + 1) {
        check_failed(check, "wrong number of buckets", t->bucket_count);
    }
    for (uint64_t i = 0; i < t->bucket_count; i++) {
        overflow += check_chain(check, t, i, i < moved, truth);
    }
    if (overflow != atomic_load(&t->overflow)) {
        check_failed(check, "overflow buckets, but found", overflow);
    }
}

bool bale_index_check(BaleIndex *index)
{
    Segment *moving = atomic_load(&index->moving);
    Check check = { .index = index, .ok = true };

    for (uint64_t i = 0; i < index->segment_count; i++) {
        Segment *segment = atomic_load(&index->segments[i]);
        Table *t, *next;

        check.segment = i;
        check.keys = 0;
        if (!segment) {
            continue;
        }
        t = atomic_load(&segment->table);
        next = atomic_load(&t->next);
        if ((next != NULL) != (segment == moving) ||
            (next && atomic_load(&next->next)) ||
            (!next && atomic_load(&t->moved) != 0) ||
            atomic_load(&t->moved) > t->bucket_count) {
            check_failed(&check, "wrong state of growth, moved",
                         atomic_load(&t->moved));
        }
        check_table(&check, t, atomic_load(&t->moved), true);
        if (next) {
            /*
             * Nothing is placed in the successor before its bucket is done,
             * or the mover is at work; so all in there is the truth.
             */
            check_table(&check, next, 0, true);
        }
        if ((int64_t)check.keys != atomic_load(&segment->keys)) {
            check_failed(&check, "keys are counted wrong, found", check.keys);
        }
    }
    return check.ok;
}
