/*
 * The mutable region after a crash: patches that the log brought back.
 *
 * They are laid over what the index points at by being put into the region
 * again, as if they had just been written and saved.
 *
 * Threads: the one that recovers, before anybody else knows the image.
 * Errors: -EFBIG: more than the format allows; -ENOMEM.  A patch that is
 * damaged is none: its cluster is marked as spoilt.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "mutable-internal.h"

#include <errno.h>

#include "recover-internal.h"
#include "util/planted.h"

/* Lay one patch over what is cached.  -EIO: damaged. */
static int mutable_recover_one(BaleMutable *m, BalePatchPacker *packer,
                               uint64_t cluster, const BalePatch *patch)
{
    BaleStore *s = m->image->store;
    g_autofree uint8_t *payload = NULL;
    const uint8_t *bytes;
    uint64_t page, offset;
    size_t accepted;
    uint32_t len;
    BaleRecord r;
    int ret;

    if (!bale_address_split(s, patch->address, &page, &offset)) {
        return -EIO;
    }
    ret = bale_recover_record(s, patch->address, bale_page(s, page)->version,
                              BALE_RECORD_HEADER_LEN + patch->len, &r,
                              &payload);
    if (ret < 0) {
        return ret;
    }
    if (r.type != BALE_RECORD_PATCH || r.seq != patch->seq ||
        r.cluster != cluster ||
        r.count != patch->offset || r.payload_len != patch->len) {
        return -EIO;
    }
    ret = bale_patch_unpack(packer, s->cluster_size, &r, payload, &bytes,
                            &len);
    if (ret < 0) {
        return ret;
    }
    ret = bale_seqcache_write_buf(m->cache,
                                  (cluster << s->cluster_bits) +
                                      patch->offset,
                                  bytes, len, 0, &accepted);
    return ret == -EAGAIN ? -EFBIG : ret;
}

/*
 * A patch of a cluster that a record held, and that record is not there: it was
 * in a torn tail, so no flush has acknowledged the patch, and without it nobody
 * knows what lies beside it.
 */
static void mutable_recover_orphans(BaleMutable *m, BalePatched *p)
{
    if (bale_image_find(m->image, p->cluster)) {
        return;
    }
    for (guint i = p->patches->len; i-- > 0;) {
        BalePatch *patch = &g_array_index(p->patches, BalePatch, i);

        if (!patch->bare) {
            m->patched.patches--;
            m->patched.bytes -= bale_patch_live(patch->len);
            g_array_remove_index(p->patches, i);
        }
    }
}

/* -EIO: the patch *@bad is damaged. */
static int mutable_recover_cluster(BaleMutable *m, BalePatchPacker *packer,
                                   BalePatched *p, BalePatch *bad)
{
    for (guint i = 0; i < p->patches->len; i++) {
        guint n = BALE_PLANTED(patch_order) ? p->patches->len - 1 - i : i;
        int ret = mutable_recover_one(
            m, packer, p->cluster, &g_array_index(p->patches, BalePatch, n));

        if (ret < 0) {
            *bad = g_array_index(p->patches, BalePatch, n);
            return ret;
        }
    }
    return 0;
}

/* The rest of bale_mutable_recover_load(). */
static int mutable_recover_all(BaleMutable *m, BalePatchPacker *packer,
                               BalePatchTable *t)
{
    BaleStore *s = m->image->store;
    BalePatchTable empty = m->patched;
    GHashTableIter iter;
    void *value;

    m->patched = *t;
    m->patched.max = empty.max;
    *t = empty;
    g_hash_table_iter_init(&iter, m->patched.clusters);
    while (g_hash_table_iter_next(&iter, NULL, &value)) {
        BalePatched *p = value;
        BalePatch bad;
        int ret;

        if (p->patches->len > BALE_PATCHES_PER_CLUSTER_MAX) {
            return -EFBIG;
        }
        mutable_recover_orphans(m, p);
        if (p->patches->len == 0) {
            m->patched.patched--;
            g_hash_table_iter_remove(&iter);
            continue;
        }
        ret = mutable_recover_cluster(m, packer, p, &bad);
        if (ret == -EIO) {
            /* What lies under the patch is out of date. */
            bale_seqcache_discard(m->cache, p->cluster << s->cluster_bits,
                                  s->cluster_size);
            bale_patch_drop(&m->patched, p, false);
            ret = bale_patch_spoil(m->image->top, p->cluster, &bad);
            g_hash_table_iter_remove(&iter);
        }
        if (ret < 0) {
            return ret;
        }
    }
    g_hash_table_iter_init(&iter, m->patched.clusters);
    while (g_hash_table_iter_next(&iter, NULL, &value)) {
        BalePatched *p = value;

        for (guint i = 0; i < p->patches->len; i++) {
            BalePatch *patch = &g_array_index(p->patches, BalePatch, i);

            bale_page_live_add(s, patch->address,
                               bale_patch_live(patch->len));
        }
    }
    return 0;
}

int bale_mutable_recover_load(BaleMutable *m, BalePatchTable *t)
{
    BalePatchPacker packer = { 0 };
    int ret = mutable_recover_all(m, &packer, t);

    bale_patch_packer_destroy(&packer);
    return ret;
}
