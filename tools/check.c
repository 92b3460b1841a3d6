/*
 * `bale check` and `bale verify`: is the store what it should be?
 *
 * check looks at the structure and can repair it; verify reads every record
 * as well.  The exit statuses are those of qemu-img check.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <stdio.h>
#include <string.h>

#include "store-internal.h"

/* A longer sleep would make the progress line jump, in microseconds */
#define SLEEP_MAX_US 500000

typedef struct Check {
    const char *name;        /* of the command */
    const char *path;
    BaleToolDevice *device;
    BaleToolProgress progress;
    gboolean json;
    GPtrArray *findings;     /* for JSON; strings, owned */
    uint64_t rate;           /* bytes in a second; 0: no limit */
    gint64 start_us;         /* when the check began, monotonic */
} Check;

static bool check_report(void *opaque, const char *what, uint64_t done,
                         uint64_t total)
{
    Check *c = opaque;
    gint64 due_us;
    gint64 now_us;

    if (what) {
        bale_tool_progress_end(&c->progress);
        if (c->json) {
            g_ptr_array_add(c->findings, g_strdup(what));
        } else {
            printf("%s\n", what);
        }
        return true;
    }
    bale_tool_progress(&c->progress, done, total);
    if (c->rate) {
        due_us = c->start_us + (gint64)(done * 1e6 / c->rate);
        /* Bounded by the device's size divided by the rate. */
        while ((now_us = g_get_monotonic_time()) < due_us) {
            g_usleep(MIN(due_us - now_us, SLEEP_MAX_US));
        }
    }
    return true;
}

static void print_result_json(const Check *c, const BaleCheckResult *r)
{
    g_autoptr(JsonBuilder) b = json_builder_new();

    json_builder_begin_object(b);
    bale_tool_json_string(b, "filename", c->path);
    bale_tool_json_bool(b, "corrupt", r->corrupt);
    bale_tool_json_uint(b, "damaged", r->damaged);
    bale_tool_json_uint(b, "leaked-pages", r->leaked_pages);
    bale_tool_json_uint(b, "wrong-counters", r->wrong_counters);
    bale_tool_json_uint(b, "bad-superblocks", r->bad_superblocks);
    bale_tool_json_uint(b, "fixed", r->fixed);
    bale_tool_json_uint(b, "total-clusters", r->clusters_total);
    bale_tool_json_uint(b, "allocated-clusters", r->clusters_allocated);
    bale_tool_json_uint(b, "compressed-clusters", r->clusters_compressed);
    bale_tool_json_uint(b, "checked-records", r->checked_records);
    bale_tool_json_uint(b, "checked-bytes", r->checked_bytes);
    bale_tool_json_uint(b, "end-offset", r->end_offset);
    json_builder_set_member_name(b, "findings");
    json_builder_begin_array(b);
    for (guint i = 0; i < c->findings->len; i++) {
        json_builder_add_string_value(b, g_ptr_array_index(c->findings, i));
    }
    json_builder_end_array(b);
    json_builder_end_object(b);
    bale_tool_print_json(b);
}

static void print_count(uint64_t count, const char *what)
{
    if (count) {
        printf("%" G_GUINT64_FORMAT " %s\n", count, what);
    }
}

static void print_result_text(const BaleCheckResult *r, bool data)
{
    g_autofree char *bytes = bale_tool_size_string(r->checked_bytes);

    if (r->corrupt) {
        printf("The store is marked corrupt: reads are refused.\n");
    }
    print_count(r->damaged, "records are damaged: what they held reads as "
                            "an error");
    print_count(r->bad_superblocks, "superblock copies are damaged");
    print_count(r->leaked_pages, "pages are in use for nothing");
    print_count(r->wrong_counters, "counters are wrong");
    print_count(r->fixed, "problems were repaired");
    if (!r->damaged && !r->bad_superblocks && !r->leaked_pages &&
        !r->wrong_counters && !r->corrupt) {
        printf("No errors were found.\n");
    }
    printf("%" G_GUINT64_FORMAT " of %" G_GUINT64_FORMAT
           " clusters are allocated, %" G_GUINT64_FORMAT " compressed.\n",
           r->clusters_allocated, r->clusters_total, r->clusters_compressed);
    if (data) {
        printf("%" G_GUINT64_FORMAT " records (%s) were read.\n",
               r->checked_records, bytes);
    }
}

static int result_status(const BaleCheckResult *r)
{
    if (r->damaged || r->bad_superblocks || r->corrupt) {
        return BALE_EXIT_DAMAGE;
    }
    if (r->leaked_pages || r->wrong_counters) {
        return BALE_EXIT_LEAKS;
    }
    return BALE_EXIT_OK;
}

/* Run the check on an open store; the exit status. */
static int check_store(Check *c, BaleStore *store, unsigned flags)
{
    g_autoptr(GError) error = NULL;
    BaleCheckResult result = { 0 };
    uint64_t fixed = 0;
    bool ok;

    c->findings = g_ptr_array_new_with_free_func(g_free);
    c->start_us = g_get_monotonic_time();
    ok = bale_store_check(store, flags, check_report, c, &result, &error);
    if (ok && result.fixed) {
        /* What is left after the repair decides. */
        fixed = result.fixed;
        memset(&result, 0, sizeof(result));
        g_ptr_array_set_size(c->findings, 0);
        flags &= ~(BALE_CHECK_FIX_LEAKS | BALE_CHECK_FIX_ALL);
        ok = bale_store_check(store, flags, check_report, c, &result, &error);
        result.fixed = fixed;
    }
    bale_tool_progress_end(&c->progress);
    if (!ok) {
        g_ptr_array_unref(c->findings);
        return bale_tool_file_error(c->name, c->path, error->message);
    }
    if (c->json) {
        print_result_json(c, &result);
    } else {
        print_result_text(&result, flags & BALE_CHECK_DATA);
    }
    g_ptr_array_unref(c->findings);
    return result_status(&result);
}

static int check_open(Check *c, unsigned flags)
{
    bool fix = flags & (BALE_CHECK_FIX_LEAKS | BALE_CHECK_FIX_ALL);
    BaleStore *store =
        bale_tool_store_open(c->name, c->device, c->path,
                             fix ? BALE_TOOL_REPAIR : BALE_TOOL_READ, 0);

    if (!store) {
        return BALE_EXIT_ERROR;
    }
    return bale_tool_store_close(c->name, c->path, store,
                                 check_store(c, store, flags));
}

static int check(const BaleCommand *command, int argc, char **argv)
{
    g_auto(BaleToolDevice) device = { 0 };
    Check c = { .name = "check", .device = &device };
    g_autofree char *repair = NULL;
    gboolean progress = FALSE;
    unsigned flags = 0;
    const GOptionEntry entries[] = {
        { "repair", 'r', 0, G_OPTION_ARG_STRING, &repair,
          "Repair what can be repaired", "leaks|all" },
        { "progress", 'p', 0, G_OPTION_ARG_NONE, &progress, "Show progress",
          NULL },
        { "json", 0, 0, G_OPTION_ARG_NONE, &c.json, "Print JSON", NULL },
        BALE_TOOL_SHARE_ENTRY(device),
        BALE_TOOL_DEVICE_ENTRIES(device),
        { NULL },
    };

    if (!bale_tool_parse(command, entries, false, &argc, &argv) ||
        !bale_tool_arguments(command, argc, 1)) {
        return BALE_EXIT_ERROR;
    }
    c.path = argv[1];
    c.progress.on = progress;
    if (repair) {
        if (!strcmp(repair, "leaks")) {
            flags = BALE_CHECK_FIX_LEAKS;
        } else if (!strcmp(repair, "all")) {
            flags = BALE_CHECK_FIX_LEAKS | BALE_CHECK_FIX_ALL;
        } else {
            return bale_tool_error("check: -r takes 'leaks' or 'all', not "
                                   "'%s'", repair);
        }
        if (device.force_share) {
            return bale_tool_error("check: -U does not go with -r");
        }
    }
    return check_open(&c, flags);
}

static int verify(const BaleCommand *command, int argc, char **argv)
{
    g_auto(BaleToolDevice) device = { 0 };
    Check c = { .name = "verify", .device = &device };
    g_autoptr(GError) error = NULL;
    g_autofree char *rate = NULL;
    gboolean progress = FALSE;
    const GOptionEntry entries[] = {
        { "rate-limit", 0, 0, G_OPTION_ARG_STRING, &rate,
          "Read at most SIZE bytes in a second", "SIZE" },
        { "progress", 'p', 0, G_OPTION_ARG_NONE, &progress, "Show progress",
          NULL },
        { "json", 0, 0, G_OPTION_ARG_NONE, &c.json, "Print JSON", NULL },
        BALE_TOOL_SHARE_ENTRY(device),
        BALE_TOOL_DEVICE_ENTRIES(device),
        { NULL },
    };

    if (!bale_tool_parse(command, entries, false, &argc, &argv) ||
        !bale_tool_arguments(command, argc, 1)) {
        return BALE_EXIT_ERROR;
    }
    if (rate && !bale_tool_parse_size(rate, &c.rate, &error)) {
        return bale_tool_error("verify: --rate-limit: %s", error->message);
    }
    c.path = argv[1];
    c.progress.on = progress;
    return check_open(&c, BALE_CHECK_DATA);
}

#define STATUS_HELP                                                           \
    "Exit status: 0 no errors; 1 it could not be done; 2 damage was found;\n" \
    "3 only space is lost, or counters are wrong."

const BaleCommand bale_command_check = {
    .name = "check",
    .arguments = "STORE",
    .summary = "Check the structure of a store, and repair it",
    .help = STATUS_HELP "\n\n"
            "-r leaks gives lost space back. -r all also rebuilds the index "
            "from all\n"
            "records, restores superblock copies, and sets damaged clusters "
            "apart: they\n"
            "go on reading as errors until they are written anew. The status "
            "tells what\n"
            "is left after the repair.",
    .run = check,
};

const BaleCommand bale_command_verify = {
    .name = "verify",
    .arguments = "STORE",
    .summary = "Read and verify every record of a store",
    .help = STATUS_HELP,
    .run = verify,
};
