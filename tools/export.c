/*
 * `bale export`: an image of a store to a raw file or block device.
 *
 * The main thread submits reads and writes what they bring, in the order in
 * which they complete; completions only pass a slot on.  At most
 * EXPORT_SLOTS reads are under way.  What reads as zeroes becomes a hole in a
 * file; on a block device zeroes are written.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store-internal.h"

#define EXPORT_SLOTS 16
/* Length of a read, in bytes, unless a cluster is longer */
#define EXPORT_READ_LEN (1u << 20)
/* Zeroes are looked for in units of so many bytes */
#define EXPORT_HOLE 4096u
/* Longest status run asked for at once, in bytes */
#define EXPORT_RUN_MAX (1ull << 40)

typedef struct Export Export;

typedef struct Slot {
    Export *export;
    uint8_t *buf;
    struct iovec iov;
    uint64_t offset;
    int ret;
} Slot;

struct Export {
    const char *store_name;
    const char *path;
    BaleImage *image;
    uint64_t size;        /* of the image, bytes */
    uint32_t cluster_size;
    bool salvage;
    bool zero_block_device; /* zeroes must be written */
    int fd;
    Slot slots[EXPORT_SLOTS];
    BaleToolBag finished; /* Slots whose read has completed */
    GPtrArray *idle;      /* Slots without a read */
    unsigned under_way;
    uint64_t copied;       /* bytes done with */
    uint64_t lost;         /* clusters that could not be read */
    BaleToolProgress progress;
};

static int say(Export *e, const char *name, const char *format, ...)
    G_GNUC_PRINTF(3, 4);

static int say(Export *e, const char *name, const char *format, ...)
{
    g_autofree char *message = NULL;
    va_list args;

    bale_tool_progress_end(&e->progress);
    va_start(args, format);
    message = g_strdup_vprintf(format, args);
    va_end(args);
    bale_tool_file_error("export", name, message);
    return -EIO;
}

static int write_all(Export *e, const uint8_t *buf, size_t len,
                     uint64_t offset)
{
    while (len > 0) {
        ssize_t n = pwrite(e->fd, buf, len, offset);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return say(e, e->path, "write: %s",
                       n ? g_strerror(errno) : "nothing was written");
        }
        buf += n;
        offset += n;
        len -= n;
    }
    return 0;
}

/* Write @len bytes of @buf, leaving holes where they are zero. */
static int write_sparse(Export *e, const uint8_t *buf, size_t len,
                        uint64_t offset)
{
    size_t start = 0;
    int ret;

    if (e->zero_block_device) {
        return write_all(e, buf, len, offset);
    }
    for (size_t at = 0; at < len; at += EXPORT_HOLE) {
        if (bale_tool_is_zero(buf + at, MIN(EXPORT_HOLE, len - at))) {
            ret = write_all(e, buf + start, at - start, offset + start);
            if (ret < 0) {
                return ret;
            }
            start = MIN(at + EXPORT_HOLE, len);
        }
    }
    return write_all(e, buf + start, len - start, offset + start);
}

/* Make a range of a block device zero; files have a hole there already. */
static int write_zeroes(Export *e, uint64_t offset, uint64_t len)
{
    static const uint8_t zeroes[65536];
    uint64_t range[2] = { offset, len };
    int ret = 0;

    if (!e->zero_block_device || !ioctl(e->fd, BLKZEROOUT, range)) {
        return 0;
    }
    while (len > 0 && ret == 0) {
        uint64_t n = MIN(len, sizeof(zeroes));

        ret = write_all(e, zeroes, n, offset);
        offset += n;
        len -= n;
    }
    return ret;
}

/* Read the clusters of a failed slot one by one; zeroes where that fails. */
static void read_salvage(Export *e, Slot *slot)
{
    size_t len;
    int ret;

    for (size_t at = 0; at < slot->iov.iov_len; at += len) {
        len = MIN(e->cluster_size, slot->iov.iov_len - at);
        ret = bale_image_read_sync(e->image, slot->offset + at, slot->buf + at,
                                   len);
        if (ret < 0) {
            memset(slot->buf + at, 0, len);
            e->lost++;
            bale_tool_progress_end(&e->progress);
            fprintf(stderr, "bale: export: %s: %zu bytes at %" G_GUINT64_FORMAT
                    " are lost: %s\n",
                    e->store_name, len, slot->offset + at, g_strerror(-ret));
        }
    }
}

static void read_done(void *opaque, int ret)
{
    Slot *slot = opaque;

    slot->ret = ret;
    bale_tool_bag_put(&slot->export->finished, slot);
}

/* Wait for one read and write what it brought. */
static int finish_one(Export *e)
{
    Slot *slot = bale_tool_bag_take(&e->finished);

    e->under_way--;
    g_ptr_array_add(e->idle, slot);
    if (slot->ret < 0) {
        if (!e->salvage) {
            return say(e, e->store_name, "reading %zu bytes at "
                       "%" G_GUINT64_FORMAT ": %s",
                       slot->iov.iov_len, slot->offset,
                       g_strerror(-slot->ret));
        }
        read_salvage(e, slot);
    }
    e->copied += slot->iov.iov_len;
    bale_tool_progress(&e->progress, e->copied, e->size);
    return write_sparse(e, slot->buf, slot->iov.iov_len, slot->offset);
}

static int read_range(Export *e, uint64_t offset, uint64_t len)
{
    size_t step = MAX(EXPORT_READ_LEN, e->cluster_size);
    int ret;

    while (len > 0) {
        Slot *slot;

        if (e->idle->len == 0) {
            ret = finish_one(e);
            if (ret < 0) {
                return ret;
            }
        }
        slot = g_ptr_array_steal_index_fast(e->idle, e->idle->len - 1);
        slot->offset = offset;
        slot->iov.iov_len = MIN(len, step - offset % step);
        e->under_way++;
        bale_image_read(e->image, offset, &slot->iov, 1, read_done, slot);
        offset += slot->iov.iov_len;
        len -= slot->iov.iov_len;
    }
    return 0;
}

static int copy(Export *e)
{
    uint64_t offset = 0;
    int ret = 0;

    while (offset < e->size && ret == 0) {
        BaleClusterStatus status;
        uint64_t run;

        ret = bale_image_status(e->image, offset,
                                MIN(e->size - offset, EXPORT_RUN_MAX), &status,
                                &run);
        if (ret < 0) {
            ret = say(e, e->store_name, "status at %" G_GUINT64_FORMAT ": %s",
                      offset, g_strerror(-ret));
            break;
        }
        if (status == BALE_CLUSTER_DATA) {
            ret = read_range(e, offset, run);
        } else {
            ret = write_zeroes(e, offset, run);
            e->copied += run;
            bale_tool_progress(&e->progress, e->copied, e->size);
        }
        offset += run;
    }
    while (e->under_way > 0 && ret == 0) {
        ret = finish_one(e);
    }
    /* After an error only the end of the reads matters. */
    while (e->under_way > 0) {
        bale_tool_bag_take(&e->finished);
        e->under_way--;
    }
    return ret;
}

/* Open the output and give it its size; *@made: the file is new. */
static int open_output(Export *e, bool *made)
{
    struct stat st;
    uint64_t bytes;
    int ret = 0;

    e->fd = open(e->path, O_RDWR | O_CLOEXEC | O_CREAT | O_EXCL, 0600);
    *made = e->fd >= 0;
    if (e->fd < 0 && errno == EEXIST) {
        e->fd = open(e->path, O_RDWR | O_CLOEXEC);
    }
    if (e->fd < 0 || fstat(e->fd, &st) < 0) {
        return say(e, e->path, "%s", g_strerror(errno));
    }
    if (S_ISBLK(st.st_mode)) {
        e->zero_block_device = true;
        if (ioctl(e->fd, BLKGETSIZE64, &bytes) < 0) {
            return say(e, e->path, "%s", g_strerror(errno));
        }
        if (bytes < e->size) {
            return say(e, e->path, "has %" G_GUINT64_FORMAT " bytes, but the "
                       "image has %" G_GUINT64_FORMAT, bytes, e->size);
        }
        return 0;
    }
    if (!S_ISREG(st.st_mode)) {
        return say(e, e->path, "is neither a regular file nor a block device");
    }
    if (ftruncate(e->fd, 0) < 0 || ftruncate(e->fd, e->size) < 0) {
        ret = say(e, e->path, "%s", g_strerror(errno));
    }
    return ret;
}

static int slots_init(Export *e)
{
    size_t len = MAX(EXPORT_READ_LEN, e->cluster_size);

    bale_tool_bag_init(&e->finished);
    e->idle = g_ptr_array_new();
    for (int i = 0; i < EXPORT_SLOTS; i++) {
        Slot *slot = &e->slots[i];

        slot->export = e;
        slot->buf = bale_tool_buffer_new(len);
        if (!slot->buf) {
            return say(e, e->path, "no memory");
        }
        slot->iov.iov_base = slot->buf;
        g_ptr_array_add(e->idle, slot);
    }
    return 0;
}

static int export_image(Export *e, BaleStore *store, bool ignore_backing)
{
    g_autofree BaleImageInfo *info = g_new0(BaleImageInfo, 1);
    BaleStoreInfo store_info;
    bool made = false;
    int ret;

    bale_store_get_info(store, &store_info);
    if (store_info.corrupt && !e->salvage) {
        say(e, e->store_name, "the store is corrupt: clusters may be missing "
            "or old without being named; see 'bale check', or use --salvage");
        return BALE_EXIT_ERROR;
    }
    bale_image_set_salvage(e->image, e->salvage);
    bale_image_get_info(e->image, info);
    e->size = info->size;
    e->cluster_size = info->cluster_size;
    e->fd = -1;
    if (info->has_backing_file && !ignore_backing) {
        say(e, e->store_name, "the image has a backing file ('%s'), which "
            "only QEMU reads: use 'bale run qemu-img convert', or "
            "--ignore-backing", info->backing_file);
        return BALE_EXIT_ERROR;
    }
    ret = slots_init(e);
    if (ret == 0) {
        ret = open_output(e, &made);
    }
    if (ret == 0) {
        ret = copy(e);
    }
    if (ret == 0 && fdatasync(e->fd) < 0) {
        ret = say(e, e->path, "%s", g_strerror(errno));
    }
    if (ret == 0) {
        bale_tool_progress(&e->progress, 1, 1);
    }
    bale_tool_progress_end(&e->progress);
    if (e->fd >= 0) {
        close(e->fd);
    }
    if (ret < 0 && made) {
        unlink(e->path);
    }
    for (int i = 0; i < EXPORT_SLOTS; i++) {
        free(e->slots[i].buf);
    }
    bale_tool_bag_clear(&e->finished);
    g_ptr_array_unref(e->idle);
    if (ret < 0) {
        return BALE_EXIT_ERROR;
    }
    return e->lost || store_info.corrupt ? BALE_EXIT_DAMAGE : BALE_EXIT_OK;
}

static int run_export(const BaleCommand *command, int argc, char **argv)
{
    g_autofree Export *e = g_new0(Export, 1);
    g_autofree char *name = NULL;
    g_auto(BaleToolDevice) device = { 0 };
    gboolean progress = FALSE;
    gboolean salvage = FALSE;
    gboolean ignore_backing = FALSE;
    int workers = 0;
    BaleStore *store;
    int status;
    const GOptionEntry entries[] = {
        { "progress", 'p', 0, G_OPTION_ARG_NONE, &progress, "Show progress",
          NULL },
        { "salvage", 0, 0, G_OPTION_ARG_NONE, &salvage,
          "Go on at damaged clusters, list them, write zeroes", NULL },
        { "ignore-backing", 0, 0, G_OPTION_ARG_NONE, &ignore_backing,
          "Write zeroes where a backing file would show", NULL },
        { "workers", 0, 0, G_OPTION_ARG_INT, &workers,
          "Threads that decompress; 0: one for each core", "N" },
        BALE_TOOL_IMAGE_ENTRY(name),
        BALE_TOOL_SHARE_ENTRY(device),
        BALE_TOOL_DEVICE_ENTRIES(device),
        { NULL },
    };

    if (!bale_tool_parse(command, entries, false, &argc, &argv) ||
        !bale_tool_arguments(command, argc, 2)) {
        return BALE_EXIT_ERROR;
    }
    if (workers < 0 || workers > BALE_WORKERS_MAX) {
        return bale_tool_error("export: --workers takes 0 to %d",
                               BALE_WORKERS_MAX);
    }
    if (bale_tool_same_file(argv[1], argv[2])) {
        return bale_tool_file_error("export", argv[2], "is the store itself");
    }
    e->store_name = argv[1];
    e->path = argv[2];
    e->salvage = salvage;
    e->progress.on = progress;
    store = bale_tool_store_open("export", &device, argv[1], BALE_TOOL_READ,
                                 workers);
    if (!store) {
        return BALE_EXIT_ERROR;
    }
    e->image = bale_tool_image_open("export", argv[1], store, name);
    if (e->image) {
        status = export_image(e, store, ignore_backing);
        bale_image_close(e->image);
    } else {
        status = BALE_EXIT_ERROR;
    }
    return bale_tool_store_close("export", argv[1], store, status);
}

const BaleCommand bale_command_export = {
    .name = "export",
    .arguments = "STORE OUT",
    .summary = "Write an image of a store to a raw file or block device",
    .help = "A file is replaced, and sparse. Exit status: 0 done; 1 failed, "
            "and a file that\n"
            "was made is removed; 2 done with --salvage, but clusters were "
            "lost, or may be.",
    .run = run_export,
};
