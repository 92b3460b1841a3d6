#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""
Device plug-ins: the one of docs/device-plugin.md, taken out of that page,
compiled as it says, and used; and plug-ins that must be refused.
"""

import os
import re
import shlex
import shutil
import stat
import subprocess

import bale_iotests
from bale_iotests import bale, run

TOP = os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.realpath(__file__))))
PAGE = os.path.join(TOP, 'docs', 'device-plugin.md')
MiB = 1 << 20


def blocks(language):
    """What the page has in code blocks of this language, put together."""
    with open(PAGE, encoding='utf-8') as page:
        return '\n'.join(re.findall(rf'^```{language}\n(.*?)^```$',
                                    page.read(), re.M | re.S))


class PluginCase(bale_iotests.TestCase):
    def setUp(self):
        self.need('cc', 'pkg-config')
        os.symlink(os.path.join(TOP, 'include'), 'include')

    def compile(self, source, name='pagedir'):
        """By the very command of the page."""
        with open('pagedir.c', 'w', encoding='utf-8') as file:
            file.write(source)
        command = blocks('sh').split('bale create')[0]
        run('sh', '-ec', command, check=0)
        if name != 'pagedir':
            os.rename('pagedir.so', f'{name}.so')
        return f'./{name}.so'

    def bale(self, command, *args, **kwargs):
        return bale(command, '--device', './pagedir.so', *args, **kwargs)

    def random_raw(self, name, size):
        """Some of it does not compress, one half at least, some does, some is
        zero."""
        with open(name, 'wb') as file:
            for at in range(0, size, MiB):
                kind = self.random.randrange(4) if at // MiB % 2 else 0
                file.write(self.random.randbytes(MiB) if kind < 2 else
                           b'%015d\n' % at * (MiB // 16) if kind == 2 else
                           bytes(MiB))


class PageDir(PluginCase):
    def setUp(self):
        super().setUp()
        self.compile(blocks('c'))

    def test_page_compiles_without_warnings(self):
        flags = subprocess.run(['pkg-config', '--cflags', 'glib-2.0'],
                               stdout=subprocess.PIPE, check=True,
                               text=True).stdout
        for compiler in 'gcc', 'clang':
            if shutil.which(compiler):
                run(compiler, '-std=gnu11', '-Wall', '-Wextra', '-Werror',
                    '-Wno-unused-parameter', '-fsyntax-only', '-Iinclude',
                    *shlex.split(flags), 'pagedir.c', check=0)

    def test_commands_of_the_page_work(self):
        lines = blocks('sh').split('bale create')[1]
        for line in ('bale create' + lines).splitlines():
            words = line.split()
            if words and words[0] == 'bale':
                bale(*words[1:], check=0)
        self.assertEqual(os.stat('vm.raw').st_size, 10 << 30)

    def test_store_round_trip(self):
        self.random_raw('in.raw', 24 * MiB)
        self.bale('import', '-o', 'page_size=2M', 'in.raw', 'x.store',
                  check=0)
        self.bale('check', 'x.store', check=0)
        self.bale('verify', 'x.store', check=0)
        self.bale('export', 'x.store', 'out.raw', check=0)
        run('cmp', 'in.raw', 'out.raw', check=0)

    def test_one_file_per_page_and_private(self):
        self.random_raw('in.raw', 12 * MiB)
        self.bale('import', '-o', 'page_size=2M', 'in.raw', 'x.store',
                  check=0)
        names = set(os.listdir('x.store'))
        pages = sorted(int(name) for name in names - {'super'})
        self.assertIn('super', names)
        self.assertEqual(pages, list(range(len(pages))))
        self.assertGreater(len(pages), 2)
        self.assertEqual(stat.S_IMODE(os.stat('x.store').st_mode), 0o700)
        for name in names:
            info = os.stat(os.path.join('x.store', name))
            self.assertEqual(stat.S_IMODE(info.st_mode), 0o600)
            if name != 'super':
                self.assertLessEqual(info.st_size, 2 * MiB)

    def test_damaged_page_is_found(self):
        self.random_raw('in.raw', 8 * MiB)
        self.bale('import', '-o', 'page_size=2M', 'in.raw', 'x.store',
                  check=0)
        names = [name for name in os.listdir('x.store') if name != 'super']
        biggest = max(names, key=lambda name:
                      os.stat(os.path.join('x.store', name)).st_blocks)
        with open(os.path.join('x.store', biggest), 'r+b') as file:
            # Wide enough to hit records, not just what lies between them
            file.seek(64 * 1024)
            file.write(b'damage' * 100000)
        self.assertNotEqual(self.bale('verify', 'x.store').status, 0)

    def test_create_does_not_replace(self):
        self.bale('create', 'x.store', '1M', check=0)
        result = self.bale('create', 'x.store', '1M')
        self.assert_one_line_error(result, 'x.store', 'exists')
        self.bale('check', 'x.store', check=0)

    def test_missing_directory_is_refused(self):
        result = self.bale('check', 'missing')
        self.assert_one_line_error(result, 'missing', 'No such file')
        self.assertFalse(os.path.exists('missing'))


class Refused(PluginCase):
    """Each plug-in is the page's with one thing wrong."""

    def refused(self, change, *words):
        source = blocks('c')
        changed = change(source)
        self.assertNotEqual(source, changed)
        plugin = self.compile(changed, 'wrong')
        result = bale('create', '--device', plugin, 'x.store', '1M')
        self.assert_one_line_error(result, 'wrong.so', *words)

    def test_other_interface_version(self):
        self.refused(lambda source: source.replace(
            '.interface_version = BALE_DEVICE_INTERFACE,',
            '.interface_version = 99,'), 'version 99')

    def test_plugin_refuses_our_version(self):
        self.refused(lambda source: source.replace(
            'if (interface != BALE_DEVICE_INTERFACE)', 'if (interface != 2)'),
            'speaks interface')

    def test_missing_function(self):
        self.refused(lambda source: source.replace(
            '.flush = pagedir_flush,', ''), 'not optional')

    def test_missing_symbol(self):
        self.refused(lambda source: source.replace(
            'bale_device_create_instance', 'another_name'),
            'does not export bale_device_create_instance')

    def test_bad_block_size(self):
        self.refused(lambda source: source.replace(
            '.block_size = 4096', '.block_size = 1000'),
            'block size of 1000 bytes')

    def test_no_instance_and_no_reason(self):
        self.refused(lambda source: source.replace(
            'p = g_new0(PageDir, 1);', 'if (!target[0] || 1) { return NULL; }'
            ' p = g_new0(PageDir, 1);'), 'no instance')

    def test_no_object(self):
        with open('wrong.so', 'w', encoding='utf-8') as file:
            file.write('this is no object')
        result = bale('create', '--device', './wrong.so', 'x.store', '1M')
        self.assert_one_line_error(result, 'wrong.so')

    def test_no_file(self):
        result = bale('create', '--device', './none.so', 'x.store', '1M')
        self.assert_one_line_error(result, 'none.so', 'No such file')


if __name__ == '__main__':
    bale_iotests.main()
