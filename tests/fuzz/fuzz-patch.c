/*
 * libFuzzer target: patch records, and the directories that name them (see
 * stores.c).
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "stores.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    stores_init();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    stores_fuzz(data, size, AIM_PATCH | AIM_SEGMENT);
    return 0;
}
