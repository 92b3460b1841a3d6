/*
 * Hash index: cluster number -> 48-bit value, latch-free, grown online
 *
 * The key space is cut into segments of 2^hash_bits consecutive keys, each
 * with a table of its own that is created with its first key.  In a segment,
 * the low bits of the key go through a mix that can be inverted; the result is
 * called the hash.  A table cuts the range of hashes into buckets of "span"
 * consecutive hashes, span = 7 << shift: hash / span is the bucket and hash %
 * span, below 2^14, is the tag.  So an entry determines its key exactly: there
 * are no false hits, and a table can be replaced by one with another span, or
 * walked, without anything but the table.  The factor 7 makes a full segment
 * with shift 0 fill its buckets to the last slot.
 *
 * A bucket is a cache line of seven entries and a link to an overflow bucket:
 *
 *   entry   0-47 value   48-61 tag   62 tentative   63 frozen
 *   link    0-47 address of the next overflow bucket   62 done   63 frozen
 *
 * Invariants:
 *    1. An entry with value 0 has tag 0 and is not tentative: it is empty.
 *    2. In one chain (a bucket and its overflow buckets) no tag occurs twice
 *       among the entries that are not tentative.
 *    3. Every tag is below the span, every hash below 2^hash_bits.
 *    4. A tentative entry belongs to the thread that wrote it: nobody else
 *       changes it, except for freezing it, and readers do not see it.
 *    5. A link goes from 0 to an address once; overflow buckets leave a chain
 *       only together with the table.  An entry never moves inside a table.
 *    6. At most one table of an index is being replaced at a time: it has a
 *       successor ("next"); the buckets below "moved" are done, the others are
 *       not.  A segment's table is the oldest one that is not completely done.
 *    7. As long as a bucket is not done, the truth about its hashes is in it
 *       and the successor holds none of them that anybody looks at.  From the
 *       moment it is done, the truth is in the successor.
 *    8. A bucket is done only after all its entries and links were frozen and
 *       every entry that was not tentative was copied.  Nothing frozen changes
 *       except by thawing, which happens only if nothing was copied.
 *    9. "keys" of a segment is the number of entries that are not tentative in
 *       undone buckets and in the successors of done ones.  (Counted after the
 *       fact: exact when quiet.)
 *
 * Insertion (2) writes the entry tentatively into a free slot, then looks
 * through the chain again.  If the tag is there already, tentative or not, it
 * takes its own entry back and starts anew; else it takes the tentative bit
 * away.  Of two insertions of a tag, the one that wrote its entry later meets
 * the other's when it looks again, hence not both remain.  This needs the
 * write and the second look of both to be in one total order; therefore
 * everything here is sequentially consistent unless it says otherwise.
 *
 * Moving a bucket freezes its entries and links one by one; from then on
 * updates fail and wait until the bucket is done.  Then the entries are copied
 * and the bucket is marked done.  Readers do not wait: the bucket was not done
 * when they came to it, and what it holds from then on was true at some moment
 * since, because a bucket keeps the last truth when it is done (7, 8).
 *
 * Threads: finding is wait-free but for following a move.  Changing is
 * lock-free, except that a change to the very bucket on the move waits for the
 * mover, and that overflow buckets are cut from slabs under a mutex when the
 * current slab is used up.  The mover holds "mover_busy", which nobody waits
 * for.
 *
 * Errors: no memory for a larger table only means that it is not replaced now;
 * no memory for overflow buckets fails an insertion, or thaws the bucket on
 * the move, to be tried again later.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "index-internal.h"

#include <assert.h>
#include <errno.h>
#include <sched.h>

/* Hashing */

/* Odd constants with bits well spread, as in other mixes of this kind. */
#define MIX_A UINT64_C(0x9e3779b97f4a7c15)
#define MIX_B UINT64_C(0xff51afd7ed558ccd)
#define MIX_C UINT64_C(0xc4ceb9fe1a85ec53)
#define MIX_D UINT64_C(0xd6e8feb86659fd93)

/* Newton's iteration doubles the correct low bits, from 3 to 96. */
static uint64_t odd_inverse(uint64_t a)
{
    uint64_t x = a;

    for (unsigned i = 0; i < 5; i++) {
        x *= 2 - a * x;
    }
    return x;
}

/*
 * Each step can be undone: a multiplication by an odd number modulo a power
 * of two, and a shift of at least half the width, which is its own inverse.
 * The bucket comes from the high bits, hence multiplication is last.  With four
 * rounds the keys per bucket vary as if thrown at random, also for keys in
 * steps of 2 to 4096; with three they vary up to twice as much.
 */
static uint64_t mix(const BaleIndex *index, uint64_t key)
{
    uint64_t x = key & index->hash_mask;

    x = (x * MIX_A) & index->hash_mask;
    x ^= x >> index->mix_shift;
    x = (x * MIX_B) & index->hash_mask;
    x ^= x >> index->mix_shift;
    x = (x * MIX_C) & index->hash_mask;
    x ^= x >> index->mix_shift;
    return (x * MIX_D) & index->hash_mask;
}

uint64_t bale_index_unmix(const BaleIndex *index, uint64_t hash)
{
    uint64_t x = (hash * odd_inverse(MIX_D)) & index->hash_mask;

    x ^= x >> index->mix_shift;
    x = (x * odd_inverse(MIX_C)) & index->hash_mask;
    x ^= x >> index->mix_shift;
    x = (x * odd_inverse(MIX_B)) & index->hash_mask;
    x ^= x >> index->mix_shift;
    return (x * odd_inverse(MIX_A)) & index->hash_mask;
}

/* One bucket and its chain */

typedef enum ScanResult {
    SCAN_FOUND,
    SCAN_ABSENT,
    SCAN_FROZEN,                /* the bucket is on the move: nothing known */
} ScanResult;

typedef struct Scan {
    Word *slot;                 /* found, or free; NULL: the chain is full */
    uint64_t word;              /* found */
    Bucket *last;               /* absent: the last bucket of the chain */
} Scan;

static ScanResult chain_scan(Bucket *b, uint64_t tag, Scan *scan)
{
    scan->slot = NULL;
    for (;;) {
        uint64_t link;

        for (unsigned i = 0; i < BUCKET_SLOTS; i++) {
            uint64_t word = atomic_load(&b->slot[i]);

            if (word & FROZEN) {
                return SCAN_FROZEN;
            }
            if (word == 0) {
                if (!scan->slot) {
                    scan->slot = &b->slot[i];
                }
            } else if (entry_tag(word) == tag && entry_live(word)) {
                scan->slot = &b->slot[i];
                scan->word = word;
                return SCAN_FOUND;
            }
        }
        link = atomic_load(&b->link);
        if (link & FROZEN) {
            return SCAN_FROZEN;
        }
        if (link == 0) {
            scan->last = b;
            return SCAN_ABSENT;
        }
        b = link_target(link);
    }
}

/* The live entry with @tag, frozen or not, or 0. */
static uint64_t chain_find(Bucket *b, uint64_t tag)
{
    do {
        for (unsigned i = 0; i < BUCKET_SLOTS; i++) {
            uint64_t word = atomic_load(&b->slot[i]);

            if (entry_tag(word) == tag && entry_live(word)) {
                return word;
            }
        }
        b = link_target(atomic_load(&b->link));
    } while (b);
    return 0;
}

/* Is @tag anywhere but in @own, tentative or not? */
static bool chain_has_twin(Bucket *b, uint64_t tag, const Word *own)
{
    do {
        for (unsigned i = 0; i < BUCKET_SLOTS; i++) {
            if (&b->slot[i] != own) {
                uint64_t word = atomic_load(&b->slot[i]);

                if ((word & VALUE_MASK) != 0 && entry_tag(word) == tag) {
                    return true;
                }
            }
        }
        b = link_target(atomic_load(&b->link));
    } while (b);
    return false;
}

static void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Wait while the chain at @b is frozen and not done. */
static void chain_wait(BaleIndex *index, Bucket *b)
{
    unsigned spins = 0;
    uint64_t link;

    count(&index->waits, 1);
    do {
        cpu_relax();
        if (++spins % SPINS_PER_YIELD == 0) {
            sched_yield();
        }
        link = atomic_load(&b->link);
    } while ((link & FROZEN) && !(link & LINK_DONE));
}

typedef enum InsertResult {
    INSERT_OK,
    INSERT_AGAIN,
    INSERT_NO_MEMORY,
} InsertResult;

/*
 * Second half of an insertion into the chain at @head: make the tentative
 * entry in @slot final, or take it back.
 */
static InsertResult insert_decide(BaleIndex *index, Bucket *head, Word *slot,
                                  uint64_t word)
{
    uint64_t expected = word | TENTATIVE;
    bool twin;

    BALE_INDEX_PAUSE();
    twin = chain_has_twin(head, entry_tag(word), slot);
    BALE_INDEX_PAUSE();

    if (twin) {
        count(&index->insert_conflicts, 1);
    }
    if (atomic_compare_exchange_strong(slot, &expected, twin ? 0 : word)) {
        return twin ? INSERT_AGAIN : INSERT_OK;
    }
    /*
     * Frozen.  Once the bucket is done nobody looks at the entry any more; if
     * it is thawed, then the entry is ours to remove.
     */
    for (;;) {
        assert((expected & ~FROZEN) == (word | TENTATIVE));
        chain_wait(index, head);
        if (atomic_load(&head->link) & LINK_DONE) {
            return INSERT_AGAIN;
        }
        expected = word | TENTATIVE;
        if (atomic_compare_exchange_strong(slot, &expected, 0)) {
            return INSERT_AGAIN;
        }
    }
}

/* Insert where @scan found a free slot or the end of the chain at @head. */
static InsertResult chain_insert(BaleIndex *index, Table *t, Bucket *head,
                                 const Scan *scan, uint64_t word)
{
    uint64_t expected = 0;
    Word *slot = scan->slot;

    if (slot) {
        if (!atomic_compare_exchange_strong(slot, &expected,
                                            word | TENTATIVE)) {
            return INSERT_AGAIN;
        }
    } else {
        Bucket *b = bale_index_overflow_new(t);

        if (!b) {
            return INSERT_NO_MEMORY;
        }
        slot = &b->slot[0];
        atomic_store(slot, word | TENTATIVE);
        if (!atomic_compare_exchange_strong(&scan->last->link, &expected,
                                            link_to(b))) {
            bale_index_overflow_unused(t, b);
            return INSERT_AGAIN;
        }
        atomic_fetch_add(&t->overflow, 1);
    }
    return insert_decide(index, head, slot, word);
}

/*
 * Two insertions of one key that met each other must not meet again and
 * again: wait for a random time, longer with every attempt.
 */
static void insert_backoff(unsigned attempt)
{
    static _Thread_local uint32_t random;
    uint32_t spins;

    if (random == 0) {
        random = (uint32_t)((uintptr_t)&random >> 4) | 1;
    }
    random = random * 1664525 + 1013904223;
    spins = (random >> 16) % (2u << MIN(attempt, BACKOFF_SHIFT_MAX));
    for (uint32_t i = 0; i < spins; i++) {
        cpu_relax();
    }
    if (attempt >= BACKOFF_SHIFT_MAX) {
        sched_yield();
    }
}

/* Creation and destruction */

static Segment *segment_new(BaleIndex *index)
{
    Segment *segment = bale_index_memory_new(index->ledger, sizeof(*segment));
    Table *t;

    if (!segment) {
        return NULL;
    }
    t = bale_index_table_new(index->ledger, index->hash_bits, index->shift_max);
    if (!t) {
        bale_index_memory_free(index->ledger, segment, sizeof(*segment));
        return NULL;
    }
    atomic_init(&segment->table, t);
    return segment;
}

static void segment_free(BaleIndex *index, Segment *segment)
{
    Table *t = atomic_load(&segment->table);
    Table *next = atomic_load(&t->next);

    assert(!next || !atomic_load(&next->next));
    bale_index_table_free(t);
    if (next) {
        bale_index_table_free(next);
    }
    bale_index_memory_free(index->ledger, segment, sizeof(*segment));
}

/* The segment of @key, made if @create; NULL if none, or no memory. */
static Segment *index_segment(BaleIndex *index, uint64_t key, bool create)
{
    _Atomic(Segment *) *where;
    Segment *segment, *fresh;

    assert(key >> index->key_bits == 0);
    where = &index->segments[key >> index->hash_bits];
    segment = atomic_load(where);
    if (G_LIKELY(segment) || !create) {
        return segment;
    }
    fresh = segment_new(index);
    if (!fresh) {
        return NULL;
    }
    if (atomic_compare_exchange_strong(where, &segment, fresh)) {
        return fresh;
    }
    segment_free(index, fresh);
    return segment;
}

BaleIndex *bale_index_new(unsigned key_bits, uint64_t expected_keys,
                          BaleEpoch *epoch)
{
    unsigned hash_bits, shift = 0;
    Ledger *ledger = bale_index_ledger_new();
    BaleIndex *index;
    uint64_t key_space;

    assert(key_bits >= 1 && key_bits <= BALE_INDEX_KEY_BITS_MAX);
    assert(epoch);
    if (!ledger) {
        return NULL;
    }
    index = bale_index_memory_new(ledger, sizeof(*index));
    if (!index) {
        bale_index_ledger_unref(ledger);
        return NULL;
    }
    index->ledger = ledger;
    index->epoch = epoch;

    hash_bits = MIN(key_bits, SEGMENT_BITS);
    if (key_bits > hash_bits + SEGMENTS_MAX_BITS) {
        hash_bits = key_bits - SEGMENTS_MAX_BITS;
    }
    index->key_bits = key_bits;
    index->hash_bits = hash_bits;
    index->hash_mask = (UINT64_C(1) << hash_bits) - 1;
    index->mix_shift = (hash_bits + 1) / 2;
    index->segment_count = UINT64_C(1) << (key_bits - hash_bits);

    /* The smallest table that holds the expected keys at a good load. */
    key_space = UINT64_C(1) << key_bits;
    expected_keys = MIN(expected_keys, key_space);
    while (shift < SHIFT_MAX) {
        uint64_t span = (uint64_t)BUCKET_SLOTS << (shift + 1);
        uint64_t buckets = MAX(key_space / span, 1);

        if (expected_keys / buckets > LOAD_EXPECTED ||
            span >= index->hash_mask) {
            break;
        }
        shift++;
    }
    index->shift_max = shift;

    index->scratch =
        bale_index_memory_new(ledger, SPAN_MAX * sizeof(*index->scratch));
    index->segments =
        bale_index_memory_new(ledger, index->segment_count *
                                      sizeof(*index->segments));
    if (!index->scratch || !index->segments) {
        bale_index_free(index);
        return NULL;
    }
    return index;
}

void bale_index_free(BaleIndex *index)
{
    Ledger *ledger;

    if (!index) {
        return;
    }
    ledger = index->ledger;
    for (uint64_t i = 0; index->segments && i < index->segment_count; i++) {
        Segment *segment = atomic_load(&index->segments[i]);

        if (segment) {
            segment_free(index, segment);
        }
    }
    bale_index_memory_free(ledger, index->segments,
                           index->segment_count * sizeof(*index->segments));
    bale_index_memory_free(ledger, index->scratch,
                           SPAN_MAX * sizeof(*index->scratch));
    bale_index_memory_free(ledger, index, sizeof(*index));
    bale_index_ledger_unref(ledger);
}

/* Operations */

/*
 * The bucket that holds the truth about @hash, in a table that is not retired
 * while the caller is inside the epoch.
 */
static Bucket *segment_bucket(Segment *segment, uint64_t hash, Table **table,
                              uint64_t *tag)
{
    Table *t = atomic_load(&segment->table);

    for (;;) {
        uint64_t i = hash_bucket(t, hash);
        Bucket *b = &t->buckets[i];

        if (G_LIKELY(!(atomic_load(&b->link) & LINK_DONE))) {
            *table = t;
            *tag = hash - i * table_span(t);
            return b;
        }
        t = atomic_load(&t->next);
        assert(t);
    }
}

void bale_index_prefetch(BaleIndex *index, uint64_t key)
{
    Segment *segment = index_segment(index, key, false);

    if (segment) {
        Table *t = atomic_load(&segment->table);

        __builtin_prefetch(&t->buckets[hash_bucket(t, mix(index, key))], 1);
    }
}

uint64_t bale_index_find(BaleIndex *index, uint64_t key)
{
    Segment *segment = index_segment(index, key, false);
    uint64_t hash = mix(index, key);
    BaleEpochToken token;
    uint64_t word, tag;
    Bucket *b;
    Table *t;

    if (!segment) {
        return 0;
    }
    token = bale_epoch_enter(index->epoch);
    b = segment_bucket(segment, hash, &t, &tag);
    BALE_INDEX_PAUSE();
    word = chain_find(b, tag);
    bale_epoch_exit(index->epoch, token);
    return word & VALUE_MASK;
}

/*
 * Replace the value of @key by @desired, if it is @expected or if @always.
 * *@found: the value before.
 */
static int index_exchange(BaleIndex *index, uint64_t key, bool always,
                          uint64_t expected, uint64_t desired,
                          uint64_t *found)
{
    bool create = desired != 0 && (always || expected == 0);
    Segment *segment = index_segment(index, key, create);
    uint64_t hash = mix(index, key);
    unsigned attempt = 0;
    BaleEpochToken token;
    int ret = 0;

    assert(desired <= BALE_INDEX_VALUE_MAX);
    if (!segment) {
        if (create) {
            count(&index->allocation_failures, 1);
            return -ENOMEM;
        }
        *found = 0;
        return always || expected == 0 ? 0 : -EAGAIN;
    }

    bale_index_help(index);
    token = bale_epoch_enter(index->epoch);
    for (;;) {
        InsertResult inserted;
        ScanResult result;
        uint64_t value, tag;
        Table *t;
        Scan scan;
        Bucket *b = segment_bucket(segment, hash, &t, &tag);

        result = chain_scan(b, tag, &scan);
        if (result == SCAN_FROZEN) {
            chain_wait(index, b);
            continue;
        }
        BALE_INDEX_PAUSE();
        value = result == SCAN_FOUND ? scan.word & VALUE_MASK : 0;
        if (!always && value != expected) {
            *found = value;
            ret = -EAGAIN;
            break;
        }
        if (value == desired) {
            *found = value;
            break;
        }
        if (result == SCAN_FOUND) {
            uint64_t word = desired ? entry_new(tag, desired) : 0;

            if (!atomic_compare_exchange_strong(scan.slot, &scan.word,
                                                word)) {
                continue;
            }
            *found = value;
            if (!desired) {
                bale_index_changed(index, segment, t, -1);
            }
            break;
        }
        inserted = chain_insert(index, t, b, &scan, entry_new(tag, desired));
        if (inserted == INSERT_OK) {
            *found = 0;
            bale_index_changed(index, segment, t, 1);
            break;
        }
        if (inserted == INSERT_NO_MEMORY) {
            count(&index->allocation_failures, 1);
            ret = -ENOMEM;
            break;
        }
        insert_backoff(attempt++);
    }
    bale_epoch_exit(index->epoch, token);
    return ret;
}

int bale_index_update(BaleIndex *index, uint64_t key, uint64_t expected,
                      uint64_t desired, uint64_t *current)
{
    uint64_t found;
    int ret = index_exchange(index, key, false, expected, desired, &found);

    if (current && ret != -ENOMEM) {
        *current = found;
    }
    return ret;
}

int bale_index_set(BaleIndex *index, uint64_t key, uint64_t value,
                   uint64_t *old)
{
    uint64_t found;
    int ret = index_exchange(index, key, true, 0, value, &found);

    if (old && ret == 0) {
        *old = found;
    }
    return ret;
}

/* Loading */

/* Hashes that are computed, and whose buckets are fetched, ahead of use. */
#define LOAD_BATCH 16
/* The same for values. */
#define LOAD_AHEAD 64
/* Of so many keys at least one is there: go through all of them. */
#define LOAD_SPARSE 8

uint64_t bale_index_load_keys(const BaleIndex *index)
{
    return UINT64_C(1) << index->hash_bits;
}

/* The sparsest table that holds @keys at a good load. */
static unsigned load_shift(const BaleIndex *index, uint64_t keys)
{
    unsigned shift = 0;

    while (shift < index->shift_max) {
        uint64_t span = (uint64_t)BUCKET_SLOTS << (shift + 1);
        uint64_t buckets = MAX((index->hash_mask + 1) / span, 1);

        if (keys / buckets > LOAD_EXPECTED) {
            break;
        }
        shift++;
    }
    return shift;
}

/* Nobody sees the table yet, so that the order of the stores is free. */
static bool load_entry(Table *t, Bucket *b, uint64_t word)
{
    for (;;) {
        Bucket *next;

        for (unsigned i = 0; i < BUCKET_SLOTS; i++) {
            if (!atomic_load_explicit(&b->slot[i], memory_order_relaxed)) {
                atomic_store_explicit(&b->slot[i], word,
                                      memory_order_relaxed);
                return true;
            }
        }
        next = link_target(atomic_load_explicit(&b->link,
                                                memory_order_relaxed));
        if (!next) {
            next = bale_index_overflow_new(t);
            if (!next) {
                return false;
            }
            atomic_store_explicit(&b->link, link_to(next),
                                  memory_order_relaxed);
            atomic_fetch_add(&t->overflow, 1);
        }
        b = next;
    }
}

/* Key by key: for few keys. */
static bool load_by_key(const BaleIndex *index, Table *t, uint64_t first_key,
                        const uint64_t *values, uint64_t n)
{
    uint64_t span = table_span(t);
    bool ok = true;

    for (uint64_t at = 0; at < n && ok; at += LOAD_BATCH) {
        uint64_t end = MIN(n, at + LOAD_BATCH);
        Bucket *bucket[LOAD_BATCH];
        uint64_t word[LOAD_BATCH];
        unsigned batch = 0;

        for (uint64_t i = at; i < end; i++) {
            if (values[i]) {
                uint64_t hash = mix(index, first_key + i);
                uint64_t number = hash_bucket(t, hash);

                bucket[batch] = &t->buckets[number];
                word[batch] = entry_new(hash - number * span, values[i]);
                __builtin_prefetch(bucket[batch], 1);
                batch++;
            }
        }
        for (unsigned i = 0; i < batch && ok; i++) {
            ok = load_entry(t, bucket[i], word[i]);
        }
    }
    return ok;
}

/* The entry goes behind @used others of the chain that ends with *@b. */
static bool load_append(Table *t, Bucket **b, unsigned *used, uint64_t word)
{
    if (*used == BUCKET_SLOTS) {
        Bucket *next = bale_index_overflow_new(t);

        if (!next) {
            return false;
        }
        atomic_store_explicit(&(*b)->link, link_to(next),
                              memory_order_relaxed);
        atomic_fetch_add(&t->overflow, 1);
        *b = next;
        *used = 0;
    }
    atomic_store_explicit(&(*b)->slot[*used], word, memory_order_relaxed);
    ++*used;
    return true;
}

/*
 * Bucket by bucket, which writes the table from its begin to its end: what is
 * met at random are the values, and those are fetched ahead.
 */
static bool load_by_bucket(const BaleIndex *index, Table *t,
                           uint64_t first_key, const uint64_t *values,
                           uint64_t n)
{
    const uint64_t mask = index->hash_mask, span = table_span(t);
    const uint64_t a = odd_inverse(MIX_A), b = odd_inverse(MIX_B);
    const uint64_t c = odd_inverse(MIX_C), d = odd_inverse(MIX_D);
    const unsigned shift = index->mix_shift;
    Bucket *head = t->buckets, *last = head;
    unsigned used = 0;
    uint64_t tag = 0;

    for (uint64_t hash = 0; hash <= mask; hash += LOAD_AHEAD) {
        uint64_t batch = MIN(LOAD_AHEAD, mask + 1 - hash);
        uint64_t key[LOAD_AHEAD]; /* counted from @first_key */

        for (uint64_t i = 0; i < batch; i++) {
            /* As bale_index_unmix(), with the inverses at hand. */
            uint64_t x = ((hash + i) * d) & mask;

            x ^= x >> shift;
            x = (x * c) & mask;
            x ^= x >> shift;
            x = (x * b) & mask;
            x ^= x >> shift;
            key[i] = ((x * a) & mask) - (first_key & mask);
            __builtin_prefetch(&values[MIN(key[i], n - 1)]);
        }
        for (uint64_t i = 0; i < batch; i++) {
            uint64_t value = key[i] < n ? values[key[i]] : 0;

            if (value &&
                !load_append(t, &last, &used, entry_new(tag, value))) {
                return false;
            }
            if (++tag == span) {
                last = ++head;
                used = 0;
                tag = 0;
            }
        }
    }
    return true;
}

int bale_index_load(BaleIndex *index, uint64_t first_key,
                    const uint64_t *values, uint64_t n)
{
    _Atomic(Segment *) *where =
        &index->segments[first_key >> index->hash_bits];
    Segment *segment;
    uint64_t keys = 0;
    bool dense;
    Table *t;

    assert(n > 0 && (first_key + n - 1) >> index->key_bits == 0 &&
           first_key >> index->hash_bits ==
               (first_key + n - 1) >> index->hash_bits);
    for (uint64_t i = 0; i < n; i++) {
        keys += values[i] != 0;
    }
    if (atomic_load(where) || keys == 0) {
        int ret = 0;

        for (uint64_t i = 0; i < n && ret == 0; i++) {
            if (values[i]) {
                ret = bale_index_set(index, first_key + i, values[i], NULL);
            }
        }
        return ret;
    }
    segment = bale_index_memory_new(index->ledger, sizeof(*segment));
    if (!segment) {
        return -ENOMEM;
    }
    t = bale_index_table_new(index->ledger, index->hash_bits,
                             load_shift(index, keys));
    if (!t) {
        bale_index_memory_free(index->ledger, segment, sizeof(*segment));
        return -ENOMEM;
    }
    atomic_init(&segment->table, t);
    bale_index_table_huge(t);
    dense = (index->hash_mask + 1) / LOAD_SPARSE <= keys;
    if (!(dense ? load_by_bucket : load_by_key)(index, t, first_key, values,
                                                n)) {
        segment_free(index, segment);
        return -ENOMEM;
    }
    atomic_store(&t->fresh_overflow, atomic_load(&t->overflow));
    atomic_store(&segment->keys, keys);
    atomic_store(where, segment);
    return 0;
}
