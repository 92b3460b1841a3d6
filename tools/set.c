/*
 * `bale set`: change what a store is told to keep to.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <string.h>

#include "store-internal.h"

static int set(const BaleCommand *command, int argc, char **argv)
{
    g_autoptr(GError) error = NULL;
    g_autofree char *max_size = NULL;
    g_auto(BaleToolDevice) device = { 0 };
    int status = BALE_EXIT_OK;
    uint64_t bytes = 0;
    BaleStore *store;
    const GOptionEntry entries[] = {
        { "max-size", 0, 0, G_OPTION_ARG_STRING, &max_size,
          "What the store may take", "SIZE|none" },
        BALE_TOOL_DEVICE_ENTRIES(device),
        { NULL },
    };

    if (!bale_tool_parse(command, entries, false, &argc, &argv) ||
        !bale_tool_arguments(command, argc, 1)) {
        return BALE_EXIT_ERROR;
    }
    if (!max_size) {
        return bale_tool_error("set: nothing to set");
    }
    if (strcmp(max_size, "none") &&
        !bale_tool_parse_size(max_size, &bytes, &error)) {
        return bale_tool_error("set: --max-size: %s", error->message);
    }
    store = bale_tool_store_open("set", &device, argv[1], BALE_TOOL_WRITE, 1);
    if (!store) {
        return BALE_EXIT_ERROR;
    }
    if (!bale_store_set_max_size(store, bytes, &error)) {
        status = bale_tool_file_error("set", argv[1], error->message);
    }
    return bale_tool_store_close("set", argv[1], store, status);
}

const BaleCommand bale_command_set = {
    .name = "set",
    .arguments = "STORE",
    .summary = "Change the maximum size of a store",
    .help = "A maximum size below what is in use loses nothing: nothing more "
            "is written\n"
            "until enough was freed.",
    .run = set,
};
