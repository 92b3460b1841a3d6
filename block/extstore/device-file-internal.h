/*
 * The file or block device under a store: opening it safely, locking it, and
 * its size.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_BLOCK_EXTSTORE_DEVICE_FILE_INTERNAL_H
#define BALE_BLOCK_EXTSTORE_DEVICE_FILE_INTERNAL_H

#include <pthread.h>

#include "extstore/device.h"

/* The least block size that a regular file is given, in bytes. */
#define BALE_FILE_BLOCK_SIZE 4096

typedef struct BaleFile {
    /* Never changed after bale_file_open(). */
    int fd;
    char *filename;      /* owned */
    bool is_block;
    bool read_only;
    bool direct;         /* O_DIRECT is on */
    uint32_t block_size; /* bytes */

    /* Serialises what changes the size. */
    pthread_mutex_t size_lock;
} BaleFile;

/*
 * Open @filename by @flags (BaleDeviceFlags) into @file, which the caller
 * provides.  On failure, @file holds nothing, @errp says what and where, and a
 * file that this call created is gone again.
 */
bool bale_file_open(BaleFile *file, const char *filename, unsigned flags,
                    GError **errp);

/* Close, which also unlocks. */
void bale_file_close(BaleFile *file);

/* Size in bytes now, or a negative errno. */
int64_t bale_file_size(const BaleFile *file);

/* As in BaleDeviceOps. */
int bale_file_allocate(BaleFile *file, uint64_t offset, uint64_t len);
int bale_file_release(BaleFile *file, uint64_t offset, uint64_t len);
int bale_file_truncate(BaleFile *file, uint64_t size);

/*
 * Test builds only (-DBALE_FAULT_HOOKS): a hook sees every result that the
 * kernel gives and may answer another one.  @offset and @len are those of the
 * attempt.  Results are bytes for READ and WRITE, requests for SUBMIT, else 0;
 * or a negative errno.
 */
typedef enum BaleFaultSite {
    BALE_FAULT_READ,
    BALE_FAULT_WRITE,
    BALE_FAULT_SYNC,
    BALE_FAULT_SUBMIT,
    BALE_FAULT_SETUP,     /* of the libaio context */
    BALE_FAULT_DIRECT,    /* switching O_DIRECT on */
    BALE_FAULT_ALLOCATE,
    BALE_FAULT_RELEASE,
    BALE_FAULT_TRUNCATE,
    BALE_FAULT_SITES,
} BaleFaultSite;

#ifdef BALE_FAULT_HOOKS
typedef ssize_t BaleFaultHook(BaleFaultSite site, uint64_t offset, size_t len,
                              ssize_t res, void *opaque);

/* NULL: none.  Not while transfers are under way. */
void bale_fault_hook_set(BaleFaultHook *hook, void *opaque);

ssize_t bale_fault_hook(BaleFaultSite site, uint64_t offset, size_t len,
                        ssize_t res);
#else
static inline ssize_t bale_fault_hook(BaleFaultSite site, uint64_t offset,
                                      size_t len, ssize_t res)
{
    return res;
}
#endif

#endif
