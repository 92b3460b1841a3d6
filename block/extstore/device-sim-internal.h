/*
 * Contents of the simulated device: a sparse map from block number to block
 * that can be copied in constant time.
 *
 * It is a radix tree whose nodes and blocks are reference counted.  A copy
 * shares everything; a change copies the way from the root to the block that
 * changes.  So a history can keep the contents before every store, and
 * thousands of crash states cost what they differ in.
 *
 * Threads: two trees that share nodes may be used by two threads; one tree is
 * used by one thread at a time.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_BLOCK_EXTSTORE_DEVICE_SIM_INTERNAL_H
#define BALE_BLOCK_EXTSTORE_DEVICE_SIM_INTERNAL_H

#include "extstore/device-sim.h"

#define SIM_BLOCK 4096 /* bytes */

typedef struct SimBlock {
    gint refs;
    uint64_t hash; /* of data, once it was asked for; atomic, 0: not yet */
    uint8_t data[SIM_BLOCK];
} SimBlock;

typedef struct SimNode SimNode;

/* Zero-initialise: empty.  Bytes that are not there are zeroes. */
typedef struct SimTree {
    SimNode *root;
    unsigned levels;
    uint64_t size; /* bytes; nothing but zeroes lies past it */
} SimTree;

struct BaleSimImage {
    gint refs;
    SimTree tree;
};

SimBlock *sim_block_new(const void *data, size_t len);
SimBlock *sim_block_ref(SimBlock *block);
void sim_block_unref(SimBlock *block); /* NULL is allowed */

/* @to is uninitialised; release it with sim_tree_clear(). */
void sim_tree_copy(SimTree *to, const SimTree *from);
void sim_tree_clear(SimTree *tree);

/* NULL is a block of zeroes.  Borrowed. */
const SimBlock *sim_tree_block(const SimTree *tree, uint64_t index);

/* @block is borrowed; NULL for zeroes.  The size does not change. */
void sim_tree_put(SimTree *tree, uint64_t index, SimBlock *block);

void sim_tree_read(const SimTree *tree, uint64_t offset, void *buf,
                   size_t len);

/* Grows the size as a file would. */
void sim_tree_write(SimTree *tree, uint64_t offset, const void *buf,
                    size_t len);

void sim_tree_zero(SimTree *tree, uint64_t offset, uint64_t len);

/* Cuts, or extends by zeroes. */
void sim_tree_resize(SimTree *tree, uint64_t size);

/* The first block that is not NULL from @index on; false: none. */
bool sim_tree_next(const SimTree *tree, uint64_t *index);

BaleSimImage *sim_image_new(const SimTree *tree);

#endif
