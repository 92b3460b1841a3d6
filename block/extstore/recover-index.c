/*
 * Load the index of a checkpoint: its chunks, by several threads.
 *
 * An index is loaded in groups of keys that share nothing (util/index.h), each
 * by one thread at a time: it reads the group's chunks, verifies them, checks
 * each value, counts what is live in each page, and gives the group to the
 * index as a whole.
 *
 * Memory: 10 MiB for each thread, and a counter for each page.
 *
 * Errors: the first one ends the load; what was loaded is of no use then.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "recover-internal.h"

#include <errno.h>
#include <string.h>

#include "util/memory.h"

#define LOAD_THREADS_MAX 4u
/* Values in a group; larger ones are not loaded as a whole. */
#define LOAD_GROUP_MAX (1u << 20)
/* Groups between two looks at the memory that they take. */
#define LIMIT_GROUPS 256u

/* Bytes that are read at once: parts that lie near each other. */
#define LOAD_WINDOW_LEN (2u << 20)

_Static_assert(LOAD_WINDOW_LEN >= BALE_CHUNK_CLUSTERS * 8 +
                                      BALE_RECORD_HEADER_LEN +
                                      2 * BALE_BLOCK_SIZE,
               "a part fits, wherever in a block it begins");

typedef struct LoadPart {
    BaleLayer *layer;
    BalePart part;
    uint64_t group; /* the first key of its group */
} LoadPart;

typedef struct Loader {
    Checkpoint *c;
    GArray *parts;   /* LoadPart, by layer and cluster */
    pthread_mutex_t lock;
    guint next;      /* part; under lock */
    int ret;         /* under lock */
    unsigned groups; /* loaded; under lock */
} Loader;

typedef struct LoadThread {
    Loader *l;
    pthread_t thread;
    uint64_t *values;
    uint8_t *buf;    /* LOAD_WINDOW_LEN */
    uint64_t window_begin, window_end; /* addresses of what @buf holds */
    uint64_t *live;  /* bytes, by page */
    GArray *stale;   /* StaleCluster */
} LoadThread;

/* Does the record of @value begin below the known end of a page?  Which? */
static bool load_value_known(Checkpoint *c, uint64_t value, uint64_t *page)
{
    uint64_t offset;

    return bale_address_split(c->s, bale_value_address(value), page,
                              &offset) &&
           offset + BALE_RECORD_HEADER_LEN <= c->limit[*page];
}

static int load_values(LoadThread *t, const LoadPart *p,
                       const uint8_t *payload)
{
    Checkpoint *c = t->l->c;
    uint64_t *values = t->values + (p->part.b - p->group);
    BaleChunk *chunk = bale_layer_chunk_make(
        p->layer, p->part.b / BALE_CHUNK_CLUSTERS);
    uint32_t entries = 0;
    uint64_t page;

    if (!chunk) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < p->part.payload_len / 8; i++) {
        uint64_t value = bale_get_le64(payload + i * 8);

        values[i] = value;
        if (value == 0) {
            continue;
        }
        if (value >> BALE_VALUE_BITS) {
            return -EIO;
        }
        if (load_value_known(c, value, &page)) {
            t->live[page] += bale_value_live(value, c->s->cluster_size);
        } else if (c->exact) {
            return -EIO;
        } else {
            StaleCluster stale = { p->part.a, p->part.b + i };

            g_array_append_val(t->stale, stale);
            values[i] = VALUE_STALE;
            chunk->changed = true;
        }
        entries++;
    }
    chunk->entries = entries;
    if (bale_page_has_metadata(c->s, p->part.address,
                               BALE_RECORD_HEADER_LEN + p->part.payload_len,
                               &page)) {
        chunk->address = p->part.address;
        chunk->version = p->part.version;
        chunk->payload_len = p->part.payload_len;
    }
    return 0;
}

/* Where the blocks of @part begin and end; -EIO: not on the device. */
static int load_extent(BaleStore *s, const BalePart *part, uint64_t *begin,
                       uint64_t *end)
{
    uint64_t len = BALE_RECORD_HEADER_LEN + part->payload_len;

    if (!bale_recover_extent_ok(s, part->address, len)) {
        return -EIO;
    }
    *begin = bale_align_down(part->address, BALE_BLOCK_SIZE);
    *end = bale_align_up(part->address + len, BALE_BLOCK_SIZE);
    return 0;
}

/* Have part @p in the buffer, and what follows it there of the @n from @p. */
static int load_fetch(LoadThread *t, const LoadPart *p, guint n)
{
    BaleStore *s = t->l->c->s;
    uint64_t begin, end;
    int ret = load_extent(s, &p->part, &begin, &end);

    if (ret < 0 || (begin >= t->window_begin && end <= t->window_end)) {
        return ret;
    }
    for (guint i = 1; i < n; i++) {
        uint64_t next_begin, next_end;

        if (load_extent(s, &p[i].part, &next_begin, &next_end) < 0 ||
            next_begin < begin || next_end - begin > LOAD_WINDOW_LEN) {
            break;
        }
        end = MAX(end, next_end);
    }
    t->window_begin = t->window_end = 0;
    ret = bale_device_get_sync(s->dev, begin, t->buf, end - begin);
    if (ret == 0) {
        t->window_begin = begin;
        t->window_end = end;
    }
    return ret;
}

/* Load @p, the first of @n parts of a group that are left. */
static int load_part(LoadThread *t, const LoadPart *p, guint n)
{
    const uint8_t *payload;
    BaleRecord r;
    int ret = load_fetch(t, p, n);

    if (ret == 0) {
        ret = bale_recover_verify(t->l->c->s, p->part.address,
                                  p->part.version,
                                  BALE_RECORD_HEADER_LEN +
                                      p->part.payload_len,
                                  &r, t->buf + (p->part.address -
                                                t->window_begin),
                                  &payload);
    }
    if (ret == 0 && (r.type != BALE_RECORD_CHECKPOINT_PART ||
                     r.payload_len != p->part.payload_len)) {
        ret = -EIO;
    }
    return ret < 0 ? ret : load_values(t, p, payload);
}

static bool same_group(const LoadPart *a, const LoadPart *b)
{
    return a->layer == b->layer && a->group == b->group;
}

/* Parts [@first, @end) are a group. */
static int load_group(LoadThread *t, guint first, guint end)
{
    LoadPart *p = &g_array_index(t->l->parts, LoadPart, first);
    uint64_t n = 0;
    int ret = 0;

    for (guint i = 0; ret == 0 && i < end - first; i++) {
        uint64_t at = p[i].part.b - p->group;

        memset(t->values + n, 0, (at - n) * sizeof(*t->values));
        n = at + p[i].part.payload_len / 8;
        ret = load_part(t, &p[i], end - first - i);
    }
    if (ret == 0 && n) {
        ret = bale_index_load(p->layer->index, p->group, t->values, n);
    }
    return ret;
}

static void *load_main(void *opaque)
{
    LoadThread *t = opaque;
    Loader *l = t->l;

    pthread_mutex_lock(&l->lock);
    while (l->ret == 0 && l->next < l->parts->len) {
        LoadPart *p = &g_array_index(l->parts, LoadPart, l->next);
        guint first = l->next, end = first + 1;
        int ret;

        while (end < l->parts->len &&
               same_group(p, &g_array_index(l->parts, LoadPart, end))) {
            end++;
        }
        l->next = end;
        pthread_mutex_unlock(&l->lock);
        ret = load_group(t, first, end);
        pthread_mutex_lock(&l->lock);
        if (ret == 0 && ++l->groups % LIMIT_GROUPS == 0) {
            ret = bale_limit_memory(l->c->s);
        }
        l->ret = l->ret < 0 ? l->ret : ret;
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

static int part_compare(const void *a, const void *b)
{
    const BalePart *x = &((const LoadPart *)a)->part;
    const BalePart *y = &((const LoadPart *)b)->part;

    if (x->a != y->a) {
        return x->a < y->a ? -1 : 1;
    }
    return x->b < y->b ? -1 : x->b > y->b;
}

/* List the parts in order, each once. */
static int load_list(Loader *l)
{
    Checkpoint *c = l->c;

    for (uint32_t i = 0; i < c->root.parts; i++) {
        LoadPart p;
        uint64_t keys;

        if (bale_part_decode(&p.part, c->payload + BALE_ROOT_FIXED_LEN +
                                          i * BALE_PART_LEN) < 0) {
            return -EIO;
        }
        if (p.part.kind != BALE_PART_INDEX) {
            continue;
        }
        p.layer = p.part.a <= UINT32_MAX ? bale_layer_get(c->s, p.part.a)
                                         : NULL;
        if (!p.layer || p.part.b + p.part.payload_len / 8 >
                            bale_layer_clusters(p.layer)) {
            return -EIO;
        }
        keys = MIN(bale_index_load_keys(p.layer->index), LOAD_GROUP_MAX);
        p.group = bale_align_down(p.part.b, MAX(keys, BALE_CHUNK_CLUSTERS));
        g_array_append_val(l->parts, p);
    }
    g_array_sort(l->parts, part_compare);
    for (guint i = 1; i < l->parts->len; i++) {
        LoadPart *p = &g_array_index(l->parts, LoadPart, i);

        if (part_compare(p - 1, p) == 0) {
            return -EIO;
        }
    }
    return 0;
}

static unsigned load_groups(Loader *l)
{
    unsigned groups = l->parts->len > 0;

    for (guint i = 1; i < l->parts->len; i++) {
        LoadPart *p = &g_array_index(l->parts, LoadPart, i);

        groups += !same_group(p - 1, p);
    }
    return groups;
}

static int thread_init(LoadThread *t, Loader *l)
{
    *t = (LoadThread){ .l = l };
    t->values = bale_memory_try_alloc_huge(LOAD_GROUP_MAX *
                                           sizeof(*t->values));
    t->buf = bale_memory_try_alloc(BALE_BLOCK_SIZE, LOAD_WINDOW_LEN);
    t->live = g_try_new0(uint64_t, l->c->s->pages->len + 1);
    t->stale = g_array_new(FALSE, FALSE, sizeof(StaleCluster));
    return t->values && t->buf && t->live ? 0 : -ENOMEM;
}

/* What the thread has counted; and free it. */
static void thread_finish(LoadThread *t)
{
    Checkpoint *c = t->l->c;

    for (uint64_t i = 0; t->live && i < c->s->pages->len; i++) {
        if (c->exact) {
            bale_page(c->s, i)->live_bytes += t->live[i];
        }
    }
    g_array_append_vals(c->stale, t->stale->data, t->stale->len);
    g_array_free(t->stale, TRUE);
    bale_memory_free(t->values);
    bale_memory_free(t->buf);
    g_free(t->live);
}

int bale_checkpoint_load_index(Checkpoint *c)
{
    Loader l = { .c = c, .lock = PTHREAD_MUTEX_INITIALIZER };
    LoadThread t[LOAD_THREADS_MAX];
    unsigned n, started = 1;
    bool ready;

    l.parts = g_array_new(FALSE, FALSE, sizeof(LoadPart));
    l.ret = load_list(&l);
    n = MIN(load_groups(&l), LOAD_THREADS_MAX);
    if (l.ret < 0 || n == 0) {
        g_array_free(l.parts, TRUE);
        return l.ret;
    }
    for (unsigned i = 0; i < n; i++) {
        int ret = thread_init(&t[i], &l);

        l.ret = l.ret < 0 ? l.ret : ret;
    }
    /* This thread is the first one; a few less only take longer. */
    ready = l.ret == 0;
    while (ready && started < n &&
           pthread_create(&t[started].thread, NULL, load_main,
                          &t[started]) == 0) {
        started++;
    }
    load_main(&t[0]);
    for (unsigned i = 1; i < started; i++) {
        pthread_join(t[i].thread, NULL);
    }
    for (unsigned i = 0; i < n; i++) {
        thread_finish(&t[i]);
    }
    g_array_free(l.parts, TRUE);
    pthread_mutex_destroy(&l.lock);
    return l.ret;
}
