/*
 * `bale compact`: move what is live together and give the rest back.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <stdio.h>

#include "store-internal.h"

static bool compact_progress(void *opaque, uint64_t done, uint64_t total)
{
    bale_tool_progress(opaque, done, total);
    return true;
}

/* Print what was won; the exit status. */
static int compact_store(const char *name, BaleStore *store, uint64_t rate,
                         BaleToolProgress *progress)
{
    g_autoptr(GError) error = NULL;
    g_autofree BaleStoreStats *before = g_new0(BaleStoreStats, 1);
    g_autofree BaleStoreStats *after = g_new0(BaleStoreStats, 1);
    g_autofree char *used = NULL, *now = NULL, *moved = NULL;
    BaleCompactOptions options = {
        .rate = rate,
        .progress = compact_progress,
        .opaque = progress,
    };

    bale_store_get_stats(store, before);
    if (!bale_store_compact(store, &options, &error)) {
        bale_tool_progress_end(progress);
        return bale_tool_file_error("compact", name, error->message);
    }
    bale_tool_progress_end(progress);
    bale_store_get_stats(store, after);
    used = bale_tool_size_string(before->used_bytes);
    now = bale_tool_size_string(after->used_bytes);
    moved = bale_tool_size_string(after->compacted_bytes);
    printf("%s in use before, %s now; %s were moved.\n", used, now, moved);
    return BALE_EXIT_OK;
}

static int compact(const BaleCommand *command, int argc, char **argv)
{
    g_autoptr(GError) error = NULL;
    g_autofree char *rate_limit = NULL;
    g_auto(BaleToolDevice) device = { 0 };
    BaleToolProgress progress = { .permille = -1 };
    gboolean show = FALSE;
    uint64_t rate = 0;
    BaleStore *store;
    const GOptionEntry entries[] = {
        { "progress", 'p', 0, G_OPTION_ARG_NONE, &show, "Show progress",
          NULL },
        { "rate-limit", 'r', 0, G_OPTION_ARG_STRING, &rate_limit,
          "Examine at most so many bytes a second", "SIZE" },
        BALE_TOOL_DEVICE_ENTRIES(device),
        { NULL },
    };

    if (!bale_tool_parse(command, entries, false, &argc, &argv) ||
        !bale_tool_arguments(command, argc, 1)) {
        return BALE_EXIT_ERROR;
    }
    if (rate_limit && !bale_tool_parse_size(rate_limit, &rate, &error)) {
        return bale_tool_error("compact: --rate-limit: %s", error->message);
    }
    progress.on = show;
    store = bale_tool_store_open("compact", &device, argv[1],
                                 BALE_TOOL_WRITE, 0);
    if (!store) {
        return BALE_EXIT_ERROR;
    }
    return bale_tool_store_close("compact", argv[1], store,
                                 compact_store(argv[1], store, rate,
                                               &progress));
}

const BaleCommand bale_command_compact = {
    .name = "compact",
    .arguments = "STORE",
    .summary = "Give space that is not needed any more back to the host",
    .run = compact,
};
