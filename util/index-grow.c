/*
 * Hash index: replacing a table while it is in use
 *
 * Design and invariants: see index.c.  One thread at a time moves buckets, and
 * nobody waits for the right to: whoever finds it taken goes on with his own
 * business.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "index-internal.h"

#include <assert.h>

static bool mover_try_lock(BaleIndex *index)
{
    return !atomic_load_explicit(&index->mover_busy, memory_order_relaxed) &&
           !atomic_exchange_explicit(&index->mover_busy, true,
                                     memory_order_acquire);
}

static void mover_unlock(BaleIndex *index)
{
    atomic_store_explicit(&index->mover_busy, false, memory_order_release);
}

/*
 * The shift of the table that should replace @t, or -1 if it is fine.  Both
 * numbers may be changing; whoever acts on the result asks again.
 */
static int table_wanted_shift(const BaleIndex *index, Table *t, int64_t keys)
{
    uint64_t n = t->bucket_count;
    uint64_t overflow = atomic_load_explicit(&t->overflow,
                                             memory_order_relaxed);
    uint64_t k = MAX(keys, 0);

    if (k > n * LOAD_GROW && t->shift > 0) {
        return t->shift - 1;
    }
    if (k < n * LOAD_SHRINK && t->shift < index->shift_max) {
        return t->shift + 1;
    }
    /*
     * Tidy only if it helps: a good part is overflow, and it has grown by half
     * since the table was completed (some keys collide more than others).
     */
    if (overflow * 4 > n &&
        (n + overflow) * sizeof(Bucket) > k * BYTES_PER_KEY_MAX &&
        overflow * 2 > counted(&t->fresh_overflow) * 3 + 32) {
        return t->shift;
    }
    return -1;
}

/*
 * Freeze the chain at @b and collect its live entries; returns how many.  The
 * first link comes first, because that is what writers watch while they wait.
 */
static unsigned chain_freeze(Bucket *b, uint64_t *entries)
{
    unsigned n = 0;

    do {
        uint64_t link = atomic_fetch_or(&b->link, FROZEN);

        assert(!(link & FROZEN));
        for (unsigned i = 0; i < BUCKET_SLOTS; i++) {
            uint64_t word = atomic_fetch_or(&b->slot[i], FROZEN);

            BALE_INDEX_PAUSE();
            assert(!(word & FROZEN));
            if (entry_live(word)) {
                assert(n < SPAN_MAX);
                entries[n++] = word;
            }
        }
        b = link_target(link);
    } while (b);
    return n;
}

static void chain_thaw(Bucket *b)
{
    do {
        for (unsigned i = 0; i < BUCKET_SLOTS; i++) {
            atomic_fetch_and(&b->slot[i], ~FROZEN);
        }
        b = link_target(atomic_fetch_and(&b->link, ~FROZEN));
    } while (b);
}

/* Put @entries into the private chain @buckets, as many as needed. */
static void private_fill(Bucket *buckets, const uint64_t *entries, unsigned n)
{
    for (Bucket *b = buckets; b; b = link_target(atomic_load(&b->link))) {
        for (unsigned i = 0; i < BUCKET_SLOTS; i++) {
            atomic_store_explicit(&b->slot[i], n ? *entries : 0,
                                  memory_order_relaxed);
            if (n) {
                entries++;
                n--;
            }
        }
    }
    assert(n == 0);
}

/* Cut the first @keep buckets off the private chain; returns the rest. */
static Bucket *private_cut(Bucket *buckets, unsigned keep)
{
    Bucket *rest;

    assert(keep > 0);
    while (--keep) {
        buckets = link_target(atomic_load(&buckets->link));
    }
    rest = link_target(atomic_load(&buckets->link));
    atomic_store(&buckets->link, 0);
    return rest;
}

/*
 * Copy @n entries, which nobody else can insert, into the chain at @b of
 * @t.  When tables are merged, others insert into the same chain; therefore
 * what does not fit goes in at once, with the overflow buckets around it:
 * the number reserved cannot run short.  Returns the buckets left over.
 */
static Bucket *chain_place(Table *t, Bucket *b, const uint64_t *entries,
                           unsigned n, Bucket *reserved)
{
    while (n > 0) {
        uint64_t link;

        for (unsigned i = 0; i < BUCKET_SLOTS && n > 0; i++) {
            uint64_t empty = 0;

            BALE_INDEX_PAUSE();

            if (atomic_load(&b->slot[i]) == 0 &&
                atomic_compare_exchange_strong(&b->slot[i], &empty,
                                               *entries)) {
                entries++;
                n--;
            }
        }
        link = atomic_load(&b->link);
        if (n > 0 && link == 0) {
            unsigned needed = (n + BUCKET_SLOTS - 1) / BUCKET_SLOTS;
            Bucket *rest;

            assert(reserved);
            rest = private_cut(reserved, needed);
            private_fill(reserved, entries, n);
            if (atomic_compare_exchange_strong(&b->link, &link,
                                               link_to(reserved))) {
                atomic_fetch_add(&t->overflow, needed);
                return rest;
            }
            /* Somebody was faster: look for room there first. */
            b = reserved;
            while (link_target(atomic_load(&b->link))) {
                b = link_target(atomic_load(&b->link));
            }
            atomic_store(&b->link, link_to(rest));
        }
        b = link_target(link);
    }
    return reserved;
}

/* Move bucket @i of @t to its successor @next.  False: no memory. */
static bool bucket_move(BaleIndex *index, Table *t, Table *next, uint64_t i)
{
    Bucket *from = &t->buckets[i];
    uint64_t hash = i * table_span(t);          /* the first one of @from */
    uint64_t target = hash_bucket(next, hash);
    uint64_t offset = hash - target * table_span(next);
    bool shared = next->shift > t->shift;
    uint64_t *entries = index->scratch;
    Bucket *reserved = NULL;
    unsigned n = chain_freeze(from, entries);
    unsigned low = 0, needed = 0, got = 0;

    /* Change the tags; those of the first target bucket come first. */
    for (unsigned e = 0; e < n; e++) {
        uint64_t tag = entry_tag(entries[e]) + offset;
        uint64_t value = entries[e] & VALUE_MASK;

        if (tag < table_span(next)) {
            entries[e] = entries[low];
            entries[low++] = entry_new(tag, value);
        } else {
            entries[e] = entry_new(tag - table_span(next), value);
        }
    }
    assert(low == n || target + 1 < next->bucket_count);

    if (shared) {
        assert(low == n);
        needed = (n + BUCKET_SLOTS - 1) / BUCKET_SLOTS;
    } else {
        /* Empty targets: only what exceeds their seven slots. */
        needed += low ? (low - 1) / BUCKET_SLOTS : 0;
        needed += n > low ? (n - low - 1) / BUCKET_SLOTS : 0;
    }
    for (; got < needed; got++) {
        Bucket *b = bale_index_overflow_new(next);

        if (!b) {
            count(&index->allocation_failures, 1);
            break;
        }
        atomic_store(&b->link, link_to(reserved));
        reserved = b;
    }
    if (got == needed) {
        reserved = chain_place(next, &next->buckets[target], entries, low,
                               reserved);
        if (n > low) {
            reserved = chain_place(next, &next->buckets[target + 1],
                                   entries + low, n - low, reserved);
        }
        BALE_INDEX_PAUSE();
        atomic_fetch_or(&from->link, LINK_DONE);
        count(&index->entries_moved, n);
    } else {
        chain_thaw(from);
    }
    while (reserved) {
        Bucket *b = reserved;

        reserved = link_target(atomic_load(&b->link));
        bale_index_overflow_unused(next, b);
    }
    return got == needed;
}

/* All is moved: make the successor the segment's table. */
static void mover_finish(BaleIndex *index, Segment *segment, Table *t)
{
    Table *next = atomic_load(&t->next);

    atomic_store(&next->fresh_overflow, atomic_load(&next->overflow));
    if (next->shift < t->shift) {
        count(&index->growths, 1);
    } else if (next->shift == t->shift) {
        count(&index->rebuilds, 1);
    } else {
        count(&index->shrinks, 1);
    }
    bale_index_table_huge(next);
    atomic_store(&segment->table, next);
    atomic_store(&index->moving, NULL);
    bale_index_table_retire(t, index->epoch);
}

/* Under mover_busy: move one chunk.  True if there is more to do. */
static bool mover_step(BaleIndex *index)
{
    Segment *segment = atomic_load(&index->moving);
    Table *t, *next;
    uint64_t i, end;

    if (!segment) {
        return false;
    }
    t = atomic_load(&segment->table);
    next = atomic_load(&t->next);
    i = atomic_load(&t->moved);
    end = MIN(i + BALE_INDEX_CHUNK_BUCKETS, t->bucket_count);
    for (; i < end; i++) {
        if (!bucket_move(index, t, next, i)) {
            return false;
        }
        atomic_store(&t->moved, i + 1);
    }
    count(&index->chunks_moved, 1);
    if (i < t->bucket_count) {
        return true;
    }
    mover_finish(index, segment, t);
    return false;
}

/* Under mover_busy, nothing on the move: begin with @segment if it is due. */
static bool mover_begin(BaleIndex *index, Segment *segment)
{
    Table *t = atomic_load(&segment->table);
    int shift = table_wanted_shift(index, t, atomic_load(&segment->keys));
    Table *next;

    if (shift < 0) {
        return false;
    }
    next = bale_index_table_new(index->ledger, index->hash_bits, shift);
    if (!next) {
        count(&index->allocation_failures, 1);
        atomic_store(&index->retry_pause, RETRY_CHANGES);
        return false;
    }
    atomic_store(&t->next, next);
    atomic_store(&index->moving, segment);
    return true;
}

/* Before a change: do a share of the work if there is any. */
void bale_index_help(BaleIndex *index)
{
    if (G_UNLIKELY(atomic_load_explicit(&index->moving,
                                        memory_order_relaxed)) &&
        mover_try_lock(index)) {
        mover_step(index);
        mover_unlock(index);
    }
}

/* After the number of keys changed. */
void bale_index_changed(BaleIndex *index, Segment *segment, Table *t,
                          int64_t delta)
{
    int64_t keys = atomic_fetch_add(&segment->keys, delta) + delta;

    if (G_LIKELY(table_wanted_shift(index, t, keys) < 0) ||
        atomic_load_explicit(&index->moving, memory_order_relaxed)) {
        return;
    }
    if (G_UNLIKELY(atomic_load_explicit(&index->retry_pause,
                                        memory_order_relaxed) > 0)) {
        atomic_fetch_sub(&index->retry_pause, 1);
        return;
    }
    if (mover_try_lock(index)) {
        if (!atomic_load(&index->moving)) {
            mover_begin(index, segment);
        }
        mover_unlock(index);
    }
}

bool bale_index_grow_step(BaleIndex *index)
{
    bool more = false;

    if (!mover_try_lock(index)) {
        return atomic_load(&index->moving) != NULL;
    }
    if (atomic_load(&index->moving)) {
        more = mover_step(index);
        if (atomic_load(&index->moving)) {
            goto out;
        }
    }
    for (uint64_t i = 0; i < index->segment_count && !more; i++) {
        Segment *segment = atomic_load(&index->segments[i]);

        if (segment) {
            more = mover_begin(index, segment);
        }
    }
out:
    mover_unlock(index);
    return more;
}
