/*
 * A small store on a simulated device, and what is done to it.
 *
 * The contents of a sector are made from its number and a value, so that a
 * sector that is read tells which write it came from, or that it came from
 * none.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "sim.h"

#include <errno.h>
#include <string.h>

#include "../../block/extstore/store-internal.h"

#define BACKING_NAMES 8u
/* Of a store, before its first page. */
#define SUPER_BYTES (2ull << 20)

const Geometry geometries[] = {
    { "small", 4096, BALE_CODEC_ZSTD, 6, 8, false },
    { "backed", 4096, BALE_CODEC_DEFLATE, 6, 8, true },
    { "middle", 16384, BALE_CODEC_ZSTD, 6, 8, true, .skip_unchanged = true,
      .ahead_bytes = 2 * BALE_BLOCK_SIZE },
    /* A few writes fill a page, so that pages are freed and used again. */
    { "pages", 262144, BALE_CODEC_NONE, 5, 6, false },
    { "pages-backed", 262144, BALE_CODEC_NONE, 5, 6, true },
    /*
     * The same, full after these: steps wait for compaction.  There is room for
     * the images and snapshots, two checkpoints, and what a crash leaves open.
     */
    { "limited", 262144, BALE_CODEC_NONE, 5, 6, false,
      .max_size = SUPER_BYTES + 12 * BALE_PAGE_SIZE_UNIT },
    { "skipping", 4096, BALE_CODEC_ZSTD, 6, 8, .skip_unchanged = true,
      .ahead_bytes = BALE_BLOCK_SIZE },
    /* Little memory: clusters leave it in batches, others at once. */
    { "batches", 16384, BALE_CODEC_ZSTD, 6, 8, true, .mutable_clusters = 4 },
};
const unsigned geometry_count = G_N_ELEMENTS(geometries);

/* --- contents --- */

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

static void fill_sector(uint8_t *buf, unsigned sector, uint32_t value)
{
    uint64_t *words = (uint64_t *)buf;
    uint64_t base, step;

    if (value == VALUE_ZERO) {
        memset(buf, 0, SECTOR);
        return;
    }
    words[0] = 0x726f746365732121;
    words[1] = sector;
    words[2] = value;
    /* Odd values compress, even ones hardly. */
    base = mix((uint64_t)sector << 32 | value);
    step = value % 2 ? 0 : 0x9e3779b97f4a7c15;
    for (unsigned i = 3; i < SECTOR / 8; i++) {
        words[i] = base ^ i * step;
    }
}

void world_fill(const World *w, uint8_t *buf, unsigned sector, unsigned n,
                uint32_t value)
{
    for (unsigned i = 0; i < n; i++) {
        uint32_t v = value == VALUE_BACKING &&
                             sector + i >= w->backing_sectors
                         ? VALUE_ZERO
                         : value;

        fill_sector(buf + i * SECTOR, sector + i, v);
    }
}

uint32_t world_value(const World *w, const uint8_t *buf, unsigned sector)
{
    uint64_t expect[SECTOR / 8], words[3];

    memcpy(words, buf, sizeof(words));
    if (words[0] == 0) {
        fill_sector((uint8_t *)expect, sector, VALUE_ZERO);
        return memcmp(buf, expect, SECTOR) ? VALUE_UNKNOWN : VALUE_ZERO;
    }
    if (words[1] != sector || words[2] >= VALUE_UNKNOWN) {
        return VALUE_UNKNOWN;
    }
    fill_sector((uint8_t *)expect, sector, words[2]);
    return memcmp(buf, expect, SECTOR) ? VALUE_UNKNOWN : words[2];
}

const char *backing_name(uint32_t number)
{
    static const char *names[BACKING_NAMES] = {
        "", "one.qcow2", "two.qcow2", "three.qcow2", "four.qcow2",
        "five.qcow2", "six.qcow2", "seven.qcow2",
    };

    return names[number % BACKING_NAMES];
}

uint32_t backing_number(const char *name)
{
    for (uint32_t i = 0; i < BACKING_NAMES; i++) {
        if (!strcmp(name, backing_name(i))) {
            return i;
        }
    }
    return VALUE_UNKNOWN;
}

/* --- cases --- */

char *case_parse(Case *c, const char *text)
{
    g_auto(GStrv) part = g_strsplit(text, "/", 6);
    unsigned n = g_strv_length(part);

    memset(c, 0, sizeof(*c));
    if (n < 5) {
        return g_strdup("a case is CLASS/GEOMETRY/START/STEPS/SEED[/DETAIL]");
    }
    g_strlcpy(c->class_name, part[0], sizeof(c->class_name));
    for (unsigned i = 0; i < geometry_count; i++) {
        if (!strcmp(part[1], geometries[i].name)) {
            c->geo = &geometries[i];
        }
    }
    if (!c->geo) {
        return g_strdup_printf("no geometry is called '%s'", part[1]);
    }
    g_strlcpy(c->start, part[2], sizeof(c->start));
    if (strlen(part[3]) > STEPS_MAX) {
        return g_strdup_printf("more than %d steps", STEPS_MAX);
    }
    g_strlcpy(c->steps, part[3], sizeof(c->steps));
    for (const char *p = c->steps; *p; p++) {
        if (!step_describe(*p)) {
            return g_strdup_printf("no step is called '%c'", *p);
        }
    }
    c->seed = g_ascii_strtoull(part[4], NULL, 0);
    g_strlcpy(c->detail, n > 5 ? g_strchomp(part[5]) : "",
              sizeof(c->detail));
    return NULL;
}

char *case_text(const Case *c, const char *detail)
{
    return g_strdup_printf("%s/%s/%s/%s/%" PRIu64 "%s%s", c->class_name,
                           c->geo->name, c->start, c->steps, c->seed,
                           detail && *detail ? "/" : "",
                           detail ? detail : "");
}

/* --- a device that outlives the store --- */

typedef struct Shim {
    BaleDevice dev;
    BaleDevice *sim;
} Shim;

static BaleDevice *shim_sim(BaleDevice *dev)
{
    return ((Shim *)dev)->sim;
}

static void shim_destroy(BaleDevice *dev)
{
    g_free(dev);
}

static void shim_get_info(BaleDevice *dev, BaleDeviceInfo *info)
{
    shim_sim(dev)->ops->get_info(shim_sim(dev), info);
}

static int shim_allocate(BaleDevice *dev, uint64_t offset, uint64_t len)
{
    return shim_sim(dev)->ops->allocate(shim_sim(dev), offset, len);
}

static int shim_release(BaleDevice *dev, uint64_t offset, uint64_t len)
{
    return shim_sim(dev)->ops->release(shim_sim(dev), offset, len);
}

static int shim_truncate(BaleDevice *dev, uint64_t size)
{
    return shim_sim(dev)->ops->truncate(shim_sim(dev), size);
}

static void shim_store(BaleDevice *dev, BaleDeviceIo *io)
{
    shim_sim(dev)->ops->store(shim_sim(dev), io);
}

static void shim_get(BaleDevice *dev, BaleDeviceIo *io)
{
    shim_sim(dev)->ops->get(shim_sim(dev), io);
}

static void shim_flush(BaleDevice *dev, BaleDeviceIo *io)
{
    shim_sim(dev)->ops->flush(shim_sim(dev), io);
}

static void shim_get_stats(BaleDevice *dev, BaleDeviceStats *stats)
{
    shim_sim(dev)->ops->get_stats(shim_sim(dev), stats);
}

static void shim_reset_stats(BaleDevice *dev)
{
    shim_sim(dev)->ops->reset_stats(shim_sim(dev));
}

static int shim_command(BaleDevice *dev, const char *command, char **reply)
{
    return shim_sim(dev)->ops->command(shim_sim(dev), command, reply);
}

static const BaleDeviceOps shim_ops = {
    .interface_version = BALE_DEVICE_INTERFACE,
    .destroy = shim_destroy,
    .get_info = shim_get_info,
    .allocate = shim_allocate,
    .release = shim_release,
    .truncate = shim_truncate,
    .store = shim_store,
    .get = shim_get,
    .flush = shim_flush,
    .get_stats = shim_get_stats,
    .reset_stats = shim_reset_stats,
    .command = shim_command,
};

static BaleDevice *shim_new(BaleDevice *sim)
{
    Shim *shim = g_new0(Shim, 1);

    shim->dev.ops = &shim_ops;
    shim->sim = sim;
    return &shim->dev;
}

/* --- the store --- */

World *world_new(const Geometry *geo, BaleDevice *sim)
{
    World *w = g_new0(World, 1);

    w->geo = geo;
    w->cluster_sectors = geo->cluster_size / SECTOR;
    w->max_sectors = geo->max * w->cluster_sectors;
    w->backing_sectors =
        geo->backing ? (geo->clusters - 1) * w->cluster_sectors - 1 : 0;
    w->sim = sim;
    w->oracle = oracle_new(w->max_sectors);
    w->next_value = VALUE_FIRST;
    w->buf = g_malloc((size_t)w->max_sectors * SECTOR);
    w->workers = 1;
    pthread_mutex_init(&w->story_lock, NULL);
    return w;
}

void world_free(World *w)
{
    if (w->store) {
        world_close(w);
    }
    bale_device_close(w->sim);
    oracle_free(w->oracle);
    if (w->memo) {
        g_hash_table_destroy(w->memo);
    }
    g_free(w->buf);
    g_free(w->error);
    if (w->story) {
        g_string_free(w->story, TRUE);
    }
    pthread_mutex_destroy(&w->story_lock);
    g_free(w);
}

static void world_tell(World *w, const char *fmt, ...) G_GNUC_PRINTF(2, 3);

/* The store's own threads tell of failures and damage while a step runs. */
static void world_tell(World *w, const char *fmt, ...)
{
    va_list ap;

    if (w->story) {
        pthread_mutex_lock(&w->story_lock);
        va_start(ap, fmt);
        g_string_append_vprintf(w->story, fmt, ap);
        va_end(ap);
        pthread_mutex_unlock(&w->story_lock);
    }
}

void world_broken(World *w, const char *fmt, ...)
{
    va_list ap;

    if (!w->error) {
        va_start(ap, fmt);
        w->error = g_strdup_vprintf(fmt, ap);
        va_end(ap);
        world_tell(w, "  BROKEN: %s\n", w->error);
    }
}

static void world_damage(void *opaque, const char *what)
{
    World *w = opaque;

    world_tell(w, "  damage: %s\n", what);
    g_atomic_int_inc(&w->complaints);
}

static void world_failed(void *opaque, const char *what)
{
    World *w = opaque;

    world_tell(w, "  failed: %s\n", what);
    g_atomic_int_inc(&w->failures);
}

void world_backing_read(void *opaque, uint64_t offset, void *buf,
                               size_t len, BaleDone *done, void *done_opaque)
{
    World *w = opaque;
    unsigned first = offset / SECTOR;
    unsigned n = (offset + len + SECTOR - 1) / SECTOR - first;
    g_autofree uint8_t *sectors = g_malloc(n * SECTOR);

    world_fill(w, sectors, first, n, VALUE_BACKING);
    memcpy(buf, sectors + offset % SECTOR, len);
    done(done_opaque, 0);
}

bool world_open(World *w)
{
    BaleOpenOptions o = { .workers = w->workers,
                          .cache_size = 2 * w->geo->cluster_size,
                          .ahead_bytes = w->geo->ahead_bytes,
                          .mutable_clusters = w->geo->mutable_clusters,
                          .failed = world_failed,
                          .damage = world_damage,
                          .notify_opaque = w };
    BaleDevice *shim = shim_new(w->sim);
    g_autoptr(GError) err = NULL;

    w->store = bale_store_open(shim, &o, &err);
    if (!w->store) {
        world_tell(w, "  open: %s\n", err->message);
        shim_destroy(shim);
        return false;
    }
    w->image = bale_image_open(w->store, NULL, &err);
    if (!w->image) {
        world_tell(w, "  image: %s\n", err->message);
        bale_store_close(w->store, NULL);
        w->store = NULL;
        return false;
    }
    if (w->geo->backing) {
        bale_image_set_backing_read(w->image, world_backing_read, w);
    }
    bale_image_set_skip_unchanged(w->image, w->geo->skip_unchanged);
    return true;
}

bool world_close(World *w)
{
    uint64_t moment = oracle_moment(w->oracle);
    g_autoptr(GError) err = NULL;
    bool ok;

    bale_image_close(w->image);
    ok = bale_store_close(w->store, &err);
    if (ok && !w->doubtful) {
        oracle_flushed(w->oracle, moment, bale_sim_events(w->sim));
    } else if (!ok) {
        world_tell(w, "  close: %s\n", err->message);
    }
    w->store = NULL;
    w->image = NULL;
    return ok;
}

bool world_poisoned(World *w)
{
    BaleStoreInfo info;

    bale_store_get_info(w->store, &info);
    return info.poisoned;
}

bool world_revive(World *w)
{
    g_autoptr(GError) err = NULL;
    bool ok = bale_store_revive(w->store, &err);

    world_tell(w, "  revive: %s\n", ok ? "well again" : err->message);
    return ok;
}

/* --- steps --- */

const char *step_describe(char step)
{
    switch (step) {
    case 'w': return "write the first two clusters";
    case 'o': return "overwrite the second cluster, write the third";
    case 'p': return "write sectors across a cluster boundary";
    case 'q': return "write sectors at the image's end";
    case 'h': return "write the whole image";
    case 'z': return "zero sectors and a whole cluster";
    case 'y': return "zero the second cluster";
    case 'd': return "discard three clusters";
    case 'j': return "write two sectors, flush, two that overlap, flush";
    case 'f': return "flush";
    case 'u': return "write two sectors with FUA";
    case 'k': return "checkpoint";
    case 'K': return "checkpoint in use";
    case 's': return "shrink to two and a half clusters";
    case 'g': return "grow by more than a cluster";
    case 'c': return "clear";
    case 'b': return "change the backing file's name";
    case 'r': return "close and open again";
    case 'n': return "make a snapshot, the third in the oldest one's place";
    case 'e': return "delete the oldest snapshot";
    case 'v': return "roll back to the newest snapshot";
    case 'i': return "clone the image and write to that, or delete it";
    case 'm': return "compact";
    case 'x': return "read everything";
    default: return NULL;
    }
}

typedef struct Range {
    unsigned first, n;
} Range;

static Range step_range(World *w, char step)
{
    unsigned c = w->cluster_sectors;
    unsigned size = bale_image_size(w->image) / SECTOR;
    Range r = { 0, 0 };

    switch (step) {
    case 'w': r = (Range){ 0, 2 * c }; break;
    case 'o': r = (Range){ c, 2 * c }; break;
    case 'p': r = (Range){ c / 2 + 1, c - 2 }; break;
    case 'q': r = (Range){ size > 3 ? size - 3 : 0, 2 }; break;
    case 'h': r = (Range){ 0, size }; break;
    case 'z': r = (Range){ c / 2, 2 * c }; break;
    case 'y': r = (Range){ c, c }; break;
    case 'd': r = (Range){ c, 3 * c }; break;
    case 'u': r = (Range){ 2 * c + 1, 2 }; break;
    case 'j': r = (Range){ c + 1, 2 }; break;
    case 'J': r = (Range){ c + 2, 2 }; break;
    }
    if (r.first >= size) {
        return (Range){ 0, 0 };
    }
    r.n = MIN(r.n, size - r.first);
    return r;
}

static int step_request(World *w, char step)
{
    bool zero = step == 'z' || step == 'y' || step == 'd';
    Range r = step_range(w, step);
    uint32_t value = zero ? VALUE_ZERO : w->next_value++;
    uint64_t begun, offset = (uint64_t)r.first * SECTOR;
    uint64_t len = (uint64_t)r.n * SECTOR;
    int ret;

    if (r.n == 0) {
        return 0;
    }
    begun = oracle_begin(w->oracle, r.first, r.n, value,
                         bale_sim_events(w->sim));
    if (zero) {
        ret = bale_image_zero_sync(w->image, offset, len,
                                   step == 'd' ? BALE_DISCARD : 0);
    } else {
        world_fill(w, w->buf, r.first, r.n, value);
        ret = bale_image_write_sync(w->image, offset, w->buf, len,
                                    step == 'u' ? BALE_FUA : 0);
    }
    oracle_end(w->oracle, r.first, r.n, begun, ret == 0,
               step == 'u' ? bale_sim_events(w->sim) : EVENT_NEVER);
    if (step == 'w' || step == 'u') {
        /* That went to the log: a session has begun. */
        w->doubtful &= ret != 0;
    }
    if (step == 'u' && ret == 0) {
        oracle_flushed(w->oracle, begun - 1, bale_sim_events(w->sim));
    }
    world_tell(w, "    sectors %u to %u become %" PRIu32 "\n", r.first,
               r.first + r.n - 1, value);
    return ret;
}

static bool step_resize(World *w, char step)
{
    Oracle *o = w->oracle;
    unsigned c = w->cluster_sectors;
    unsigned old = bale_image_size(w->image) / SECTOR;
    unsigned new = step == 's' ? MIN(old, 2 * c + c / 2)
                               : MIN(w->max_sectors, old + c + 2);
    unsigned from = MIN(old, new), n = MAX(old, new) - from;
    uint64_t event = bale_sim_events(w->sim), begun, begun_size;
    g_autoptr(GError) err = NULL;
    bool ok;

    begun_size = oracle_begin(o, oracle_size(o), 1, new, event);
    if (new > old && old < w->backing_sectors) {
        /* Until it was zeroed, what lies under the image shows there. */
        unsigned under = MIN(w->backing_sectors, new) - old;

        begun = oracle_begin(o, old, under, VALUE_BACKING, event);
        oracle_end(o, old, under, begun, false, EVENT_NEVER);
    }
    begun = oracle_begin(o, from, n, VALUE_ZERO, event);
    ok = bale_image_resize(w->image, (uint64_t)new * SECTOR, &err);
    if (ok && new > old && w->geo->backing) {
        /* As the QEMU driver does. */
        ok = bale_image_zero_sync(w->image, (uint64_t)old * SECTOR,
                                  (uint64_t)n * SECTOR, BALE_FUA) == 0;
    }
    event = bale_sim_events(w->sim);
    oracle_end(o, from, n, begun, ok, event);
    oracle_end(o, oracle_size(o), 1, begun_size, ok, event);
    world_tell(w, "    from %u to %u sectors\n", old, new);
    return ok;
}

static bool step_clear(World *w)
{
    Oracle *o = w->oracle;
    uint64_t event = bale_sim_events(w->sim), begun, begun_end;
    unsigned size = bale_image_size(w->image) / SECTOR;
    unsigned under = MIN(w->backing_sectors, size);
    g_autoptr(GError) err = NULL;
    bool ok;

    begun = oracle_begin(o, 0, under, VALUE_BACKING, event);
    begun_end = oracle_begin(o, under, size - under, VALUE_ZERO, event);
    ok = bale_image_clear(w->image, &err);
    event = bale_sim_events(w->sim);
    oracle_end(o, 0, under, begun, ok, event);
    oracle_end(o, under, size - under, begun_end, ok, event);
    return ok;
}

static bool step_backing(World *w)
{
    Oracle *o = w->oracle;
    uint32_t name = 1 + w->next_value++ % (BACKING_NAMES - 1);
    uint64_t begun = oracle_begin(o, oracle_name(o), 1, name,
                                  bale_sim_events(w->sim));
    g_autoptr(GError) err = NULL;
    bool ok;

    ok = bale_image_set_backing(w->image, backing_name(name), "qcow2", &err);
    oracle_end(o, oracle_name(o), 1, begun, ok, bale_sim_events(w->sim));
    return ok;
}

static bool step_barrier(World *w, char step)
{
    uint64_t moment = oracle_moment(w->oracle);
    g_autoptr(GError) err = NULL;
    bool ok = step == 'f'   ? bale_store_flush_sync(w->store) == 0
              : step == 'k' ? bale_store_checkpoint(w->store, &err)
                            : bale_store_checkpoint_running(w->store, &err);

    if (ok && !w->doubtful) {
        oracle_flushed(w->oracle, moment, bale_sim_events(w->sim));
    }
    return ok;
}

/* --- snapshots, the clone --- */

static bool step_delete(World *w, unsigned other, uint32_t number)
{
    Oracle *o = w->oracle;
    g_autofree char *name = world_other_name(other, number);
    g_autoptr(GError) err = NULL;
    uint64_t begun;
    bool ok;

    begun = oracle_begin(o, oracle_other(o, other), 1, 0,
                         bale_sim_events(w->sim));
    ok = other == CLONE
             ? bale_image_delete(w->store, name, &err)
             : bale_snapshot_delete(w->store, NULL, name + 1, &err);
    oracle_end(o, oracle_other(o, other), 1, begun, ok,
               bale_sim_events(w->sim));
    world_tell(w, "    %s: %s\n", name, ok ? "deleted" : err->message);
    return ok;
}

/* Make what shows the same as the image. */
static bool step_create(World *w, unsigned other, uint32_t number)
{
    Oracle *o = w->oracle;
    g_autofree char *name = world_other_name(other, number);
    BaleSnapshotInfo info = { .name = name + 1, .date_s = 1 };
    unsigned first = oracle_sectors(o, other);
    uint64_t event, begun, begun_other, begun_size;
    g_autoptr(GError) err = NULL;
    Observed now;
    bool ok;

    world_look(w, &now);
    ok = now.ret == 0;
    if (ok) {
        event = bale_sim_events(w->sim);
        begun = oracle_begin_each(o, first, now.size, now.value, event);
        begun_size = oracle_begin(o, oracle_other_size(o, other), 1, now.size,
                                  event);
        begun_other = oracle_begin(o, oracle_other(o, other), 1, number,
                                   event);
        ok = other == CLONE
                 ? bale_image_clone(w->store, NULL, NULL, name, &err)
                 : bale_snapshot_create(w->store, NULL, &info, &err);
        event = bale_sim_events(w->sim);
        oracle_end(o, first, now.size, begun, ok, event);
        oracle_end(o, oracle_other_size(o, other), 1, begun_size, ok, event);
        oracle_end(o, oracle_other(o, other), 1, begun_other, ok, event);
        world_tell(w, "    %s: %s\n", name, ok ? "made" : err->message);
    }
    observed_clear(&now);
    return ok;
}

/* The oldest or newest snapshot; its number in *@number, 0: there is none. */
static unsigned snapshot_find(World *w, bool newest, uint32_t *number)
{
    uint32_t others[OTHERS];
    unsigned found = 0;

    world_others(w, others);
    *number = 0;
    for (unsigned i = 0; i < SNAPSHOTS; i++) {
        if (others[i] && (!*number || (others[i] > *number) == newest)) {
            *number = others[i];
            found = i;
        }
    }
    return found;
}

static bool step_snapshot_delete(World *w)
{
    uint32_t number;
    unsigned other = snapshot_find(w, false, &number);

    return !number || step_delete(w, other, number);
}

static bool step_snapshot_create(World *w)
{
    uint32_t others[OTHERS];
    unsigned at = 0;

    world_others(w, others);
    while (at < SNAPSHOTS && others[at]) {
        at++;
    }
    if (at == SNAPSHOTS) {
        uint32_t number;

        at = snapshot_find(w, false, &number);
        if (!step_delete(w, at, number)) {
            return false;
        }
    }
    return step_create(w, at, w->next_value++);
}

static bool step_rollback(World *w)
{
    Oracle *o = w->oracle;
    uint32_t number;
    unsigned other = snapshot_find(w, true, &number);
    g_autofree char *name = world_other_name(other, number);
    uint64_t event, begun, begun_size;
    g_autoptr(GError) err = NULL;
    Observed now;
    bool ok;

    if (!number) {
        return true;
    }
    world_look(w, &now);
    ok = now.ret == 0;
    if (ok) {
        event = bale_sim_events(w->sim);
        begun = oracle_begin_each(o, 0, w->max_sectors,
                                  now.value + oracle_sectors(o, other),
                                  event);
        begun_size = oracle_begin(o, oracle_size(o), 1,
                                  now.other_size[other], event);
        ok = bale_snapshot_rollback(w->store, NULL, name + 1, &err);
        event = bale_sim_events(w->sim);
        oracle_end(o, 0, w->max_sectors, begun, ok, event);
        oracle_end(o, oracle_size(o), 1, begun_size, ok, event);
        world_tell(w, "    %s: %s\n", name, ok ? "shows again"
                                               : err->message);
    }
    observed_clear(&now);
    return ok;
}

/* Across a cluster's boundary, as far as the clone reaches. */
static bool step_clone_write(World *w, uint32_t number)
{
    g_autoptr(GError) err = NULL;
    BaleImage *clone = world_open_other(w, CLONE, number, &err);
    unsigned c = w->cluster_sectors, at = c / 2 + 1, n = c - 2;
    unsigned first = oracle_sectors(w->oracle, CLONE) + at;
    uint32_t value = w->next_value++;
    uint64_t begun;
    int ret;

    if (!clone) {
        return false;
    }
    g_assert((uint64_t)(at + n) * SECTOR <= bale_image_size(clone));
    world_fill(w, w->buf, at, n, value);
    begun = oracle_begin(w->oracle, first, n, value, bale_sim_events(w->sim));
    ret = bale_image_write_sync(clone, (uint64_t)at * SECTOR, w->buf,
                                n * SECTOR, 0);
    oracle_end(w->oracle, first, n, begun, ret == 0, EVENT_NEVER);
    bale_image_close(clone);
    world_tell(w, "    its sectors %u to %u become %" PRIu32 "\n", at,
               at + n - 1, value);
    return ret == 0;
}

static bool step_clone(World *w)
{
    uint32_t others[OTHERS], number;

    world_others(w, others);
    if (others[CLONE]) {
        return step_delete(w, CLONE, others[CLONE]);
    }
    number = w->next_value++;
    return step_create(w, CLONE, number) && step_clone_write(w, number);
}

/* Between two of its windows: half of the compactions make way for readers. */
static bool compact_progress(void *opaque, uint64_t done, uint64_t total)
{
    World *w = opaque;

    __atomic_store_n(&w->store->compact_gently, w->next_value % 2,
                     __ATOMIC_RELAXED);
    return true;
}

static bool step_compact(World *w)
{
    BaleCompactOptions o = { .progress = compact_progress, .opaque = w };
    g_autoptr(GError) err = NULL;

    return bale_store_compact(w->store, &o, &err);
}

static bool world_do(World *w, char step)
{
    bool ok;

    world_tell(w, "  %c: %s (event %" PRIu64 ")\n", step, step_describe(step),
               bale_sim_events(w->sim));
    switch (step) {
    case 'f':
    case 'k':
    case 'K':
        ok = step_barrier(w, step);
        break;
    case 'j':
        ok = step_request(w, 'j') == 0 && step_barrier(w, 'f') &&
             step_request(w, 'J') == 0 && step_barrier(w, 'f');
        break;
    case 's':
    case 'g':
        ok = step_resize(w, step);
        break;
    case 'c':
        ok = step_clear(w);
        break;
    case 'b':
        ok = step_backing(w);
        break;
    case 'n':
        ok = step_snapshot_create(w);
        break;
    case 'e':
        ok = step_snapshot_delete(w);
        break;
    case 'v':
        ok = step_rollback(w);
        break;
    case 'i':
        ok = step_clone(w);
        break;
    case 'm':
        ok = step_compact(w);
        break;
    case 'r':
        ok = world_close(w);
        if (world_open(w) && !ok) {
            world_recovered(w);
        }
        ok = ok && w->store;
        break;
    case 'x':
        world_read(w, false);
        ok = true;
        break;
    default:
        ok = step_request(w, step) == 0;
        break;
    }
    if (ok && strchr("sgcbni", step)) {
        w->doubtful = false;
    }
    if (!ok) {
        world_tell(w, "    refused\n");
    }
    return ok;
}

/* Steps that want the maintenance thread, or another store. */
#define STEPS_MAINTAINED "mKr"

/* Wait until the maintenance thread has nothing to do. */
static void world_settle_thread(World *w)
{
    BaleStore *s = w->store;

    if (s) {
        pthread_mutex_lock(&s->log_lock);
        while (s->maintain_started && !store_failed(s) &&
               (!s->maintain_idle || bale_maintain_has_work(s))) {
            pthread_cond_wait(&s->log_cond, &s->log_lock);
        }
        pthread_mutex_unlock(&s->log_lock);
    }
}

bool world_step(World *w, char step)
{
    BaleStore *s = w->store;
    bool pause = w->quiet && s && !w->geo->max_size &&
                 !strchr(STEPS_MAINTAINED, step);
    bool ok;

    if (pause) {
        bale_maintain_pause(s);
    }
    ok = world_do(w, step);
    if (pause) {
        bale_maintain_resume(s);
    }
    if (w->quiet) {
        world_settle_thread(w);
    }
    return ok;
}

/* --- the start of a case --- */

/*
 * How a store looks before the first step, made once for each geometry: as
 * created, and as closed after it was written.
 */
typedef struct StartImage {
    BaleSimImage *created, *closed;
    uint32_t next_value; /* after closed */
} StartImage;

static bool start_make(World *w, StartImage *start)
{
    BaleCreateOptions o = {
        .size = ((uint64_t)w->geo->clusters * w->cluster_sectors - 3) * SECTOR,
        .cluster_size = w->geo->cluster_size,
        .page_size = BALE_PAGE_SIZE_UNIT,
        .codec = w->geo->codec,
        .max_size = w->geo->max_size,
        .backing_file = w->geo->backing ? backing_name(1) : NULL,
    };
    g_autoptr(GError) err = NULL;

    if (!bale_store_create(w->sim, &o, &err)) {
        world_broken(w, "create: %s", err->message);
        return false;
    }
    start->created = bale_sim_image(w->sim);
    if (!world_open(w)) {
        world_broken(w, "the new store does not open");
        return false;
    }
    for (unsigned i = 0; i < w->max_sectors; i++) {
        oracle_reset(w->oracle, i,
                     i < w->backing_sectors ? VALUE_BACKING : VALUE_ZERO);
    }
    oracle_reset(w->oracle, oracle_size(w->oracle), o.size / SECTOR);
    oracle_reset(w->oracle, oracle_name(w->oracle), w->geo->backing ? 1 : 0);
    world_read(w, false);
    if (!world_step(w, 'h') || !world_step(w, 'y') || !world_close(w)) {
        world_broken(w, "the new store cannot be written");
        return false;
    }
    start->closed = bale_sim_image(w->sim);
    start->next_value = w->next_value;
    return !w->error;
}

bool world_start(World *w, const Case *c)
{
    static StartImage starts[G_N_ELEMENTS(geometries)];
    StartImage *start = &starts[w->geo - geometries];
    bool closed = !strcmp(c->start, "closed"), ok = true;

    world_tell(w, "start: %s\n", c->start);
    if (!start->closed && !start_make(w, start)) {
        return false;
    }
    bale_device_close(w->sim);
    w->sim = bale_sim_new_from_image(closed ? start->closed : start->created,
                                     &w->sim_options);
    w->next_value = start->next_value;
    if (!world_open(w)) {
        world_broken(w, "the new store does not open");
        return false;
    }
    world_settle(w);
    if (closed) {
        /* It is. */
    } else if (!strcmp(c->start, "active")) {
        ok = world_step(w, 'h') && world_step(w, 'y') && world_step(w, 'f') &&
             world_step(w, 'p') && world_step(w, 'f');
    } else if (strcmp(c->start, "fresh")) {
        world_broken(w, "no start is called '%s'", c->start);
        return false;
    }
    if (!ok) {
        world_broken(w, "the case cannot be started");
        return false;
    }
    world_read(w, false);
    world_settle(w);
    if (!w->error) {
        bale_sim_forget(w->sim);
    }
    world_tell(w, "steps:\n");
    return !w->error;
}
