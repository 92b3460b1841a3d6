/*
 * Contents of the simulated device: see device-sim-internal.h.
 *
 * Invariant: a node or block with more than one reference is never written.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "device-sim-internal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util/checksum.h"
#include "util/memory.h"

#define FANOUT_BITS 6
#define FANOUT (1u << FANOUT_BITS)

/* Enough for 2^64 bytes. */
#define LEVELS_MAX 9

struct SimNode {
    gint refs;
    void *slots[FANOUT]; /* nodes; blocks in the lowest level */
};

/* ---- blocks and nodes ------------------------------------------------- */

SimBlock *sim_block_new(const void *data, size_t len)
{
    SimBlock *block = g_new(SimBlock, 1);

    g_assert(len <= SIM_BLOCK);
    block->refs = 1;
    block->hash = 0;
    memcpy(block->data, data, len);
    memset(block->data + len, 0, SIM_BLOCK - len);
    return block;
}

SimBlock *sim_block_ref(SimBlock *block)
{
    if (block) {
        g_atomic_int_inc(&block->refs);
    }
    return block;
}

void sim_block_unref(SimBlock *block)
{
    if (block && g_atomic_int_dec_and_test(&block->refs)) {
        g_free(block);
    }
}

static void slot_ref(void *slot, unsigned level)
{
    if (!slot) {
        return;
    }
    if (level == 0) {
        sim_block_ref(slot);
    } else {
        g_atomic_int_inc(&((SimNode *)slot)->refs);
    }
}

/* @level is the node's: 0 for one whose slots are blocks. */
static void node_unref(SimNode *node, unsigned level)
{
    if (!node || !g_atomic_int_dec_and_test(&node->refs)) {
        return;
    }
    for (unsigned i = 0; i < FANOUT; i++) {
        if (level == 0) {
            sim_block_unref(node->slots[i]);
        } else {
            node_unref(node->slots[i], level - 1);
        }
    }
    g_free(node);
}

static SimNode *node_new(void)
{
    SimNode *node = g_new0(SimNode, 1);

    node->refs = 1;
    return node;
}

/* Make the node at *@where one that may be written. */
static SimNode *node_own(SimNode **where, unsigned level)
{
    SimNode *node = *where, *copy;

    if (!node) {
        return *where = node_new();
    }
    if (g_atomic_int_get(&node->refs) == 1) {
        return node;
    }
    copy = node_new();
    for (unsigned i = 0; i < FANOUT; i++) {
        copy->slots[i] = node->slots[i];
        slot_ref(copy->slots[i], level);
    }
    node_unref(node, level);
    return *where = copy;
}

static unsigned slot_of(uint64_t index, unsigned level)
{
    return (index >> (level * FANOUT_BITS)) & (FANOUT - 1);
}

/* ---- trees ------------------------------------------------------------ */

static bool tree_covers(const SimTree *tree, uint64_t index)
{
    return tree->levels >= LEVELS_MAX ||
           index >> (tree->levels * FANOUT_BITS) == 0;
}

void sim_tree_copy(SimTree *to, const SimTree *from)
{
    *to = *from;
    if (to->root) {
        g_atomic_int_inc(&to->root->refs);
    }
}

void sim_tree_clear(SimTree *tree)
{
    if (tree->root) {
        node_unref(tree->root, tree->levels - 1);
    }
    *tree = (SimTree) { 0 };
}

const SimBlock *sim_tree_block(const SimTree *tree, uint64_t index)
{
    const SimNode *node = tree->root;

    if (!tree_covers(tree, index)) {
        return NULL;
    }
    for (unsigned level = tree->levels; node && level > 1; level--) {
        node = node->slots[slot_of(index, level - 1)];
    }
    return node ? node->slots[slot_of(index, 0)] : NULL;
}

void sim_tree_put(SimTree *tree, uint64_t index, SimBlock *block)
{
    SimNode *node;
    void **slot;

    if (!block && !sim_tree_block(tree, index)) {
        return;
    }
    while (!tree->root || !tree_covers(tree, index)) {
        SimNode *root = node_new();

        root->slots[0] = tree->root;
        tree->root = root;
        tree->levels++;
    }
    node = node_own(&tree->root, tree->levels - 1);
    for (unsigned level = tree->levels - 1; level > 0; level--) {
        node = node_own((SimNode **)&node->slots[slot_of(index, level)],
                        level - 1);
    }
    slot = &node->slots[slot_of(index, 0)];
    sim_block_ref(block);
    sim_block_unref(*slot);
    *slot = block;
}

static bool node_next(const SimNode *node, unsigned level, uint64_t *index)
{
    uint64_t step = (uint64_t)1 << (level * FANOUT_BITS);

    for (unsigned i = slot_of(*index, level); i < FANOUT; i++) {
        const void *slot = node->slots[i];
        uint64_t next = (*index / step + 1) * step;

        if (slot && (level == 0 || node_next(slot, level - 1, index))) {
            return true;
        }
        *index = next;
    }
    return false;
}

bool sim_tree_next(const SimTree *tree, uint64_t *index)
{
    return tree->root && tree_covers(tree, *index) &&
           node_next(tree->root, tree->levels - 1, index);
}

void sim_tree_read(const SimTree *tree, uint64_t offset, void *buf, size_t len)
{
    uint8_t *to = buf;

    while (len > 0) {
        size_t skip = offset % SIM_BLOCK;
        size_t n = MIN(len, SIM_BLOCK - skip);
        const SimBlock *block = sim_tree_block(tree, offset / SIM_BLOCK);

        if (block) {
            memcpy(to, block->data + skip, n);
        } else {
            memset(to, 0, n);
        }
        to += n;
        offset += n;
        len -= n;
    }
}

/* Change @n bytes inside one block; @from NULL: to zeroes. */
static void tree_patch(SimTree *tree, uint64_t offset, const void *from,
                       size_t n)
{
    uint64_t index = offset / SIM_BLOCK;
    const SimBlock *old = sim_tree_block(tree, index);
    uint8_t data[SIM_BLOCK];
    SimBlock *block;

    if (old) {
        memcpy(data, old->data, SIM_BLOCK);
    } else {
        memset(data, 0, SIM_BLOCK);
    }
    if (from) {
        memcpy(data + offset % SIM_BLOCK, from, n);
    } else {
        memset(data + offset % SIM_BLOCK, 0, n);
    }
    if (bale_memory_is_zero(data, SIM_BLOCK)) {
        sim_tree_put(tree, index, NULL);
        return;
    }
    block = sim_block_new(data, SIM_BLOCK);
    sim_tree_put(tree, index, block);
    sim_block_unref(block);
}

void sim_tree_write(SimTree *tree, uint64_t offset, const void *buf,
                    size_t len)
{
    const uint8_t *from = buf;

    while (len > 0) {
        size_t n = MIN(len, SIM_BLOCK - offset % SIM_BLOCK);

        tree_patch(tree, offset, from, n);
        from += n;
        offset += n;
        len -= n;
    }
    tree->size = MAX(tree->size, offset);
}

void sim_tree_zero(SimTree *tree, uint64_t offset, uint64_t len)
{
    uint64_t end = len > UINT64_MAX - offset ? UINT64_MAX : offset + len;
    uint64_t index = offset / SIM_BLOCK;

    /* Only what is there: a range may be terabytes. */
    for (; sim_tree_next(tree, &index) && index * SIM_BLOCK < end; index++) {
        uint64_t from = MAX(offset, index * SIM_BLOCK);
        uint64_t to = MIN(end, (index + 1) * SIM_BLOCK);

        if (to - from == SIM_BLOCK) {
            sim_tree_put(tree, index, NULL);
        } else {
            tree_patch(tree, from, NULL, to - from);
        }
    }
}

void sim_tree_resize(SimTree *tree, uint64_t size)
{
    if (size < tree->size) {
        sim_tree_zero(tree, size, UINT64_MAX);
    }
    tree->size = size;
}

/* ---- images ----------------------------------------------------------- */

BaleSimImage *sim_image_new(const SimTree *tree)
{
    BaleSimImage *image = g_new0(BaleSimImage, 1);

    image->refs = 1;
    sim_tree_copy(&image->tree, tree);
    return image;
}

BaleSimImage *bale_sim_image_ref(BaleSimImage *image)
{
    g_atomic_int_inc(&image->refs);
    return image;
}

void bale_sim_image_unref(BaleSimImage *image)
{
    if (image && g_atomic_int_dec_and_test(&image->refs)) {
        sim_tree_clear(&image->tree);
        g_free(image);
    }
}

uint64_t bale_sim_image_size(const BaleSimImage *image)
{
    return image->tree.size;
}

void bale_sim_image_read(const BaleSimImage *image, uint64_t offset, void *buf,
                         size_t len)
{
    sim_tree_read(&image->tree, offset, buf, len);
}

/* Is every block of @a the same in @b? */
static bool tree_within(const SimTree *a, const SimTree *b)
{
    for (uint64_t i = 0; sim_tree_next(a, &i); i++) {
        const SimBlock *x = sim_tree_block(a, i);
        const SimBlock *y = sim_tree_block(b, i);

        if (x == y) {
            continue;
        }
        if (y ? memcmp(x->data, y->data, SIM_BLOCK) != 0
              : !bale_memory_is_zero(x->data, SIM_BLOCK)) {
            return false;
        }
    }
    return true;
}

bool bale_sim_image_equal(const BaleSimImage *a, const BaleSimImage *b)
{
    return a->tree.size == b->tree.size && tree_within(&a->tree, &b->tree) &&
           tree_within(&b->tree, &a->tree);
}

static uint64_t block_hash(SimBlock *block)
{
    uint64_t hash = __atomic_load_n(&block->hash, __ATOMIC_RELAXED);

    if (hash == 0) {
        hash = bale_checksum(block->data, SIM_BLOCK, 0) | 1;
        __atomic_store_n(&block->hash, hash, __ATOMIC_RELAXED);
    }
    return hash;
}

uint64_t bale_sim_image_hash(const BaleSimImage *image)
{
    uint64_t hash = image->tree.size;

    for (uint64_t i = 0; sim_tree_next(&image->tree, &i); i++) {
        /* Shared and reference counted, but for this never changed. */
        SimBlock *block = (SimBlock *)sim_tree_block(&image->tree, i);
        uint64_t at[2] = { i, block_hash(block) };

        hash += bale_checksum(at, sizeof(at), 0);
    }
    return hash;
}

static bool file_failed(const char *filename, int errnum, GError **errp)
{
    g_set_error(errp, G_FILE_ERROR, g_file_error_from_errno(errnum),
                "'%s': %s", filename, g_strerror(errnum));
    return false;
}

bool bale_sim_image_save(const BaleSimImage *image, const char *filename,
                         GError **errp)
{
    int fd = open(filename, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    int errnum = fd < 0 ? errno : 0;

    if (fd < 0) {
        return file_failed(filename, errnum, errp);
    }
    if (ftruncate(fd, (off_t)image->tree.size) < 0) {
        errnum = errno;
    }
    for (uint64_t i = 0; !errnum && sim_tree_next(&image->tree, &i); i++) {
        const SimBlock *block = sim_tree_block(&image->tree, i);
        uint64_t n = MIN(SIM_BLOCK, image->tree.size - i * SIM_BLOCK);
        ssize_t res = pwrite(fd, block->data, n, (off_t)(i * SIM_BLOCK));

        if (res != (ssize_t)n) {
            errnum = res < 0 ? errno : EIO;
        }
    }
    if (close(fd) < 0 && !errnum) {
        errnum = errno;
    }
    return errnum ? file_failed(filename, errnum, errp) : true;
}

BaleSimImage *bale_sim_image_load(const char *filename, GError **errp)
{
    g_autofree char *content = NULL;
    SimTree tree = { 0 };
    BaleSimImage *image;
    gsize len;

    if (!g_file_get_contents(filename, &content, &len, errp)) {
        return NULL;
    }
    sim_tree_write(&tree, 0, content, len);
    image = sim_image_new(&tree);
    sim_tree_clear(&tree);
    return image;
}
