/*
 * `bale create`: an empty store with one unnamed image.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

static int create(const BaleCommand *command, int argc, char **argv)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(GPtrArray) keep = g_ptr_array_new_with_free_func(g_free);
    g_auto(GStrv) options = NULL;
    g_auto(BaleToolDevice) device = { 0 };
    g_autofree char *max_size = NULL;
    gboolean force = FALSE;
    BaleCreateOptions o = { .codec = BALE_TOOL_CODEC_DEFAULT };
    bool made;
    const GOptionEntry entries[] = {
        { "options", 'o', 0, G_OPTION_ARG_STRING_ARRAY, &options,
          "Options of the store; see below", "NAME=VALUE[,...]" },
        { "force", 'f', 0, G_OPTION_ARG_NONE, &force,
          "Replace what is at STORE", NULL },
        { "max-size", 0, 0, G_OPTION_ARG_STRING, &max_size,
          "What the store may take (default: no limit)", "SIZE" },
        BALE_TOOL_DEVICE_ENTRIES(device),
        { NULL },
    };

    if (!bale_tool_parse(command, entries, false, &argc, &argv) ||
        !bale_tool_arguments(command, argc, 2)) {
        return BALE_EXIT_ERROR;
    }
    if (!bale_tool_parse_size(argv[2], &o.size, &error) ||
        !bale_tool_parse_options(options, true, &o, keep, &error) ||
        (max_size &&
         !bale_tool_parse_size(max_size, &o.max_size, &error))) {
        return bale_tool_file_error("create", argv[1], error->message);
    }
    if (!bale_tool_create("create", &device, argv[1], &o, force, &made)) {
        return BALE_EXIT_ERROR;
    }
    return BALE_EXIT_OK;
}

const BaleCommand bale_command_create = {
    .name = "create",
    .arguments = "STORE SIZE",
    .summary = "Make an empty store with one image",
    .help = "SIZE is the size of the image, such as 20G. Options:\n"
            "  compression_type=zstd|deflate|none   default zstd\n"
            "  compression_level=N                  default: the codec's\n"
            "  cluster_size=SIZE                    4K to 2M, default 64K\n"
            "  page_size=SIZE                       multiple of 2M, default "
            "64M\n"
            "  max_size=SIZE                        as --max-size\n"
            "  backing_file=NAME, backing_fmt=FORMAT\n"
            "  image=NAME                           default: the unnamed "
            "image",
    .run = create,
};
