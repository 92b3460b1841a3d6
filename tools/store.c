/*
 * What the subcommands that work on a store share; see store-internal.h.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* The longest start of a file that probing needs, in bytes */
#define PROBE_LEN 4096
/* Enough for O_DIRECT on every device, in bytes */
#define BUFFER_ALIGN 4096

int bale_tool_file_error(const char *command, const char *name,
                         const char *message)
{
    g_autofree char *quoted = g_strdup_printf("'%s'", name);

    /* Devices name the file in their messages already. */
    if (strstr(message, quoted)) {
        return bale_tool_error("%s: %s", command, message);
    }
    return bale_tool_error("%s: %s: %s", command, name, message);
}

/* --- opening --- */

/* A warning of the engine is one line, like an error of ours. */
static void print_log(const char *domain, GLogLevelFlags level,
                      const char *message, gpointer opaque)
{
    if (level & (G_LOG_LEVEL_DEBUG | G_LOG_LEVEL_INFO)) {
        return;
    }
    fprintf(stderr, "bale: %s%s\n",
            level & G_LOG_LEVEL_WARNING ? "warning: " : "", message);
}

static BaleDevice *device_open(const BaleToolDevice *d, const char *store,
                               unsigned flags, GError **errp)
{
    g_log_set_default_handler(print_log, NULL);
    if (d->force_share) {
        flags |= BALE_DEVICE_NO_LOCK;
    }
    if (d->buffered) {
        flags |= BALE_DEVICE_BUFFERED;
    }
    if (d->plugin) {
        return bale_device_plugin_open(d->plugin, store, flags, errp);
    }
    return bale_device_aio_open(store, flags, errp);
}

BaleDevice *bale_tool_device_open(const char *command, const BaleToolDevice *d,
                                  const char *store, unsigned flags)
{
    g_autoptr(GError) error = NULL;
    BaleDevice *dev = device_open(d, store, flags, &error);

    if (!dev) {
        bale_tool_file_error(command, store, error->message);
    }
    return dev;
}

static void store_failed(void *opaque, const char *reason)
{
    fprintf(stderr, "bale: %s: writing has stopped: %s\n",
            (const char *)opaque, reason);
}

static void store_damaged(void *opaque, const char *what)
{
    fprintf(stderr, "bale: %s: warning: %s\n", (const char *)opaque, what);
}

BaleStore *bale_tool_store_open(const char *command, const BaleToolDevice *d,
                                const char *store, BaleToolOpen mode,
                                unsigned workers)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(BaleDevice) dev = NULL;
    BaleOpenOptions options = {
        .read_only = mode == BALE_TOOL_READ,
        .repair = mode == BALE_TOOL_REPAIR,
        .workers = workers,
        .failed = store_failed,
        .damage = store_damaged,
        .notify_opaque = (void *)store,
    };
    BaleStore *opened;

    dev = bale_tool_device_open(command, d, store,
                                options.read_only ? BALE_DEVICE_READ_ONLY : 0);
    if (!dev) {
        return NULL;
    }
    opened = bale_store_open(dev, &options, &error);
    if (!opened) {
        bale_tool_file_error(command, store, error->message);
        return NULL;
    }
    g_steal_pointer(&dev);
    return opened;
}

int bale_tool_store_close(const char *command, const char *name,
                          BaleStore *store, int status)
{
    g_autoptr(GError) error = NULL;

    if (!bale_store_close(store, &error)) {
        return bale_tool_file_error(command, name, error->message);
    }
    return status;
}

/* --- arguments --- */

bool bale_tool_arguments(const BaleCommand *command, int argc, int count)
{
    if (argc - 1 == count) {
        return true;
    }
    bale_tool_error("%s: %s arguments: bale %s %s", command->name,
                    argc - 1 < count ? "missing" : "too many", command->name,
                    command->arguments);
    return false;
}

bool bale_tool_same_file(const char *a, const char *b)
{
    struct stat sa, sb;

    return !stat(a, &sa) && !stat(b, &sb) && sa.st_dev == sb.st_dev &&
           sa.st_ino == sb.st_ino;
}

static bool invalid(GError **errp, const char *format, ...)
    G_GNUC_PRINTF(2, 3);

static bool invalid(GError **errp, const char *format, ...)
{
    g_autofree char *message = NULL;
    va_list args;

    va_start(args, format);
    message = g_strdup_vprintf(format, args);
    va_end(args);
    g_set_error_literal(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID,
                        message);
    return false;
}

bool bale_tool_parse_size(const char *text, uint64_t *bytes, GError **errp)
{
    static const char suffixes[] = "BKMGTPE";
    const char *suffix;
    unsigned shift = 0;
    char *end;
    uint64_t value;

    /* strtoull() would accept a sign and leading blanks. */
    if (!g_ascii_isdigit(text[0])) {
        return invalid(errp, "'%s' is not a size", text);
    }
    errno = 0;
    value = g_ascii_strtoull(text, &end, 10);
    if (errno) {
        return invalid(errp, "size '%s' is too large", text);
    }
    if (*end) {
        suffix = strchr(suffixes, g_ascii_toupper(*end));
        if (!suffix || end[1]) {
            return invalid(errp, "'%s' is not a size: use a number of bytes, "
                                 "or a suffix of K, M, G, T, P or E",
                           text);
        }
        shift = (suffix - suffixes) * 10;
    }
    if (value > UINT64_MAX >> shift) {
        return invalid(errp, "size '%s' is too large", text);
    }
    *bytes = value << shift;
    return true;
}

static bool parse_level(const char *text, int *level, GError **errp)
{
    gint64 value;
    char *end;

    errno = 0;
    value = g_ascii_strtoll(text, &end, 10);
    if (errno || end == text || *end || value < INT8_MIN ||
        value > INT8_MAX) {
        return invalid(errp, "'%s' is not a compression level", text);
    }
    *level = value;
    return true;
}

static bool parse_option(const char *name, char *value, bool backing,
                         BaleCreateOptions *o, GError **errp)
{
    uint64_t bytes;

    if (!strcmp(name, "compression_type")) {
        return bale_codec_from_name(value, &o->codec, errp);
    }
    if (!strcmp(name, "compression_level")) {
        return parse_level(value, &o->level, errp);
    }
    if (!strcmp(name, "cluster_size")) {
        if (!bale_tool_parse_size(value, &bytes, errp)) {
            return false;
        }
        /* 0 stands for the default in the engine; here it is a mistake. */
        if (bytes == 0 || bytes > UINT32_MAX) {
            return invalid(errp, "cluster_size %s is out of range", value);
        }
        o->cluster_size = bytes;
        return true;
    }
    if (!strcmp(name, "page_size")) {
        if (!bale_tool_parse_size(value, &bytes, errp)) {
            return false;
        }
        if (bytes == 0) {
            return invalid(errp, "page_size 0 is out of range");
        }
        o->page_size = bytes;
        return true;
    }
    if (!strcmp(name, "max_size")) {
        return bale_tool_parse_size(value, &o->max_size, errp);
    }
    if (!strcmp(name, "image")) {
        o->image = value;
        return true;
    }
    if (backing && !strcmp(name, "backing_file")) {
        o->backing_file = value;
        return true;
    }
    if (backing && (!strcmp(name, "backing_fmt") ||
                    !strcmp(name, "backing_format"))) {
        o->backing_format = value;
        return true;
    }
    return invalid(errp, "there is no option '%s'", name);
}

/* Cut the first option off @text, with doubled commas made single. */
static char *next_option(const char **text)
{
    GString *option = g_string_new(NULL);
    const char *p = *text;

    for (; *p; p++) {
        if (*p == ',') {
            if (p[1] != ',') {
                p++;
                break;
            }
            p++;
        }
        g_string_append_c(option, *p);
    }
    *text = p;
    return g_string_free(option, FALSE);
}

bool bale_tool_parse_options(char *const *options, bool backing,
                             BaleCreateOptions *o, GPtrArray *keep,
                             GError **errp)
{
    for (; options && *options; options++) {
        const char *text = *options;

        while (*text) {
            char *option = next_option(&text);
            char *equals = strchr(option, '=');

            g_ptr_array_add(keep, option);
            if (!equals) {
                return invalid(errp, "option '%s' has no value", option);
            }
            *equals = '\0';
            g_strdelimit(option, "-", '_');
            if (!parse_option(option, equals + 1, backing, o, errp)) {
                return false;
            }
        }
    }
    return true;
}

/* --- output --- */

void bale_tool_progress(BaleToolProgress *p, uint64_t done, uint64_t total)
{
    int permille;

    if (!p->on) {
        return;
    }
    permille = total ? (int)(MIN(done, total) * 1000.0 / total) : 1000;
    if (p->shown && permille == p->permille) {
        return;
    }
    fprintf(stderr, "\r    (%d.%02d/100%%)", permille / 10,
            permille % 10 * 10);
    fflush(stderr);
    p->shown = true;
    p->permille = permille;
}

void bale_tool_progress_end(BaleToolProgress *p)
{
    if (p->shown) {
        fputc('\n', stderr);
        p->shown = false;
    }
}

void bale_tool_print_json(JsonBuilder *builder)
{
    g_autoptr(JsonGenerator) generator = json_generator_new();
    g_autoptr(JsonNode) root = json_builder_get_root(builder);
    g_autofree char *text = NULL;

    json_generator_set_pretty(generator, TRUE);
    json_generator_set_indent(generator, 4);
    json_generator_set_root(generator, root);
    text = json_generator_to_data(generator, NULL);
    puts(text);
}

void bale_tool_json_uint(JsonBuilder *builder, const char *name,
                         uint64_t value)
{
    json_builder_set_member_name(builder, name);
    /* JSON-GLib has signed integers only. */
    json_builder_add_int_value(builder, MIN(value, (uint64_t)INT64_MAX));
}

void bale_tool_json_bool(JsonBuilder *builder, const char *name, bool value)
{
    json_builder_set_member_name(builder, name);
    json_builder_add_boolean_value(builder, value);
}

void bale_tool_json_string(JsonBuilder *builder, const char *name,
                           const char *value)
{
    json_builder_set_member_name(builder, name);
    json_builder_add_string_value(builder, value);
}

char *bale_tool_size_string(uint64_t bytes)
{
    static const char units[] = "KMGTPE";
    double value = bytes;
    int unit = -1;

    if (bytes < 1024) {
        return g_strdup_printf("%" G_GUINT64_FORMAT " B", bytes);
    }
    /* 1023.96 would be printed as 1024.0. */
    while (value >= 1023.95) {
        value /= 1024;
        unit++;
    }
    return g_strdup_printf("%.3g %ciB", value, units[unit]);
}

/* --- memory --- */

void *bale_tool_buffer_new(size_t len)
{
    void *buf;

    return posix_memalign(&buf, BUFFER_ALIGN, len) ? NULL : buf;
}

bool bale_tool_is_zero(const void *buf, size_t len)
{
    const uint8_t *bytes = buf;

    /* Each byte equals the one before it; memcmp() is the fastest loop. */
    return len == 0 ||
           (bytes[0] == 0 && !memcmp(bytes, bytes + 1, len - 1));
}

/* --- passing things between threads --- */

void bale_tool_bag_init(BaleToolBag *bag)
{
    pthread_mutex_init(&bag->lock, NULL);
    pthread_cond_init(&bag->cond, NULL);
    bag->items = g_ptr_array_new();
}

void bale_tool_bag_clear(BaleToolBag *bag)
{
    g_ptr_array_unref(bag->items);
    pthread_cond_destroy(&bag->cond);
    pthread_mutex_destroy(&bag->lock);
}

void bale_tool_bag_put(BaleToolBag *bag, void *item)
{
    pthread_mutex_lock(&bag->lock);
    g_ptr_array_add(bag->items, item);
    /* Under the lock: the taker of the last item may clear the bag. */
    pthread_cond_signal(&bag->cond);
    pthread_mutex_unlock(&bag->lock);
}

void *bale_tool_bag_take(BaleToolBag *bag)
{
    void *item;

    pthread_mutex_lock(&bag->lock);
    while (bag->items->len == 0) {
        pthread_cond_wait(&bag->cond, &bag->lock);
    }
    item = g_ptr_array_steal_index_fast(bag->items, bag->items->len - 1);
    pthread_mutex_unlock(&bag->lock);
    return item;
}

/* --- creating --- */

/* True if a store lies on the device @path. */
static bool holds_store(const char *path)
{
    g_autofree char *buf = g_malloc(PROBE_LEN);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t len;

    if (fd < 0) {
        return false;
    }
    len = pread(fd, buf, PROBE_LEN, 0);
    close(fd);
    return len > 0 && bale_store_probe(buf, len);
}

bool bale_tool_create(const char *command, const BaleToolDevice *d,
                      const char *path, const BaleCreateOptions *o, bool force,
                      bool *made)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(BaleDevice) dev = NULL;
    unsigned flags = BALE_DEVICE_CREATE;
    struct stat st;
    bool exists;
    bool done;

    *made = false;
    if (!bale_create_options_check(o, &error)) {
        bale_tool_file_error(command, path, error->message);
        return false;
    }
    exists = !stat(path, &st);
    if (exists && S_ISBLK(st.st_mode)) {
        flags = 0;
        if (!force && holds_store(path)) {
            bale_tool_file_error(command, path,
                                 "holds a store already; use --force to "
                                 "lose it");
            return false;
        }
    } else if (exists && !force) {
        bale_tool_file_error(command, path, "exists already; use --force to "
                                            "lose what is in it");
        return false;
    } else if (exists) {
        flags |= BALE_DEVICE_TRUNCATE;
    }
    dev = bale_tool_device_open(command, d, path, flags);
    if (!dev) {
        return false;
    }
    *made = !exists;
    done = bale_store_create(dev, o, &error);
    bale_device_close(g_steal_pointer(&dev));
    if (!done) {
        bale_tool_file_error(command, path, error->message);
        if (*made && !d->plugin) {
            unlink(path);
        }
        return false;
    }
    return true;
}

BaleImage *bale_tool_image_open(const char *command, const char *path,
                                BaleStore *store, const char *name)
{
    g_autoptr(GArray) images = bale_image_list(store);
    g_autoptr(GError) error = NULL;
    BaleImage *image;

    if (!name && images->len == 1) {
        name = g_array_index(images, BaleImageListEntry, 0).name;
    }
    image = bale_image_open(store, name, &error);
    if (!image) {
        bale_tool_file_error(command, path, error->message);
    }
    return image;
}
