/*
 * What the parts of the simulator share.
 *
 *     oracle.c    what may be read, now and after a crash, sector by sector
 *     world.c     a small store on a simulated device; its workloads
 *     look.c      read everything, compare it with the oracle
 *     verify.c    recover a device's contents and compare with the oracle
 *     crash.c     power cuts at any moment, also inside recovery
 *     fault.c     errors of the device and of the allocator
 *     damage.c    damaged sectors and superblocks
 *     inline.c    the engine's work, done by whoever waits for it
 *     model.c     parallel requests, checkpoints and crashes, at random
 *     main.c      options, cases, budgets, results
 *
 * A case is a line of text, CLASS/GEOMETRY/START/STEPS/SEED[/DETAIL], and
 * always runs the same steps.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef TESTS_SIM_H
#define TESTS_SIM_H

#include <glib.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "extstore/device-sim.h"
#include "extstore/store.h"

#define SECTOR 512u
#define EVENT_NEVER UINT64_MAX
#define NOW UINT64_MAX
#define STEPS_MAX 64

/* --- the oracle --- */

/* Contents of a sector: a number, which world.c turns into bytes. */
#define VALUE_ZERO 0u
#define VALUE_BACKING 1u
#define VALUE_FIRST 2u
#define VALUE_UNKNOWN UINT32_MAX /* bytes that nobody ever wrote */

/* What there may be besides the image: snapshots of it, and its clone. */
#define SNAPSHOTS 2
#define CLONE SNAPSHOTS
#define OTHERS 3

typedef struct Oracle Oracle;

/*
 * Everything reads as zeroes, durably; @sectors is the most there will be.
 * Tracks 0 to @sectors - 1 are the image's; oracle_sectors() are the others'.
 */
Oracle *oracle_new(unsigned sectors);
void oracle_free(Oracle *o);
/* Further tracks. */
unsigned oracle_size(Oracle *o);      /* the image's size in sectors */
unsigned oracle_name(Oracle *o);      /* number of the backing file's name */
/* Another one's number, or 0 when there is none; its size; its sectors. */
unsigned oracle_other(Oracle *o, unsigned other);
unsigned oracle_other_size(Oracle *o, unsigned other);
unsigned oracle_sectors(Oracle *o, unsigned other);

/* All that is there: what was said before is forgotten. */
void oracle_reset(Oracle *o, unsigned track, uint32_t value);
/*
 * @n tracks from @first on are about to become @value; @event is the device's
 * event count.  Returns the moment, which oracle_end() takes.
 */
uint64_t oracle_begin(Oracle *o, unsigned first, unsigned n, uint32_t value,
                      uint64_t event);
/* The same, with a value for each. */
uint64_t oracle_begin_each(Oracle *o, unsigned first, unsigned n,
                           const uint32_t *value, uint64_t event);
/* That has ended; with @durable not EVENT_NEVER it survives from there on. */
void oracle_end(Oracle *o, unsigned first, unsigned n, uint64_t begun,
                bool ok, uint64_t durable);
/* The moment now, to be passed to oracle_flushed() later. */
uint64_t oracle_moment(Oracle *o);
/* All that had ended at @moment survives any crash from @event on. */
void oracle_flushed(Oracle *o, uint64_t moment, uint64_t event);
/*
 * May @track be @value after a crash at @event?  NOW: may a reader see it that
 * began at @moment (and ends now)?
 */
bool oracle_allows(Oracle *o, unsigned track, uint32_t value, uint64_t event,
                   uint64_t moment);
/* The first of @n tracks from @first on that may not be @value[i]; or @n. */
unsigned oracle_refuses(Oracle *o, unsigned first, unsigned n,
                        const uint32_t *value, uint64_t event,
                        uint64_t moment);
/* The same for now, as if nothing had been acknowledged after @proven. */
unsigned oracle_refuses_unproven(Oracle *o, unsigned first, unsigned n,
                                 const uint32_t *value, uint64_t proven);
/* Nobody will ask about a crash before @event: forget what that rules out. */
void oracle_prune(Oracle *o, uint64_t event);
/* What it may be, as text. */
char *oracle_describe(Oracle *o, unsigned track, uint64_t event);

/* --- a store and what is done to it --- */

typedef struct Geometry {
    const char *name;
    uint32_t cluster_size;
    BaleCodec codec;
    unsigned clusters;  /* of the image at first, less 3 sectors */
    unsigned max;       /* clusters it may grow to */
    bool backing;       /* something lies under it */
    bool skip_unchanged; /* writes are compared with what is there */
    uint64_t max_size;  /* of the store; 0: no limit */
    uint32_t ahead_bytes; /* of zeroes at a time; 0: more than we flush */
    uint32_t mutable_clusters; /* in memory; 0: more than there are */
} Geometry;

extern const Geometry geometries[];
extern const unsigned geometry_count;

typedef struct Case {
    char class_name[16];
    const Geometry *geo;
    char start[16];     /* fresh, closed, active */
    char steps[STEPS_MAX + 1];
    uint64_t seed;
    char detail[64];    /* restricts a class to one of its states; or empty */
} Case;

/* NULL with @c filled in, or what is wrong.  The inverse: newly allocated. */
char *case_parse(Case *c, const char *text);
char *case_text(const Case *c, const char *detail);

/* The letters of all steps, and of those that are enumerated. */
#define STEPS_ENUMERATED "wopzdfuKjksgcbrnevim"
#define STEPS_SAMPLED "wopzdfujksgcbrwophhhqyfKKnnevimjjp"
/* What fills and frees pages. */
#define STEPS_SPACE "hhhhhccwfkrsdKKneimj"
const char *step_describe(char step);

typedef struct World {
    const Geometry *geo;
    unsigned cluster_sectors, max_sectors, backing_sectors;
    BaleDevice *sim;
    BaleSimOptions sim_options; /* of the device that world_start() makes */
    BaleStore *store;   /* NULL: not open */
    BaleImage *image;
    Oracle *oracle;
    uint32_t next_value;
    uint8_t *buf;       /* max_sectors long */
    pthread_mutex_t story_lock; /* the store's threads tell, too */
    GString *story;     /* NULL: nobody wants it */
    unsigned workers;
    bool quiet;         /* the maintenance thread does what it has to between
                         * steps: a case is the same each time */
    bool doubtful;      /* reopened after a failure and not written since: a
                         * flush has nothing to make durable */
    uint64_t proven_event; /* what was flushed by then is proven */
    GHashTable *memo;   /* verify.c's: hash of an image -> what it holds */
    gint complaints;    /* damage that the store has reported */
    gint failures;      /* times that it said it was poisoned */
    char *error;        /* the first broken promise */
} World;

/* Everything that can be read. */
typedef struct Observed {
    uint32_t size;      /* sectors */
    uint32_t name;
    uint32_t other[OTHERS];      /* numbers, or 0 */
    uint32_t other_size[OTHERS]; /* sectors, or this */
#define OTHER_UNREADABLE UINT32_MAX
    uint32_t *value;    /* of each sector: the image's, then the others' */
    bool *error;        /* it cannot be read */
    int ret;            /* the first error, and where it was */
    unsigned ret_track;
    bool silent;        /* something cannot be read, and no damage was told */
    unsigned silent_track;
} Observed;

/* @sim is transferred.  Nothing is opened. */
World *world_new(const Geometry *geo, BaleDevice *sim);
void world_free(World *w);
/* Create the store, bring it where @c->start says, forget how it came there. */
bool world_start(World *w, const Case *c);
bool world_open(World *w);
/* False if not everything was made durable. */
bool world_close(World *w);
/* Do one step.  False if the store refused it. */
bool world_step(World *w, char step);
/* The oracle expects what is there now, and nothing else. */
void world_settle(World *w);
void oracle_expect(Oracle *o, const Observed *seen, unsigned max_sectors);
/*
 * After a close that failed, what is there is what a crash could have left,
 * and from now on reads must answer that.
 */
void world_recovered(World *w);
/* Free @out with observed_clear(). */
void world_look(World *w, Observed *out);
void observed_clear(Observed *o);
void observed_copy(Observed *to, const Observed *from, const World *w);
/* As oracle_refuses().  NULL, or what is wrong, newly allocated. */
char *world_compare(World *w, const Observed *seen, uint64_t event,
                    uint64_t moment, bool unproven);
/* The numbers of all others, each 0 if it is not there. */
void world_others(World *w, uint32_t number[OTHERS]);
char *world_other_name(unsigned other, uint32_t number);
/* NULL: it cannot be opened.  Close it with bale_image_close(). */
BaleImage *world_open_other(World *w, unsigned other, uint32_t number,
                            GError **errp);
BaleBackingRead world_backing_read;
/* Read all that can be read and compare; @errors_allowed: -EIO is fine. */
void world_read(World *w, bool errors_allowed);
void world_broken(World *w, const char *fmt, ...) G_GNUC_PRINTF(2, 3);
void world_fill(const World *w, uint8_t *buf, unsigned sector, unsigned n,
                uint32_t value);
uint32_t world_value(const World *w, const uint8_t *buf, unsigned sector);
bool world_poisoned(World *w);
/* Let the poisoned store write everything again; is it well now? */
bool world_revive(World *w);
const char *backing_name(uint32_t number);
uint32_t backing_number(const char *name);

/* --- recovering and comparing --- */

typedef enum VerifyFlags {
    VERIFY_DAMAGE = 1 << 0,   /* errors are fine, if they are reported */
    VERIFY_UNPROVEN = 1 << 1, /* with DAMAGE: what no barrier proves yet (see
                               * proven_event) may be lost */
    VERIFY_GO_ON = 1 << 2,    /* write, flush, close, reopen, too */
    VERIFY_OPENS = 1 << 3,    /* with DAMAGE: open may not fail */
    VERIFY_GO_ON_DAMAGED = 1 << 4, /* with DAMAGE: if all can be read although
                               * some was told, write, flush, kill, open */
} VerifyFlags;

/*
 * Open what @image holds and compare with @w's oracle at @event.  NULL, or
 * what is wrong, newly allocated.  @out may be NULL; else observed_clear().
 */
char *verify_image(World *w, BaleSimImage *image, uint64_t event,
                   unsigned flags, Observed *out);

/* --- classes --- */

typedef struct Class {
    const char *name;
    int number;         /* in design/durability.md */
    const char *what;
    /* Run one case; adds to *@count the states it looked at.  NULL, or what
     * is wrong, newly allocated; then @c->detail may be made narrower. */
    char *(*run)(Case *c, uint64_t *count);
    /* The @n-th case to run; false: there are no more. */
    bool (*next)(Case *c, uint64_t n, GRand *rand, bool all);
    uint64_t states;    /* that make test wants to see */
} Class;

extern const Class class_crash, class_recovery, class_fault, class_flush,
    class_memory, class_damage, class_super, class_model;

extern bool verbose;  /* print the story of each case */
/* Damaged stores that opened marked as corrupt: reported, not compared. */
extern uint64_t corrupt_states;
/* Stores that were opened and read; the others had bytes seen before. */
extern uint64_t recovered_states;

/* Sequences: all up to length 3 in an order of @rand's, then samples. */
bool sequence_next(Case *c, const char *class_name, uint64_t n, GRand *rand,
                   bool all);
/* NULL, or what samples are made of. */
extern const char *sequence_letters;
/* A sample of @min to @max steps. */
void sequence_sample(Case *c, const char *class_name, GRand *rand,
                     unsigned min, unsigned max);
char *broken_story(World *w, const char *what);

#endif
