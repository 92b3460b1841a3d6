#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The shim and `bale run`: loads where it must, nowhere else, safely."""

import os
import re
import shutil
import stat

import bale_iotests
from bale_iotests import BALE, BUILD_IDS, MODULE, SHIM, bale, run

NOTE_NAME = b'GNU\0'
VERSIONS = {
    'qemu-img': ['--version'],
    'qemu-io': ['--version'],
    'qemu-nbd': ['--version'],
    'qemu-storage-daemon': ['--version'],
    'qemu-system-x86_64': ['--version'],
}


def build_id(program):
    notes = run('readelf', '-n', program, check=0).out
    return re.search(r'Build ID: ([0-9a-f]+)', notes).group(1)


class LoaderTest(bale_iotests.TestCase):

    def loaded_objects(self, *command):
        """The shared objects that ld.so reports for one program."""
        result = run(*command, check=0,
                     env={'LD_PRELOAD': SHIM, 'LD_DEBUG': 'files',
                          'LD_DEBUG_OUTPUT': self.path('ld')})
        text = ''
        for name in os.listdir(self.dir):
            if name.startswith('ld.'):
                with open(self.path(name), encoding='utf-8') as file:
                    text += file.read()
        return text, result

    def copy_of_module(self, name='lib'):
        """A directory as an installation has it. Returns its shim."""
        directory = self.path(name)
        os.mkdir(directory, 0o755)
        for file in (SHIM, MODULE, BUILD_IDS):
            shutil.copy(file, directory)
        return os.path.join(directory, os.path.basename(SHIM))

    def test_loads_into_all_five_programs(self):
        for program, args in VERSIONS.items():
            with self.subTest(program=program):
                text, result = self.loaded_objects(program, *args)
                self.assertIn('calling init: ' + MODULE, text)
                self.assertEqual(result.err, '')

    def test_silent_elsewhere(self):
        """sh, sed, python: same output, and the module is not even opened."""
        for command in (['sh', '-c', 'echo x | sed s/x/y/'],
                        ['sed', '--version'],
                        ['/usr/bin/python3', '-c', 'print(6 * 7)'],
                        ['grep', '--color=never', 'root:', '/etc/passwd']):
            with self.subTest(command=command[0]):
                plain = run(*command, check=0)
                text, result = self.loaded_objects(*command)
                self.assertEqual(result.out, plain.out)
                self.assertEqual(result.err, '')
                self.assertNotIn(MODULE, text)

    def test_status_and_arguments_pass_through(self):
        result = bale('run', 'sh', '-c', 'printf "%s|" "$@"; exit 42', 'sh',
                      'a b', '--version', '')
        self.assertEqual(result.status, 42)
        self.assertEqual(result.out, 'a b|--version||')

    def test_reaches_a_grandchild(self):
        result = bale('run', 'sh', '-c',
                      'grep -l bale-module /proc/self/maps; '
                      'LD_DEBUG=files qemu-img --version 2>&1',
                      check=0)
        self.assertIn('calling init: ' + MODULE, result.out)

    def wrong_program(self):
        """A copy of qemu-img whose build-id is another."""
        program = self.path('qemu-img')
        shutil.copy('/usr/bin/qemu-img', program)
        with open(program, 'r+b') as file:
            data = file.read()
            right = bytes.fromhex(build_id(program))
            self.assertEqual(data.count(NOTE_NAME + right), 1)
            file.seek(data.index(NOTE_NAME + right) + len(NOTE_NAME))
            file.write(bytes(byte ^ 0xff for byte in right))
        return program

    def test_refuses_a_wrong_build_naming_both(self):
        program = self.wrong_program()
        self.assertNotEqual(build_id(program), build_id('/usr/bin/qemu-img'))
        version = run('dpkg-query', '-W', '-f', '${Version}', 'qemu-utils',
                      check=0).out
        result = bale('run', program, 'info', '/dev/null')
        self.assert_one_line_error(result, build_id(program),
                                   build_id('/usr/bin/qemu-img'), version,
                                   program)
        self.assertEqual(result.out, '')

    def test_registers_nothing_in_a_wrong_build(self):
        text = None
        program = self.wrong_program()
        run(program, '--version', env={'LD_PRELOAD': SHIM, 'LD_DEBUG': 'files',
                                       'LD_DEBUG_OUTPUT': self.path('ld')})
        for name in os.listdir(self.dir):
            if name.startswith('ld.'):
                with open(self.path(name), encoding='utf-8') as file:
                    text = file.read()
        self.assertIn(SHIM, text)
        self.assertNotIn(MODULE, text)

    def test_refuses_a_program_missing_from_the_list(self):
        shim = self.copy_of_module()
        ids = self.path('lib/bale.build-ids')
        with open(ids, 'w', encoding='utf-8') as file:
            file.write('0123456789abcdef qemu-img\n')
        result = run('qemu-img', '--version', env={'LD_PRELOAD': shim})
        self.assert_one_line_error(result, build_id('/usr/bin/qemu-img'),
                                   '0123456789abcdef')

    def test_refuses_an_empty_list(self):
        shim = self.copy_of_module()
        with open(self.path('lib/bale.build-ids'), 'w', encoding='utf-8'):
            pass
        result = run('qemu-img', '--version', env={'LD_PRELOAD': shim})
        self.assert_one_line_error(result, 'not loaded')

    def test_refuses_without_a_list_or_a_module(self):
        for name in ('bale.build-ids', 'bale-module.so'):
            with self.subTest(name=name):
                shim = self.copy_of_module('no-' + name)
                os.unlink(os.path.join(os.path.dirname(shim), name))
                result = run('qemu-img', '--version', env={'LD_PRELOAD': shim})
                self.assert_one_line_error(result, name,
                                           'No such file or directory')

    def test_refuses_a_module_that_is_none(self):
        shim = self.copy_of_module()
        with open(self.path('lib/bale-module.so'), 'w',
                  encoding='utf-8') as file:
            file.write('not an ELF file')
        result = run('qemu-img', '--version', env={'LD_PRELOAD': shim})
        self.assert_one_line_error(result, 'bale-module.so')

    def test_refuses_what_others_can_write(self):
        for name in ('.', 'bale-module.so', 'bale.build-ids'):
            for bit in (stat.S_IWGRP, stat.S_IWOTH):
                with self.subTest(name=name, bit=bit):
                    shim = self.copy_of_module(f'lib-{name}-{bit}')
                    path = os.path.normpath(
                        os.path.join(os.path.dirname(shim), name))
                    os.chmod(path, os.stat(path).st_mode | bit)
                    result = run('qemu-img', '--version',
                                 env={'LD_PRELOAD': shim})
                    self.assert_one_line_error(result, path, 'writable')

    def test_refuses_what_another_user_owns(self):
        self.need_root()
        for name in ('.', 'bale-module.so', 'bale.build-ids'):
            with self.subTest(name=name):
                shim = self.copy_of_module(f'lib-{name}')
                path = os.path.normpath(
                    os.path.join(os.path.dirname(shim), name))
                os.chown(path, 12345, -1)
                result = run('qemu-img', '--version', env={'LD_PRELOAD': shim})
                self.assert_one_line_error(result, path, '12345')

    def test_follows_a_link_to_the_shim(self):
        """The directory that counts is the one that the shim really is in."""
        os.symlink(SHIM, self.path('link.so'))
        os.chmod(self.dir, 0o777)
        result = run('qemu-img', '--version',
                     env={'LD_PRELOAD': self.path('link.so')})
        self.assertEqual((result.status, result.err), (0, ''))

    def test_keeps_another_preload(self):
        other = '/usr/lib/x86_64-linux-gnu/libaio.so.1'
        result = bale('run', 'sh', '-c', 'echo $LD_PRELOAD', check=0,
                      env={'LD_PRELOAD': other})
        self.assertEqual(result.out, f'{SHIM}:{other}\n')

    def test_starts_no_thread(self):
        """Programs fork after loading: a thread would be lost."""
        self.need('strace')
        strace = ['strace', '-f', '-e', 'trace=clone,clone3,fork,vfork']
        plain = run(*strace, 'qemu-img', '--version')
        if plain.status != 0:
            self.skipTest('strace may not trace here')
        loaded = run(*strace, BALE, 'run', 'qemu-img', '--version', check=0)
        for call in ('clone(', 'clone3(', 'fork('):
            self.assertEqual(loaded.err.count(call), plain.err.count(call),
                             str(loaded))

    def test_exports_only_what_the_shim_looks_up(self):
        symbols = run('nm', '-D', '--defined-only', MODULE, check=0).out
        names = {line.split()[-1] for line in symbols.splitlines()}
        self.assertEqual({n for n in names if not n.startswith('bale_module_')},
                         set())

    def test_shim_needs_only_libc(self):
        needed = re.findall(r'NEEDED.*\[(.*)\]',
                            run('readelf', '-d', SHIM, check=0).out)
        self.assertEqual(set(needed) - {'libc.so.6', 'libdl.so.2'}, set())


class RunTest(bale_iotests.TestCase):

    def test_no_program(self):
        self.assert_one_line_error(bale('run'), 'no program')

    def test_missing_program(self):
        self.assert_one_line_error(bale('run', 'no-such-program'),
                                   'no-such-program', 'No such file')

    def test_unknown_option(self):
        self.assert_one_line_error(bale('run', '--wrong', 'true'), '--wrong')

    def test_options_after_the_program_are_the_programs(self):
        self.assertIn('qemu-img version',
                      bale('run', 'qemu-img', '--version', check=0).out)

    def test_unknown_command(self):
        self.assert_one_line_error(bale('wrong'), 'wrong')

    def test_no_command(self):
        self.assert_one_line_error(bale(), 'no command')

    def test_help_lists_commands(self):
        self.assertIn('\n  run ', bale('--help', check=0).out)

    def test_help_of_a_command(self):
        self.assertEqual(bale('help', 'run', check=0).out,
                         bale('run', '--help', check=0).out)

    def test_works_from_where_it_is_installed(self):
        """bin/bale finds lib/ARCH/bale beside it, wherever both are."""
        run('meson', 'install', '-C', bale_iotests.BUILD, '--no-rebuild',
            f'--destdir={self.path("root")}', check=0)
        found = [os.path.join(path, 'bale')
                 for path, _, files in os.walk(self.path('root'))
                 if 'bale' in files and path.endswith('/bin')]
        self.assertEqual(len(found), 1)
        result = run(found[0], 'run', 'sh', '-c', 'echo $LD_PRELOAD',
                     check=0, env={'LD_PRELOAD': None})
        self.assertTrue(result.out.startswith(self.path('root')), result)
        run(found[0], 'run', 'qemu-img', '--version', check=0)

    def test_says_when_the_shim_is_missing(self):
        os.mkdir('bin')
        shutil.copy(BALE, 'bin/bale')
        self.assert_one_line_error(run('bin/bale', 'run', 'true'),
                                   'bale-preload.so')

    def test_refuses_a_path_that_ld_so_would_split(self):
        os.makedirs('a b/block')
        os.makedirs('a b/tools')
        shutil.copy(BALE, 'a b/tools/bale')
        shutil.copy(SHIM, 'a b/block')
        self.assert_one_line_error(run('a b/tools/bale', 'run', 'true'),
                                   'space')


if __name__ == '__main__':
    bale_iotests.main()
