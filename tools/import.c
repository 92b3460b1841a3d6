/*
 * `bale import`: a raw file or block device to a new store, or over an image
 * that holds an older copy of it.
 *
 * Reader threads take chunks of the input in order, read them, and submit the
 * clusters that are not zero as asynchronous writes.  There are IMPORT_SLOTS
 * buffers; a reader waits for a free one, which bounds memory and what is
 * under way.  A buffer is free again when the last write from it completed.
 *
 * Threads: cursor, input offset of holes under `lock`; error and done are
 * atomic; a slot belongs to one reader until its writes are submitted.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "extstore/bitmap.h"
#include "store-internal.h"

#define IMPORT_SLOTS 32
#define IMPORT_READERS_MAX 4
/* Length of a read, in bytes, unless a cluster is longer */
#define IMPORT_READ_LEN (1u << 20)
/* How often the progress line may change, in microseconds */
#define PROGRESS_US 100000

typedef struct Import Import;

typedef struct Slot {
    Import *import;
    uint8_t *buf;
    struct iovec *iov;   /* one for each write from this slot */
    atomic_int pending;  /* writes, and one while they are being submitted */
} Slot;

struct Import {
    const char *path;    /* of the input */
    int fd;
    uint64_t size;       /* of the input, bytes */
    size_t read_len;
    uint32_t cluster_size;
    bool update;         /* the image holds something */
    BaleImage *image;
    Slot slots[IMPORT_SLOTS];
    BaleToolBag idle;    /* Slots */

    pthread_mutex_t lock;
    uint64_t cursor;     /* where the next chunk begins */
    char *message;       /* the first error of the input */

    atomic_int error;    /* the first error of a write or the input; 0: none */
    atomic_uint_fast64_t done; /* bytes of the input */
    atomic_int readers;  /* that still run */
};

static void import_fail(Import *m, int error, const char *message)
{
    int none = 0;

    if (atomic_compare_exchange_strong(&m->error, &none, error) && message) {
        pthread_mutex_lock(&m->lock);
        m->message = g_strdup(message);
        pthread_mutex_unlock(&m->lock);
    }
}

static void slot_put(Slot *slot)
{
    if (atomic_fetch_sub(&slot->pending, 1) == 1) {
        bale_tool_bag_put(&slot->import->idle, slot);
    }
}

static void write_done(void *opaque, int ret)
{
    Slot *slot = opaque;

    if (ret < 0) {
        import_fail(slot->import, ret, NULL);
    }
    slot_put(slot);
}

/* Take the next chunk that is not a hole.  False at the end. */
static bool next_chunk(Import *m, uint64_t *offset, size_t *len)
{
    bool found = false;
    uint64_t start;
    off_t data;

    pthread_mutex_lock(&m->lock);
    if (m->cursor < m->size) {
        start = m->cursor;
        data = m->update ? (off_t)start
                         : lseek(m->fd, m->cursor, SEEK_DATA);
        if (data >= 0) {
            m->cursor = data - data % m->read_len;
            m->cursor = MAX(m->cursor, start);
        } else if (errno == ENXIO) {
            m->cursor = m->size; /* a hole up to the end */
        }
        atomic_fetch_add(&m->done, MIN(m->cursor, m->size) - start);
        if (m->cursor < m->size) {
            *offset = m->cursor;
            *len = MIN(m->read_len, m->size - m->cursor);
            m->cursor += *len;
            found = true;
        }
    }
    pthread_mutex_unlock(&m->lock);
    return found;
}

static bool read_chunk(Import *m, uint8_t *buf, size_t len, uint64_t offset)
{
    while (len > 0) {
        ssize_t n = pread(m->fd, buf, len, offset);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            import_fail(m, n ? -errno : -EIO,
                        n ? g_strerror(errno) : "has become shorter");
            return false;
        }
        buf += n;
        offset += n;
        len -= n;
    }
    return true;
}

/*
 * Submit the runs of clusters that are not zero; all, if there can be something
 * else, as the engine stores only what differs.
 */
static void write_chunk(Import *m, Slot *slot, uint64_t offset, size_t len)
{
    unsigned writes = 0;
    size_t start = 0;
    size_t at;

    for (at = 0; at < len; at += m->cluster_size) {
        bool zero = !m->update &&
                    bale_tool_is_zero(slot->buf + at,
                                      MIN(m->cluster_size, len - at));
        bool last = at + m->cluster_size >= len;
        size_t end = zero ? at : MIN(at + m->cluster_size, len);

        if ((zero || last) && end > start) {
            struct iovec *iov = &slot->iov[writes++];

            iov->iov_base = slot->buf + start;
            iov->iov_len = end - start;
            atomic_fetch_add(&slot->pending, 1);
            bale_image_write(m->image, offset + start, iov, 1, 0, write_done,
                             slot);
        }
        if (zero) {
            start = at + m->cluster_size;
        }
    }
}

static gpointer reader_thread(gpointer opaque)
{
    Import *m = opaque;
    uint64_t offset;
    size_t len;

    while (!atomic_load(&m->error) && next_chunk(m, &offset, &len)) {
        Slot *slot = bale_tool_bag_take(&m->idle);

        atomic_store(&slot->pending, 1);
        if (read_chunk(m, slot->buf, len, offset)) {
            write_chunk(m, slot, offset, len);
        }
        slot_put(slot);
        atomic_fetch_add(&m->done, len);
    }
    atomic_fetch_sub(&m->readers, 1);
    return NULL;
}

static bool slots_init(Import *m)
{
    for (int i = 0; i < IMPORT_SLOTS; i++) {
        Slot *slot = &m->slots[i];

        slot->import = m;
        slot->iov = g_new0(struct iovec, m->read_len / m->cluster_size);
        slot->buf = bale_tool_buffer_new(m->read_len);
        if (!slot->buf) {
            return false;
        }
        bale_tool_bag_put(&m->idle, slot);
    }
    return true;
}

/* Copy everything; 0 or a negative errno. */
static int copy(Import *m, unsigned readers, BaleToolProgress *progress)
{
    GThread *threads[IMPORT_READERS_MAX];

    m->read_len = MAX(IMPORT_READ_LEN, m->cluster_size);
    if (!slots_init(m)) {
        return -ENOMEM;
    }
    atomic_store(&m->readers, readers);
    for (unsigned i = 0; i < readers; i++) {
        threads[i] = g_thread_new("bale-import", reader_thread, m);
    }
    while (progress->on && atomic_load(&m->readers) > 0) {
        bale_tool_progress(progress, atomic_load(&m->done), m->size);
        g_usleep(PROGRESS_US);
    }
    for (unsigned i = 0; i < readers; i++) {
        g_thread_join(threads[i]);
    }
    /* All slots are back when no write is under way. */
    for (int i = 0; i < IMPORT_SLOTS; i++) {
        bale_tool_bag_take(&m->idle);
    }
    return atomic_load(&m->error);
}

static void import_clear(Import *m)
{
    for (int i = 0; i < IMPORT_SLOTS; i++) {
        free(m->slots[i].buf);
        g_free(m->slots[i].iov);
    }
    bale_tool_bag_clear(&m->idle);
    pthread_mutex_destroy(&m->lock);
    g_free(m->message);
    if (m->fd >= 0) {
        close(m->fd);
    }
}

static bool open_input(Import *m)
{
    struct stat st;
    off_t size;

    /* O_NONBLOCK: a fifo must be refused, not waited for. */
    m->fd = open(m->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (m->fd < 0 || fstat(m->fd, &st) < 0) {
        bale_tool_file_error("import", m->path, g_strerror(errno));
        return false;
    }
    if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) {
        bale_tool_file_error("import", m->path,
                             "is neither a regular file nor a block device");
        return false;
    }
    size = lseek(m->fd, 0, SEEK_END);
    if (size < 0) {
        bale_tool_file_error("import", m->path, g_strerror(errno));
        return false;
    }
    m->size = size;
    return true;
}

/* Make an image that holds something ready for @m's input. */
static bool update_begin(Import *m, const BaleImageInfo *info,
                         const char *store_path)
{
    g_autoptr(GError) error = NULL;

    if (info->has_backing_file) {
        bale_tool_file_error("import", store_path, "what the image shows of "
                             "its backing file cannot be compared here");
        return false;
    }
    /* Nobody notes in them what is written now. */
    if (!bale_bitmaps_begin_use(m->image, &error) ||
        (info->size != m->size &&
         !bale_image_resize(m->image, m->size, &error))) {
        bale_tool_file_error("import", store_path, error->message);
        return false;
    }
    bale_image_set_skip_unchanged(m->image, true);
    return true;
}

static int import_into(Import *m, const BaleToolDevice *device,
                       const char *store_path, const char *name,
                       unsigned workers, BaleToolProgress *progress)
{
    g_autoptr(GError) error = NULL;
    BaleImageInfo *info;
    BaleStore *store;
    int status = BALE_EXIT_OK;
    int ret;

    store = bale_tool_store_open("import", device, store_path,
                                 BALE_TOOL_WRITE, workers);
    if (!store) {
        return BALE_EXIT_ERROR;
    }
    m->image = bale_tool_image_open("import", store_path, store, name);
    if (!m->image) {
        status = BALE_EXIT_ERROR;
        return bale_tool_store_close("import", store_path, store, status);
    }
    info = g_new0(BaleImageInfo, 1);
    bale_image_get_info(m->image, info);
    m->cluster_size = info->cluster_size;
    if (m->update && !update_begin(m, info, store_path)) {
        g_free(info);
        bale_image_close(m->image);
        return bale_tool_store_close("import", store_path, store,
                                     BALE_EXIT_ERROR);
    }
    g_free(info);
    ret = copy(m, CLAMP(g_get_num_processors(), 1, IMPORT_READERS_MAX),
               progress);
    if (ret == 0) {
        ret = bale_store_flush_sync(store);
    }
    if (ret == 0) {
        bale_tool_progress(progress, 1, 1);
    }
    bale_tool_progress_end(progress);
    if (ret < 0) {
        status = bale_tool_file_error("import",
                                      m->message ? m->path : store_path,
                                      m->message ? m->message
                                                 : g_strerror(-ret));
    }
    bale_image_close(m->image);
    /* One error is enough: a failed write makes the close fail too. */
    if (!bale_store_close(store, &error) && status == BALE_EXIT_OK) {
        status = bale_tool_file_error("import", store_path, error->message);
    }
    return status;
}

static int run_import(const BaleCommand *command, int argc, char **argv)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(GPtrArray) keep = g_ptr_array_new_with_free_func(g_free);
    g_auto(GStrv) options = NULL;
    g_autofree Import *m = g_new0(Import, 1);
    g_auto(BaleToolDevice) device = { 0 };
    BaleToolProgress progress = { 0 };
    BaleCreateOptions o = { .codec = BALE_TOOL_CODEC_DEFAULT };
    gboolean force = FALSE;
    gboolean show = FALSE;
    gboolean update = FALSE;
    g_autofree char *name = NULL;
    int workers = 0;
    bool made = false;
    int status = BALE_EXIT_ERROR;
    const GOptionEntry entries[] = {
        { "options", 'o', 0, G_OPTION_ARG_STRING_ARRAY, &options,
          "Options of the store, as for bale create", "NAME=VALUE[,...]" },
        { "force", 'f', 0, G_OPTION_ARG_NONE, &force,
          "Replace what is at STORE", NULL },
        { "update", 'u', 0, G_OPTION_ARG_NONE, &update,
          "Into the image that is there: store only what differs", NULL },
        BALE_TOOL_IMAGE_ENTRY(name),
        { "progress", 'p', 0, G_OPTION_ARG_NONE, &show, "Show progress",
          NULL },
        { "workers", 0, 0, G_OPTION_ARG_INT, &workers,
          "Threads that compress; 0: one for each core", "N" },
        BALE_TOOL_DEVICE_ENTRIES(device),
        { NULL },
    };

    if (!bale_tool_parse(command, entries, false, &argc, &argv) ||
        !bale_tool_arguments(command, argc, 2)) {
        return BALE_EXIT_ERROR;
    }
    if (workers < 0 || workers > BALE_WORKERS_MAX) {
        return bale_tool_error("import: --workers takes 0 to %d",
                               BALE_WORKERS_MAX);
    }
    if (update ? force || options : !!name) {
        return bale_tool_error("import: --update takes no --force and no "
                               "--options, and only it takes --image");
    }
    if (!bale_tool_parse_options(options, false, &o, keep, &error)) {
        return bale_tool_file_error("import", argv[2], error->message);
    }
    m->update = update;
    m->path = argv[1];
    bale_tool_bag_init(&m->idle);
    pthread_mutex_init(&m->lock, NULL);
    progress.on = show;
    if (!open_input(m)) {
        goto out;
    }
    o.size = m->size;
    if (bale_tool_same_file(argv[1], argv[2])) {
        status = bale_tool_file_error("import", argv[2],
                                      "is the input itself");
        goto out;
    }
    if (!update &&
        !bale_tool_create("import", &device, argv[2], &o, force, &made)) {
        goto out;
    }
    status = import_into(m, &device, argv[2], name, workers, &progress);
    if (status != BALE_EXIT_OK && made && !device.plugin) {
        unlink(argv[2]);
    }
out:
    import_clear(m);
    return status;
}

const BaleCommand bale_command_import = {
    .name = "import",
    .arguments = "RAW STORE",
    .summary = "Make a store of a raw file or block device",
    .help = "Zeroes and holes take no room in the store. When it fails, a "
            "store that was made\n"
            "is removed. The options are those of bale create, but for "
            "backing_file.\n"
            "With --update the image gets the length and the contents of RAW; "
            "its snapshots\n"
            "stay, and clusters that hold what RAW has are not stored again.",
    .run = run_import,
};
