/*
 * Runs inputs of a fuzz target without libFuzzer: each file of the
 * directories that are named, once.  For coverage, and for compilers that
 * have no libFuzzer.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <glib.h>
#include <stdint.h>
#include <stdio.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv) __attribute__((weak));

static unsigned replay(const char *directory)
{
    g_autoptr(GDir) dir = g_dir_open(directory, 0, NULL);
    unsigned inputs = 0;
    const char *name;

    while (dir && (name = g_dir_read_name(dir))) {
        g_autofree char *path = g_build_filename(directory, name, NULL);
        g_autofree char *data = NULL;
        gsize len;

        if (g_file_get_contents(path, &data, &len, NULL)) {
            LLVMFuzzerTestOneInput((const uint8_t *)data, len);
            inputs++;
        }
    }
    return inputs;
}

int main(int argc, char **argv)
{
    unsigned inputs = 0;

    if (LLVMFuzzerInitialize) {
        LLVMFuzzerInitialize(&argc, &argv);
    }
    for (int i = 1; i < argc; i++) {
        inputs += replay(argv[i]);
    }
    printf("%u inputs\n", inputs);
    return 0;
}
