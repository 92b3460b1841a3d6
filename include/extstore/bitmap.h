/*
 * Dirty bitmaps of an image, kept in its store: which parts of the image were
 * written to since some moment.  The engine stores them and does not look into
 * them; who changes an image keeps them up to date.
 *
 * A bitmap belongs to an image, not to its snapshots: a snapshot or a clone has
 * none, a rollback makes those of the image inconsistent, and so does a resize
 * while they are not in use; deleting the image deletes them.
 *
 * A bitmap whose bits are in somebody's memory is **in use** in the store, from
 * before the first change of the image (bale_bitmaps_begin_use) until the bits
 * were stored (bale_bitmaps_store).  If that never came about, in a crash say,
 * it still is when the image is opened again: it is **inconsistent**, nobody
 * knows its bits, and it can only be removed.
 *
 * Bits are little-endian: bit n % 8 of byte n / 8 stands for the n-th
 * granularity bytes of the image.
 *
 * All functions may block, and are durable when they return true; see store.h
 * for threads.  Two users of one image must not call them at the same time.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_EXTSTORE_BITMAP_H
#define BALE_EXTSTORE_BITMAP_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

#include "extstore/store.h"

#define BALE_BITMAP_NAME_MAX 1023u /* bytes */
#define BALE_BITMAP_GRANULARITY_MIN_BITS 9u
#define BALE_BITMAP_GRANULARITY_MAX_BITS 31u
#define BALE_BITMAP_DATA_MAX (512ull << 20) /* bytes of one bitmap's bits */
#define BALE_BITMAPS_MAX 1024u              /* of one image */
#define BALE_BITMAPS_DATA_MAX (1ull << 30)  /* bytes of all bits of an image */

typedef struct BaleBitmapInfo {
    char *name;
    uint64_t size;         /* bytes of the image that it covers */
    uint32_t granularity;  /* bytes that one bit stands for, a power of two */
    bool enabled;          /* it records changes when the image is opened */
    bool in_use;
} BaleBitmapInfo;

/* Bytes that the bits take, a multiple of 8. */
static inline uint64_t bale_bitmap_data_len(uint64_t size,
                                            uint32_t granularity)
{
    uint64_t bits = size / granularity + !!(size % granularity);

    return (bits / 64 + !!(bits % 64)) * 8;
}

/*
 * BaleBitmapInfo of @image's bitmaps in the order of their making; free with
 * g_array_unref().  NULL with @errp set: there is no such image.
 */
GArray *bale_bitmap_list(BaleStore *store, const char *image, GError **errp);

/*
 * Could @image have these bitmaps, in place of those of the same names and with
 * its others?  False with @errp set, which says what is too much.
 */
bool bale_bitmaps_check(BaleImage *image, const BaleBitmapInfo *list,
                        unsigned n, GError **errp);

/* Mark all bitmaps of @image as in use. */
bool bale_bitmaps_begin_use(BaleImage *image, GError **errp);

/* Take (or give) @len bytes of bits, from byte @offset on. */
typedef void BaleBitmapBits(void *opaque, uint64_t offset, void *buf,
                            size_t len);

/* Hand the bits of one of @image's bitmaps, in pieces, to @take. */
bool bale_bitmap_load(BaleImage *image, const char *name,
                      BaleBitmapBits *take, void *opaque, GError **errp);

typedef struct BaleBitmapSource {
    BaleBitmapInfo info;   /* in_use does not count */
    BaleBitmapBits *give;  /* called in the calling thread */
    void *opaque;
} BaleBitmapSource;

/*
 * Store these bitmaps, in place of those of the same names, and mark them as
 * not in use.  When this fails, they are in use in the store, or not there.
 */
bool bale_bitmaps_store(BaleImage *image, const BaleBitmapSource *list,
                        unsigned n, GError **errp);

/* Clears a BaleBitmapInfo that owns its name. */
void bale_bitmap_info_clear(void *info);

/* False also if there is none of that name. */
bool bale_bitmap_remove(BaleImage *image, const char *name, GError **errp);

#endif
