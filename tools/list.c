/*
 * `bale list`: the images of a store.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <stdio.h>

#include "store-internal.h"

static void list_json(BaleStore *store, GArray *images)
{
    g_autoptr(JsonBuilder) builder = json_builder_new();

    json_builder_begin_array(builder);
    for (guint i = 0; i < images->len; i++) {
        BaleImageListEntry *e = &g_array_index(images, BaleImageListEntry, i);
        g_autofree BaleImageInfo *info = g_new0(BaleImageInfo, 1);
        BaleImage *image = bale_image_open(store, e->name, NULL);

        if (!image) {
            continue;
        }
        bale_image_get_info(image, info);
        bale_image_close(image);
        json_builder_begin_object(builder);
        bale_tool_json_string(builder, "name", info->name);
        bale_tool_json_uint(builder, "size", info->size);
        bale_tool_json_uint(builder, "allocated-clusters",
                            info->allocated_clusters);
        bale_tool_json_string(builder, "compression-type",
                              bale_codec_name(info->codec));
        json_builder_end_object(builder);
    }
    json_builder_end_array(builder);
    bale_tool_print_json(builder);
}

static void list_text(BaleStore *store, GArray *images)
{
    printf("%-24s %12s %12s  %s\n", "NAME", "SIZE", "ALLOCATED",
           "COMPRESSION");
    for (guint i = 0; i < images->len; i++) {
        BaleImageListEntry *e = &g_array_index(images, BaleImageListEntry, i);
        g_autofree BaleImageInfo *info = g_new0(BaleImageInfo, 1);
        BaleImage *image = bale_image_open(store, e->name, NULL);
        g_autofree char *size = NULL, *allocated = NULL;

        if (!image) {
            continue;
        }
        bale_image_get_info(image, info);
        bale_image_close(image);
        size = bale_tool_size_string(info->size);
        allocated = bale_tool_size_string(info->allocated_clusters *
                                          info->cluster_size);
        printf("%-24s %12s %12s  %s\n",
               info->name[0] ? info->name : "(unnamed)", size, allocated,
               bale_codec_name(info->codec));
    }
}

static int list(const BaleCommand *command, int argc, char **argv)
{
    g_autoptr(GArray) images = NULL;
    g_auto(BaleToolDevice) device = { 0 };
    gboolean json = FALSE;
    BaleStore *store;
    const GOptionEntry entries[] = {
        { "json", 0, 0, G_OPTION_ARG_NONE, &json, "Print JSON", NULL },
        BALE_TOOL_SHARE_ENTRY(device),
        BALE_TOOL_DEVICE_ENTRIES(device),
        { NULL },
    };

    if (!bale_tool_parse(command, entries, false, &argc, &argv) ||
        !bale_tool_arguments(command, argc, 1)) {
        return BALE_EXIT_ERROR;
    }
    store = bale_tool_store_open("list", &device, argv[1], BALE_TOOL_READ, 1);
    if (!store) {
        return BALE_EXIT_ERROR;
    }
    images = bale_image_list(store);
    (json ? list_json : list_text)(store, images);
    return bale_tool_store_close("list", argv[1], store, BALE_EXIT_OK);
}

const BaleCommand bale_command_list = {
    .name = "list",
    .arguments = "STORE",
    .summary = "List the images of a store",
    .run = list,
};
