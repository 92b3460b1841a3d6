/*
 * What only a QEMU that Bale was built into can tell: members of unions that
 * are closed in a stock QEMU.  bale.c refers to them when BALE_BUILT_IN is
 * defined.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/block_int.h"
#include "block/dirty-bitmap.h"
#include "qapi/qapi-types-block-core.h"

#include "bale-control-internal.h"
#include "bale-driver-internal.h"
#include "bale-internal.h"

bool bale_job_types_known(void)
{
    return true;
}

static ImageInfoSpecificBaleBitmapList *specific_bitmaps(BlockDriverState *bs)
{
    ImageInfoSpecificBaleBitmapList *list = NULL;
    BdrvDirtyBitmap *bitmap;

    FOR_EACH_DIRTY_BITMAP(bs, bitmap) {
        if (bdrv_dirty_bitmap_get_persistence(bitmap)) {
            ImageInfoSpecificBaleBitmap *out =
                g_new0(ImageInfoSpecificBaleBitmap, 1);

            out->name = g_strdup(bdrv_dirty_bitmap_name(bitmap));
            out->granularity = bdrv_dirty_bitmap_granularity(bitmap);
            out->enabled = bdrv_dirty_bitmap_enabled(bitmap);
            out->inconsistent = bdrv_dirty_bitmap_inconsistent(bitmap);
            QAPI_LIST_PREPEND(list, out);
        }
    }
    return list;
}

ImageInfoSpecific *bale_get_specific_info(BlockDriverState *bs, Error **errp)
{
    ImageInfoSpecific *info = g_new0(ImageInfoSpecific, 1);
    ImageInfoSpecificBale *bale = g_new0(ImageInfoSpecificBale, 1);
    g_autofree BaleImageInfo *image = g_new0(BaleImageInfo, 1);
    BaleStoreInfo store;

    bale_store_get_info(bale_bs_store(bs), &store);
    bale_image_get_info(bale_bs_image(bs), image);
    bale->cluster_size = image->cluster_size;
    bale->page_size = store.page_size;
    bale->compression_type = g_strdup(bale_codec_name(image->codec));
    bale->corrupt = store.corrupt;
    bale->bitmaps = specific_bitmaps(bs);
    bale->has_bitmaps = bale->bitmaps;
    info->type = IMAGE_INFO_SPECIFIC_KIND_BALE;
    info->u.bale.data = bale;
    return info;
}

BlockStatsSpecific *bale_get_specific_stats(BlockDriverState *bs)
{
    BlockStatsSpecific *specific = g_new0(BlockStatsSpecific, 1);
    g_autofree BaleStoreStats *stats = g_new0(BaleStoreStats, 1);

    bale_store_get_stats(bale_bs_store(bs), stats);
    specific->driver = BLOCKDEV_DRIVER_BALE;
    specific->u.bale = (BlockStatsSpecificBale){
        .logical_bytes = stats->logical_bytes,
        .stored_bytes = stats->stored_bytes,
        .live_bytes = stats->live_bytes,
        .flushes = stats->flushes,
        .compacted_pages = stats->compacted_pages,
    };
    return specific;
}
