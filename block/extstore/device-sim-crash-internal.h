/*
 * The history of the simulated device, and the crash states made from it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_BLOCK_EXTSTORE_DEVICE_SIM_CRASH_INTERNAL_H
#define BALE_BLOCK_EXTSTORE_DEVICE_SIM_CRASH_INTERNAL_H

#include "device-sim-internal.h"

typedef struct SimHistoryOp {
    BaleSimOp pub;
    /* A store: its data by blocks of SIM_BLOCK, NULL for zeroes. */
    SimBlock **blocks;
    size_t n_blocks;
    uint8_t *skip;  /* one for each sector that is lost, or NULL: none */
    size_t applied; /* bytes that a reader sees, all unless ret < 0 */
    SimTree before; /* what a reader saw before it completed */
} SimHistoryOp;

typedef struct SimHistory {
    SimTree origin;
    uint64_t events;
    SimHistoryOp *ops;
    size_t n_ops;
} SimHistory;

/*
 * Do @op to @tree.  Of a store, only the first @len bytes (a multiple of the
 * sector size), and only the sectors with a nonzero byte in @survive if that is
 * not NULL; of a release the same.
 */
void sim_op_apply(const SimHistoryOp *op, SimTree *tree, size_t len,
                  const uint8_t *survive);

uint64_t sim_history_crash_states(const SimHistory *history,
                                  const BaleSimCrashOptions *options,
                                  BaleSimCrashFunc *func, void *opaque);

/* The next number of a sequence that *@state, any number, begins. */
static inline uint64_t sim_random(uint64_t *state)
{
    uint64_t x = *state += UINT64_C(0x9e3779b97f4a7c15);

    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

#endif
