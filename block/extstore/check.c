/*
 * Check: does every record that the index names verify, and do the counters
 * agree?  Repair of what can be repaired.
 *
 * A check reads like any reader and can run on a store that is in use; what a
 * concurrent write changes under it is looked at again, not reported.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "util/memory.h"

/* Bytes of image that are read and verified at once. */
#define CHECK_WINDOW (4u << 20)

typedef struct Check {
    BaleStore *s;
    unsigned flags;
    BaleCheckReport *report;
    void *opaque;
    BaleCheckResult *result;
    bool stopped;
} Check;

static void check_finding(Check *c, const char *fmt, ...)
    G_GNUC_PRINTF(2, 3);

static void check_finding(Check *c, const char *fmt, ...)
{
    g_autofree char *what = NULL;
    va_list ap;

    va_start(ap, fmt);
    what = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    if (c->report && !c->report(c->opaque, what, 0, 0)) {
        c->stopped = true;
    }
}

static void check_progress(Check *c, uint64_t done, uint64_t total)
{
    if (c->report && !c->report(c->opaque, NULL, done, total)) {
        c->stopped = true;
    }
}

/* --- superblocks --- */

static void check_supers(Check *c)
{
    BALE_AUTO_MEMORY uint8_t *block =
        bale_memory_try_alloc(BALE_BLOCK_SIZE, BALE_BLOCK_SIZE);

    for (unsigned copy = 0; block && copy < BALE_SUPER_COPIES; copy++) {
        BaleSuper super;
        const char *reason = NULL;
        int ret = bale_device_get_sync(c->s->dev, bale_super_address(copy),
                                       block, BALE_BLOCK_SIZE);

        if (ret == 0) {
            ret = bale_super_decode(&super, copy, block, &reason);
        }
        if (ret == 0 &&
            memcmp(super.uuid, c->s->super.uuid, sizeof(super.uuid))) {
            ret = -EIO;
            reason = "it belongs to another store";
        }
        if (ret < 0) {
            c->result->bad_superblocks++;
            check_finding(c, "superblock copy %u at offset %" PRIu64 ": %s",
                          copy, bale_super_address(copy),
                          reason ? reason : g_strerror(-ret));
        }
    }
}

/* --- clusters --- */

/* One window at a time; where it fails, cluster by cluster. */
static void check_window(Check *c, BaleImage *image, uint64_t begin,
                         uint64_t end, uint8_t *buf)
{
    BaleStore *s = c->s;
    uint64_t pos = begin;

    if (bale_image_read_sync(image, begin, buf, end - begin) == 0) {
        return;
    }
    while (pos < end) {
        uint64_t len = MIN(s->cluster_size, end - pos);
        int ret = bale_image_read_sync(image, pos, buf, len);

        if (ret < 0 && !__atomic_load_n(&image->top->gone,
                                        __ATOMIC_ACQUIRE)) {
            uint64_t cluster = pos >> s->cluster_bits;
            uint64_t value = bale_image_find(image, cluster);
            uint64_t address = bale_value_address(value) - BALE_SUPER_SIZE;

            c->result->damaged++;
            check_finding(c, "image '%s', cluster %" PRIu64 ": the record in "
                          "page %" PRIu64 " at offset %" PRIu64 ": %s",
                          image->record.name, cluster,
                          address / s->page_size, address % s->page_size,
                          ret == -EIO ? "damaged" : g_strerror(-ret));
        }
        pos += len;
    }
}

static bool check_no_memory(GError **errp)
{
    g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_NO_MEMORY,
                "no memory for a check");
    return false;
}

static bool check_clusters(Check *c, BaleImage *image, GError **errp)
{
    BaleStore *s = c->s;
    uint64_t size = bale_image_size(image);
    BALE_AUTO_MEMORY uint8_t *buf =
        bale_memory_try_alloc(BALE_BLOCK_SIZE, CHECK_WINDOW);
    uint64_t pos = 0;

    if (!buf) {
        return check_no_memory(errp);
    }
    c->result->clusters_total +=
        bale_size_clusters(size, s->cluster_size);
    while (pos < size && !c->stopped) {
        BaleClusterStatus status;
        uint64_t run, end;

        if (bale_image_status(image, pos, size - pos, &status, &run) < 0) {
            break;
        }
        end = pos + run;
        if (status != BALE_CLUSTER_UNALLOCATED) {
            c->result->clusters_allocated +=
                (run + s->cluster_size - 1) >> s->cluster_bits;
        }
        if (status == BALE_CLUSTER_DATA) {
            c->result->clusters_compressed +=
                (run + s->cluster_size - 1) >> s->cluster_bits;
        }
        while (pos < end && !c->stopped) {
            uint64_t len = MIN(end - pos, CHECK_WINDOW);

            if (status != BALE_CLUSTER_DATA || !(c->flags &
                                                 BALE_CHECK_DATA)) {
                len = end - pos;
            } else {
                check_window(c, image, pos, pos + len, buf);
                c->result->checked_records +=
                    (len + s->cluster_size - 1) >> s->cluster_bits;
                c->result->checked_bytes += len;
            }
            pos += len;
            check_progress(c, pos, size);
        }
    }
    return true;
}

/* What to call layer @id in a report. */
static void check_name_layer(BaleStore *s, uint32_t id, char *name,
                             size_t len)
{
    g_snprintf(name, len, "layer %" PRIu32, id);
    for (guint i = 0; i < s->catalogue->snapshots->len; i++) {
        BaleSnapshotEntry *e = &g_array_index(s->catalogue->snapshots,
                                              BaleSnapshotEntry, i);
        BaleImageEntry *image = bale_catalogue_image(s->catalogue, e->image);

        if (e->layer == id) {
            g_snprintf(name, len, "%s@%s", image->name, e->name);
        }
    }
    for (guint i = 0; i < s->catalogue->images->len; i++) {
        BaleImageEntry *e = &g_array_index(s->catalogue->images,
                                           BaleImageEntry, i);

        if (e->layer == id) {
            g_strlcpy(name, e->name, len);
        }
    }
    for (guint i = 0; i < s->catalogue->bitmaps->len; i++) {
        BaleBitmapEntry *e = &g_array_index(s->catalogue->bitmaps,
                                            BaleBitmapEntry, i);

        if (e->layer == id) {
            bale_bitmap_describe(s->catalogue, e, name, len);
        }
    }
}

/* An image that shows only what layer @id has itself; NULL: it is gone. */
static BaleImage *check_open_layer(Check *c, uint32_t id, GError **errp)
{
    BaleStore *s = c->s;
    BaleImage *image = NULL;
    BaleLayer *layer;

    pthread_mutex_lock(&s->admin_lock);
    layer = bale_layer_get(s, id);
    if (layer) {
        image = bale_image_new(s, layer, errp);
    }
    if (image) {
        image->own_only = true;
        /* What a corrupt store refuses to show is one finding; which records
         * are damaged is others. */
        image->salvage = true;
        __atomic_add_fetch(&layer->refs, 1, __ATOMIC_RELAXED);
        check_name_layer(s, id, image->record.name,
                         sizeof(image->record.name));
    }
    pthread_mutex_unlock(&s->admin_lock);
    return image;
}

/* Each layer once, however many images show it. */
static bool check_layers(Check *c, GError **errp)
{
    BaleStore *s = c->s;
    g_autofree uint32_t *ids = NULL;
    bool ok = true;
    guint n;

    pthread_mutex_lock(&s->admin_lock);
    n = s->catalogue->layers->len;
    ids = g_try_new(uint32_t, n + 1);
    for (guint i = 0; ids && i < n; i++) {
        ids[i] = g_array_index(s->catalogue->layers, BaleLayerEntry, i).id;
    }
    pthread_mutex_unlock(&s->admin_lock);
    if (!ids) {
        return check_no_memory(errp);
    }
    for (guint i = 0; ok && i < n && !c->stopped; i++) {
        GError *err = NULL;
        BaleImage *image = check_open_layer(c, ids[i], &err);

        if (image) {
            ok = check_clusters(c, image, errp);
            /* Its requests have ended, and so has read-ahead. */
            bale_store_quiesce(s);
            bale_layer_unref_later(image->top);
            bale_image_free(image);
        } else if (err) {
            g_propagate_error(errp, err);
            ok = false;
        }
    }
    return ok;
}

/* --- counters --- */

typedef struct CheckCount {
    BaleStore *s;
    uint64_t *live;
} CheckCount;

static bool check_count(uint64_t cluster, uint64_t value, void *opaque)
{
    CheckCount *count = opaque;
    uint64_t page, offset;

    if (bale_address_split(count->s, bale_value_address(value), &page,
                           &offset)) {
        count->live[page] += bale_value_live(value, count->s->cluster_size);
    }
    return true;
}

static void check_count_patch(void *opaque, uint64_t address, uint32_t live)
{
    CheckCount *count = opaque;
    uint64_t page, offset;

    if (bale_address_split(count->s, address, &page, &offset)) {
        count->live[page] += live;
    }
}

/* Compare the pages' live bytes with the index.  No write can come between. */
static bool check_counters(Check *c, GError **errp)
{
    BaleStore *s = c->s;
    CheckCount count = { .s = s };
    g_autofree BaleImage **images = NULL;
    GHashTableIter iter;
    void *layer;
    uint64_t n;
    guint opened;

    pthread_rwlock_wrlock(&s->session_lock);
    n = s->pages->len;
    count.live = g_try_new0(uint64_t, n + 1);
    if (!count.live) {
        pthread_rwlock_unlock(&s->session_lock);
        return check_no_memory(errp);
    }
    g_hash_table_iter_init(&iter, s->layers);
    while (g_hash_table_iter_next(&iter, NULL, &layer)) {
        bale_index_foreach(((BaleLayer *)layer)->index, check_count, &count);
    }
    images = bale_store_images(s, &opened);
    for (guint i = 0; i < opened; i++) {
        /* Held until the pages are compared: a write-out may end now. */
        bale_mutable_lock(images[i]->mutable_region);
        bale_mutable_foreach_patch(images[i]->mutable_region,
                                   check_count_patch, &count);
    }
    pthread_mutex_lock(&s->log_lock);
    bale_log_fold(s);
    c->result->end_offset = BALE_SUPER_SIZE;
    for (uint64_t i = 0; i < n; i++) {
        BalePage *p = bale_page(s, i);

        if (p->state == BALE_PAGE_FREE) {
            continue;
        }
        c->result->end_offset =
            MAX(c->result->end_offset, page_address(s, i) + p->end);
        if (p->bucket == BALE_BUCKET_META) {
            continue;
        }
        if (p->live_bytes != count.live[i]) {
            c->result->wrong_counters++;
            if (c->flags & (BALE_CHECK_FIX_LEAKS | BALE_CHECK_FIX_ALL)) {
                p->live_bytes = count.live[i];
                c->result->fixed++;
            }
        }
        /* The last of those who are in a page lets it die. */
        if (p->state == BALE_PAGE_SEALED && !count.live[i] &&
            !p->tombstone_seq && !p->readers && !p->in_flight) {
            c->result->leaked_pages++;
        }
    }
    pthread_mutex_unlock(&s->log_lock);
    for (guint i = 0; i < opened; i++) {
        bale_mutable_unlock(images[i]->mutable_region);
    }
    pthread_rwlock_unlock(&s->session_lock);
    g_free(count.live);
    if (c->result->wrong_counters) {
        check_finding(c, "%" PRIu64 " pages with a wrong count of live bytes",
                      c->result->wrong_counters);
    }
    return true;
}

/* --- repair --- */

/*
 * Superblocks are written anew, the corrupt mark is taken away, and with the
 * session that this begins the next checkpoint replaces a damaged one.  Damaged
 * clusters stay as they are: they read as errors, and every check lists them.
 */
static void check_repair(Check *c)
{
    BaleStore *s = c->s;
    uint64_t wrong = c->result->bad_superblocks + s->checkpoint_damaged +
                     !!s->corrupt;
    bool was_corrupt = s->corrupt;
    int ret = 0;

    if (!wrong || s->read_only || store_failed(s)) {
        return;
    }
    pthread_rwlock_wrlock(&s->session_lock);
    s->super.incompatible &= ~(uint64_t)BALE_INCOMPAT_CORRUPT;
    __atomic_store_n(&s->corrupt, false, __ATOMIC_RELAXED);
    if (s->session) {
        ret = bale_supers_write(s);
    } else {
        ret = bale_session_begin(s);
    }
    if (ret < 0 && was_corrupt) {
        __atomic_store_n(&s->corrupt, true, __ATOMIC_RELAXED);
    }
    pthread_rwlock_unlock(&s->session_lock);
    if (ret == 0) {
        c->result->fixed += wrong;
        s->checkpoint_damaged = false;
    }
}

/* Dead pages are given back in a session; begin one for them. */
static void check_free_leaks(Check *c)
{
    BaleStore *s = c->s;

    if (!c->result->leaked_pages || bale_store_write_begin(s) < 0) {
        return;
    }
    pthread_mutex_lock(&s->log_lock);
    bale_page_consider_all(s);
    pthread_mutex_unlock(&s->log_lock);
    bale_store_write_end(s);
    c->result->fixed += c->result->leaked_pages;
}

bool bale_store_check(BaleStore *s, unsigned flags, BaleCheckReport *report,
                      void *opaque, BaleCheckResult *result, GError **errp)
{
    Check c = { s, flags, report, opaque, result, false };

    memset(result, 0, sizeof(*result));
    check_supers(&c);
    if (s->checkpoint_damaged) {
        result->damaged++;
        check_finding(&c, "the checkpoint at offset %" PRIu64 ": damaged",
                      s->super.checkpoint.address);
    }
    if (s->corrupt) {
        check_finding(&c, "the store is marked corrupt: there may be clusters "
                      "that show older data, or none");
        result->corrupt = true;
    }
    if (flags & BALE_CHECK_FIX_ALL) {
        check_repair(&c);
    }
    if (!check_counters(&c, errp)) {
        return false;
    }
    if (flags & (BALE_CHECK_FIX_LEAKS | BALE_CHECK_FIX_ALL)) {
        check_free_leaks(&c);
    }
    return check_layers(&c, errp);
}
