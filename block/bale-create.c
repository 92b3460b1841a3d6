/*
 * The format driver "bale": creating an image, and how large one would get.
 *
 * Options are taken and checked before anything is touched, so that a mistake
 * changes nothing on disk.  Only then the file is made and opened, and the
 * engine writes an empty store through the same device as a driver's node.
 *
 * Threads: create runs in a coroutine, measure in the main loop.  Errors: one
 * line that says what and where.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/block_int.h"
#include "block/dirty-bitmap.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/option.h"
#include "qemu/units.h"

#include "extstore/store.h"

#include "bale-bridge-internal.h"
#include "bale-driver-internal.h"
#include "bdrv-device-internal.h"

#define BALE_OPT_COMPRESSION_LEVEL "compression_level"
#define BALE_OPT_PAGE_SIZE         "page_size"
#define BALE_OPT_IMAGE             "image"
#define BALE_OPT_MAX_SIZE          "max_size"

/*
 * For bale_measure(), which needs an upper bound rather than the format's own
 * constants: the super area, the headers of a page and of a record, and the
 * pages that metadata and a second bucket may take.
 */
#define MEASURE_SUPER         (2 * MiB)
#define MEASURE_PAGE_HEADER   (64 * KiB)
#define MEASURE_RECORD_HEADER 128u
#define MEASURE_PAGES_MIN     1u

QemuOptsList bale_create_opts = {
    .name = "bale-create-opts",
    .head = QTAILQ_HEAD_INITIALIZER(bale_create_opts.head),
    .desc = {
        {
            .name = BLOCK_OPT_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Virtual disk size",
        },
        {
            .name = BLOCK_OPT_BACKING_FILE,
            .type = QEMU_OPT_STRING,
            .help = "File name of a base image",
        },
        {
            .name = BLOCK_OPT_BACKING_FMT,
            .type = QEMU_OPT_STRING,
            .help = "Image format of the base image",
        },
        {
            .name = BLOCK_OPT_CLUSTER_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Unit of compression, 4K to 2M",
            .def_value_str = "65536",
        },
        {
            .name = BLOCK_OPT_COMPRESSION_TYPE,
            .type = QEMU_OPT_STRING,
            .help = "Compression: deflate (or zlib), zstd, none",
            .def_value_str = "zstd",
        },
        {
            .name = BALE_OPT_COMPRESSION_LEVEL,
            .type = QEMU_OPT_NUMBER,
            .help = "Level of the compression (default: its own default)",
        },
        {
            .name = BALE_OPT_IMAGE,
            .type = QEMU_OPT_STRING,
            .help = "Name of the image in the store (default: none)",
        },
        {
            .name = BALE_OPT_PAGE_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Unit of allocation in the file, a multiple of 2M "
                    "(default: 64M)",
        },
        {
            .name = BALE_OPT_MAX_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "What the store may take (default: no limit)",
        },
        { /* end of list */ }
    },
};

/* What bale_parse_create_opts() fills; the strings are owned. */
typedef struct BaleCreateParams {
    BaleCreateOptions o;
    char *backing_file;
    char *backing_format;
    char *image;
} BaleCreateParams;

static void bale_create_params_clear(BaleCreateParams *p)
{
    g_free(p->backing_file);
    g_free(p->backing_format);
    g_free(p->image);
}

/*
 * Take the options of this driver out of @opts, which then holds those of the
 * protocol, and check them.
 */
static int bale_parse_create_opts(QemuOpts *opts, BaleCreateParams *p,
                                  Error **errp)
{
    g_autofree char *codec = NULL;
    uint64_t cluster_size, level;
    GError *err = NULL;

    memset(p, 0, sizeof(*p));
    p->o.size = qemu_opt_get_size_del(opts, BLOCK_OPT_SIZE, 0);
    if (p->o.size > UINT64_MAX - BDRV_SECTOR_SIZE) {
        error_setg(errp, "Image size is too large");
        return -EINVAL;
    }
    p->o.size = ROUND_UP(p->o.size, BDRV_SECTOR_SIZE);
    cluster_size = qemu_opt_get_size_del(opts, BLOCK_OPT_CLUSTER_SIZE,
                                         BALE_CLUSTER_SIZE_DEFAULT);
    if (cluster_size < BALE_CLUSTER_SIZE_MIN ||
        cluster_size > BALE_CLUSTER_SIZE_MAX ||
        !is_power_of_2(cluster_size)) {
        error_setg(errp, "Cluster size must be a power of two between %u and "
                   "%uk", BALE_CLUSTER_SIZE_MIN, BALE_CLUSTER_SIZE_MAX / 1024);
        return -EINVAL;
    }
    p->o.cluster_size = cluster_size;
    p->o.page_size = qemu_opt_get_size_del(opts, BALE_OPT_PAGE_SIZE, 0);
    p->o.max_size = qemu_opt_get_size_del(opts, BALE_OPT_MAX_SIZE, 0);
    level = qemu_opt_get_number_del(opts, BALE_OPT_COMPRESSION_LEVEL,
                                    BALE_CODEC_LEVEL_DEFAULT);
    if (level > INT_MAX) {
        error_setg(errp, "Compression level is out of range");
        return -EINVAL;
    }
    p->o.level = level;
    codec = qemu_opt_get_del(opts, BLOCK_OPT_COMPRESSION_TYPE);
    if (!bale_codec_from_name(codec ?: "zstd", &p->o.codec, &err)) {
        bale_bridge_error(err, errp);
        return -EINVAL;
    }
    p->backing_file = qemu_opt_get_del(opts, BLOCK_OPT_BACKING_FILE);
    p->backing_format = qemu_opt_get_del(opts, BLOCK_OPT_BACKING_FMT);
    p->image = qemu_opt_get_del(opts, BALE_OPT_IMAGE);
    p->o.image = p->image;
    p->o.backing_file = p->backing_file;
    p->o.backing_format = p->backing_format;
    if (!bale_create_options_check(&p->o, &err)) {
        bale_bridge_error(err, errp);
        return -EINVAL;
    }
    return 0;
}

typedef struct EngineCreate {
    BaleDevice *device;
    const BaleCreateOptions *options;
    GError *err;
    bool ok;
} EngineCreate;

static void engine_create_blocking(void *opaque)
{
    EngineCreate *c = opaque;

    c->ok = bale_store_create(c->device, c->options, &c->err);
    bale_device_close(c->device);
}

/* The path that @filename names, or NULL when it is no file of this host. */
static const char *local_path(const char *filename)
{
    BlockDriver *drv = bdrv_find_protocol(filename, true, NULL);

    if (!drv || strcmp(drv->format_name, "file") != 0) {
        return NULL;
    }
    strstart(filename, "file:", &filename);
    return filename;
}

/*
 * Make the file at @path, if it is a new one, so that only its owner can read
 * it: QEMU gives new files mode 0644, and keeps the mode of those that exist.
 * True: it was made.  What goes wrong here goes wrong again in
 * bdrv_create_file(), which says it.
 */
static bool create_private_file(const char *path)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOCTTY,
                  0600);

    if (fd < 0) {
        return false;
    }
    close(fd);
    return true;
}

int coroutine_fn bale_co_create_opts(BlockDriver *drv, const char *filename,
                                     QemuOpts *opts, Error **errp)
{
    BaleCreateParams params;
    EngineCreate c = { .options = &params.o };
    BlockDriverState *bs = NULL;
    BaleBdrvDevice *dev = NULL;
    const char *path;
    bool created = false, made;
    int ret;

    ret = bale_parse_create_opts(opts, &params, errp);
    if (ret < 0) {
        goto out;
    }
    path = local_path(filename);
    made = path && create_private_file(path);
    ret = bdrv_create_file(filename, opts, errp);
    if (ret < 0) {
        if (made) {
            unlink(path);
        }
        goto out;
    }
    created = true;
    bs = bdrv_open(filename, NULL, NULL,
                   BDRV_O_RDWR | BDRV_O_RESIZE | BDRV_O_PROTOCOL, errp);
    if (!bs) {
        ret = -EIO;
        goto out;
    }
    dev = bale_bdrv_device_new(bs, BALE_BDRV_WRITE, errp);
    if (!dev) {
        ret = -EPERM;
        goto out;
    }

    c.device = bale_bdrv_device_open(dev);
    bale_bridge_run(bdrv_get_aio_context(bs), engine_create_blocking, &c);
    ret = c.ok ? 0 : bale_bridge_error(c.err, errp);

out:
    bale_bdrv_device_unref(dev);
    if (ret < 0 && created && bs) {
        bdrv_co_delete_file_noerr(bs);
    }
    bdrv_unref(bs);
    bale_create_params_clear(&params);
    return ret;
}

/*
 * An upper bound: whether and how well the data compresses is not known, so
 * each cluster counts as it is, with its record's header, in whole pages.
 */
static uint64_t measure_bytes(const BaleCreateOptions *o, uint64_t clusters)
{
    /* A header is far below this; a page also loses its end, where the next
     * record does not fit. */
    const uint64_t record = o->cluster_size + MEASURE_RECORD_HEADER;
    uint64_t page_size = bale_create_page_size(o, 0);
    uint64_t per_page = (page_size - MEASURE_PAGE_HEADER) / record;
    uint64_t pages = DIV_ROUND_UP(clusters, MAX(per_page, 1));

    return MEASURE_SUPER + (pages + MEASURE_PAGES_MIN) * page_size;
}

BlockMeasureInfo *bale_measure(QemuOpts *opts, BlockDriverState *in_bs,
                               Error **errp)
{
    BaleCreateParams params;
    BlockMeasureInfo *info = NULL;
    uint64_t size, used = 0;
    uint32_t cluster_size;

    if (bale_parse_create_opts(opts, &params, errp) < 0) {
        goto out;
    }
    size = params.o.size;
    cluster_size = params.o.cluster_size;

    if (in_bs) {
        int64_t in_size = bdrv_getlength(in_bs);
        int64_t offset, pnum;

        if (in_size < 0) {
            error_setg_errno(errp, -in_size,
                             "Unable to get image virtual_size");
            goto out;
        }
        size = in_size;
        for (offset = 0; offset < in_size; offset += pnum) {
            int ret = bdrv_block_status_above(in_bs, NULL, offset,
                                              in_size - offset, &pnum, NULL,
                                              NULL);
            if (ret < 0) {
                error_setg_errno(errp, -ret, "Unable to get block status");
                goto out;
            }
            if (params.o.backing_file ||
                ((ret & BDRV_BLOCK_DATA) && !(ret & BDRV_BLOCK_ZERO))) {
                /* From here to the end of the cluster, counted once. */
                pnum = QEMU_ALIGN_UP(offset + pnum, cluster_size) - offset;
                used += DIV_ROUND_UP(pnum, cluster_size);
            }
        }
    }

    info = g_new0(BlockMeasureInfo, 1);
    info->required = measure_bytes(&params.o, used);
    info->fully_allocated = measure_bytes(&params.o,
                                          DIV_ROUND_UP(size, cluster_size));
    if (in_bs && bdrv_supports_persistent_dirty_bitmap(in_bs)) {
        info->has_bitmaps = true;
        info->bitmaps = bale_bitmaps_measure(in_bs, cluster_size);
    }

out:
    bale_create_params_clear(&params);
    return info;
}
