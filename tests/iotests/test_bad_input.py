#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""
The command `bale` and input that is wrong: one line that says what and where,
status 1, and nothing changed on disk.  (QEMU's side: test_bale_bad_input.py.)
"""

import hashlib
import json
import os
import stat

import bale_iotests
from bale_iotests import bale, run
from bale_forge import BLOCK, MiB, Forge
from bale_images import check_killed
from bale_oracle import QemuIo

READING = (('info',), ('list',), ('check',), ('verify',))


def digest(path):
    """What of a file must not change, atime aside."""
    st = os.stat(path)
    with open(path, 'rb') as file:
        return (hashlib.sha256(file.read()).hexdigest(), st.st_size,
                st.st_mode, st.st_mtime_ns)


class BadInputCase(bale_iotests.TestCase):
    def make_store(self, name='x.bale', size='1M', options='page_size=2M'):
        bale('create', '-o', options, name, size, check=0)
        return self.path(name)

    def forge(self, clean=True):
        f = Forge(size=1 * MiB)
        f.open_page(bucket=1)
        f.segment([f.image()])
        f.open_page()
        f.segment([f.data(i, bytes([i + 1]) * 4096) for i in range(8)],
                  f.barrier_all())
        f.finish(clean)
        return f

    def refused(self, *words, name='x.bale'):
        """All commands refuse the store @name with @words."""
        before = digest(name)
        for command in READING + (('check', '-r', 'all'),):
            result = bale(*command, name)
            self.assert_one_line_error(result, name, *words)
            self.assertEqual(digest(name), before, str(result))
        result = bale('export', name, 'out.raw')
        self.assert_one_line_error(result, name, *words)
        self.assertFalse(os.path.exists('out.raw'), str(result))
        self.assertEqual(digest(name), before)


class BadStores(BadInputCase):
    def test_forged_store_is_good(self):
        # Or the others would show nothing.
        self.forge().write('x.bale')
        bale('check', 'x.bale', check=0)
        bale('export', 'x.bale', 'out.raw', check=0)

    def test_wrong_magic(self):
        f = self.forge()
        f.patch_super(None, magic=b'ELABSTOR')
        f.write('x.bale')
        self.refused('not a Bale store')

    def test_newer_version(self):
        f = self.forge()
        f.patch_super(None, version=2)
        f.write('x.bale')
        self.refused('version')

    def test_unknown_incompatible_feature(self):
        f = self.forge()
        f.patch_super(None, incompatible=1 << 20)
        f.write('x.bale')
        self.refused('feature')

    def test_unknown_read_only_feature_refuses_writing_only(self):
        f = self.forge()
        f.patch_super(None, ro_compatible=1 << 20)
        f.write('x.bale')
        bale('verify', 'x.bale', check=0)
        before = digest('x.bale')
        self.assert_one_line_error(bale('check', '-r', 'all', 'x.bale'),
                                   'x.bale', 'feature')
        self.assertEqual(digest('x.bale'), before)

    def test_truncated(self):
        for length in (2 * MiB + 3 * BLOCK, 2 * MiB + BLOCK, 2 * MiB):
            f = self.forge()
            f.bytes = f.bytes[:length]
            f.write('x.bale')
            self.refused('truncated')

    def test_truncated_inside_the_super_area(self):
        for length in (1 * MiB, 4096, 512):
            f = self.forge()
            f.bytes = f.bytes[:length]
            f.write('x.bale')
            self.refused('truncated')

    def test_all_superblocks_damaged(self):
        f = self.forge()
        for address in (0, MiB // 2, MiB, 3 * MiB // 2):
            f.flip(address + 60)
        f.write('x.bale')
        self.refused('superblock')

    def test_geometry_out_of_range(self):
        for changes in (dict(cluster_size=3000), dict(cluster_size=0),
                        dict(cluster_size=1 << 31), dict(page_size=0),
                        dict(page_size=3 * MiB), dict(page_size=1 << 63),
                        dict(super_size=1), dict(block_size=512)):
            f = self.forge()
            f.patch_super(None, **changes)
            f.write('x.bale')
            self.refused('superblock')

    def test_no_store(self):
        for content in (b'', b'x', bytes(512), bytes(3 * MiB),
                        b'QFI\xfb' + bytes(4092), b'BALE' + bytes(4092),
                        os.urandom(1 * MiB)):
            with open('x.bale', 'wb') as file:
                file.write(content)
            self.refused('not a Bale store')

    def test_not_a_file(self):
        os.mkdir('dir')
        os.mkfifo('fifo')
        for name in ('dir', 'fifo', '/dev/null'):
            for command in READING + (('check', '-r', 'all'),):
                self.assert_one_line_error(bale(*command, name), name)
            self.assert_one_line_error(bale('import', name, 'y.bale'), name)
            self.assertFalse(os.path.exists('y.bale'))

    def test_missing(self):
        for command in READING:
            self.assert_one_line_error(bale(*command, 'missing'), 'missing',
                                       'No such file')
        self.assert_one_line_error(bale('import', 'missing', 'y.bale'),
                                   'missing', 'No such file')
        self.assertEqual(os.listdir('.'), [])

    def test_image_record_lost(self):
        # Nothing says how long the image is: damage, not an empty image.
        f = self.forge(clean=False)
        r, page, offset = f.placed[0]
        f.flip(f.base(page) + offset + 70)
        f.write('x.bale')
        before = digest('x.bale')
        result = bale('info', 'x.bale')
        self.assertEqual(result.status, 1, str(result))
        self.assertIn('x.bale', result.err)
        self.assertIn('image record', result.err)
        self.assertEqual(digest('x.bale'), before)


class Locks(BadInputCase):
    def test_already_open_for_writing(self):
        self.need('qemu-io')
        if not os.path.exists(bale_iotests.SHIM):
            self.skipTest('built without QEMU')
        self.make_store()
        writer = QemuIo(None, 'x.bale')
        try:
            # Each returns when it is done: nothing is under way any more
            writer.command('write 0 4k')
            writer.command('flush')
            before = digest('x.bale')
            for command in READING + (('check', '-r', 'all'),
                                      ('create', '--force')):
                more = ('1M',) if command[0] == 'create' else ()
                self.assert_one_line_error(bale(*command, 'x.bale', *more),
                                           'x.bale', 'lock')
            with open('in.raw', 'wb') as file:
                file.truncate(1 * MiB)
            self.assert_one_line_error(
                bale('import', '--force', 'in.raw', 'x.bale'), 'x.bale',
                'lock')
            self.assertEqual(digest('x.bale'), before)
            bale('info', '-U', 'x.bale', check=0)
        finally:
            writer.kill()
        check_killed('x.bale')


class BadOptions(BadInputCase):
    def test_create_out_of_range(self):
        for size, options in (
                ('1M', 'cluster_size=2K'), ('1M', 'cluster_size=4M'),
                ('1M', 'cluster_size=5000'), ('1M', 'cluster_size=0'),
                ('1M', 'cluster_size=-4096'), ('1M', 'cluster_size=8E'),
                ('1M', 'page_size=1M'), ('1M', 'page_size=3M'),
                ('1M', 'page_size=2G'), ('1M', 'page_size=0'),
                ('1M', 'page_size=4M,cluster_size=2M'),
                ('1M', 'compression_type=lzma'),
                ('1M', 'compression_level=99'),
                ('1M', 'compression_level=x'),
                ('1M', 'compression_type=none,compression_level=3'),
                ('1M', 'nonsense=1'), ('1M', 'cluster_size'),
                ('2E', 'cluster_size=64K'), ('16E', 'cluster_size=64K'),
                ('1P', 'cluster_size=4K'),
                ('-1', 'cluster_size=64K'), ('', 'cluster_size=64K'),
                ('1Q', 'cluster_size=64K'), ('1MM', 'cluster_size=64K'),
                ('1M', 'backing_file=' + 'x' * 5000)):
            result = bale('create', '-o', options, '--', 'x.bale', size)
            self.assert_one_line_error(result, 'x.bale')
            self.assertEqual(os.listdir('.'), [], str(result))

    def test_force_with_bad_options_changes_nothing(self):
        self.make_store()
        before = digest('x.bale')
        self.assert_one_line_error(
            bale('create', '--force', '-o', 'cluster_size=1', 'x.bale', '1M'),
            'x.bale')
        self.assertEqual(digest('x.bale'), before)

    def test_existing_file_is_not_replaced(self):
        with open('x.bale', 'w') as file:
            file.write('precious')
        with open('in.raw', 'wb') as file:
            file.truncate(MiB)
        before = digest('x.bale')
        self.assert_one_line_error(bale('create', 'x.bale', '1M'), 'x.bale',
                                   'exists')
        self.assert_one_line_error(bale('import', 'in.raw', 'x.bale'),
                                   'x.bale', 'exists')
        self.assertEqual(digest('x.bale'), before)

    def test_arguments(self):
        self.make_store()
        for command in (('create',), ('create', 'y.bale'), ('info',),
                        ('list', 'a', 'b'), ('check', '-r', 'some', 'x.bale'),
                        ('check', '-U', '-r', 'all', 'x.bale'),
                        ('verify', '--rate-limit', 'fast', 'x.bale'),
                        ('export', 'x.bale'), ('export', 'x.bale', 'x.bale'),
                        ('export', '--workers', '9999', 'x.bale', 'y'),
                        ('import', 'x.bale', 'x.bale', '--force'),
                        ('info', '--nonsense', 'x.bale'), ('nonsense',), ()):
            before = digest('x.bale')
            self.assert_one_line_error(bale(*command))
            self.assertEqual(digest('x.bale'), before)
        self.assertEqual(os.listdir('.'), ['x.bale'])

    def test_bad_plugin(self):
        with open('plugin.so', 'w') as file:
            file.write('no object')
        self.make_store()
        for plugin in ('plugin.so', 'missing.so'):
            self.assert_one_line_error(
                bale('info', '--device', self.path(plugin), 'x.bale'), plugin)


class NoRoom(BadInputCase):
    def mount(self, size):
        self.need_root()
        os.mkdir('small')
        result = run('mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs',
                     'small')
        if result.status != 0:
            self.skipTest('no tmpfs can be mounted')
        self.addCleanup(run, 'umount', self.path('small'))

    def test_create_on_a_full_disk(self):
        self.mount('16K')
        result = bale('create', '-o', 'page_size=2M', 'small/x.bale', '1G')
        self.assert_one_line_error(result, 'small/x.bale', 'space')
        self.assertEqual(os.listdir('small'), [])

    def test_import_on_a_full_disk(self):
        self.mount('8M')
        with open('in.raw', 'wb') as file:
            file.write(self.random.randbytes(32 * MiB))
        result = bale('import', '-o', 'page_size=2M', 'in.raw',
                      'small/x.bale')
        self.assertEqual(result.status, 1, str(result))
        self.assertIn('space', result.err)
        self.assertEqual(os.listdir('small'), [])

    def test_export_on_a_full_disk(self):
        with open('in.raw', 'wb') as file:
            file.write(self.random.randbytes(8 * MiB))
        bale('import', 'in.raw', 'x.bale', check=0)
        self.mount('4M')
        result = bale('export', 'x.bale', 'small/out.raw')
        self.assert_one_line_error(result, 'small/out.raw', 'space')
        self.assertEqual(os.listdir('small'), [])
        bale('check', 'x.bale', check=0)


class NoPermission(BadInputCase):
    """As root nothing is unwritable but what cannot be written at all."""

    def unwritable(self):
        os.mkdir('ro')
        os.chmod('ro', 0o555)
        if os.geteuid() == 0:
            result = run('mount', '-t', 'tmpfs', '-o', 'ro', 'tmpfs', 'ro')
            if result.status != 0:
                self.skipTest('no tmpfs can be mounted')
            self.addCleanup(run, 'umount', self.path('ro'))

    def test_unwritable_directory(self):
        self.unwritable()
        with open('in.raw', 'wb') as file:
            file.truncate(MiB)
        self.make_store()
        self.assert_one_line_error(bale('create', 'ro/x.bale', '1M'),
                                   'ro/x.bale')
        self.assert_one_line_error(bale('import', 'in.raw', 'ro/x.bale'),
                                   'ro/x.bale')
        self.assert_one_line_error(bale('export', 'x.bale', 'ro/out.raw'),
                                   'ro/out.raw')
        self.assertEqual(os.listdir('ro'), [])

    def test_directory_that_is_missing(self):
        self.assert_one_line_error(bale('create', 'no/x.bale', '1M'),
                                   'no/x.bale', 'No such file')

    def test_new_store_is_private(self):
        self.make_store()
        self.assertEqual(stat.S_IMODE(os.stat('x.bale').st_mode), 0o600)


class HostileStores(BadInputCase):
    """Nonsense under right checksums: an error or an answer, never a crash,
    a hang or another program's memory."""

    ROUNDS = 1500 if bale_iotests.LONG else 120
    INTERESTING = (0, 1, 2, 15, 16, 63, 64, 255, 4096, (1 << 16) - 1, 1 << 20,
                   1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 36,
                   1 << 40, (1 << 48) - 1, 1 << 60, 1 << 63, (1 << 64) - 1)

    def busy_forge(self, clean):
        f = Forge(size=1 * MiB)
        f.open_page(bucket=1)
        f.segment([f.image(backing_file='')])
        f.open_page()
        f.segment([f.data(i, bytes([i + 1]) * 4096, i % 3)
                   for i in range(9)], f.barrier_all())
        f.segment([f.zero(3, 20), f.drop(5, 2), f.data(4, b'abcd' * 1024),
                   f.drop(200, 0)], f.barrier_all())
        f.finish(clean)
        return f

    def mutate(self, f):
        """One or two changes, sealed again; what was done."""
        rng = self.random
        done = []
        for _ in range(rng.choice((1, 1, 2))):
            kind = rng.randrange(4)
            if kind == 0:
                name = rng.choice((
                    'ro_compatible', 'compatible', 'uuid', 'generation',
                    'state', 'cluster_size', 'page_size', 'root_address',
                    'root_version', 'root_length', 'root_end',
                    'next_sequence', 'device_end'))
                narrow = name in ('state', 'cluster_size', 'root_length',
                                  'root_end')
                value = rng.choice(self.INTERESTING)
                value = (rng.randbytes(16) if name == 'uuid' else
                         value & ((1 << 32) - 1) if narrow else value)
                f.patch_super(None, **{name: value})
                done.append(('super', name, value))
            elif kind == 1:
                page = rng.randrange(len(f.tails))
                name = rng.choice(('bucket', 'page', 'version',
                                   'first_sequence'))
                value = rng.choice(self.INTERESTING)
                if name == 'bucket':
                    value &= (1 << 32) - 1
                f.patch_page(page, **{name: value})
                done.append(('page', page, name, value))
            else:
                page, offset = rng.choice(
                    [(p, o) for _, p, o in f.placed]
                    + [(p, BLOCK) for p in f.tails])
                fields = dict(zip(
                    ('type', 'codec', 'flags', 'payload_length',
                     'header_length', 'sequence', 'version', 'layer',
                     'count', 'cluster'), (8, 8, 16, 32, 16, 64, 64, 32, 32,
                                           64)))
                if kind == 2:
                    name = rng.choice(list(fields))
                    value = (rng.choice(self.INTERESTING)
                             & ((1 << fields[name]) - 1))
                    f.patch_record(page, offset, **{name: value})
                else:
                    at = f.base(page) + offset
                    length = int.from_bytes(f.get(at + 8, 4), 'little')
                    if not 0 < length <= 1 << 20:
                        continue
                    width = rng.choice((1, 2, 4, 8))
                    name = rng.randrange(length) // width * width
                    value = (rng.choice(self.INTERESTING)
                             & ((1 << 8 * width) - 1))
                    f.put(at + 64 + name, value.to_bytes(width, 'little'))
                    f.seal_record(page, offset)
                done.append(('record', page, offset, name, value))
        return done

    def test_resealed_fields(self):
        for i in range(self.ROUNDS):
            f = self.busy_forge(clean=bool(i % 2))
            done = self.mutate(f)
            f.write('x.bale')
            for command in (('verify', 'x.bale'),
                            ('export', '--salvage', 'x.bale', 'out.raw'),
                            ('check', '-r', 'all', 'x.bale')):
                if command[0] == 'export' and self.huge():
                    continue
                result = bale(*command)
                self.assertIn(result.status, (0, 1, 2, 3),
                              f'{done} {result}')

    def huge(self):
        """The image of a hostile store may be longer than the disk."""
        result = bale('list', '--json', 'x.bale')
        return result.status != 0 or json.loads(
            result.out)[0]['size'] > 64 * MiB


if __name__ == '__main__':
    bale_iotests.main()
