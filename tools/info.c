/*
 * `bale info`: what a store is, and with --stats how it does.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "extstore/bitmap.h"
#include "store-internal.h"

typedef struct Info {
    const char *path;
    BaleStoreInfo store;
    BaleImageInfo image;
    GArray *bitmaps; /* BaleBitmapInfo */
    BaleStoreStats stats;
    BaleDeviceInfo device;
    BaleDeviceStats device_stats;
    bool with_stats;
} Info;

/* A counter in a struct of statistics, by its place */
typedef struct Counter {
    const char *name;
    size_t offset;
} Counter;

#define STORE_COUNTER(name, field) { name, offsetof(BaleStoreStats, field) }

static const Counter store_counters[] = {
    STORE_COUNTER("mutable-clusters", mutable_clusters),
    STORE_COUNTER("mutable-bytes", mutable_bytes),
    STORE_COUNTER("tail-bytes", tail_bytes),
    STORE_COUNTER("sealed-bytes", sealed_bytes),
    STORE_COUNTER("stable-bytes", stable_bytes),
    STORE_COUNTER("durable-bytes", durable_bytes),
    STORE_COUNTER("pages-free", pages_free),
    STORE_COUNTER("pages-active", pages_active),
    STORE_COUNTER("pages-sealed", pages_sealed),
    STORE_COUNTER("pages-freeing", pages_freeing),
    STORE_COUNTER("live-bytes", live_bytes),
    STORE_COUNTER("used-bytes", used_bytes),
    STORE_COUNTER("dead-bytes", dead_bytes),
    STORE_COUNTER("overhead-bytes", overhead_bytes),
    STORE_COUNTER("records-appended", records_appended),
    STORE_COUNTER("zero-records", zero_records),
    STORE_COUNTER("patches", patches),
    STORE_COUNTER("patch-bytes", patch_bytes),
    STORE_COUNTER("patches-live", patches_live),
    STORE_COUNTER("patches-live-bytes", patches_live_bytes),
    STORE_COUNTER("logical-bytes", logical_bytes),
    STORE_COUNTER("stored-bytes", stored_bytes),
    STORE_COUNTER("segments", segments),
    STORE_COUNTER("segment-bytes", segment_bytes),
    STORE_COUNTER("padding-bytes", padding_bytes),
    STORE_COUNTER("ahead-bytes", ahead_bytes),
    STORE_COUNTER("write-amplification-permille", write_amplification_permille),
    STORE_COUNTER("flushes", flushes),
    STORE_COUNTER("device-flushes", device_flushes),
    STORE_COUNTER("revivals", revivals),
    STORE_COUNTER("reads", reads),
    STORE_COUNTER("read-bytes", read_bytes),
    STORE_COUNTER("writes", writes),
    STORE_COUNTER("write-bytes", write_bytes),
    STORE_COUNTER("zeroes", zeroes),
    STORE_COUNTER("zero-bytes", zero_bytes),
    STORE_COUNTER("reads-held", reads_held),
    STORE_COUNTER("reads-at-once", reads_at_once),
    STORE_COUNTER("read-modify-writes", read_modify_writes),
    STORE_COUNTER("memory-hits", memory_hits),
    STORE_COUNTER("incompressible", incompressible),
    STORE_COUNTER("unchanged-clusters", unchanged_clusters),
    STORE_COUNTER("checksum-errors", checksum_errors),
    STORE_COUNTER("cache-hits", cache_hits),
    STORE_COUNTER("cache-misses", cache_misses),
    STORE_COUNTER("cache-admissions", cache_admissions),
    STORE_COUNTER("cache-rejections", cache_rejections),
    STORE_COUNTER("cache-entries", cache_entries),
    STORE_COUNTER("cache-bytes", cache_bytes),
    STORE_COUNTER("cache-max-bytes", cache_max_bytes),
    STORE_COUNTER("readahead", readahead),
    STORE_COUNTER("readahead-bytes", readahead_bytes),
    STORE_COUNTER("readahead-hits", readahead_hits),
    STORE_COUNTER("checkpoints", checkpoints),
    STORE_COUNTER("checkpoint-bytes", checkpoint_bytes),
    STORE_COUNTER("checkpoint-kept-bytes", checkpoint_kept_bytes),
    STORE_COUNTER("checkpoint-ns", checkpoint_ns),
    STORE_COUNTER("checkpoints-failed", checkpoints_failed),
    STORE_COUNTER("compacted-pages", compacted_pages),
    STORE_COUNTER("compacted-records", compacted_records),
    STORE_COUNTER("compacted-bytes", compacted_bytes),
    STORE_COUNTER("compact-examined-bytes", compact_examined_bytes),
    STORE_COUNTER("compact-running", compact_running),
    STORE_COUNTER("compact-pending-bytes", compact_pending_bytes),
    STORE_COUNTER("compact-paced-ns", compact_paced_ns),
    STORE_COUNTER("writes-held-ns", writes_held_ns),
    STORE_COUNTER("space-waits", space_waits),
    STORE_COUNTER("index-entries", index_entries),
    STORE_COUNTER("index-bytes", index_bytes),
    STORE_COUNTER("index-peak-bytes", index_peak_bytes),
    STORE_COUNTER("index-buckets", index_buckets),
    STORE_COUNTER("index-overflow-buckets", index_overflow_buckets),
    STORE_COUNTER("index-load-permille", index_load_permille),
    STORE_COUNTER("index-growing", index_growing),
    STORE_COUNTER("index-growths", index_growths),
    STORE_COUNTER("index-rebuilds", index_rebuilds),
    STORE_COUNTER("index-shrinks", index_shrinks),
    STORE_COUNTER("index-waits", index_waits),
    STORE_COUNTER("epoch", epoch),
    STORE_COUNTER("epoch-pending", epoch_pending),
    STORE_COUNTER("epoch-readers", epoch_readers),
    STORE_COUNTER("epoch-executed", epoch_executed),
    STORE_COUNTER("reads-in-flight", reads_in_flight),
    STORE_COUNTER("writes-in-flight", writes_in_flight),
    STORE_COUNTER("workers", workers),
    STORE_COUNTER("workers-running", workers_running),
    STORE_COUNTER("workers-queued", workers_queued),
    STORE_COUNTER("write-buffers", write_buffers),
    STORE_COUNTER("write-buffers-in-flight", write_buffers_in_flight),
    STORE_COUNTER("write-buffers-waits", write_buffers_waits),
};

#define LATENCY_COUNTER(field) { #field, offsetof(BaleLatency, field) }

static const Counter latency_counters[] = {
    LATENCY_COUNTER(count), LATENCY_COUNTER(mean), LATENCY_COUNTER(p50),
    LATENCY_COUNTER(p95),   LATENCY_COUNTER(p99),  LATENCY_COUNTER(max),
};

static const char *const bucket_names[BALE_STATS_BUCKETS] = {
    "data", "metadata", "compacted"
};

#define DEVICE_COUNTER(name, field) { name, offsetof(BaleDeviceStats, field) }

static const Counter device_counters[] = {
    DEVICE_COUNTER("gets", gets),
    DEVICE_COUNTER("stores", stores),
    DEVICE_COUNTER("flushes", flushes),
    DEVICE_COUNTER("allocates", allocates),
    DEVICE_COUNTER("releases", releases),
    DEVICE_COUNTER("get-bytes", get_bytes),
    DEVICE_COUNTER("store-bytes", store_bytes),
    DEVICE_COUNTER("errors", errors),
    DEVICE_COUNTER("retries", retries),
    DEVICE_COUNTER("queue-depth", queue_depth),
};

static uint64_t counter_value(const Counter *counter, const void *stats)
{
    return *(const uint64_t *)((const char *)stats + counter->offset);
}

/* Owned by the caller. */
static char *uuid_string(const uint8_t uuid[16])
{
    GString *text = g_string_new(NULL);

    for (int i = 0; i < 16; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10) {
            g_string_append_c(text, '-');
        }
        g_string_append_printf(text, "%02x", uuid[i]);
    }
    return g_string_free(text, FALSE);
}

/* --- JSON --- */

static void json_counters(JsonBuilder *b, const Counter *counters, size_t n,
                          const void *stats)
{
    for (size_t i = 0; i < n; i++) {
        bale_tool_json_uint(b, counters[i].name,
                            counter_value(&counters[i], stats));
    }
}

/* Bucket i counts what took less than 2^(i+1) ns. */
static void json_histogram(JsonBuilder *b, const char *name,
                           const uint64_t *buckets, int n)
{
    json_builder_set_member_name(b, name);
    json_builder_begin_array(b);
    for (int i = 0; i < n; i++) {
        json_builder_add_int_value(b, buckets[i]);
    }
    json_builder_end_array(b);
}

static void json_region(JsonBuilder *b, const char *name, uint64_t begin,
                        uint64_t end)
{
    json_builder_set_member_name(b, name);
    json_builder_begin_object(b);
    bale_tool_json_uint(b, "begin", begin);
    bale_tool_json_uint(b, "end", end);
    json_builder_end_object(b);
}

/* Positions in the log; the mutable region has none, only a length. */
static void json_regions(JsonBuilder *b, const BaleStoreStats *s)
{
    json_builder_set_member_name(b, "regions");
    json_builder_begin_object(b);
    json_region(b, "mutable", s->tail_bytes,
                s->tail_bytes + s->mutable_bytes);
    json_region(b, "read-only", s->stable_bytes, s->tail_bytes);
    json_region(b, "stable", s->durable_bytes, s->stable_bytes);
    json_region(b, "durable", 0, s->durable_bytes);
    json_builder_end_object(b);
}

static void json_buckets(JsonBuilder *b, const BaleStoreStats *s)
{
    json_builder_set_member_name(b, "buckets");
    json_builder_begin_object(b);
    for (int i = 0; i < BALE_STATS_BUCKETS; i++) {
        json_builder_set_member_name(b, bucket_names[i]);
        json_builder_begin_object(b);
        bale_tool_json_uint(b, "pages", s->buckets[i].pages);
        bale_tool_json_uint(b, "live-bytes", s->buckets[i].live_bytes);
        bale_tool_json_uint(b, "dead-bytes", s->buckets[i].dead_bytes);
        json_builder_end_object(b);
    }
    json_builder_end_object(b);
}

static void json_latency(JsonBuilder *b, const char *name,
                         const BaleLatency *latency)
{
    json_builder_set_member_name(b, name);
    json_builder_begin_object(b);
    json_counters(b, latency_counters, G_N_ELEMENTS(latency_counters),
                  latency);
    json_builder_end_object(b);
}

static void json_stats(JsonBuilder *b, const Info *info)
{
    const BaleStoreStats *s = &info->stats;
    const BaleDeviceStats *d = &info->device_stats;

    json_builder_set_member_name(b, "stats");
    json_builder_begin_object(b);
    json_counters(b, store_counters, G_N_ELEMENTS(store_counters), s);
    json_regions(b, s);
    json_buckets(b, s);
    json_latency(b, "read-latency-ns", &s->read_latency);
    json_latency(b, "write-latency-ns", &s->write_latency);
    json_latency(b, "flush-latency-ns", &s->flush_latency);
    json_histogram(b, "read-ns", s->read_ns, BALE_HIST_BUCKETS);
    json_histogram(b, "write-ns", s->write_ns, BALE_HIST_BUCKETS);
    json_histogram(b, "flush-ns", s->flush_ns, BALE_HIST_BUCKETS);
    json_builder_set_member_name(b, "device");
    json_builder_begin_object(b);
    json_counters(b, device_counters, G_N_ELEMENTS(device_counters), d);
    json_histogram(b, "get-ns", d->get_ns, BALE_DEVICE_HIST_BUCKETS);
    json_histogram(b, "store-ns", d->store_ns, BALE_DEVICE_HIST_BUCKETS);
    json_histogram(b, "flush-ns", d->flush_ns, BALE_DEVICE_HIST_BUCKETS);
    json_builder_end_object(b);
    json_builder_end_object(b);
}

static void json_bitmaps(JsonBuilder *b, const GArray *bitmaps)
{
    json_builder_set_member_name(b, "bitmaps");
    json_builder_begin_array(b);
    for (guint i = 0; i < bitmaps->len; i++) {
        BaleBitmapInfo *bitmap = &g_array_index(bitmaps, BaleBitmapInfo, i);

        json_builder_begin_object(b);
        bale_tool_json_string(b, "name", bitmap->name);
        bale_tool_json_uint(b, "granularity", bitmap->granularity);
        bale_tool_json_uint(b, "size", bitmap->size);
        bale_tool_json_bool(b, "enabled", bitmap->enabled);
        bale_tool_json_bool(b, "inconsistent", bitmap->in_use);
        json_builder_end_object(b);
    }
    json_builder_end_array(b);
}

static void json_image(JsonBuilder *b, const BaleImageInfo *image,
                       const GArray *bitmaps)
{
    json_builder_begin_object(b);
    bale_tool_json_string(b, "name", image->name);
    bale_tool_json_uint(b, "size", image->size);
    bale_tool_json_string(b, "compression-type",
                          bale_codec_name(image->codec));
    json_builder_set_member_name(b, "compression-level");
    json_builder_add_int_value(b, image->level);
    bale_tool_json_uint(b, "layer", image->layer);
    if (image->has_backing_file) {
        bale_tool_json_string(b, "backing-file", image->backing_file);
        bale_tool_json_string(b, "backing-format", image->backing_format);
    }
    bale_tool_json_uint(b, "allocated-clusters", image->allocated_clusters);
    if (bitmaps->len) {
        json_bitmaps(b, bitmaps);
    }
    json_builder_end_object(b);
}

static void print_json(const Info *info)
{
    g_autoptr(JsonBuilder) b = json_builder_new();
    g_autofree char *uuid = uuid_string(info->store.uuid);

    json_builder_begin_object(b);
    bale_tool_json_string(b, "filename", info->path);
    bale_tool_json_uint(b, "format-version", info->store.version);
    bale_tool_json_string(b, "uuid", uuid);
    bale_tool_json_uint(b, "generation", info->store.generation);
    bale_tool_json_uint(b, "cluster-size", info->store.cluster_size);
    bale_tool_json_uint(b, "page-size", info->store.page_size);
    bale_tool_json_uint(b, "max-size", info->store.max_size);
    bale_tool_json_bool(b, "clean", info->store.clean);
    bale_tool_json_bool(b, "corrupt", info->store.corrupt);
    bale_tool_json_uint(b, "recovered-records", info->store.recovered_records);
    bale_tool_json_uint(b, "torn-bytes", info->store.torn_bytes);
    bale_tool_json_uint(b, "damaged-records", info->store.damaged_records);
    bale_tool_json_string(b, "device", info->device.name);
    bale_tool_json_uint(b, "device-size", info->device.size);
    bale_tool_json_uint(b, "used-bytes", info->stats.used_bytes);
    bale_tool_json_uint(b, "live-bytes", info->stats.live_bytes);
    json_builder_set_member_name(b, "images");
    json_builder_begin_array(b);
    json_image(b, &info->image, info->bitmaps);
    json_builder_end_array(b);
    if (info->with_stats) {
        json_stats(b, info);
    }
    json_builder_end_object(b);
    bale_tool_print_json(b);
}

/* --- text --- */

static void print_size(const char *what, uint64_t bytes)
{
    g_autofree char *text = bale_tool_size_string(bytes);

    printf("%-18s %s (%" G_GUINT64_FORMAT " bytes)\n", what, text, bytes);
}

static void print_image(const BaleImageInfo *image)
{
    printf("image:             %s\n",
           image->name[0] ? image->name : "(unnamed)");
    print_size("  virtual size:", image->size);
    printf("  compression:     %s", bale_codec_name(image->codec));
    if (image->level) {
        printf(", level %d", image->level);
    }
    printf("\n");
    print_size("  allocated:",
               image->allocated_clusters * image->cluster_size);
    if (image->has_backing_file) {
        printf("  backing file:    %s", image->backing_file);
        if (image->backing_format[0]) {
            printf(" (format %s)", image->backing_format);
        }
        printf("\n");
    }
}

static void print_bitmaps(const GArray *bitmaps)
{
    for (guint i = 0; i < bitmaps->len; i++) {
        BaleBitmapInfo *bitmap = &g_array_index(bitmaps, BaleBitmapInfo, i);
        g_autofree char *granularity =
            bale_tool_size_string(bitmap->granularity);

        printf("  dirty bitmap:    %s (granularity %s%s)\n", bitmap->name,
               granularity,
               bitmap->in_use     ? ", inconsistent or in use"
               : bitmap->enabled ? ""
                                 : ", disabled");
    }
}

static void print_histogram(const char *name, const uint64_t *buckets, int n)
{
    for (int i = 0; i < n; i++) {
        if (buckets[i]) {
            printf("  %-20s below %.3f ms: %" G_GUINT64_FORMAT "\n", name,
                   (double)(UINT64_C(2) << i) / 1e6, buckets[i]);
        }
    }
}

static void print_counters(const char *title, const Counter *counters,
                           size_t n, const void *stats)
{
    printf("%s\n", title);
    for (size_t i = 0; i < n; i++) {
        printf("  %-28s %" G_GUINT64_FORMAT "\n", counters[i].name,
               counter_value(&counters[i], stats));
    }
}

static void print_region(const char *name, uint64_t begin, uint64_t end)
{
    printf("  %-28s from %" G_GUINT64_FORMAT " to %" G_GUINT64_FORMAT "\n",
           name, begin, end);
}

static void print_latency(const char *name, const BaleLatency *l)
{
    printf("  %-28s %" G_GUINT64_FORMAT " of them, p50 %.3f ms, p95 %.3f ms, "
           "p99 %.3f ms, max %.3f ms\n", name, l->count, l->p50 / 1e6,
           l->p95 / 1e6, l->p99 / 1e6, l->max / 1e6);
}

static void print_stats(const BaleStoreStats *s)
{
    printf("regions:\n");
    print_region("mutable", s->tail_bytes, s->tail_bytes + s->mutable_bytes);
    print_region("read-only", s->stable_bytes, s->tail_bytes);
    print_region("stable", s->durable_bytes, s->stable_bytes);
    print_region("durable", 0, s->durable_bytes);
    printf("pages:\n");
    for (int i = 0; i < BALE_STATS_BUCKETS; i++) {
        printf("  %-28s %" G_GUINT64_FORMAT " pages, %" G_GUINT64_FORMAT
               " bytes live, %" G_GUINT64_FORMAT " dead\n", bucket_names[i],
               s->buckets[i].pages, s->buckets[i].live_bytes,
               s->buckets[i].dead_bytes);
    }
    print_counters("statistics:", store_counters,
                   G_N_ELEMENTS(store_counters), s);
    print_latency("reads", &s->read_latency);
    print_latency("writes", &s->write_latency);
    print_latency("flushes", &s->flush_latency);
    print_histogram("reads", s->read_ns, BALE_HIST_BUCKETS);
    print_histogram("writes", s->write_ns, BALE_HIST_BUCKETS);
    print_histogram("flushes", s->flush_ns, BALE_HIST_BUCKETS);
}

static void print_text(const Info *info)
{
    g_autofree char *uuid = uuid_string(info->store.uuid);

    printf("store:             %s\n", info->path);
    printf("format version:    %u\n", info->store.version);
    printf("uuid:              %s\n", uuid);
    print_size("cluster size:", info->store.cluster_size);
    print_size("page size:", info->store.page_size);
    if (info->store.max_size) {
        print_size("maximum size:", info->store.max_size);
    }
    print_size("device size:", info->device.size);
    print_size("pages in use:", info->stats.used_bytes);
    print_size("live data:", info->stats.live_bytes);
    printf("closed cleanly:    %s\n", info->store.clean ? "yes" : "no");
    if (!info->store.clean) {
        printf("recovered records: %" G_GUINT64_FORMAT "\n",
               info->store.recovered_records);
    }
    if (info->store.damaged_records) {
        printf("damaged records:   %" G_GUINT64_FORMAT "\n",
               info->store.damaged_records);
    }
    if (info->store.corrupt) {
        printf("corrupt:           yes\n");
    }
    print_image(&info->image);
    print_bitmaps(info->bitmaps);
    if (info->with_stats) {
        print_stats(&info->stats);
        print_counters("device statistics:", device_counters,
                       G_N_ELEMENTS(device_counters), &info->device_stats);
        print_histogram("gets", info->device_stats.get_ns,
                        BALE_DEVICE_HIST_BUCKETS);
        print_histogram("stores", info->device_stats.store_ns,
                        BALE_DEVICE_HIST_BUCKETS);
        print_histogram("flushes", info->device_stats.flush_ns,
                        BALE_DEVICE_HIST_BUCKETS);
    }
}

static void gather(Info *info, BaleStore *store, BaleImage *image,
                   const char *name)
{
    BaleDevice *dev = bale_store_device(store);

    bale_store_get_info(store, &info->store);
    bale_store_get_stats(store, &info->stats);
    bale_image_get_info(image, &info->image);
    info->bitmaps = bale_bitmap_list(store, name, NULL);
    dev->ops->get_info(dev, &info->device);
    dev->ops->get_stats(dev, &info->device_stats);
}

static int info(const BaleCommand *command, int argc, char **argv)
{
    g_autofree Info *i = g_new0(Info, 1);
    g_autofree char *name = NULL;
    g_auto(BaleToolDevice) device = { 0 };
    gboolean stats = FALSE;
    gboolean json = FALSE;
    BaleStore *store;
    BaleImage *image;
    int status = BALE_EXIT_OK;
    const GOptionEntry entries[] = {
        { "stats", 0, 0, G_OPTION_ARG_NONE, &stats, "Print statistics too",
          NULL },
        { "json", 0, 0, G_OPTION_ARG_NONE, &json, "Print JSON", NULL },
        BALE_TOOL_IMAGE_ENTRY(name),
        BALE_TOOL_SHARE_ENTRY(device),
        BALE_TOOL_DEVICE_ENTRIES(device),
        { NULL },
    };

    if (!bale_tool_parse(command, entries, false, &argc, &argv) ||
        !bale_tool_arguments(command, argc, 1)) {
        return BALE_EXIT_ERROR;
    }
    i->path = argv[1];
    i->with_stats = stats;
    store = bale_tool_store_open("info", &device, i->path, BALE_TOOL_READ, 1);
    if (!store) {
        return BALE_EXIT_ERROR;
    }
    image = bale_tool_image_open("info", i->path, store, name);
    if (image) {
        gather(i, store, image, name ? name : i->image.name);
        (json ? print_json : print_text)(i);
        g_array_unref(i->bitmaps);
        bale_image_close(image);
    } else {
        status = BALE_EXIT_ERROR;
    }
    return bale_tool_store_close("info", i->path, store, status);
}

const BaleCommand bale_command_info = {
    .name = "info",
    .arguments = "STORE",
    .summary = "Tell what a store is and holds",
    .help = "The statistics are those of opening the store, as nothing else "
            "has happened;\n"
            "a running QEMU tells its own.",
    .run = info,
};
