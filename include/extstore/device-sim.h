/*
 * The simulated device: a store's bytes in memory, for tests only.
 *
 * It implements the vtable of extstore/device.h and is not part of release
 * builds.  On top of it, a test can
 *
 *   - let transfers complete at once, from a thread in an order drawn from a
 *     seed, or only when the test says so;
 *   - read back the history: every store, release, truncate, allocate and
 *     flush, with the moments of its submission and its completion;
 *   - enumerate what a power cut at any moment could have left, and make a new
 *     device from each such crash image (cheaply: contents are shared copy on
 *     write, so a state costs about what it differs in);
 *   - make the n-th call of a kind fail, or transfer less than was asked;
 *   - damage the contents: flipped, zeroed, stale, swapped, duplicated blocks,
 *     and ranges whose stores are acknowledged but lost.
 *
 * The device as a process sees it, and as a crash may leave it.  A read sees
 * every completed store.  In a crash, a store, release, truncate or growth is
 * certain to survive only if a flush that was issued after its completion has
 * completed with 0; each one that is not certain survives or not,
 * independently of all others, and a store may survive sector by sector (512
 * bytes).  That also holds for operations that were submitted and not
 * completed, and for stores that failed.  As on Linux, a failed flush dooms
 * what it should have made certain: no later flush makes it certain either,
 * so that an engine that retries a failed flush is caught.
 *
 * Time.  The device counts events: a transfer that completes inside its own
 * call is one event; in the other modes submission and completion are one
 * event each.  "Point p" means that exactly the first p events have happened.
 * A test notes bale_sim_events() when it is promised something (a flush was
 * acknowledged) and requires that promise of every crash point from there on.
 *
 * Threads: all functions may be called from any thread.  Errors: allocation
 * failure aborts (these are tests); a misuse is an assertion.
 *
 * Determinism: with BALE_SIM_IMMEDIATE and BALE_SIM_MANUAL and one submitting
 * thread, the same calls and the same seed give the same history and the same
 * crash states.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_EXTSTORE_DEVICE_SIM_H
#define BALE_EXTSTORE_DEVICE_SIM_H

#include "extstore/device.h"

/* A crash tears stores at this size, in bytes. */
#define BALE_SIM_SECTOR 512

/* Unflushed operations of which every subset is enumerated, by default. */
#define BALE_SIM_EXHAUSTIVE_DEFAULT 12
#define BALE_SIM_EXHAUSTIVE_MAX 20

/* States sampled per crash point above that, by default. */
#define BALE_SIM_SAMPLES_DEFAULT 256

typedef enum BaleSimMode {
    BALE_SIM_IMMEDIATE, /* completes inside the submitting call */
    BALE_SIM_DEFERRED,  /* a thread completes, reordered by the seed */
    BALE_SIM_MANUAL,    /* bale_sim_step() completes, reordered by the seed */
} BaleSimMode;

/* All zero is a good default: 4096-byte blocks, growable, empty, immediate. */
typedef struct BaleSimOptions {
    uint32_t block_size; /* bytes; 0: 4096 */
    uint64_t size;       /* bytes at the start; ignored with an image */
    uint64_t max_size;   /* bytes; 0: unlimited.  Stores and allocates past it
                          * answer -ENOSPC */
    bool fixed_size;     /* as a block device: allocate does not grow */
    bool read_only;
    bool no_release;     /* release answers -ENOTSUP */
    bool no_history;     /* do not record; no crash states, no stale blocks */
    BaleSimMode mode;
    uint64_t seed;       /* of the order of completions */
} BaleSimOptions;

/* ---- contents --------------------------------------------------------- */

/* Frozen contents of a device.  Reference counted, thread-safe. */
typedef struct BaleSimImage BaleSimImage;

BaleSimImage *bale_sim_image_ref(BaleSimImage *image);
void bale_sim_image_unref(BaleSimImage *image); /* NULL is allowed */
uint64_t bale_sim_image_size(const BaleSimImage *image);

/* Bytes past the end read as zeroes; any offset and length. */
void bale_sim_image_read(const BaleSimImage *image, uint64_t offset, void *buf,
                         size_t len);
bool bale_sim_image_equal(const BaleSimImage *a, const BaleSimImage *b);

/* Of size and contents.  Images of one origin that are equal have the same. */
uint64_t bale_sim_image_hash(const BaleSimImage *image);

/* To and from a (sparse) file, to look at a state with other tools. */
bool bale_sim_image_save(const BaleSimImage *image, const char *filename,
                         GError **errp);
BaleSimImage *bale_sim_image_load(const char *filename, GError **errp);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(BaleSimImage, bale_sim_image_unref)

/* ---- the device ------------------------------------------------------- */

/* Close with bale_device_close().  @options may be NULL; it is copied. */
BaleDevice *bale_sim_new(const BaleSimOptions *options);

/* The device starts with the contents of @image (borrowed), all durable. */
BaleDevice *bale_sim_new_from_image(BaleSimImage *image,
                                    const BaleSimOptions *options);

/* What a reader sees now: every completed operation.  Owned by the caller. */
BaleSimImage *bale_sim_image(BaleDevice *dev);

/* What is certain to survive a crash now, and nothing else. */
BaleSimImage *bale_sim_durable_image(BaleDevice *dev);

/* Change the mode; what is pending completes by the new one. */
void bale_sim_set_mode(BaleDevice *dev, BaleSimMode mode);

/* BALE_SIM_MANUAL: complete one pending transfer; false if there was none. */
bool bale_sim_step(BaleDevice *dev);

/* BALE_SIM_MANUAL: step until nothing is pending; returns the steps taken. */
unsigned bale_sim_run(BaleDevice *dev);

unsigned bale_sim_pending(BaleDevice *dev);

/* ---- history ---------------------------------------------------------- */

typedef enum BaleSimOpKind {
    BALE_SIM_OP_STORE,
    BALE_SIM_OP_RELEASE,
    BALE_SIM_OP_GROW,     /* allocate that made the device larger */
    BALE_SIM_OP_TRUNCATE,
    BALE_SIM_OP_FLUSH,
} BaleSimOpKind;

typedef struct BaleSimOp {
    BaleSimOpKind kind;
    uint64_t offset;    /* GROW, TRUNCATE: 0 */
    uint64_t len;       /* GROW, TRUNCATE: the new size */
    uint64_t submitted; /* number of the event, from 1 */
    uint64_t completed; /* the same, or UINT64_MAX: not yet */
    uint64_t durable;   /* event since when it is certain to survive, or
                         * UINT64_MAX: not yet */
    int ret;            /* as completed */
} BaleSimOp;

/* Events so far: the crash point "now". */
uint64_t bale_sim_events(BaleDevice *dev);

/* Operations so far, in order of submission, and the @index-th of them. */
uint64_t bale_sim_ops(BaleDevice *dev);
void bale_sim_op(BaleDevice *dev, uint64_t index, BaleSimOp *op);

/* Forget the history; what is complete becomes certain.  Nothing may be
 * pending.  Events start again at 0. */
void bale_sim_forget(BaleDevice *dev);

/* The history as text, one line per operation.  Newly allocated. */
char *bale_sim_story(BaleDevice *dev);

/* ---- crash states ----------------------------------------------------- */

typedef struct BaleSimCrash {
    uint64_t point;     /* events that have happened */
    uint64_t state;     /* number of the state within its point, from 0 */
    unsigned uncertain; /* operations that may survive or not */
    uint64_t mask;      /* which survived; bit 0 is the first uncertain one,
                         * beyond 64 not shown */
    bool sampled;       /* drawn from the seed, not enumerated */
    bool torn;          /* some stores survived in part */
} BaleSimCrash;

/*
 * One crash state.  @image is borrowed.  Return false to stop.  It may create
 * and use other devices, but must not touch the device that is enumerated.
 */
typedef bool BaleSimCrashFunc(BaleSimImage *image, const BaleSimCrash *crash,
                              void *opaque);

/* All zero: every point, defaults above, no torn states. */
typedef struct BaleSimCrashOptions {
    uint64_t first_point;    /* from this point … */
    uint64_t last_point;     /* … to this one; 0: the last event */
    bool barriers_only;      /* only the points right before and after each
                              * flush completes, and the last: every image of
                              * the points between is among theirs */
    unsigned max_exhaustive; /* uncertain operations of which every subset is
                              * enumerated; 0: BALE_SIM_EXHAUSTIVE_DEFAULT */
    unsigned samples;        /* states per point above that; 0:
                              * BALE_SIM_SAMPLES_DEFAULT */
    unsigned torn_samples;   /* further states per point, with stores torn */
    uint64_t seed;           /* of the samples */
    bool only_state;         /* only the state number @state of each point */
    uint64_t state;
} BaleSimCrashOptions;

/*
 * Call @func for what a crash at each chosen point could have left.  The
 * history up to now is enumerated; transfers may go on meanwhile.  Returns
 * the number of calls.  The same options and history give the same states:
 * { .first_point = p, .last_point = p, .only_state = true, .state = s } with
 * the other members unchanged replays one.
 */
uint64_t bale_sim_crash_states(BaleDevice *dev,
                               const BaleSimCrashOptions *options,
                               BaleSimCrashFunc *func, void *opaque);

/* ---- faults ----------------------------------------------------------- */

typedef enum BaleSimCall {
    BALE_SIM_GET,
    BALE_SIM_STORE,
    BALE_SIM_FLUSH,
    BALE_SIM_ALLOCATE,
    BALE_SIM_RELEASE,
    BALE_SIM_TRUNCATE,
    BALE_SIM_CALLS,
} BaleSimCall;

/*
 * Attempts are counted: what the retry loop (shared with the aio device) does
 * after a short transfer, EINTR or EAGAIN is an attempt of its own.
 */
typedef struct BaleSimFault {
    BaleSimCall call;
    uint64_t nth;    /* from 1, counted from bale_sim_fault(); 0 is 1 */
    bool sticky;     /* that attempt and all later ones, not only that one */
    int error;       /* negative errno, or 0 for a short transfer */
    size_t short_len;/* get, store, with @error 0: bytes that the attempt
                      * transfers, rounded down to the block size */
} BaleSimFault;

/* Arm @fault (copied); several may be armed.  A failing call changes nothing
 * that a read shows; a failed store is uncertain in a crash. */
void bale_sim_fault(BaleDevice *dev, const BaleSimFault *fault);
void bale_sim_faults_clear(BaleDevice *dev);

/* Attempts of this kind so far, and faults that were served so far. */
uint64_t bale_sim_calls(BaleDevice *dev, BaleSimCall call);
uint64_t bale_sim_faults_hit(BaleDevice *dev);

/* ---- damage: at once, not in the history ------------------------------ */

void bale_sim_poke(BaleDevice *dev, uint64_t offset, const void *buf,
                   size_t len);
void bale_sim_flip_bit(BaleDevice *dev, uint64_t offset, unsigned bit);
void bale_sim_zero(BaleDevice *dev, uint64_t offset, uint64_t len);
void bale_sim_swap(BaleDevice *dev, uint64_t a, uint64_t b, uint64_t len);
void bale_sim_duplicate(BaleDevice *dev, uint64_t from, uint64_t to,
                        uint64_t len);

/* Put back what each block of the range (multiples of the block size) held
 * before the last completed store to it.  Returns blocks that changed. */
uint64_t bale_sim_stale(BaleDevice *dev, uint64_t offset, uint64_t len);

/* Cut or extend the device without an operation. */
void bale_sim_resize(BaleDevice *dev, uint64_t size);

/* Stores to this range (the part of them inside it) are acknowledged from now
 * on, but lost.  @len 0 ends all such ranges. */
void bale_sim_lose(BaleDevice *dev, uint64_t offset, uint64_t len);

#endif
