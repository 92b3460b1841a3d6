/*
 * The command `bale`: finds the subcommand and runs it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tool-internal.h"

/* In the order in which `bale --help` lists them */
static const BaleCommand *const commands[] = {
    &bale_command_run,
    &bale_command_create,
    &bale_command_info,
    &bale_command_list,
    &bale_command_image,
    &bale_command_check,
    &bale_command_verify,
    &bale_command_compact,
    &bale_command_set,
    &bale_command_export,
    &bale_command_import,
};

int bale_tool_error(const char *format, ...)
{
    g_autofree char *message = NULL;
    va_list args;

    va_start(args, format);
    message = g_strdup_vprintf(format, args);
    va_end(args);
    fprintf(stderr, "bale: %s\n", message);
    return 1;
}

bool bale_tool_parse(const BaleCommand *command, const GOptionEntry *entries,
                     bool posix, int *argc, char ***argv)
{
    g_autoptr(GOptionContext) context = NULL;
    g_autoptr(GError) error = NULL;
    g_autofree char *name = g_strdup_printf("bale %s", command->name);
    g_autofree char *summary = g_strdup_printf("%s.", command->summary);

    g_set_prgname(name);
    context = g_option_context_new(command->arguments);
    g_option_context_set_strict_posix(context, posix);
    g_option_context_set_summary(context, summary);
    if (command->help) {
        g_option_context_set_description(context, command->help);
    }
    if (entries) {
        g_option_context_add_main_entries(context, entries, NULL);
    }
    if (!g_option_context_parse(context, argc, argv, &error)) {
        bale_tool_error("%s: %s", command->name, error->message);
        return false;
    }
    /* GLib leaves the "--" that ended the options */
    if (*argc > 1 && !strcmp((*argv)[1], "--")) {
        memmove(*argv + 1, *argv + 2, (*argc - 1) * sizeof(**argv));
        *argc -= 1;
    }
    return true;
}

static const BaleCommand *find_command(const char *name)
{
    for (size_t i = 0; i < G_N_ELEMENTS(commands); i++) {
        if (!strcmp(commands[i]->name, name)) {
            return commands[i];
        }
    }
    bale_tool_error("there is no command '%s'; see bale --help", name);
    return NULL;
}

static void print_help(void)
{
    printf("Usage: bale COMMAND [OPTION...] [ARGUMENT...]\n"
           "\n"
           "Compressed backup stores for QEMU.\n"
           "\n"
           "Commands:\n");
    for (size_t i = 0; i < G_N_ELEMENTS(commands); i++) {
        printf("  %-10s %s\n", commands[i]->name, commands[i]->summary);
    }
    printf("  %-10s %s\n", "help", "Explain a command: bale help COMMAND");
    printf("\n"
           "bale --version prints the version.\n");
}

static int help(const char *name)
{
    const BaleCommand *command;
    char *argv[] = { NULL, (char *)"--help", NULL };

    if (!name) {
        print_help();
        return 0;
    }
    command = find_command(name);
    if (!command) {
        return 1;
    }
    argv[0] = (char *)command->name;
    return command->run(command, 2, argv);
}

int main(int argc, char **argv)
{
    const BaleCommand *command;

    setlocale(LC_ALL, "");
    g_set_prgname("bale");
    if (argc < 2) {
        return bale_tool_error("no command given; see bale --help");
    }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") ||
        !strcmp(argv[1], "help")) {
        return help(argv[2]);
    }
    if (!strcmp(argv[1], "--version")) {
        printf("bale %s\n", BALE_VERSION);
        return 0;
    }
    command = find_command(argv[1]);
    return command ? command->run(command, argc - 1, argv + 1) : 1;
}
