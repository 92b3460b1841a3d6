/*
 * Hash index: memory of tables and of overflow buckets, with its accounting
 *
 * Design and invariants: see index.c.  The mutex of a table is taken only to
 * begin a new slab, and for the rare bucket that was taken and not used.  It is
 * pthread's and not GLib's, because ThreadSanitizer knows that one.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "index-internal.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

atomic_long bale_index_test_allocations = -1;

Ledger *bale_index_ledger_new(void)
{
    Ledger *ledger = g_try_new0(Ledger, 1);

    if (ledger) {
        atomic_init(&ledger->refs, 1);
    }
    return ledger;
}

static Ledger *ledger_ref(Ledger *ledger)
{
    atomic_fetch_add(&ledger->refs, 1);
    return ledger;
}

void bale_index_ledger_unref(Ledger *ledger)
{
    if (atomic_fetch_sub(&ledger->refs, 1) == 1) {
        assert(ledger->bytes == 0 && ledger->retired_bytes == 0);
        g_free(ledger);
    }
}

/* Zeroed, aligned to a cache line; NULL if there is no memory. */
void *bale_index_memory_new(Ledger *ledger, size_t bytes)
{
    void *memory;
    uint64_t now, peak;

    if (atomic_load_explicit(&bale_index_test_allocations,
                             memory_order_relaxed) >= 0) {
        long left = atomic_fetch_sub(&bale_index_test_allocations, 1);

        if (left <= 0) {
            atomic_store(&bale_index_test_allocations, 0);
            return NULL;
        }
    }
    if (bytes >= MMAP_MIN_BYTES) {
        memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) {
            return NULL;
        }
    } else {
        if (posix_memalign(&memory, sizeof(Bucket), bytes) != 0) {
            return NULL;
        }
        memset(memory, 0, bytes);
    }
    assert((uintptr_t)memory >> TAG_SHIFT == 0);

    now = atomic_fetch_add(&ledger->bytes, bytes) + bytes;
    peak = atomic_load(&ledger->peak_bytes);
    while (now > peak &&
           !atomic_compare_exchange_weak(&ledger->peak_bytes, &peak, now)) {
        /* @peak has been read again. */
    }
    return memory;
}

void bale_index_memory_free(Ledger *ledger, void *memory, size_t bytes)
{
    if (!memory) {
        return;
    }
    if (bytes >= MMAP_MIN_BYTES) {
        munmap(memory, bytes);
    } else {
        free(memory);
    }
    atomic_fetch_sub(&ledger->bytes, bytes);
}

Table *bale_index_table_new(Ledger *ledger, unsigned hash_bits, unsigned shift)
{
    uint64_t span = (uint64_t)BUCKET_SLOTS << shift;
    uint64_t hashes = UINT64_C(1) << hash_bits;
    Table *t = bale_index_memory_new(ledger, sizeof(*t));

    if (!t) {
        return NULL;
    }
    t->bucket_count = (hashes + span - 1) / span;
    t->shift = shift;
    t->buckets_bytes = t->bucket_count * sizeof(Bucket);
    t->buckets = bale_index_memory_new(ledger, t->buckets_bytes);
    if (!t->buckets) {
        bale_index_memory_free(ledger, t, sizeof(*t));
        return NULL;
    }
    t->ledger = ledger_ref(ledger);
    pthread_mutex_init(&t->lock, NULL);
    return t;
}

void bale_index_table_huge(Table *t)
{
    if (t->buckets_bytes >= HUGE_MIN_BYTES) {
        madvise(t->buckets, t->buckets_bytes, MADV_HUGEPAGE);
    }
}

static uint64_t table_bytes(Table *t)
{
    uint64_t bytes = sizeof(*t) + t->buckets_bytes;

    for (Slab *s = atomic_load(&t->slab); s; s = s->older) {
        bytes += s->bytes;
    }
    return bytes;
}

void bale_index_table_free(Table *t)
{
    Ledger *ledger = t->ledger;
    Slab *slab = atomic_load(&t->slab);

    while (slab) {
        Slab *older = slab->older;

        bale_index_memory_free(ledger, slab, slab->bytes);
        slab = older;
    }
    bale_index_memory_free(ledger, t->buckets, t->buckets_bytes);
    pthread_mutex_destroy(&t->lock);
    bale_index_memory_free(ledger, t, sizeof(*t));
    bale_index_ledger_unref(ledger);
}

/* The deferred end of a table that has been replaced. */
static void table_free_retired(void *opaque)
{
    Table *t = opaque;

    atomic_fetch_sub(&t->ledger->retired_bytes, t->retired_bytes);
    bale_index_table_free(t);
}

void bale_index_table_retire(Table *t, BaleEpoch *epoch)
{
    /*
     * Somebody late may still take a slab, only to find that the chain is
     * frozen; hence remember what was counted.
     */
    t->retired_bytes = table_bytes(t);
    atomic_fetch_add(&t->ledger->retired_bytes, t->retired_bytes);
    bale_epoch_defer(epoch, table_free_retired, t);
}

static Bucket *slab_take(Slab *slab)
{
    uint64_t i;

    if (!slab || atomic_load(&slab->used) >= slab->count) {
        return NULL;
    }
    i = atomic_fetch_add(&slab->used, 1);
    return i < slab->count ? (Bucket *)slab + 1 + i : NULL;
}

/* An empty bucket for a chain of @t, or NULL if there is no memory. */
Bucket *bale_index_overflow_new(Table *t)
{
    Bucket *b = NULL;
    Slab *slab;

    if (atomic_load(&t->spare_count) == 0) {
        b = slab_take(atomic_load(&t->slab));
        if (b) {
            return b;
        }
    }

    pthread_mutex_lock(&t->lock);
    if (t->spare) {
        b = t->spare;
        t->spare = link_target(atomic_load(&b->link));
        atomic_store(&b->link, 0);
        atomic_fetch_sub(&t->spare_count, 1);
        goto out;
    }
    slab = atomic_load(&t->slab);
    b = slab_take(slab);
    if (!b) {
        uint64_t buckets = CLAMP(t->bucket_count >> SLAB_BUCKETS_SHIFT,
                                 SLAB_BUCKETS_MIN, SLAB_BUCKETS_MAX - 1);
        size_t bytes = (buckets + 1) * sizeof(Bucket);
        Slab *newer = bale_index_memory_new(t->ledger, bytes);

        if (newer) {
            newer->older = slab;
            newer->bytes = bytes;
            newer->count = buckets;
            b = slab_take(newer);
            atomic_store(&t->slab, newer);
        }
    }
out:
    pthread_mutex_unlock(&t->lock);
    return b;
}

/* Give back a bucket that did not make it into a chain, empty. */
void bale_index_overflow_unused(Table *t, Bucket *b)
{
    for (unsigned i = 0; i < BUCKET_SLOTS; i++) {
        atomic_store_explicit(&b->slot[i], 0, memory_order_relaxed);
    }
    pthread_mutex_lock(&t->lock);
    atomic_store(&b->link, link_to(t->spare));
    t->spare = b;
    atomic_fetch_add(&t->spare_count, 1);
    pthread_mutex_unlock(&t->lock);
}
