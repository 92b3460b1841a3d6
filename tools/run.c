/*
 * `bale run`: runs a QEMU program, or anything that starts one, with the
 * module preloaded.
 *
 * The shim is found relative to this executable, so that a build tree works
 * where it is and an installed tree can be moved.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <limits.h>
#include <string.h>
#include <unistd.h>

#include "tool-internal.h"

#define SHIM_FILE "bale-preload.so"

/* Where the shim can be, seen from the executable's directory */
static const char *const shim_dirs[] = {
    "../block",    /* build tree: build/tools/bale, build/block/ */
    BALE_LIB_DIR,  /* installed: bin/bale, lib/.../bale/ */
};

/* Returns the shim's real path, owned by the caller (free()), or NULL */
static char *find_shim(const char *executable)
{
    g_autofree char *directory = g_path_get_dirname(executable);

    for (size_t i = 0; i < G_N_ELEMENTS(shim_dirs); i++) {
        g_autofree char *path =
            g_build_filename(directory, shim_dirs[i], SHIM_FILE, NULL);
        char *real = realpath(path, NULL);

        if (real) {
            return real;
        }
    }
    return NULL;
}

static void prepend_preload(const char *shim)
{
    const char *old = g_getenv("LD_PRELOAD");
    g_autofree char *both = NULL;

    if (old && old[0]) {
        both = g_strdup_printf("%s:%s", shim, old);
    }
    g_setenv("LD_PRELOAD", both ? both : shim, TRUE);
}

static int run(const BaleCommand *command, int argc, char **argv)
{
    char executable[PATH_MAX];
    g_autofree char *shim = NULL;
    ssize_t bytes;

    if (!bale_tool_parse(command, NULL, true, &argc, &argv)) {
        return 1;
    }
    if (argc < 2) {
        return bale_tool_error("run: no program given");
    }
    bytes = readlink("/proc/self/exe", executable, sizeof(executable) - 1);
    if (bytes < 0) {
        return bale_tool_error("run: /proc/self/exe: %s", g_strerror(errno));
    }
    executable[bytes] = '\0';
    shim = find_shim(executable);
    if (!shim) {
        return bale_tool_error("run: no " SHIM_FILE " belongs to %s: was it "
                               "built without QEMU's headers?",
                               executable);
    }
    /* The loader splits LD_PRELOAD at both, and knows no quoting. */
    if (strpbrk(shim, " :")) {
        return bale_tool_error("run: cannot preload %s: its path has a space "
                               "or a colon in it",
                               shim);
    }
    prepend_preload(shim);
    execvp(argv[1], argv + 1);
    return bale_tool_error("run: %s: %s", argv[1], g_strerror(errno));
}

const BaleCommand bale_command_run = {
    .name = "run",
    .arguments = "PROGRAM [ARGUMENT...]",
    .summary = "Run a QEMU program with the drivers of Bale loaded",
    .help = "Example:\n"
            "  bale run qemu-img convert -p -O bale disk.qcow2 disk.bale\n"
            "\n"
            "The program may also be a script that starts QEMU programs.",
    .run = run,
};
