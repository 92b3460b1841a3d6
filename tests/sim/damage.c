/*
 * Damaged sectors: every one of a small store, in several ways.  And all
 * copies of the superblock but some.
 *
 * The store is either closed cleanly or left open, as by a kill; in the latter
 * case a flush has proven everything but the last write: behind the newest
 * barrier damage looks like a torn write, and may be taken for one.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "inline.h"
#include "sim.h"

#include <stdlib.h>
#include <string.h>

#define BLOCK 4096u
#define BARRIERS_LEN 1024u /* of a block that may hold a few barriers */
#define SUPER_COPIES 4
#define SUPER_STRIDE (512u << 10)
/* Zero sectors of the store that are damaged, too: each so many-th. */
#define ZERO_SECTORS_EVERY 512
/* Of a store with more sectors than this a sample is damaged. */
#define SECTORS_MAX 500
/* Of so many cases, one is of a geometry whose pages fill and are freed. */
#define LARGE_EVERY 8

enum { DAMAGE_FLIP, DAMAGE_ZERO, DAMAGE_STALE, DAMAGE_SWAP, DAMAGE_DUPLICATE,
       DAMAGE_BLOCK_ZERO, DAMAGE_KINDS };

static const char *kinds[DAMAGE_KINDS] = {
    "flip", "zero", "stale", "swap", "duplicate", "zero-block",
};

/* Make the store of @c; NULL and an error if that fails. */
static World *damage_world(const Case *c, bool *clean, char **error)
{
    World *w = world_new(c->geo, bale_sim_new(NULL));

    w->story = g_string_new(NULL);
    w->quiet = inline_enabled;
    /* What is given back to some devices stays as it was. */
    w->sim_options.no_release = c->seed / 2 % 2;
    if (world_start(w, c)) {
        for (const char *p = c->steps; *p && !w->error; p++) {
            if (!world_step(w, *p)) {
                world_broken(w, "step %c was refused", *p);
            }
        }
    }
    *clean = c->seed % 2;
    if (!w->error) {
        world_step(w, 'f');
        w->proven_event = bale_sim_events(w->sim);
        if (*clean) {
            world_close(w);
            w->proven_event = bale_sim_events(w->sim);
        } else {
            /*
             * The next segments carry the barriers for all there is.  Some
             * replace it all; the maintenance thread frees pages after that.
             */
            for (const char *p = c->seed % 4 ? "pf" : "hfff"; *p; p++) {
                world_step(w, *p);
            }
        }
    }
    if (w->error) {
        *error = broken_story(w, w->error);
        world_free(w);
        return NULL;
    }
    return w;
}

/* Numbers of the sectors of @image that hold something, and some others. */
static GArray *damage_sectors(BaleSimImage *image)
{
    GArray *out = g_array_new(FALSE, FALSE, sizeof(uint64_t));
    uint64_t n = bale_sim_image_size(image) / SECTOR;

    for (uint64_t i = 0; i < n; i++) {
        static const uint8_t zeroes[SECTOR];
        uint8_t buf[SECTOR];

        bale_sim_image_read(image, i * SECTOR, buf, SECTOR);
        if (memcmp(buf, zeroes, SECTOR) || i % ZERO_SECTORS_EVERY == 0) {
            g_array_append_val(out, i);
        }
    }
    return out;
}

/* Is @at in what was written after everything was proven? */
static bool damage_in_tail(World *w, uint64_t at)
{
    uint64_t ops = bale_sim_ops(w->sim);

    for (uint64_t i = 0; i < ops; i++) {
        BaleSimOp op;

        bale_sim_op(w->sim, i, &op);
        if (op.kind == BALE_SIM_OP_STORE && op.submitted > w->proven_event &&
            at >= op.offset && at < op.offset + op.len) {
            return true;
        }
    }
    return false;
}

/* A copy of the device with sector @n damaged; NULL: that changes nothing. */
static BaleSimImage *damage_apply(World *w, BaleSimImage *image, int kind,
                                  GArray *sectors, uint64_t n, GRand *rand)
{
    BaleSimOptions options = { .no_history = true };
    BaleDevice *dev = bale_sim_new_from_image(image, &options);
    uint64_t at = n * SECTOR;
    uint64_t other = g_array_index(sectors, uint64_t,
                                   g_rand_int_range(rand, 0, sectors->len)) *
                     SECTOR;
    g_autoptr(BaleSimImage) out = NULL;

    switch (kind) {
    case DAMAGE_FLIP:
        bale_sim_flip_bit(dev, at + g_rand_int_range(rand, 0, SECTOR),
                          g_rand_int_range(rand, 0, 8));
        break;
    case DAMAGE_ZERO:
        bale_sim_zero(dev, at, SECTOR);
        break;
    case DAMAGE_STALE: {
        /* The history is the world's: find the old contents there. */
        uint64_t block = at / 4096 * 4096;
        uint8_t buf[4096];
        g_autoptr(BaleSimImage) now = NULL;

        bale_sim_stale(w->sim, block, 4096);
        now = bale_sim_image(w->sim);
        bale_sim_image_read(now, block, buf, sizeof(buf));
        bale_sim_poke(dev, block, buf, sizeof(buf));
        bale_sim_image_read(image, block, buf, sizeof(buf));
        bale_sim_poke(w->sim, block, buf, sizeof(buf));
        break;
    }
    case DAMAGE_SWAP:
        if (damage_in_tail(w, at) != damage_in_tail(w, other)) {
            /* Two damages: of data, and of the barrier that proves it. */
            break;
        }
        if (w->store && (at % BLOCK < BARRIERS_LEN ||
                         other % BLOCK < BARRIERS_LEN)) {
            break; /* the same: segments begin there, and barriers with them */
        }
        bale_sim_swap(dev, at, other, SECTOR);
        break;
    case DAMAGE_DUPLICATE:
        bale_sim_duplicate(dev, other, at, SECTOR);
        break;
    case DAMAGE_BLOCK_ZERO:
        bale_sim_zero(dev, at / 4096 * 4096, 4096);
        break;
    }
    out = bale_sim_image(dev);
    bale_device_close(dev);
    return bale_sim_image_equal(image, out) ? NULL : g_steal_pointer(&out);
}

static char *damage_try(World *w, BaleSimImage *image, bool clean,
                        uint64_t *count, bool must_open)
{
    unsigned flags = VERIFY_DAMAGE | VERIFY_GO_ON_DAMAGED |
                     (must_open ? VERIFY_OPENS : 0) |
                     (clean ? 0 : VERIFY_UNPROVEN);

    ++*count;
    return verify_image(w, image, bale_sim_events(w->sim), flags, NULL);
}

/*
 * Where the device may not end earlier, as the superblock says.  Behind that
 * a cut takes away the barriers along with what they prove: nobody can tell.
 */
static uint64_t damage_known_end(BaleSimImage *image, bool clean)
{
    uint64_t end;

    bale_sim_image_read(image, 128, &end, sizeof(end));
    return clean ? bale_sim_image_size(image) : GUINT64_FROM_LE(end);
}

/* Cut at, and extended behind, each of a number of places. */
static char *damage_size(Case *c, World *w, BaleSimImage *image, bool clean,
                         uint64_t *count)
{
    uint64_t size = bale_sim_image_size(image);
    uint64_t known = damage_known_end(image, clean);
    BaleSimOptions options = { .no_history = true };
    g_autoptr(GRand) rand = g_rand_new_with_seed(c->seed);
    char *error = NULL;

    for (int i = 0; !error && i < 24; i++) {
        uint64_t to = i < 16 ? g_rand_double(rand) * known
                             : size + ((uint64_t)SECTOR << i);
        BaleDevice *dev = bale_sim_new_from_image(image, &options);
        g_autoptr(BaleSimImage) damaged = NULL;
        g_autofree char *detail = g_strdup_printf("size.%" PRIu64, to);

        if (i == 0) {
            to = 0;
        }
        bale_sim_resize(dev, to);
        damaged = bale_sim_image(dev);
        bale_device_close(dev);
        if (!*c->detail || !strcmp(c->detail, detail)) {
            error = damage_try(w, damaged, clean, count, to >= size);
        }
        if (error) {
            g_strlcpy(c->detail, detail, sizeof(c->detail));
        }
    }
    return error;
}

static char *damage_run(Case *c, uint64_t *count)
{
    char *error = NULL;
    bool clean;
    World *w = damage_world(c, &clean, &error);
    g_autoptr(BaleSimImage) image = NULL;
    GArray *sectors;

    if (!w) {
        return error;
    }
    image = bale_sim_image(w->sim);
    sectors = damage_sectors(image);
    for (int kind = 0; kind < DAMAGE_KINDS && !error; kind++) {
        for (guint i = 0; i < sectors->len && !error; i++) {
            uint64_t n = g_array_index(sectors, uint64_t, i);
            g_autoptr(GRand) rand =
                g_rand_new_with_seed(c->seed + n * DAMAGE_KINDS + kind);
            g_autofree char *detail =
                g_strdup_printf("%s.%" PRIu64, kinds[kind], n);
            g_autoptr(BaleSimImage) damaged = NULL;

            if (*c->detail
                    ? strcmp(c->detail, detail) != 0
                    : sectors->len > SECTORS_MAX &&
                          g_rand_int_range(rand, 0, sectors->len) >=
                              SECTORS_MAX) {
                continue;
            }
            damaged = damage_apply(w, image, kind, sectors, n, rand);
            if (!damaged) {
                continue;
            }
            /* A swap damages two places, perhaps both image records. */
            error = damage_try(w, damaged, clean, count,
                               kind != DAMAGE_SWAP);
            if (error) {
                g_strlcpy(c->detail, detail, sizeof(c->detail));
                if (g_getenv("BALE_SIM_SAVE")) {
                    bale_sim_image_save(damaged, g_getenv("BALE_SIM_SAVE"),
                                        NULL);
                }
            }
        }
    }
    if (!error) {
        error = damage_size(c, w, image, clean, count);
    }
    if (error) {
        g_autofree char *what = error;

        error = broken_story(w, what);
    }
    g_array_free(sectors, TRUE);
    world_free(w);
    return error;
}

static bool damage_next(Case *c, uint64_t n, GRand *rand, bool all)
{
    sequence_sample(c, "damage", rand, 1, 7);
    if ((n + 1) % LARGE_EVERY) {
        c->geo = &geometries[n % 3];
    }
    return true;
}

const Class class_damage = {
    "damage", 6, "any sector is damaged", damage_run, damage_next,
    100000,
};

/* --- superblocks --- */

static void super_damage(BaleDevice *dev, unsigned copy, int how, GRand *rand)
{
    uint64_t at = (uint64_t)copy * SUPER_STRIDE;
    uint8_t noise[SECTOR];

    switch (how) {
    case 0:
        bale_sim_zero(dev, at, 4096);
        break;
    case 1:
        bale_sim_flip_bit(dev, at + g_rand_int_range(rand, 0, SECTOR),
                          g_rand_int_range(rand, 0, 8));
        break;
    case 2:
        for (unsigned i = 0; i < SECTOR; i++) {
            noise[i] = g_rand_int(rand);
        }
        bale_sim_poke(dev, at, noise, sizeof(noise));
        break;
    default:
        /* Another copy, in the wrong place. */
        bale_sim_duplicate(dev, (copy + 1) % SUPER_COPIES * SUPER_STRIDE, at,
                           4096);
        break;
    }
}

static char *super_run(Case *c, uint64_t *count)
{
    char *error = NULL;
    bool clean;
    World *w = damage_world(c, &clean, &error);
    g_autoptr(BaleSimImage) image = NULL;
    g_autoptr(GRand) rand = g_rand_new_with_seed(c->seed);
    BaleSimOptions options = { .no_history = true };

    if (!w) {
        return error;
    }
    image = bale_sim_image(w->sim);
    /* Each set of copies that are damaged, but for none and all of them. */
    for (unsigned set = 1; !error && set < (1u << SUPER_COPIES) - 1; set++) {
        for (int how = 0; !error && how < 4; how++) {
            BaleDevice *dev = bale_sim_new_from_image(image, &options);
            g_autoptr(BaleSimImage) damaged = NULL;

            for (unsigned copy = 0; copy < SUPER_COPIES; copy++) {
                if (set & (1u << copy)) {
                    super_damage(dev, copy, how, rand);
                }
            }
            damaged = bale_sim_image(dev);
            bale_device_close(dev);
            ++*count;
            /* Nothing but superblocks is damaged: all must be right. */
            error = verify_image(w, damaged, bale_sim_events(w->sim),
                                 VERIFY_DAMAGE | VERIFY_OPENS | VERIFY_GO_ON,
                                 NULL);
            if (error) {
                g_autofree char *what = error;
                g_autofree char *text =
                    g_strdup_printf("superblocks %#x damaged (%d): %s", set,
                                    how, what);

                error = broken_story(w, text);
            }
        }
    }
    world_free(w);
    return error;
}

static bool super_next(Case *c, uint64_t n, GRand *rand, bool all)
{
    sequence_sample(c, "super", rand, 1, 5);
    return true;
}

const Class class_super = {
    "super", 7, "all but one superblock copy damaged", super_run, super_next,
    20000,
};
