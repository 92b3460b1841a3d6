/*
 * Stores in memory, for unit tests: each step must succeed, or the test fails.
 *
 * Threads: any.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef TESTS_UNIT_STORES_H
#define TESTS_UNIT_STORES_H

#include "extstore/device-sim.h"
#include "extstore/store.h"

/* $BALE_SEED, or a new one; the log of the test tells it. */
uint64_t test_seed(void);

/* For damage and failed of BaleOpenOptions: ends the test. */
void test_complain(void *opaque, const char *what);

/* A simulated device that holds a new store. */
BaleDevice *test_store_new(const BaleSimOptions *sim,
                           const BaleCreateOptions *create);

/*
 * Open the store on @dev, which belongs to it from then on, and its image @name
 * if @image is given.
 */
BaleStore *test_store_open(BaleDevice *dev, const BaleOpenOptions *open,
                           const char *name, BaleImage **image);

/* Close image (may be NULL) and store, and free the device. */
void test_store_close(BaleStore *store, BaleImage *image);

/* Make the store clean, as before a close. */
void test_store_checkpoint(BaleStore *store);

/* A device with the contents that @dev has now. */
BaleDevice *test_device_copy(BaleDevice *dev, const BaleSimOptions *sim);

#endif
