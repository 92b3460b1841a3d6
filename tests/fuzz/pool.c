/*
 * Large buffers are kept from one input of a fuzzer to the next.
 *
 * The buffers of a store are of megabytes; to take them from the system and to
 * give them back for each input took most of the time.  The linker puts these
 * functions before those of util/memory.c.  What nobody uses is poisoned, so
 * that AddressSanitizer sees its use all the same; and a leak is seen because
 * no more than BUFFERS_MAX are kept.
 *
 * Threads: any.  Errors: NULL as ever.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define KEPT_LEN_MIN (32u << 10)
#define BUFFERS_MAX 64

/* Of AddressSanitizer's run-time library, if there is one. */
void __asan_poison_memory_region(const volatile void *p, size_t len)
    __attribute__((weak));
void __asan_unpoison_memory_region(const volatile void *p, size_t len)
    __attribute__((weak));

void *__real_bale_memory_try_alloc(size_t align, size_t size);
void *__wrap_bale_memory_try_alloc(size_t align, size_t size);
void *__wrap_bale_memory_try_alloc0(size_t align, size_t size);
void *__wrap_bale_memory_try_alloc_huge(size_t size);
void __real_bale_memory_free(void *p);
void __wrap_bale_memory_free(void *p);

typedef struct Buffer {
    void *p;
    size_t size, align;
    bool used;
} Buffer;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Buffer buffers[BUFFERS_MAX]; /* under lock */
static unsigned buffer_count;

void *__wrap_bale_memory_try_alloc(size_t align, size_t size)
{
    void *p = NULL;

    if (size < KEPT_LEN_MIN) {
        return __real_bale_memory_try_alloc(align, size);
    }
    pthread_mutex_lock(&lock);
    for (unsigned i = 0; i < buffer_count && !p; i++) {
        Buffer *b = &buffers[i];

        if (!b->used && b->size == size && b->align == align) {
            b->used = true;
            p = b->p;
            if (__asan_unpoison_memory_region) {
                __asan_unpoison_memory_region(p, size);
            }
        }
    }
    if (!p) {
        p = __real_bale_memory_try_alloc(align, size);
        if (p && buffer_count < BUFFERS_MAX) {
            buffers[buffer_count++] = (Buffer) { p, size, align, true };
        }
    }
    pthread_mutex_unlock(&lock);
    return p;
}

void *__wrap_bale_memory_try_alloc0(size_t align, size_t size)
{
    void *p = __wrap_bale_memory_try_alloc(align, size);

    if (p) {
        memset(p, 0, size);
    }
    return p;
}

void *__wrap_bale_memory_try_alloc_huge(size_t size)
{
    return __wrap_bale_memory_try_alloc(4096, size);
}

void __wrap_bale_memory_free(void *p)
{
    bool kept = false;

    pthread_mutex_lock(&lock);
    for (unsigned i = 0; i < buffer_count && p && !kept; i++) {
        Buffer *b = &buffers[i];

        if (b->p == p) {
            if (!b->used) {
                abort(); /* freed twice */
            }
            kept = true;
            b->used = false;
            if (__asan_poison_memory_region) {
                __asan_poison_memory_region(p, b->size);
            }
        }
    }
    pthread_mutex_unlock(&lock);
    if (!kept) {
        __real_bale_memory_free(p);
    }
}
