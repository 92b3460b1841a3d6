/*
 * The file or block device under a store: open, lock, allocate, release.
 *
 * Opening: only a regular file or a block device; symbolic links to one are
 * followed, as every program does with a name that its user typed.  The
 * descriptor is O_CLOEXEC.  A new file has mode 0600 and never replaces one
 * that exists, unless that was asked for, and then it is emptied only after
 * the lock is held.  A block device is claimed (O_EXCL) by a writer.
 *
 * Locking: by the same protocol as QEMU uses on image files, so that QEMU and
 * this device keep out of each other's way.  Locks are open file description
 * locks (F_OFD_SETLK), all of them shared, on single bytes far inside the
 * file: byte 100 + i says "somebody uses permission i", byte 200 + i says
 * "somebody does not let others use permission i".  An opener sets its bytes
 * first and then looks whether the opposite bytes are set by others; of two
 * that open at the same moment, one or both may fail, never none.  The bytes
 * are fixed numbers of QEMU's; the locks go when the descriptor is closed.
 *
 * Threads: bale_file_size() from any thread; what changes the size is
 * serialised by size_lock.  Errors: 0 or a negative errno after the open.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "device-file-internal.h"

#include <errno.h>
#include <fcntl.h>
#include <glib/gstdio.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util/memory.h"

/* QEMU's numbers: see the head comment. */
#define LOCK_USED_BASE 100
#define LOCK_DENIED_BASE 200

enum {
    PERM_CONSISTENT_READ = 0,
    PERM_WRITE = 1,
    PERM_WRITE_UNCHANGED = 2,
    PERM_RESIZE = 3,
    PERMS = 4,
};

static const char *const perm_names[PERMS] = {
    "consistent read", "write", "write unchanged", "resize",
};

/* Attempts at a call that a signal may interrupt. */
#define EINTR_RETRIES_MAX 1000

/* Largest block size that a device or a file system may ask for, in bytes. */
#define BLOCK_SIZE_MAX 65536

/* ---- errors ----------------------------------------------------------- */

static void G_GNUC_PRINTF(3, 4)
file_error(GError **errp, int errnum, const char *format, ...)
{
    g_autofree char *text = NULL;
    va_list args;

    va_start(args, format);
    text = g_strdup_vprintf(format, args);
    va_end(args);
    g_set_error_literal(errp, G_FILE_ERROR, g_file_error_from_errno(errnum),
                        text);
}

#ifdef BALE_FAULT_HOOKS
static BaleFaultHook *fault_hook;
static void *fault_hook_opaque;

void bale_fault_hook_set(BaleFaultHook *hook, void *opaque)
{
    /* Other threads only look between their transfers. */
    __atomic_store_n(&fault_hook, NULL, __ATOMIC_RELEASE);
    __atomic_store_n(&fault_hook_opaque, opaque, __ATOMIC_RELEASE);
    __atomic_store_n(&fault_hook, hook, __ATOMIC_RELEASE);
}

ssize_t bale_fault_hook(BaleFaultSite site, uint64_t offset, size_t len,
                        ssize_t res)
{
    BaleFaultHook *hook = __atomic_load_n(&fault_hook, __ATOMIC_ACQUIRE);

    if (!hook) {
        return res;
    }
    return hook(site, offset, len, res,
                __atomic_load_n(&fault_hook_opaque, __ATOMIC_ACQUIRE));
}
#endif

/* ---- locking ---------------------------------------------------------- */

static int lock_byte(int fd, int command, short type, off_t byte,
                     short *found)
{
    struct flock lock = {
        .l_type = type,
        .l_whence = SEEK_SET,
        .l_start = byte,
        .l_len = 1,
    };

    for (unsigned i = 0; i < EINTR_RETRIES_MAX; i++) {
        if (fcntl(fd, command, &lock) == 0) {
            *found = lock.l_type;
            return 0;
        }
        if (errno != EINTR) {
            return -errno;
        }
    }
    return -EINTR;
}

/* Set our bytes: permissions in @used are used, those in @denied are denied. */
static int lock_set(int fd, unsigned used, unsigned denied)
{
    short found;

    for (int i = 0; i < PERMS; i++) {
        int ret = 0;

        if (used & (1u << i)) {
            ret = lock_byte(fd, F_OFD_SETLK, F_RDLCK, LOCK_USED_BASE + i,
                            &found);
        }
        if (ret == 0 && (denied & (1u << i))) {
            ret = lock_byte(fd, F_OFD_SETLK, F_RDLCK, LOCK_DENIED_BASE + i,
                            &found);
        }
        if (ret < 0) {
            return ret;
        }
    }
    return 0;
}

/* Has anybody else set a byte of @base whose bit is in @perms?  Which one? */
static int lock_look(int fd, off_t base, unsigned perms, int *perm)
{
    for (int i = 0; i < PERMS; i++) {
        short found;
        int ret;

        if (!(perms & (1u << i))) {
            continue;
        }
        /* A question about a write lock finds read locks of others. */
        ret = lock_byte(fd, F_OFD_GETLK, F_WRLCK, base + i, &found);
        if (ret < 0) {
            return ret;
        }
        if (found != F_UNLCK) {
            *perm = i;
            return 1;
        }
    }
    return 0;
}

static bool file_lock(const BaleFile *file, GError **errp)
{
    const unsigned all = (1u << PERMS) - 1;
    const unsigned changes = 1u << PERM_WRITE | 1u << PERM_RESIZE;
    unsigned used = 1u << PERM_CONSISTENT_READ;
    unsigned denied = changes;
    const char *purpose = file->read_only ? "reading" : "writing";
    int perm = 0;
    int ret;

    if (!file->read_only) {
        /* Nobody may even read: what a writer has under way is not a store. */
        used |= changes;
        denied = all;
    }
    ret = lock_set(file->fd, used, denied);
    if (ret == 0) {
        ret = lock_look(file->fd, LOCK_USED_BASE, denied, &perm);
    }
    if (ret == 0) {
        ret = lock_look(file->fd, LOCK_DENIED_BASE, used, &perm);
    }
    if (ret > 0 || ret == -EAGAIN || ret == -EACCES) {
        file_error(errp, EBUSY,
                   "Could not lock '%s' for %s: another process is using it "
                   "(\"%s\" lock)", file->filename, purpose, perm_names[perm]);
        return false;
    }
    if (ret < 0) {
        file_error(errp, -ret, "Could not lock '%s' for %s: %s",
                   file->filename, purpose, g_strerror(-ret));
        return false;
    }
    return true;
}

/* ---- opening ---------------------------------------------------------- */

static int open_retrying(const char *filename, int oflags)
{
    for (unsigned i = 0; i < EINTR_RETRIES_MAX; i++) {
        int fd = open(filename, oflags, 0600);

        if (fd >= 0 || errno != EINTR) {
            return fd;
        }
    }
    return -1;
}

/* Open or create; *@created tells which. */
static bool file_open_fd(BaleFile *file, unsigned flags, bool *created,
                         GError **errp)
{
    /* O_NONBLOCK: a FIFO is to be refused, not to be waited for. */
    int oflags = O_CLOEXEC | O_NOCTTY | O_NONBLOCK |
                 (file->read_only ? O_RDONLY : O_RDWR);

    *created = false;
    if (flags & BALE_DEVICE_CREATE) {
        file->fd = open_retrying(file->filename, oflags | O_CREAT | O_EXCL);
        if (file->fd >= 0) {
            *created = true;
            return true;
        }
        if (errno != EEXIST || !(flags & BALE_DEVICE_TRUNCATE)) {
            file_error(errp, errno, "Could not create '%s': %s",
                       file->filename, g_strerror(errno));
            return false;
        }
    }
    file->fd = open_retrying(file->filename, oflags);
    if (file->fd < 0) {
        file_error(errp, errno, "Could not open '%s'%s: %s", file->filename,
                   file->read_only ? "" : " for writing", g_strerror(errno));
        return false;
    }
    return true;
}

/* Check what it is, and claim a block device. */
static bool file_check_kind(BaleFile *file, GError **errp)
{
    struct stat st;
    int fd, status;

    if (fstat(file->fd, &st) < 0) {
        file_error(errp, errno, "Could not examine '%s': %s", file->filename,
                   g_strerror(errno));
        return false;
    }
    if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) {
        file_error(errp, EINVAL,
                   "'%s' is neither a regular file nor a block device",
                   file->filename);
        return false;
    }
    file->is_block = S_ISBLK(st.st_mode);

    if (file->is_block && !file->read_only) {
        g_autofree char *self = g_strdup_printf("/proc/self/fd/%d", file->fd);

        /* By way of /proc it is this very device, whatever the name is now. */
        fd = open_retrying(self, O_RDWR | O_EXCL | O_CLOEXEC);
        if (fd < 0 && errno == ENOENT) {
            /* No /proc here. */
            fd = open_retrying(file->filename, O_RDWR | O_EXCL | O_CLOEXEC);
        }
        if (fd < 0) {
            file_error(errp, errno,
                       "Could not claim block device '%s' for writing: %s",
                       file->filename, g_strerror(errno));
            return false;
        }
        close(file->fd);
        file->fd = fd;
    }

    status = fcntl(file->fd, F_GETFL);
    if (status < 0 || fcntl(file->fd, F_SETFL, status & ~O_NONBLOCK) < 0) {
        file_error(errp, errno, "Could not set up '%s': %s", file->filename,
                   g_strerror(errno));
        return false;
    }
    return true;
}

/* Bytes of alignment that direct I/O needs; 0: none is possible here. */
static uint32_t file_direct_align(const BaleFile *file)
{
#ifdef STATX_DIOALIGN
    struct statx stx;

    if (statx(file->fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) == 0 &&
        (stx.stx_mask & STATX_DIOALIGN)) {
        return MAX(stx.stx_dio_mem_align, stx.stx_dio_offset_align);
    }
#endif
    return BALE_FILE_BLOCK_SIZE;
}

/*
 * Try one direct read.  Some file systems accept the flag and refuse every
 * transfer, some do not say which alignment they need.
 */
static bool file_probe_direct(const BaleFile *file, uint32_t *block_size)
{
    BALE_AUTO_MEMORY void *buf = bale_memory_try_alloc(BLOCK_SIZE_MAX,
                                                       BLOCK_SIZE_MAX);

    if (!buf) {
        return true; /* not a reason to give direct I/O up */
    }
    for (uint32_t len = *block_size; len <= BLOCK_SIZE_MAX; len *= 2) {
        ssize_t res = pread(file->fd, buf, len, 0);

        res = bale_fault_hook(BALE_FAULT_DIRECT, 0, len, res < 0 ? -errno : 0);
        if (res != -EINVAL) {
            *block_size = len;
            return true;
        }
        if (file->is_block) {
            break;
        }
    }
    return false;
}

static bool is_block_size(uint32_t size)
{
    return size >= 512 && size <= BLOCK_SIZE_MAX && (size & (size - 1)) == 0;
}

/* Choose the block size and switch direct I/O on, if that is possible. */
static bool file_set_up_io(BaleFile *file, unsigned flags, GError **errp)
{
    uint32_t align = 0;
    int status, sector;

    file->block_size = BALE_FILE_BLOCK_SIZE;
    if (file->is_block) {
        if (ioctl(file->fd, BLKSSZGET, &sector) < 0) {
            file_error(errp, errno, "Could not get the sector size of '%s': %s",
                       file->filename, g_strerror(errno));
            return false;
        }
        file->block_size = (uint32_t)sector;
        if (sector < 0 || !is_block_size(file->block_size)) {
            file_error(errp, EINVAL, "'%s' has sectors of %d bytes, which is "
                       "not supported", file->filename, sector);
            return false;
        }
    }
    if (flags & BALE_DEVICE_BUFFERED) {
        return true;
    }

    status = fcntl(file->fd, F_GETFL);
    if (status >= 0 && fcntl(file->fd, F_SETFL, status | O_DIRECT) == 0) {
        align = file->is_block ? file->block_size : file_direct_align(file);
        align = MAX(align, align ? file->block_size : 0);
        if (is_block_size(align) && file_probe_direct(file, &align)) {
            file->block_size = align;
            file->direct = true;
            return true;
        }
        fcntl(file->fd, F_SETFL, status);
    }
    g_warning("'%s': the file system refuses O_DIRECT, using the page cache",
              file->filename);
    return true;
}

bool bale_file_open(BaleFile *file, const char *filename, unsigned flags,
                    GError **errp)
{
    bool created = false;

    *file = (BaleFile) {
        .fd = -1,
        .filename = g_strdup(filename),
        .read_only = flags & BALE_DEVICE_READ_ONLY,
    };
    pthread_mutex_init(&file->size_lock, NULL);

    if (file->read_only && (flags & (BALE_DEVICE_CREATE |
                                     BALE_DEVICE_TRUNCATE))) {
        file_error(errp, EINVAL, "'%s' cannot be both created and read-only",
                   filename);
        goto fail;
    }
    if (!file_open_fd(file, flags, &created, errp) ||
        !file_check_kind(file, errp)) {
        goto fail;
    }
    if (!(flags & BALE_DEVICE_NO_LOCK) && !file_lock(file, errp)) {
        goto fail;
    }
    if ((flags & BALE_DEVICE_TRUNCATE) && !created && !file->is_block &&
        ftruncate(file->fd, 0) < 0) {
        file_error(errp, errno, "Could not empty '%s': %s", filename,
                   g_strerror(errno));
        goto fail;
    }
    if (!file_set_up_io(file, flags, errp)) {
        goto fail;
    }
    return true;

fail:
    if (created) {
        g_unlink(filename);
    }
    bale_file_close(file);
    return false;
}

void bale_file_close(BaleFile *file)
{
    if (file->fd >= 0) {
        close(file->fd);
    }
    file->fd = -1;
    g_clear_pointer(&file->filename, g_free);
    pthread_mutex_destroy(&file->size_lock);
}

/* ---- size ------------------------------------------------------------- */

int64_t bale_file_size(const BaleFile *file)
{
    struct stat st;
    uint64_t bytes;

    if (file->is_block) {
        if (ioctl(file->fd, BLKGETSIZE64, &bytes) < 0) {
            return -errno;
        }
        return bytes > INT64_MAX ? -EFBIG : (int64_t)bytes;
    }
    if (fstat(file->fd, &st) < 0) {
        return -errno;
    }
    return st.st_size;
}

static int file_fallocate(const BaleFile *file, int mode, uint64_t offset,
                          uint64_t len)
{
    for (unsigned i = 0; i < EINTR_RETRIES_MAX; i++) {
        if (fallocate(file->fd, mode, (off_t)offset, (off_t)len) == 0) {
            return 0;
        }
        if (errno != EINTR) {
            return -errno;
        }
    }
    return -EINTR;
}

static int file_ftruncate(const BaleFile *file, uint64_t size)
{
    int ret = 0;

    for (unsigned i = 0; i < EINTR_RETRIES_MAX; i++) {
        ret = ftruncate(file->fd, (off_t)size) < 0 ? -errno : 0;
        if (ret != -EINTR) {
            break;
        }
    }
    return (int)bale_fault_hook(BALE_FAULT_TRUNCATE, size, 0, ret);
}

static bool is_unsupported(int ret)
{
    return ret == -EOPNOTSUPP || ret == -ENOSYS || ret == -ENOTTY;
}

static int allocate_locked(BaleFile *file, uint64_t offset, uint64_t len)
{
    int64_t size = bale_file_size(file);
    uint64_t end = offset + len;
    int ret;

    if (size < 0) {
        return (int)size;
    }
    if (file->is_block) {
        return end > (uint64_t)size ? -ENOSPC : 0;
    }
    ret = file_fallocate(file, 0, offset, len);
    ret = (int)bale_fault_hook(BALE_FAULT_ALLOCATE, offset, len, ret);
    if (is_unsupported(ret)) {
        /* No promise of space can be had here; the size can. */
        return end > (uint64_t)size ? file_ftruncate(file, end) : 0;
    }
    if (ret < 0 && end > (uint64_t)size &&
        bale_file_size(file) > size) {
        /* Half an allocation is of no use to anybody: give it back. */
        file_ftruncate(file, (uint64_t)size);
    }
    return ret;
}

int bale_file_allocate(BaleFile *file, uint64_t offset, uint64_t len)
{
    int ret;

    if (file->read_only) {
        return -EROFS;
    }
    if (len > INT64_MAX || offset > INT64_MAX - len) {
        return -EFBIG;
    }
    if (len == 0) {
        return 0;
    }
    pthread_mutex_lock(&file->size_lock);
    ret = allocate_locked(file, offset, len);
    pthread_mutex_unlock(&file->size_lock);
    return ret;
}

static int release_block_range(BaleFile *file, uint64_t offset, uint64_t len)
{
    uint64_t range[2] = { offset, len };
    int ret;

    /* Unlike the plain ioctl, this one keeps the page cache coherent. */
    ret = file_fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                         offset, len);
    if (ret < 0 && ioctl(file->fd, BLKDISCARD, range) == 0) {
        ret = 0;
    }
    return ret;
}

static int release_locked(BaleFile *file, uint64_t offset, uint64_t len)
{
    int64_t size = bale_file_size(file);
    int ret;

    if (size < 0) {
        return (int)size;
    }
    if (offset >= (uint64_t)size) {
        return 0;
    }
    len = MIN(len, (uint64_t)size - offset);
    if (file->is_block) {
        ret = release_block_range(file, offset, len);
    } else {
        ret = file_fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                             offset, len);
    }
    ret = (int)bale_fault_hook(BALE_FAULT_RELEASE, offset, len, ret);
    return is_unsupported(ret) ? -ENOTSUP : ret;
}

int bale_file_release(BaleFile *file, uint64_t offset, uint64_t len)
{
    int ret;

    if (file->read_only) {
        return -EROFS;
    }
    if (len == 0) {
        return 0;
    }
    pthread_mutex_lock(&file->size_lock);
    ret = release_locked(file, offset, len);
    pthread_mutex_unlock(&file->size_lock);
    return ret;
}

int bale_file_truncate(BaleFile *file, uint64_t size)
{
    int ret;

    if (file->read_only) {
        return -EROFS;
    }
    if (file->is_block) {
        return -ENOTSUP;
    }
    if (size > INT64_MAX) {
        return -EFBIG;
    }
    pthread_mutex_lock(&file->size_lock);
    ret = file_ftruncate(file, size);
    pthread_mutex_unlock(&file->size_lock);
    return ret;
}
