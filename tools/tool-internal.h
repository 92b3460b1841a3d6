/*
 * The frame that every subcommand of `bale` fits into.
 *
 * A subcommand is one BaleCommand, defined in a file of its own under tools/,
 * declared at the end of this header and named in the table in bale.c. Single
 * thread. Errors are one line, "bale: ...", on standard error, and status 1.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_TOOLS_TOOL_INTERNAL_H
#define BALE_TOOLS_TOOL_INTERNAL_H

#include <glib.h>
#include <stdbool.h>

typedef struct BaleCommand {
    const char *name;      /* as typed: "run" */
    const char *arguments; /* for the usage line: "STORE [IMAGE]" */
    const char *summary;   /* one line for the list, no full stop */
    const char *help;      /* paragraphs below the options, or NULL */

    /* Returns the exit status. argv[0] is the name; argv ends with NULL. */
    int (*run)(const struct BaleCommand *command, int argc, char **argv);
} BaleCommand;

/*
 * Prints "bale: <message>" and a newline on standard error. Returns 1, to be
 * returned as the exit status.
 */
int bale_tool_error(const char *format, ...) G_GNUC_PRINTF(1, 2);

/*
 * Parses the options of a command.
 *
 * @entries: options, ended by an empty entry; or NULL for none
 * @posix: true: options end at the first argument that is none
 * @argc, @argv: in: as the command got them; out: what is left, argv[0] kept
 *
 * --help prints the command's help and ends the process with status 0.
 * Returns false, after printing the error, when an option is wrong.
 */
bool bale_tool_parse(const BaleCommand *command, const GOptionEntry *entries,
                     bool posix, int *argc, char ***argv);

extern const BaleCommand bale_command_run;
extern const BaleCommand bale_command_create;
extern const BaleCommand bale_command_info;
extern const BaleCommand bale_command_list;
extern const BaleCommand bale_command_image;
extern const BaleCommand bale_command_check;
extern const BaleCommand bale_command_verify;
extern const BaleCommand bale_command_compact;
extern const BaleCommand bale_command_set;
extern const BaleCommand bale_command_export;
extern const BaleCommand bale_command_import;

#endif
