/*
 * Patches: the table of what is saved and what is not; see patch-internal.h.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "patch-internal.h"

#include <inttypes.h>
#include <string.h>

#include "recover-internal.h"
#include "util/memory.h"
#include "util/planted.h"

static void patched_free(void *opaque)
{
    BalePatched *p = opaque;

    if (p->patches) {
        g_array_free(p->patches, TRUE);
    }
    g_free(p);
}

void bale_patch_table_init(BalePatchTable *t, BaleStore *s)
{
    t->store = s;
    t->max = UINT32_MAX;
    t->clusters = g_hash_table_new_full(g_int64_hash, g_int64_equal, NULL,
                                        patched_free);
    g_queue_init(&t->unsaved);
}

void bale_patch_table_destroy(BalePatchTable *t)
{
    if (t->clusters) {
        g_hash_table_destroy(t->clusters);
    }
}

BalePatchTable *bale_patch_table_new(BaleStore *s)
{
    BalePatchTable *t = g_new0(BalePatchTable, 1);

    bale_patch_table_init(t, s);
    return t;
}

void bale_patch_table_free(BalePatchTable *t)
{
    if (t) {
        bale_patch_table_destroy(t);
        g_free(t);
    }
}

BalePatched *bale_patch_find(BalePatchTable *t, uint64_t cluster)
{
    return g_hash_table_lookup(t->clusters, &cluster);
}

static BalePatched *patch_get(BalePatchTable *t, uint64_t cluster)
{
    BalePatched *p = bale_patch_find(t, cluster);

    if (!p) {
        p = g_new0(BalePatched, 1);
        p->cluster = cluster;
        p->unsaved.seq = UINT64_MAX;
        p->link.data = p;
        g_hash_table_insert(t->clusters, &p->cluster, p);
    }
    return p;
}

/* Add a range, and join what touches it. */
static void unsaved_add(BaleUnsaved *u, BalePatchRange r)
{
    unsigned i = 0, n;

    if (u->many) {
        return;
    }
    while (i < u->n && u->range[i].end < r.start) {
        i++;
    }
    for (n = i; n < u->n && u->range[n].start <= r.end; n++) {
        r.start = MIN(r.start, u->range[n].start);
        r.end = MAX(r.end, u->range[n].end);
    }
    if (n == i && u->n == PATCH_RANGES_MAX) {
        u->many = true;
        u->n = 0;
        return;
    }
    /* [i, n) becomes one. */
    memmove(&u->range[i + 1], &u->range[n],
            (u->n - n) * sizeof(u->range[0]));
    u->range[i] = r;
    u->n = u->n - (n - i) + 1;
}

void bale_patch_note(BalePatchTable *t, uint64_t cluster, uint32_t start,
                     uint32_t end, uint64_t seq)
{
    BalePatched *p = patch_get(t, cluster);

    if (p->unsaved.seq == UINT64_MAX) {
        p->unsaved.seq = seq;
        g_queue_push_tail_link(&t->unsaved, &p->link);
    }
    unsaved_add(&p->unsaved, (BalePatchRange){ start, end });
}

static void patch_clear_unsaved(BalePatchTable *t, BalePatched *p)
{
    if (p->unsaved.seq != UINT64_MAX) {
        g_queue_unlink(&t->unsaved, &p->link);
    }
    p->unsaved = (BaleUnsaved){ .seq = UINT64_MAX };
}

BaleUnsaved bale_patch_take(BalePatchTable *t, BalePatched *p)
{
    BaleUnsaved u = p->unsaved;

    g_assert(!p->busy);
    patch_clear_unsaved(t, p);
    p->busy = true;
    return u;
}

void bale_patch_put_back(BalePatchTable *t, BalePatched *p,
                         const BaleUnsaved *unsaved)
{
    BaleUnsaved merged = p->unsaved;
    GList *l;

    p->busy = false;
    if (unsaved->seq == UINT64_MAX) {
        return;
    }
    if (unsaved->many) {
        merged.many = true;
        merged.n = 0;
    }
    for (unsigned i = 0; i < unsaved->n; i++) {
        unsaved_add(&merged, unsaved->range[i]);
    }
    merged.seq = MIN(merged.seq, unsaved->seq);
    patch_clear_unsaved(t, p);
    p->unsaved = merged;
    l = t->unsaved.head;
    while (l && ((BalePatched *)l->data)->unsaved.seq <= merged.seq) {
        l = l->next;
    }
    g_queue_insert_before_link(&t->unsaved, l, &p->link);
}

uint64_t bale_patch_oldest(const BalePatchTable *t)
{
    BalePatched *p = g_queue_peek_head((GQueue *)&t->unsaved);

    return p ? p->unsaved.seq : UINT64_MAX;
}

/* What a patch takes in its page. */
static uint64_t patch_size(uint32_t len)
{
    return bale_align_up(BALE_RECORD_HEADER_LEN + (uint64_t)len,
                         BALE_RECORD_ALIGN);
}

/* Under log_lock: forget what is durable by now. */
static void patch_settle_ghosts(BalePatchTable *t)
{
    if (t->ghost_flush <= t->store->flushed_request) {
        t->ghosts = t->ghost_patches = 0;
    }
}

/* Is there room for @n more patches of @p, whatever a crash brings back? */
static bool patch_has_room(BalePatchTable *t, const BalePatched *p, unsigned n)
{
    uint32_t patches = (p->patches ? p->patches->len : 0) + n;
    uint32_t patched = t->patched + !p->patches;

    if (t->ghosts &&
        (patched + t->ghosts > t->max ||
         patches + t->ghost_patches > BALE_PATCHES_PER_CLUSTER_MAX)) {
        pthread_mutex_lock(&t->store->log_lock);
        patch_settle_ghosts(t);
        pthread_mutex_unlock(&t->store->log_lock);
    }
    return patched + t->ghosts <= t->max &&
           patches + t->ghost_patches <= BALE_PATCHES_PER_CLUSTER_MAX;
}

bool bale_patch_worth(BalePatchTable *t, const BalePatched *p)
{
    uint64_t cluster_size = t->store->cluster_size;
    uint64_t bytes = 0, cost = p->cost;

    for (unsigned i = 0; i < p->unsaved.n; i++) {
        uint32_t len = p->unsaved.range[i].end - p->unsaved.range[i].start;

        bytes += len;
        cost += patch_size(len);
    }
    return !p->unsaved.many && bytes <= cluster_size / 2 &&
           cost <= PATCH_COST_CLUSTERS * cluster_size &&
           patch_has_room(t, p, p->unsaved.n);
}

bool bale_patch_worth_last(BalePatchTable *t, const BalePatched *p)
{
    uint64_t bytes = 0;

    for (unsigned i = 0; i < p->unsaved.n; i++) {
        bytes += p->unsaved.range[i].end - p->unsaved.range[i].start;
    }
    return p->patches && bale_patch_worth(t, p) &&
           bytes <= t->store->cluster_size / PATCH_LAST_FRACTION;
}

void bale_patch_add(BalePatchTable *t, BalePatched *p, const BalePatch *patch)
{
    if (!p->patches) {
        p->patches = g_array_new(FALSE, FALSE, sizeof(BalePatch));
        t->patched++;
    }
    g_array_append_val(p->patches, *patch);
    p->cost += patch_size(patch->len);
    t->patches++;
    t->bytes += bale_patch_live(patch->len);
}

void bale_patch_drop(BalePatchTable *t, BalePatched *p, bool live)
{
    BaleStore *s = t->store;

    if (!p->patches) {
        return;
    }
    if (live) {
        pthread_mutex_lock(&s->log_lock);
    }
    for (guint i = 0; i < p->patches->len; i++) {
        BalePatch *patch = &g_array_index(p->patches, BalePatch, i);

        if (live) {
            bale_page_live_sub(s, patch->address,
                               bale_patch_live(patch->len));
        }
        t->patches--;
        t->bytes -= bale_patch_live(patch->len);
    }
    if (live && !BALE_PLANTED(ghosts_forgotten)) {
        patch_settle_ghosts(t);
        t->ghost_flush = s->flush_request + 1;
        t->ghosts++;
        t->ghost_patches = MAX(t->ghost_patches, p->patches->len);
    }
    if (live) {
        pthread_mutex_unlock(&s->log_lock);
    }
    g_array_free(p->patches, TRUE);
    p->patches = NULL;
    t->patched--;
    p->cost = 0;
}

void bale_patch_tidy(BalePatchTable *t, BalePatched *p)
{
    if (!p->patches && !p->busy && p->unsaved.seq == UINT64_MAX) {
        g_hash_table_remove(t->clusters, &p->cluster);
    }
}

static void patch_forget_one(BalePatchTable *t, BalePatched *p, bool live)
{
    g_assert(!p->busy);
    patch_clear_unsaved(t, p);
    bale_patch_drop(t, p, live);
}

void bale_patch_forget(BalePatchTable *t, uint64_t first, uint64_t count,
                       bool live)
{
    GHashTableIter iter;
    void *value;

    if (g_hash_table_size(t->clusters) == 0) {
        return;
    }
    if (count <= MIN(g_hash_table_size(t->clusters), UINT64_MAX - first)) {
        for (uint64_t c = first; c < first + count; c++) {
            BalePatched *p = bale_patch_find(t, c);

            if (p) {
                patch_forget_one(t, p, live);
                bale_patch_tidy(t, p);
            }
        }
        return;
    }
    g_hash_table_iter_init(&iter, t->clusters);
    while (g_hash_table_iter_next(&iter, NULL, &value)) {
        BalePatched *p = value;

        if (p->cluster >= first && p->cluster - first < count) {
            patch_forget_one(t, p, live);
            g_hash_table_iter_remove(&iter);
        }
    }
}

/* --- recovery --- */

void bale_patch_recover(BalePatchTable *t, uint64_t cluster,
                        const BalePatch *patch)
{
    BalePatched *p = patch_get(t, cluster);

    if (p->patches) {
        BalePatch *last = &g_array_index(p->patches, BalePatch,
                                         p->patches->len - 1);

        if (last->seq == patch->seq) {
            *last = *patch; /* a copy of it */
            return;
        }
    }
    bale_patch_add(t, p, patch);
}

int bale_patch_spoil(BaleLayer *layer, uint64_t cluster,
                     const BalePatch *patch)
{
    BaleStore *s = layer->store;

    bale_recover_report(s, "damaged patch of layer %" PRIu32 ", cluster %"
                        PRIu64 ", at address %" PRIu64, layer->id, cluster,
                        patch->address);
    return bale_layer_index_set(
        layer, cluster,
        bale_value(patch->address,
                   bale_size_class(patch->len, s->cluster_size)),
        NULL);
}

int bale_patch_table_spoil(BalePatchTable *t, BaleLayer *layer)
{
    GHashTableIter iter;
    void *value;
    int ret = 0;

    g_hash_table_iter_init(&iter, t->clusters);
    while (ret == 0 && g_hash_table_iter_next(&iter, NULL, &value)) {
        BalePatched *p = value;

        ret = bale_patch_spoil(layer, p->cluster,
                               &g_array_index(p->patches, BalePatch, 0));
    }
    return ret;
}
