#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Bad input: one line that says what and where, status 1, nothing changed."""

import contextlib
import os

import bale_forge
import bale_iotests
from bale_images import GIB, KIB, MIB, check, create, io, make_raw, sha256
from bale_iotests import (BALE, Background, bale_for_everybody, qemu_img,
                          qemu_io, run, wait_for_nbd)

NOBODY = 65534


@contextlib.contextmanager
def mounted_tmpfs(path, options):
    os.mkdir(path)
    run('mount', '-t', 'tmpfs', '-o', options, 'none', path, check=0)
    try:
        yield path
    finally:
        run('umount', '--lazy', path)


class BadStoreTest(bale_iotests.TestCase):
    """Files that are no store, or none that this version opens."""

    def setUp(self):
        create('good.bale', 8 * MIB, 'page_size=2M')
        io('good.bale', 'write -P 1 0 2M')

    def assert_refused(self, path, *words):
        """By each program, reading and writing, without touching the file."""
        before = sha256(path)
        self.assert_one_line_error(
            qemu_img('info', '-f', 'bale', path, check=None), path, *words)
        self.assert_one_line_error(
            qemu_img('check', '-f', 'bale', path, check=None), path, *words)
        self.assert_one_line_error(
            qemu_img('convert', '-f', 'bale', '-O', 'raw', path, 'out.raw',
                     check=None), path, *words)
        self.assert_one_line_error(
            qemu_io('-f', 'bale', '-c', 'write 0 4k', path, check=None),
            path, *words)
        self.assert_one_line_error(
            qemu_img('resize', '-f', 'bale', path, '16M', check=None),
            path, *words)
        self.assertEqual(sha256(path), before)

    def forge(self, **changes):
        forge = bale_forge.Forge.load('good.bale')
        for copy in range(4):
            forge.patch_super(copy, **changes)
        forge.write('bad.bale')

    def test_a_file_that_is_no_store(self):
        make_raw(self.random, 'bad.bale', 4 * MIB)
        self.assert_refused('bad.bale', 'not a Bale store')

    def test_a_text_file(self):
        with open('bad.bale', 'w', encoding='utf-8') as file:
            file.write('Hello\n')
        self.assert_refused('bad.bale', 'not a Bale store')

    def test_an_empty_file(self):
        with open('bad.bale', 'wb'):
            pass
        self.assert_refused('bad.bale', 'not a Bale store')

    def test_a_qcow2_image(self):
        qemu_img('create', '-q', '-f', 'qcow2', 'bad.bale', '64M')
        self.assert_refused('bad.bale', 'not a Bale store')

    def test_a_bale_image_is_no_qcow2_image(self):
        self.assert_one_line_error(
            qemu_img('info', '-f', 'qcow2', 'good.bale', check=None),
            'good.bale', 'qcow2')

    def test_wrong_magic_in_every_superblock(self):
        self.forge(magic=b'WRONGMAG')
        self.assert_refused('bad.bale', 'not a Bale store')

    def test_a_newer_version(self):
        self.forge(version=2)
        self.assert_refused('bad.bale', 'version')

    def test_an_unknown_incompatible_feature(self):
        self.forge(incompatible=1 << 40)
        self.assert_refused('bad.bale', 'feature')

    def test_a_cluster_size_out_of_range(self):
        for size in (0, 512, 65537, 4 << 20, 1 << 31):
            with self.subTest(size=size):
                self.forge(cluster_size=size)
                self.assert_refused('bad.bale')

    def test_a_page_size_out_of_range(self):
        for size in (0, 1 << 20, (2 << 20) + 4096, 1 << 40, (1 << 64) - 1):
            with self.subTest(size=size):
                self.forge(page_size=size)
                self.assert_refused('bad.bale')

    def test_damaged_superblocks(self):
        forge = bale_forge.Forge.load('good.bale')
        for copy in range(4):
            forge.flip(copy * 512 * KIB + 60)
        forge.write('bad.bale')
        self.assert_refused('bad.bale')

    def test_cut_inside_the_super_area(self):
        for size in (100, 4096, 600 * KIB):
            with self.subTest(size=size):
                with open('good.bale', 'rb') as file:
                    data = file.read(size)
                with open('bad.bale', 'wb') as file:
                    file.write(data)
                # Whether it opens or not, nothing may crash or be changed.
                before = sha256('bad.bale')
                result = qemu_img('info', '-f', 'bale', 'bad.bale',
                                  check=None)
                if result.status:
                    self.assert_one_line_error(result, 'bad.bale')
                self.assertEqual(sha256('bad.bale'), before)

    def test_cut_inside_a_page(self):
        """Damage is reported, and what was cut off never reads as data."""
        with open('good.bale', 'r+b') as file:
            file.truncate(2 * MIB + 4 * KIB)
        before = sha256('good.bale')
        result = qemu_img('convert', '-f', 'bale', '-O', 'raw', 'good.bale',
                          'out.raw', check=None)
        self.assertEqual(result.status, 1, result)
        self.assertIn('good.bale', result.err)
        self.assertEqual(sha256('good.bale'), before)

    def test_one_good_superblock_is_enough(self):
        for good in range(4):
            with self.subTest(good=good):
                forge = bale_forge.Forge.load('good.bale')
                for copy in range(4):
                    if copy != good:
                        forge.flip(copy * 512 * KIB + 60)
                forge.write('bad.bale')
                io('bad.bale', 'read -P 1 0 2M', options=('-r',))


class BadOptionTest(bale_iotests.TestCase):
    """Options out of range: no file is made, an existing one is untouched."""

    def assert_refused(self, *options, words=(), size='1G'):
        arguments = []
        for option in options:
            arguments += ['-o', option]
        with open('old.bale', 'wb') as file:
            file.write(b'old contents')
        for name in ('new.bale', 'old.bale'):
            self.assert_one_line_error(
                qemu_img('create', '-q', '-f', 'bale', *arguments, name, size,
                         check=None), name, *words)
        self.assertFalse(os.path.exists('new.bale'))
        with open('old.bale', 'rb') as file:
            self.assertEqual(file.read(), b'old contents')

    def test_cluster_size_too_small(self):
        self.assert_refused('cluster_size=2k', words=['luster size'])

    def test_cluster_size_too_large(self):
        self.assert_refused('cluster_size=4M', words=['luster size'])

    def test_cluster_size_no_power_of_two(self):
        self.assert_refused('cluster_size=96k', words=['luster size'])

    def test_page_size_no_multiple(self):
        self.assert_refused('page_size=3M', words=['age size'])

    def test_page_size_zero(self):
        self.assert_refused('page_size=512k', words=['age size'])

    def test_page_size_too_large(self):
        self.assert_refused('page_size=2G', words=['age size'])

    def test_page_too_small_for_the_clusters(self):
        self.assert_refused('page_size=2M', 'cluster_size=2M',
                            words=['age size'])

    def test_unknown_compression(self):
        self.assert_refused('compression_type=lzma', words=['lzma'])

    def test_level_out_of_range(self):
        for codec, level in (('deflate', 99), ('zstd', 99), ('none', 5)):
            with self.subTest(codec=codec):
                self.assert_refused(f'compression_type={codec}',
                                    f'compression_level={level}',
                                    words=['level'])

    def test_image_too_large(self):
        self.assert_refused(size=str((1 << 62) + (1 << 61)), words=['size'])

    def test_too_many_clusters(self):
        self.assert_refused('cluster_size=4k', size=str(1 << 60),
                            words=['cluster'])

    def test_unknown_option(self):
        self.assert_one_line_error(
            qemu_img('create', '-q', '-f', 'bale', '-o', 'colour=red',
                     'new.bale', '1G', check=None), 'new.bale', 'colour')
        self.assertFalse(os.path.exists('new.bale'))

    def test_backing_file_name_too_long(self):
        name = 'x' * 5000
        result = qemu_img('create', '-u', '-q', '-f', 'bale', '-b', name,
                          '-F', 'raw', 'new.bale', '1G', check=None)
        self.assertEqual(result.status, 1, result)
        self.assertFalse(os.path.exists('new.bale'))


class BadPlaceTest(bale_iotests.TestCase):
    """Files that cannot be opened or written."""

    def test_a_missing_file(self):
        self.assert_one_line_error(
            qemu_img('info', '-f', 'bale', 'no.bale', check=None), 'no.bale',
            'No such file or directory')

    def test_a_missing_directory(self):
        self.assert_one_line_error(
            qemu_img('create', '-q', '-f', 'bale', 'no/x.bale', '1G',
                     check=None), 'no/x.bale', 'No such file or directory')

    def test_a_directory(self):
        os.mkdir('d.bale')
        result = qemu_img('info', '-f', 'bale', 'd.bale', check=None)
        self.assert_one_line_error(result, 'd.bale')

    def test_an_unwritable_directory(self):
        self.need_root()
        self.need('setpriv')
        os.mkdir('d', 0o755)
        os.chmod('.', 0o755)
        self.assert_one_line_error(
            run('setpriv', f'--reuid={NOBODY}', '--clear-groups',
                bale_for_everybody('everybody'), 'run', 'qemu-img', 'create',
                '-q', '-f', 'bale', 'd/x.bale', '1G'),
            'd/x.bale', 'Permission denied')
        self.assertEqual(os.listdir('d'), [])

    def test_a_file_that_may_not_be_written(self):
        self.need_root()
        self.need('setpriv')
        create('x.bale', 1 * GIB)
        os.chmod('x.bale', 0o644)
        os.chmod('.', 0o755)
        before = sha256('x.bale')
        result = run('setpriv', f'--reuid={NOBODY}', '--clear-groups',
                     bale_for_everybody('everybody'), 'run', 'qemu-io',
                     '-f', 'bale', '-c', 'write 0 4k',
                     os.path.abspath('x.bale'))
        self.assert_one_line_error(result, 'x.bale', 'Permission denied')
        self.assertEqual(sha256('x.bale'), before)

    def test_open_for_writing_elsewhere(self):
        create('x.bale', 64 * MIB)
        socket = self.path('nbd.sock')
        with Background(BALE, 'run', 'qemu-nbd', '-f', 'bale', '-k', socket,
                        '-t', 'x.bale') as server:
            self.assertTrue(wait_for_nbd(server, socket), server.output())
            before = sha256('x.bale')
            for result in (
                    qemu_io('-f', 'bale', '-c', 'write 0 4k', 'x.bale',
                            check=None),
                    qemu_img('info', '-f', 'bale', 'x.bale', check=None),
                    qemu_img('create', '-q', '-f', 'bale', 'x.bale', '1G',
                             check=None)):
                self.assertEqual(result.status, 1, result)
                self.assertIn('lock', result.err)
                self.assertIn('x.bale', result.err)
            self.assertEqual(sha256('x.bale'), before)

    def test_reading_twice_at_once(self):
        create('x.bale', 64 * MIB)
        io('x.bale', 'write -P 1 0 1M')
        socket = self.path('nbd.sock')
        with Background(BALE, 'run', 'qemu-nbd', '-r', '-f', 'bale', '-k',
                        socket, '-t', 'x.bale') as server:
            self.assertTrue(wait_for_nbd(server, socket), server.output())
            io('x.bale', 'read -P 1 0 1M', options=('-r',))

    def test_a_full_disk_while_creating(self):
        self.need_root()
        with mounted_tmpfs('small', 'size=16k'):
            result = qemu_img('create', '-q', '-f', 'bale', 'small/x.bale',
                              '1G', check=None)
            self.assert_one_line_error(result, 'small/x.bale',
                                       'No space left on device')

    def test_a_full_disk_while_converting(self):
        self.need_root()
        raw = make_raw(self.random, 'disk.raw', 64 * MIB, parts=2,
                       part_length=30 * MIB)
        with mounted_tmpfs('small', 'size=12M'):
            result = qemu_img('convert', '-f', 'raw', '-O', 'bale', '-o',
                              'page_size=2M', raw, 'small/x.bale', check=None)
            self.assertEqual(result.status, 1, result)
            self.assertIn('No space left on device', result.err)
            # What is there opens and is clean.
            check('small/x.bale')

    def test_room_that_returns_is_used(self):
        self.need_root()
        # Far more than fits: what only lacks room when the store is closed
        # is told, but QEMU ignores errors of that
        raw = make_raw(self.random, 'disk.raw', 64 * MIB, parts=2,
                       part_length=30 * MIB)
        with mounted_tmpfs('small', 'size=8M'):
            qemu_img('convert', '-f', 'raw', '-O', 'bale', '-o',
                     'page_size=2M', raw, 'small/x.bale', check=1)
            run('mount', '-o', 'remount,size=100M', 'small', check=0)
            qemu_img('convert', '-n', '-f', 'raw', '-O', 'bale', raw,
                     'small/x.bale')
            check('small/x.bale')
            qemu_img('compare', '-q', raw, 'small/x.bale')


if __name__ == '__main__':
    bale_iotests.main()
