/*
 * `bale image`: images and snapshots of a store.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <stdio.h>
#include <string.h>

#include "store-internal.h"

typedef struct ImageCommand {
    BaleStore *store;
    char **args;        /* behind the name of the store */
    char *const *options;
    bool json;
    bool show;          /* progress */
} ImageCommand;

typedef struct ImageVerb {
    const char *name;
    int args;
    bool reads;
    bool (*run)(ImageCommand *c, GError **errp);
} ImageVerb;

/* "IMAGE@SNAPSHOT" taken apart; false if there is no snapshot in it. */
static bool split(const char *name, char **image, char **snapshot,
                  GError **errp)
{
    const char *at = strchr(name, '@');

    if (!at) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID,
                    "'%s' names no snapshot: IMAGE@SNAPSHOT is needed", name);
        return false;
    }
    *image = g_strndup(name, at - name);
    *snapshot = g_strdup(at + 1);
    return true;
}

/* --- list --- */

static char *date_string(uint64_t date_s)
{
    g_autoptr(GDateTime) date = g_date_time_new_from_unix_local(date_s);

    return date_s && date ? g_date_time_format(date, "%F %T")
                          : g_strdup("-");
}

static void list_row(const char *image, const char *snapshot, uint64_t size,
                     uint64_t own, uint64_t date_s, const char *flags)
{
    g_autofree char *name = g_strconcat(
        *image || snapshot ? image : "(unnamed)", snapshot ? "@" : "",
        snapshot, NULL);
    g_autofree char *size_text = bale_tool_size_string(size);
    g_autofree char *own_text = bale_tool_size_string(own);
    g_autofree char *date = date_string(date_s);

    printf("%-32s %12s %12s  %-19s %s\n", name, size_text, own_text, date,
           flags);
}

static void list_snapshots_json(JsonBuilder *builder, const GArray *snapshots)
{
    json_builder_set_member_name(builder, "snapshots");
    json_builder_begin_array(builder);
    for (guint i = 0; i < snapshots->len; i++) {
        BaleSnapshotListEntry *e =
            &g_array_index(snapshots, BaleSnapshotListEntry, i);

        json_builder_begin_object(builder);
        bale_tool_json_string(builder, "name", e->name);
        bale_tool_json_uint(builder, "id", e->id);
        bale_tool_json_uint(builder, "size", e->size);
        bale_tool_json_uint(builder, "own-bytes", e->own_bytes);
        bale_tool_json_uint(builder, "date-sec", e->date_s);
        json_builder_end_object(builder);
    }
    json_builder_end_array(builder);
}

static void list_image_json(JsonBuilder *builder, const BaleImageListEntry *e,
                            const GArray *snapshots)
{
    json_builder_begin_object(builder);
    bale_tool_json_string(builder, "name", e->name);
    bale_tool_json_uint(builder, "id", e->id);
    bale_tool_json_uint(builder, "size", e->size);
    bale_tool_json_uint(builder, "own-bytes", e->own_bytes);
    bale_tool_json_uint(builder, "layers", e->layers);
    bale_tool_json_bool(builder, "read-only", e->read_only);
    bale_tool_json_string(builder, "compression-type",
                          bale_codec_name(e->codec));
    bale_tool_json_uint(builder, "date-sec", e->date_s);
    list_snapshots_json(builder, snapshots);
    json_builder_end_object(builder);
}

static bool image_list(ImageCommand *c, GError **errp)
{
    g_autoptr(GArray) images = bale_image_list(c->store);
    g_autoptr(JsonBuilder) builder = json_builder_new();

    json_builder_begin_array(builder);
    if (!c->json) {
        printf("%-32s %12s %12s  %-19s %s\n", "NAME", "SIZE", "OWN", "DATE",
               "FLAGS");
    }
    for (guint i = 0; i < images->len; i++) {
        BaleImageListEntry *e = &g_array_index(images, BaleImageListEntry, i);
        g_autoptr(GArray) snapshots = bale_snapshot_list(c->store, e->name,
                                                         errp);

        if (!snapshots) {
            return false;
        }
        if (c->json) {
            list_image_json(builder, e, snapshots);
            continue;
        }
        list_row(e->name, NULL, e->size, e->own_bytes, e->date_s,
                 e->read_only ? "read-only" : "");
        for (guint n = 0; n < snapshots->len; n++) {
            BaleSnapshotListEntry *s =
                &g_array_index(snapshots, BaleSnapshotListEntry, n);

            list_row(e->name, s->name, s->size, s->own_bytes, s->date_s, "");
        }
    }
    json_builder_end_array(builder);
    if (c->json) {
        bale_tool_print_json(builder);
    }
    return true;
}

/* --- changes --- */

static bool image_create(ImageCommand *c, GError **errp)
{
    g_autoptr(GPtrArray) keep = g_ptr_array_new_with_free_func(g_free);
    BaleCreateOptions o = { .codec = BALE_TOOL_CODEC_DEFAULT };
    BaleImageOptions image = { .name = c->args[0] };

    if (!bale_tool_parse_size(c->args[1], &image.size, errp) ||
        !bale_tool_parse_options(c->options, true, &o, keep, errp)) {
        return false;
    }
    if (o.cluster_size || o.page_size || o.image) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID,
                    "cluster_size, page_size and image are options of the "
                    "store, not of one more image");
        return false;
    }
    image.codec = o.codec;
    image.level = o.level;
    image.backing_file = o.backing_file;
    image.backing_format = o.backing_format;
    return bale_image_create(c->store, &image, errp);
}

static bool image_delete(ImageCommand *c, GError **errp)
{
    g_autofree char *image = NULL, *snapshot = NULL;

    if (!strchr(c->args[0], '@')) {
        return bale_image_delete(c->store, c->args[0], errp);
    }
    return split(c->args[0], &image, &snapshot, errp) &&
           bale_snapshot_delete(c->store, image, snapshot, errp);
}

static bool image_rename(ImageCommand *c, GError **errp)
{
    return bale_image_rename(c->store, c->args[0], c->args[1], errp);
}

static bool image_read_only(ImageCommand *c, GError **errp)
{
    return bale_image_set_read_only(c->store, c->args[0], true, errp);
}

static bool image_read_write(ImageCommand *c, GError **errp)
{
    return bale_image_set_read_only(c->store, c->args[0], false, errp);
}

static bool image_snapshot(ImageCommand *c, GError **errp)
{
    g_autofree char *image = NULL, *snapshot = NULL;
    BaleSnapshotInfo info = { .date_s = 0 };

    if (!split(c->args[0], &image, &snapshot, errp)) {
        return false;
    }
    info.name = snapshot;
    return bale_snapshot_create(c->store, image, &info, errp);
}

static bool image_rollback(ImageCommand *c, GError **errp)
{
    g_autofree char *image = NULL, *snapshot = NULL;

    return split(c->args[0], &image, &snapshot, errp) &&
           bale_snapshot_rollback(c->store, image, snapshot, errp);
}

static bool image_clone(ImageCommand *c, GError **errp)
{
    g_autofree char *image = NULL, *snapshot = NULL;

    if (!strchr(c->args[0], '@')) {
        return bale_image_clone(c->store, c->args[0], NULL, c->args[1],
                                errp);
    }
    return split(c->args[0], &image, &snapshot, errp) &&
           bale_image_clone(c->store, image, snapshot, c->args[1], errp);
}

static bool flatten_progress(void *opaque, uint64_t done, uint64_t total)
{
    bale_tool_progress(opaque, done, total);
    return true;
}

static bool image_flatten(ImageCommand *c, GError **errp)
{
    BaleToolProgress progress = { .on = c->show, .permille = -1 };
    BaleFlattenOptions o = { flatten_progress, &progress };
    bool ok = bale_image_flatten(c->store, c->args[0], &o, errp);

    bale_tool_progress_end(&progress);
    return ok;
}

static const ImageVerb verbs[] = {
    { "list", 0, true, image_list },
    { "create", 2, false, image_create },
    { "delete", 1, false, image_delete },
    { "rename", 2, false, image_rename },
    { "snapshot", 1, false, image_snapshot },
    { "rollback", 1, false, image_rollback },
    { "clone", 2, false, image_clone },
    { "flatten", 1, false, image_flatten },
    { "read-only", 1, false, image_read_only },
    { "read-write", 1, false, image_read_write },
};

static const ImageVerb *find_verb(const char *name)
{
    for (size_t i = 0; i < G_N_ELEMENTS(verbs); i++) {
        if (!strcmp(verbs[i].name, name)) {
            return &verbs[i];
        }
    }
    return NULL;
}

static int image(const BaleCommand *command, int argc, char **argv)
{
    g_autoptr(GError) error = NULL;
    g_auto(GStrv) options = NULL;
    g_auto(BaleToolDevice) device = { 0 };
    gboolean json = FALSE, show = FALSE;
    ImageCommand c = { .store = NULL };
    const ImageVerb *verb;
    int status = BALE_EXIT_OK;
    const GOptionEntry entries[] = {
        { "json", 0, 0, G_OPTION_ARG_NONE, &json, "list: print JSON", NULL },
        { "options", 'o', 0, G_OPTION_ARG_STRING_ARRAY, &options,
          "create: options of the image, as for bale create",
          "NAME=VALUE[,...]" },
        { "progress", 'p', 0, G_OPTION_ARG_NONE, &show,
          "flatten: show progress", NULL },
        BALE_TOOL_SHARE_ENTRY(device),
        BALE_TOOL_DEVICE_ENTRIES(device),
        { NULL },
    };

    if (!bale_tool_parse(command, entries, false, &argc, &argv)) {
        return BALE_EXIT_ERROR;
    }
    verb = argc > 1 ? find_verb(argv[1]) : NULL;
    if (!verb) {
        return bale_tool_error("image: what is to be done is one of list, "
                               "create, delete, rename, snapshot, rollback, "
                               "clone, flatten, read-only, read-write");
    }
    if (argc != 3 + verb->args) {
        return bale_tool_error("image %s: %d argument%s needed behind the "
                               "store; see bale help image", verb->name,
                               verb->args, verb->args == 1 ? " is" : "s are");
    }
    if (device.force_share && !verb->reads) {
        return bale_tool_error("image %s: --force-share is for list only",
                               verb->name);
    }
    c.args = argv + 3;
    c.options = options;
    c.json = json;
    c.show = show;
    c.store = bale_tool_store_open("image", &device, argv[2],
                                   verb->reads ? BALE_TOOL_READ
                                               : BALE_TOOL_WRITE, 0);
    if (!c.store) {
        return BALE_EXIT_ERROR;
    }
    if (!verb->run(&c, &error)) {
        status = bale_tool_file_error("image", argv[2], error->message);
    }
    return bale_tool_store_close("image", argv[2], c.store, status);
}

const BaleCommand bale_command_image = {
    .name = "image",
    .arguments = "VERB STORE [IMAGE[@SNAPSHOT]] [NAME|SIZE]",
    .summary = "List and change the images and snapshots of a store",
    .help = "  list STORE                       all images and snapshots\n"
            "  create STORE IMAGE SIZE          one more, empty\n"
            "  delete STORE IMAGE[@SNAPSHOT]    an image with its snapshots, "
            "or one of them\n"
            "  rename STORE IMAGE NAME\n"
            "  snapshot STORE IMAGE@SNAPSHOT    keep what the image shows\n"
            "  rollback STORE IMAGE@SNAPSHOT    show that again\n"
            "  clone STORE IMAGE[@SNAPSHOT] NAME\n"
            "                                   a new image that shows the "
            "same\n"
            "  flatten STORE IMAGE              copy what it shares, so that "
            "it shares nothing\n"
            "  read-only, read-write STORE IMAGE\n"
            "The unnamed image is \"\"; its snapshots are @SNAPSHOT.",
    .run = image,
};
