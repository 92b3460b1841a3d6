/*
 * The module's side of the monitor and of the command line.
 *
 * Nothing yet but the two functions that the shim calls.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "loader-internal.h"

void bale_module_argv(int *argc, char ***argv)
{
}

int bale_module_getopt_long(BaleGetoptLong *real, int argc, char *const argv[],
                            const char *optstring,
                            const struct option *longopts, int *longindex)
{
    return real(argc, argv, optstring, longopts, longindex);
}
