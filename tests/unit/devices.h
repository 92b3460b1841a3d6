/*
 * Real devices on files of a new directory, for the unit tests of device-aio:
 * each step must succeed, or the test fails.
 *
 * Threads: any.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef TESTS_UNIT_DEVICES_H
#define TESTS_UNIT_DEVICES_H

#include "extstore/device.h"

#include <glib.h>

#define BLOCK 4096
#define RW_NEW (BALE_DEVICE_CREATE | BALE_DEVICE_TRUNCATE)

/*
 * g_test_init(), and a directory.  Warnings are counted and not fatal from then
 * on.
 */
void dev_tests_init(int *argc, char ***argv);

/* g_test_run(); the directory of a test that fails stays. */
int dev_tests_run(void);

extern char *dev_directory;
extern unsigned dev_warnings;

/* What is called @name in the directory; owned. */
char *dev_path(const char *name);

/* $BALE_SEED, or a new one; the log of the test tells it. */
uint32_t dev_seed(void);

/* What a shell makes of @command: its exit status. */
int dev_shell(const char *command);

BaleDevice *dev_open(const char *path, unsigned flags);
BaleDeviceInfo dev_info(BaleDevice *dev);
BaleDeviceStats dev_stats(BaleDevice *dev);

/* What the device says of how it works; owned. */
char *dev_backend(BaleDevice *dev);

/* @len bytes @fill, for O_DIRECT; bale_memory_free() frees them. */
void *dev_block(uint8_t fill, size_t len);

/* A transfer; @left of all that are under way together is counted down. */
typedef struct DevIo {
    BaleDeviceIo io; /* first; its done is dev_io_done() */
    gint *left;
    int ret;
} DevIo;

void dev_io_done(BaleDeviceIo *io, int ret);

/* Until @left is 0. */
void dev_wait(gint *left);

/* Stores and flushes are done on the thread that asks for them. */
extern _Thread_local bool dev_in_place;

/* Return what the device says; get looks whether all it got is @fill. */
int dev_store(BaleDevice *dev, uint64_t offset, uint8_t fill, size_t len);
int dev_get(BaleDevice *dev, uint64_t offset, uint8_t fill, size_t len);
int dev_flush(BaleDevice *dev);

/* Run a test body on each kind of backend that a file can have. */
typedef void DevBody(BaleDevice *dev);

void dev_each_backend(DevBody *body);

/* A body: write and read a little. */
void dev_round_trip(BaleDevice *dev);

/* A new device in @path can do that, in this way. */
void dev_work_in(const char *path, const char *backend_expected);

/*
 * Four threads, each with its own stripe of the device and a flat model of it,
 * and several transfers of any size under way that do not overlap.
 */
void dev_stress(BaleDevice *dev, uint32_t seed, unsigned rounds);

#endif
