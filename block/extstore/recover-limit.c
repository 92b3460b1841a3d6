/*
 * How much memory and work the opening of a store may take.
 *
 * What lies on the device can claim more than a device of its size could need:
 * a zero record of 64 bytes sets 2^32 index entries, a layer of 32 bytes may be
 * 2^60 bytes large, a patch of one byte takes a cluster of memory, and places
 * that look damaged make recovery look again.  So recovery counts
 *
 *   memory   what grows by more than a few bytes for each byte of the device:
 *            index entries, layers, clusters with patches
 *   work     what was read or verified, in bytes; and clusters that a record
 *            was applied to
 *
 * and gives up above the limits of extstore/store.h.  No store that was written
 * by us needs as much: maintain.c counts clusters of zero ranges as if they
 * were data, so that a checkpoint, which takes 8 bytes of the device for each,
 * comes before they are too many.  A repair has no limits.
 *
 * Threads: the one that opens the store.  Errors: -ENOMEM and -EFBIG; the
 * store's error then says what to do.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "recover-internal.h"

#include <errno.h>
#include <inttypes.h>

#include "util/planted.h"

/* Clusters that are set between two looks at the memory that they take. */
#define LIMIT_CLUSTERS (1u << 14)

/* A layer without clusters: its index, and pointers to parts of its tables. */
#define LIMIT_LAYER_BYTES 1024u
#define LIMIT_LAYER_PART_CLUSTERS (1u << 20)

void bale_limit_init(BaleStore *s)
{
    uint64_t size = MIN(s->dev_info.size, BALE_DEVICE_SIZE_MAX);

    if (s->options.repair && !s->read_only) {
        s->limit_memory = s->limit_read = s->limit_clusters = UINT64_MAX;
        return;
    }
    s->limit_memory = BALE_OPEN_MEMORY_BASE + BALE_OPEN_MEMORY_FACTOR * size;
    s->limit_read = BALE_OPEN_READ_BASE + BALE_OPEN_READ_FACTOR * size;
    s->limit_clusters = BALE_OPEN_CLUSTERS_BASE +
                        size / BALE_OPEN_CLUSTER_BYTES;
}

static int limit_memory_exceeded(BaleStore *s, uint64_t bytes)
{
    if (bytes <= s->limit_memory || BALE_PLANTED(memory_unlimited)) {
        return 0;
    }
    s->limit_exceeded = "memory";
    return -ENOMEM;
}

int bale_limit_memory(BaleStore *s)
{
    uint64_t bytes = s->limit_reserved;
    GHashTableIter iter;
    void *layer;

    bale_epoch_poll(s->epoch); /* tables that were outgrown */
    g_hash_table_iter_init(&iter, s->layers);
    while (g_hash_table_iter_next(&iter, NULL, &layer)) {
        bytes += bale_index_bytes(((BaleLayer *)layer)->index);
    }
    return limit_memory_exceeded(s, bytes);
}

int bale_limit_layer(BaleStore *s, uint64_t size)
{
    uint64_t clusters = bale_size_clusters(size, s->cluster_size);

    s->limit_reserved += LIMIT_LAYER_BYTES +
                         2 * sizeof(void *) *
                             (clusters / LIMIT_LAYER_PART_CLUSTERS);
    return limit_memory_exceeded(s, s->limit_reserved);
}

int bale_limit_layers(BaleStore *s, const BaleCatalogue *cat)
{
    int ret = 0;

    for (guint i = 0; ret == 0 && i < cat->layers->len; i++) {
        ret = bale_limit_layer(s, g_array_index(cat->layers, BaleLayerEntry,
                                                i).size);
    }
    return ret;
}

int bale_limit_patched(BaleStore *s, uint64_t clusters)
{
    /* And what an image needs to keep any. */
    s->limit_reserved += (clusters + 2) * s->cluster_size;
    return bale_limit_memory(s);
}

static int limit_work_exceeded(BaleStore *s)
{
    s->limit_exceeded = "time";
    return -EFBIG;
}

int bale_limit_read(BaleStore *s, uint64_t bytes)
{
    s->read_bytes += bytes;
    return s->read_bytes <= s->limit_read ? 0 : limit_work_exceeded(s);
}

int bale_limit_cluster(BaleStore *s)
{
    if (++s->set_clusters > s->limit_clusters) {
        return limit_work_exceeded(s);
    }
    return s->set_clusters % LIMIT_CLUSTERS ? 0 : bale_limit_memory(s);
}

void bale_limit_set_error(BaleStore *s, GError **errp)
{
    g_clear_error(errp);
    g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_CORRUPT,
                "opening a store of %" PRIu64 " bytes would take too much %s; "
                "a repair (check -r all) tries all the same",
                s->dev_info.size, s->limit_exceeded);
}
