/*
 * What the subcommands that work on a store share: opening it with one-line
 * errors that name the file, sizes, -o options, progress, JSON.
 *
 * Single thread, but for BaleToolBag.  Functions that fail have printed the
 * error already, through bale_tool_error(), unless they take a GError.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_TOOLS_STORE_INTERNAL_H
#define BALE_TOOLS_STORE_INTERNAL_H

#include <json-glib/json-glib.h>
#include <pthread.h>

#include "extstore/store.h"
#include "tool-internal.h"

/* Exit statuses, as qemu-img check has them */
enum {
    BALE_EXIT_OK = 0,
    BALE_EXIT_ERROR = 1,  /* it could not be done */
    BALE_EXIT_DAMAGE = 2, /* it was done, and damage was found */
    BALE_EXIT_LEAKS = 3,  /* it was done; space is lost, but no data */
};

#define BALE_TOOL_CODEC_DEFAULT BALE_CODEC_ZSTD

/* --- opening --- */

/* Where the options of a command put what they say about the device. */
typedef struct BaleToolDevice {
    char *plugin;          /* --device; NULL: the built-in aio */
    gboolean force_share;  /* -U: take no lock */
    gboolean buffered;     /* --buffered: page cache, not O_DIRECT */
} BaleToolDevice;

static inline void bale_tool_device_clear(BaleToolDevice *d)
{
    g_free(d->plugin);
}

G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(BaleToolDevice, bale_tool_device_clear)

/* For a GOptionEntry table; @d is a BaleToolDevice variable. */
#define BALE_TOOL_DEVICE_ENTRIES(d)                                           \
    { "device", 0, 0, G_OPTION_ARG_FILENAME, &(d).plugin,                     \
      "Use the device plug-in PLUGIN.so for the store", "PLUGIN.so" },        \
    { "buffered", 0, 0, G_OPTION_ARG_NONE, &(d).buffered,                     \
      "Use the page cache, not O_DIRECT", NULL }

#define BALE_TOOL_SHARE_ENTRY(d)                                              \
    { "force-share", 'U', 0, G_OPTION_ARG_NONE, &(d).force_share,             \
      "Take no lock: also read a store that is in use", NULL }

/* Open the device of @store with BaleDeviceFlags @flags; NULL: said. */
BaleDevice *bale_tool_device_open(const char *command, const BaleToolDevice *d,
                                  const char *store, unsigned flags);

typedef enum BaleToolOpen {
    BALE_TOOL_READ,
    BALE_TOOL_WRITE,
    BALE_TOOL_REPAIR, /* for writing, also if the store is marked corrupt */
} BaleToolOpen;

/*
 * Open @store.  Damage that is found while it is open is printed as a warning.
 * @workers: 0: one for each core.  NULL: the error has been printed.
 */
BaleStore *bale_tool_store_open(const char *command, const BaleToolDevice *d,
                                const char *store, BaleToolOpen mode,
                                unsigned workers);

/*
 * Open image @name, IMAGE[@SNAPSHOT]; NULL: the only one there is, or the
 * unnamed one.  NULL: the error has been printed.
 */
BaleImage *bale_tool_image_open(const char *command, const char *path,
                                BaleStore *store, const char *name);

/*
 * Close @store.  Returns @status, or 1 when closing fails, which is said.
 */
int bale_tool_store_close(const char *command, const char *name,
                          BaleStore *store, int status);

/* Print that @command failed for file @name.  Returns 1. */
int bale_tool_file_error(const char *command, const char *name,
                         const char *message);

#define BALE_TOOL_IMAGE_ENTRY(name)                                          \
    { "image", 'i', 0, G_OPTION_ARG_STRING, &(name),                         \
      "The image or snapshot; not needed if there is only one",              \
      "IMAGE[@SNAPSHOT]" }

/* --- arguments --- */

/* Check that exactly @count arguments are left; prints and returns false. */
bool bale_tool_arguments(const BaleCommand *command, int argc, int count);

/* True if both names are of one file that exists. */
bool bale_tool_same_file(const char *a, const char *b);

/* "64K", "10G": bytes, or with a suffix of B, K, M, G, T, P or E. */
bool bale_tool_parse_size(const char *text, uint64_t *bytes, GError **errp);

/*
 * Parse the -o options of create and import into @o: compression_type,
 * compression_level, cluster_size, page_size, image and, if @backing,
 * backing_file, backing_fmt.  A comma inside a value is doubled.  Strings are
 * kept in @keep, which owns them.  Fields that are not named are left alone.
 */
bool bale_tool_parse_options(char *const *options, bool backing,
                             BaleCreateOptions *o, GPtrArray *keep,
                             GError **errp);

/* --- output --- */

/* One line on standard error that is written over, if @done changed enough. */
typedef struct BaleToolProgress {
    bool on;
    bool shown;
    int permille;
} BaleToolProgress;

void bale_tool_progress(BaleToolProgress *p, uint64_t done, uint64_t total);
/* End the line, if there is one. */
void bale_tool_progress_end(BaleToolProgress *p);

/* Print what @builder holds, and a newline, on standard output. */
void bale_tool_print_json(JsonBuilder *builder);

/* Add a member to the object that @builder is in. */
void bale_tool_json_uint(JsonBuilder *builder, const char *name,
                         uint64_t value);
void bale_tool_json_bool(JsonBuilder *builder, const char *name, bool value);
void bale_tool_json_string(JsonBuilder *builder, const char *name,
                           const char *value);

/* "1.5 GiB"; owned by the caller. */
char *bale_tool_size_string(uint64_t bytes);

/* --- memory --- */

/* Fit for every device, or NULL; free(). */
void *bale_tool_buffer_new(size_t len);

/* True when all @len bytes at @buf are zero; true for no bytes. */
bool bale_tool_is_zero(const void *buf, size_t len);

/* --- passing things between threads --- */

/*
 * A bag of pointers: any thread puts in, any thread takes out, in no order.
 * With POSIX locks, because ThreadSanitizer knows nothing of GLib's.
 */
typedef struct BaleToolBag {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    GPtrArray *items;
} BaleToolBag;

void bale_tool_bag_init(BaleToolBag *bag);
/* The bag may hold items; it does not own them. */
void bale_tool_bag_clear(BaleToolBag *bag);
/* Does not block but for the lock. */
void bale_tool_bag_put(BaleToolBag *bag, void *item);
/* Wait for an item. */
void *bale_tool_bag_take(BaleToolBag *bag);

/* --- creating --- */

/*
 * Create a store at @path, which may only exist if it is a block device or
 * @force.  Nothing on disk has changed when the options are wrong; a file that
 * was made is removed again when making the store fails.  False: said.
 * *@made is set to whether the file is new.
 */
bool bale_tool_create(const char *command, const BaleToolDevice *d,
                      const char *path, const BaleCreateOptions *o, bool force,
                      bool *made);

#endif
