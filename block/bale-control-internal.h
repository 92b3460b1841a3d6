/*
 * What a bale node keeps for the monitor beside its store: the job that
 * compacts or verifies it, options that bale-set changes, and the notices that
 * become events.
 *
 * Unless said otherwise the functions are called in the main thread, with the
 * node's AioContext held.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_BLOCK_BALE_CONTROL_INTERNAL_H
#define BALE_BLOCK_BALE_CONTROL_INTERNAL_H

#include "qemu/osdep.h"
#include "block/block_int.h"
#include "qapi/qapi-types-job.h"

/*
 * Our types of jobs, which follow those of the program.  They have names only
 * if the program's enumeration could be extended (monitor.c).
 */
typedef enum BaleJobType {
#ifdef BALE_BUILT_IN
    BALE_JOB_TYPE_COMPACT = JOB_TYPE_BALE_COMPACT,
#else
    BALE_JOB_TYPE_COMPACT = JOB_TYPE__MAX,
#endif
    BALE_JOB_TYPE_VERIFY,
    BALE_JOB_TYPE_FLATTEN,
} BaleJobType;

bool bale_job_types_known(void);

typedef struct BaleJob BaleJob;

/* Lives in the driver's state of a node, all zero when that is opened. */
typedef struct BaleControl {
    BaleJob *job;             /* the one that runs; NULL: none */
    uint64_t speed;           /* atomic: bytes a second; 0: no bound */
    uint64_t space_threshold; /* bytes; 0: none */
    bool space_over;          /* and it was told */
    QEMUTimer *space_timer;   /* NULL: no threshold was ever set */
} BaleControl;

/* Options that concern the space of a store. */
typedef struct BaleSpace {
    uint64_t max_size;     /* as in BaleOpenOptions */
    bool compact_off;      /* not in the background, */
    uint64_t compact_rate; /* or bytes a second there; 0: no bound */
    bool given;            /* any of them, to the node */
} BaleSpace;

/* Take them out of @options. */
bool bale_space_read_options(BaleSpace *space, QDict *options, Error **errp);

typedef enum BaleJobKind {
    BALE_JOB_COMPACT,
    BALE_JOB_VERIFY,
    BALE_JOB_FLATTEN,
} BaleJobKind;

/*
 * Start a job on @bs, which keeps a reference to it; @speed replaces that of
 * the node.  @image is that to flatten.  False with @errp set if it cannot be.
 */
bool bale_job_start(const char *job_id, BlockDriverState *bs, BaleJobKind kind,
                    const char *image, int flags, uint64_t speed,
                    Error **errp);
const char *bale_job_id(BaleJob *job);
/* Does it change the store? */
bool bale_job_writes(BaleJob *job);

void bale_control_set_space_threshold(BlockDriverState *bs, uint64_t bytes);
/* Cancel the job and wait until it has let go of the store.  May poll. */
void bale_control_stop(BlockDriverState *bs);
/* The node is closed; it has no job. */
void bale_control_close(BaleControl *control);

/*
 * Notices of the engine, from any thread: a line in the log, and an event for
 * each of @node_names, the nodes of the store, which are taken.  @filename is
 * that of the store.
 */
void bale_notice_failed(char **node_names, const char *filename,
                        const char *reason);
void bale_notice_recovered(char **node_names, const char *filename);
/* @last: no more of them will be told. */
void bale_notice_damage(char **node_names, const char *filename,
                        const char *what, bool last);

#endif
