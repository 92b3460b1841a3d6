#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Persistent dirty bitmaps of bale images: what is known of qcow2's.

They survive a restart, are inconsistent after a kill, and an incremental backup
goes on where the last one ended.
"""

import json
import os

import bale_iotests
from bale_backup import DAEMON, KIB, MIB, SYSTEM
from bale_images import check, create, io, make_raw
from bale_iotests import bale, qemu_img, wait_until
from bale_qmp import Qemu, QmpError

SIZE = 32 * MIB


def bitmap(path, *args, **kwargs):
    """qemu-img bitmap on a bale image."""
    name = args[-1]
    return qemu_img('bitmap', '-f', 'bale', *args[:-1], path, name, **kwargs)


def stored(path, image=None):
    """What `bale info` lists, by name."""
    info = json.loads(bale('info', '--json', path, check=0).out)
    images = info['images'] if 'images' in info else [info['image']]
    for entry in images:
        if not image or entry.get('name') == image:
            return {b['name']: b for b in entry.get('bitmaps', [])}
    raise AssertionError(f'no image {image} in {info}')


class Node(Qemu):
    """A storage daemon with one bale node, n."""

    def __init__(self, path, **more):
        super().__init__(DAEMON)
        self.file, self.more = path, more

    def __enter__(self):
        super().__enter__()
        self.open()
        return self

    def open(self, **more):
        self.command('blockdev-add', driver='bale', node_name='n',
                     file={'driver': 'file', 'node-name': 'f',
                           'filename': self.file}, **self.more, **more)

    def close(self):
        self.command('blockdev-del', node_name='n')

    def add(self, name, **more):
        self.command('block-dirty-bitmap-add', node='n', name=name,
                     persistent=True, **more)

    def do(self, what, name, **more):
        self.command(f'block-dirty-bitmap-{what}', node='n', name=name,
                     **more)

    def merge(self, target, *names):
        self.command('block-dirty-bitmap-merge', node='n', target=target,
                     bitmaps=list(names))

    def bitmaps(self):
        nodes = self.command('query-named-block-nodes', flat=True)
        node = [n for n in nodes if n['node-name'] == 'n'][0]
        return {b['name']: b for b in node.get('dirty-bitmaps', [])}

    def digest(self, name):
        return self.command('x-debug-block-dirty-bitmap-sha256', node='n',
                            name=name)['sha256']

    def export(self):
        self.command('nbd-server-start', addr={
            'type': 'unix', 'data': {'path': self.path + '.nbd'}})
        self.command('block-export-add', type='nbd', id='e', node_name='n',
                     name='n', writable=True)
        return f'nbd+unix:///n?socket={self.path}.nbd'

    def write(self, *commands):
        """What a guest would write."""
        url = self.export()
        words = [w for c in commands for w in ('-c', c)]
        bale_iotests.run('qemu-io', '-f', 'raw', *words, url, check=0)
        self.command('block-export-del', id='e', mode='hard')
        self.wait_event('BLOCK_EXPORT_DELETED', id='e')
        self.command('nbd-server-stop')


class BitmapsTest(bale_iotests.TestCase):

    def setUp(self):
        self.image = self.path('a.bale')
        create(self.image, SIZE)

    def test_survives_restart(self):
        with Node(self.image) as node:
            node.add('b0')
            node.add('b1', granularity=4 * KIB, disabled=True)
            node.add('b2', granularity=512)
            self.command_error('exists', node.add, 'b1')
            node.write('write -P 1 1M 200k', 'write -P 2 31M 512')
            node.merge('b1', 'b2')
            before = node.bitmaps()
            digests = {name: node.digest(name) for name in before}
        self.assertEqual(before['b0']['count'], 5 * 64 * KIB)
        self.assertEqual(before['b1']['count'], 200 * KIB + 4 * KIB)
        self.assertEqual(before['b2']['count'], 200 * KIB + 512)
        self.assertEqual(
            {name: (b['granularity'], b['enabled'], b['inconsistent'])
             for name, b in stored(self.image).items()},
            {'b0': (64 * KIB, True, False), 'b1': (4 * KIB, False, False),
             'b2': (512, True, False)})
        with Node(self.image) as node:
            self.assertEqual(node.bitmaps(), before)
            for name, digest in digests.items():
                self.assertEqual(node.digest(name), digest)
            self.assertTrue(stored_in_use(node, self.image))
            # Once more, and by closing the node alone
            node.write('write -P 3 2M 64k')
            node.do('remove', 'b2')
            node.do('clear', 'b1')
            node.close()
            node.open()
            after = node.bitmaps()
            self.assertEqual(set(after), {'b0', 'b1'})
            self.assertEqual(after['b0']['count'], 6 * 64 * KIB)
            self.assertEqual(after['b1']['count'], 0)
            node.do('enable', 'b1')
            node.do('disable', 'b0')
        with Node(self.image) as node:
            node.write('write -P 3 8M 64k')
            after = node.bitmaps()
            self.assertEqual(after['b0']['count'], 6 * 64 * KIB)
            self.assertEqual(after['b1']['count'], 64 * KIB)
        check(self.image)

    def command_error(self, words, function, *args, **kwargs):
        with self.assertRaisesRegex(QmpError, words):
            function(*args, **kwargs)

    def test_killed(self):
        """What was in memory is lost, and said to be."""
        bitmap(self.image, '--add', 'b0')
        with Node(self.image) as node:
            node.add('never')
            node.write('write -P 1 0 64k')
            node.process.kill()
        self.assertEqual(set(stored(self.image)), {'b0'})
        self.assertTrue(stored(self.image)['b0']['inconsistent'])
        self.assertIn('inconsistent', bale('info', self.image).out)
        # Neither a close nor a repair makes it well
        io(self.image, 'write -P 2 0 4k')
        qemu_img('check', '-q', '-r', 'all', '-f', 'bale', self.image)
        self.assertTrue(stored(self.image)['b0']['inconsistent'])
        for word in ('--clear', '--enable', '--disable'):
            self.assertIn('inconsistent',
                          bitmap(self.image, word, 'b0', check=1).err)
        with Node(self.image) as node:
            self.assertTrue(node.bitmaps()['b0']['inconsistent'])
            self.command_error('inconsistent', node.do, 'clear', 'b0')
            self.command_error('exists', node.add, 'b0')
            self.command_error('inconsistent', node.command, 'block_resize',
                               node_name='n', size=SIZE * 2)
            node.add('b1')
            self.command_error('inconsistent', node.merge, 'b1', 'b0')
            node.do('remove', 'b0')
            node.add('b0')
        self.assertFalse(stored(self.image)['b0']['inconsistent'])
        self.assertEqual(set(stored(self.image)), {'b0', 'b1'})

    def test_killed_while_reading(self):
        """Who only reads changes nothing, and a kill does no harm."""
        bitmap(self.image, '--add', 'b0')
        with Node(self.image, read_only=True) as node:
            self.assertIn('b0', node.bitmaps())
            self.command_error('read', node.do, 'clear', 'b0')
            self.command_error('written', node.add, 'b1')
            node.process.kill()
        self.assertFalse(stored(self.image)['b0']['inconsistent'])

    def test_reopen(self):
        """Read-only and back: stored in between, and not to be changed."""
        bitmap(self.image, '--add', 'b0')
        with Node(self.image) as node:
            node.write('write -P 1 0 64k')
            for _ in range(2):
                self.reopen(node, True)
                self.assertFalse(stored_in_use(node, self.image))
                self.command_error('read', node.do, 'clear', 'b0')
                self.reopen(node, False)
                self.assertTrue(stored_in_use(node, self.image))
            node.write('write -P 1 1M 64k')
            self.assertEqual(node.bitmaps()['b0']['count'], 128 * KIB)
            self.reopen(node, True)
            node.process.kill()
        self.assertFalse(stored(self.image)['b0']['inconsistent'])

    @staticmethod
    def reopen(node, read_only):
        node.command('blockdev-reopen', options=[{
            'driver': 'bale', 'node-name': 'n', 'read-only': read_only,
            'file': {'driver': 'file', 'node-name': 'f',
                     'filename': node.file}}])

    def test_qemu_img(self):
        raw = make_raw(self.random, self.path('raw'), SIZE)
        qemu_img('convert', '-n', '-f', 'raw', '-O', 'bale', raw, self.image)
        bitmap(self.image, '--add', '--disable', '-g', '4096', 'first')
        bitmap(self.image, '--add', 'second')
        self.assertEqual(bitmap(self.image, '--add', 'second',
                                check=1).status, 1)
        io(self.image, 'write -P 7 16M 8k')
        bitmap(self.image, '--merge', 'second', 'first')
        bitmap(self.image, '--disable', 'second')
        bitmap(self.image, '--clear', '--enable', 'second')
        io(self.image, 'write -P 7 20M 8k')
        with Node(self.image, read_only=True) as node:
            want = node.bitmaps()
            digests = {name: node.digest(name) for name in want}
        self.assertEqual(want['first']['count'], 64 * KIB)
        self.assertEqual(want['second']['count'], 64 * KIB)
        # To qcow2 and back
        other, back = self.path('b.qcow2'), self.path('c.bale')
        qemu_img('convert', '--bitmaps', '-f', 'bale', '-O', 'qcow2',
                 self.image, other)
        qemu_img('convert', '--bitmaps', '-f', 'qcow2', '-O', 'bale', other,
                 back)
        with Node(back, read_only=True) as node:
            self.assertEqual(set(node.bitmaps()), set(want))
            for name, digest in digests.items():
                self.assertEqual(node.digest(name), digest)
        bitmap(self.image, '--remove', 'first')
        self.assertEqual(list(stored(self.image)), ['second'])
        check(self.image)
        size = json.loads(qemu_img('measure', '--output=json', '-O', 'qcow2',
                                   '-f', 'bale', self.image).out)
        self.assertIn('bitmaps', size)

    def test_inconsistent_is_not_converted(self):
        bitmap(self.image, '--add', 'b0')
        with Node(self.image) as node:
            node.process.kill()
        other = self.path('b.qcow2')
        result = qemu_img('convert', '--bitmaps', '-f', 'bale', '-O', 'qcow2',
                          self.image, other, check=1)
        self.assertIn('inconsistent', result.err)
        qemu_img('convert', '--bitmaps', '--skip-broken-bitmaps', '-f',
                 'bale', '-O', 'qcow2', self.image, other)

    def test_resize(self):
        with Node(self.image) as node:
            node.add('b0')
            node.write('write -P 1 31M 1M')
            node.command('block_resize', node_name='n', size=2 * SIZE)
            node.write('write -P 1 63M 1M')
            self.assertEqual(node.bitmaps()['b0']['count'], 2 * MIB)
        bitmap(self.image, '--add', 'b1')
        qemu_img('resize', '-q', '--shrink', '-f', 'bale', self.image, SIZE)
        with Node(self.image) as node:
            self.assertEqual(node.bitmaps()['b0']['count'], MIB)
            self.assertEqual(node.bitmaps()['b1']['count'], 0)

    def test_of_an_empty_disk(self):
        """QEMU's bitmaps of no bits assert when they are looked at."""
        create('e.bale', 0)
        with Node('e.bale') as node:
            node.add('a')
            node.close()
            node.open()
            self.assertFalse(node.bitmaps()['a'].get('inconsistent', False))
            node.do('remove', 'a')
        check('e.bale')

    def test_snapshots(self):
        """They belong to the image; a rollback needs them gone."""
        bitmap(self.image, '--add', 'b0')
        io(self.image, 'write -P 1 0 64k')
        qemu_img('snapshot', '-c', 's', self.image)
        self.assertEqual(set(stored(self.image)), {'b0'})
        with Node(self.image, image='@s', read_only=True) as node:
            self.assertEqual(node.bitmaps(), {})
        self.assertIn('bitmap', qemu_img('snapshot', '-a', 's', self.image,
                                         check=1).err)
        bale('image', 'rollback', self.image, '@s', check=0)
        self.assertTrue(stored(self.image)['b0']['inconsistent'])

    def test_named_images(self):
        """Each image of a store has its own, and takes them along."""
        bale('image', 'create', self.image, 'one', '1M', check=0)
        with Node(self.image, image='one') as node:
            node.add('b')
            node.add('c')
            node.write('write 0 64k')
        with Node(self.image) as node:
            self.assertEqual(node.bitmaps(), {})
            node.add('b')
        with Node(self.image, image='one') as node:
            self.assertEqual(node.bitmaps()['b']['count'], 64 * KIB)

    def test_limits(self):
        long_name = 'x' * 1023
        bitmap(self.image, '--add', long_name)
        self.assertEqual(list(stored(self.image)), [long_name])
        bitmap(self.image, '--add', long_name + 'x', check=1)
        huge = self.path('huge.bale')
        create(huge, '8T')
        result = bitmap(huge, '--add', '-g', '512', 'b', check=1)
        self.assertIn('granularity', result.err)
        bitmap(huge, '--add', 'b')
        with Node(huge) as node:
            node.write('write 7T 64k')
        with Node(huge) as node:
            self.assertEqual(node.bitmaps()['b']['count'], 64 * KIB)
        self.assertLess(os.stat(huge).st_blocks * 512, 4 * MIB)

    def test_many(self):
        with Node(self.image) as node:
            for i in range(60):
                node.add(f'b{i}')
            node.write('write 0 64k')
        self.assertEqual(list(stored(self.image)),
                         [f'b{i}' for i in range(60)])
        with Node(self.image) as node:
            self.assertEqual({b['count'] for b in node.bitmaps().values()},
                             {64 * KIB})

    def test_transaction(self):
        with Node(self.image) as node:
            node.add('b0')
            node.write('write 0 64k')

            def act(*names):
                return [{'type': f'block-dirty-bitmap-{kind}',
                         'data': {'node': 'n', 'target' if kind == 'merge'
                                  else 'name': name, **more}}
                        for kind, name, more in names]
            with self.assertRaises(QmpError):
                node.command('transaction', actions=act(
                    ('add', 'b1', {'persistent': True}),
                    ('clear', 'b0', {}), ('clear', 'missing', {})))
            self.assertEqual(set(node.bitmaps()), {'b0'})
            self.assertEqual(node.bitmaps()['b0']['count'], 64 * KIB)
            node.command('transaction', actions=act(
                ('add', 'b1', {'persistent': True}),
                ('merge', 'b1', {'bitmaps': ['b0']}),
                ('disable', 'b1', {}), ('clear', 'b0', {})))
        found = stored(self.image)
        self.assertFalse(found['b1']['enabled'])
        with Node(self.image) as node:
            self.assertEqual(node.bitmaps()['b1']['count'], 64 * KIB)
            self.assertEqual(node.bitmaps()['b0']['count'], 0)

    def test_incremental_after_restart(self):
        """Full, restart, incremental, kill: full again, and on from there."""
        base, top = self.path('full.bale'), self.path('inc.bale')
        qemu_img('create', '-q', '-f', 'bale', base, SIZE)
        qemu_img('create', '-q', '-f', 'bale', '-b', base, '-F', 'bale', top)
        with Node(self.image) as node:
            node.add('b0')
            node.write('write -P 1 0 4M', 'write -P 2 16M 1M')
            node.do('clear', 'b0')
            self.backup(node, base, 'full')
            node.write('write -P 3 1M 64k')
        with Node(self.image) as node:
            node.write('write -P 4 17M 64k')
            self.assertEqual(node.bitmaps()['b0']['count'], 128 * KIB)
            self.backup(node, top, 'incremental', bitmap='b0')
            self.assertEqual(node.bitmaps()['b0']['count'], 0)
        with Node(self.image, read_only=True) as node:
            self.assertEqual(node.bitmaps()['b0']['count'], 0)
        qemu_img('compare', '-q', '-f', 'bale', '-F', 'bale', self.image, top)

    @staticmethod
    def backup(node, path, sync, **more):
        node.command('blockdev-add', driver='bale', node_name='t',
                     file={'driver': 'file', 'filename': path})
        node.command('blockdev-backup', job_id='j', device='n', target='t',
                     sync=sync, **more)
        error = node.run_job('j')
        node.command('blockdev-del', node_name='t')
        if error:
            raise AssertionError(error)

    def test_handed_over_and_back(self):
        """Who is migrated to has them, and gives them back."""
        with Qemu(SYSTEM) as qemu:
            qemu.command('blockdev-add', driver='bale', node_name='n', file={
                'driver': 'file', 'filename': self.image})
            qemu.command('block-dirty-bitmap-add', node='n', name='b0',
                         persistent=True)
            qemu.hmp('qemu-io n "write -P 1 0 64k"')
            qemu.command('migrate', uri='exec:cat > /dev/null')
            wait_until(lambda: qemu.command('query-migrate')['status'] ==
                       'completed', 'migration')
            self.assertFalse(stored(self.image)['b0']['inconsistent'])
            io(self.image, 'write -P 2 1M 64k')
            qemu.command('cont')
            qemu.hmp('qemu-io n "write -P 3 2M 64k"')
            node = [n for n in qemu.command('query-named-block-nodes')
                    if n['node-name'] == 'n'][0]
            self.assertEqual([b['count'] for b in node['dirty-bitmaps']],
                             [3 * 64 * KIB])
            self.assertTrue(stored_in_use(qemu, self.image))
        self.assertFalse(stored(self.image)['b0']['inconsistent'])

    def test_reader(self):
        """The document alone is enough to find the bits."""
        bitmap(self.image, '--add', '-g', '65536', 'b0')
        io(self.image, 'write 1M 128k', 'write 31M 1k')
        reader = os.path.join(bale_iotests.TOP, 'scripts/bale-reader.py')
        info = json.loads(bale_iotests.run(reader, 'info', '--json',
                                           self.image, check=0).out)
        self.assertEqual(info['images'][0]['bitmaps'], [
            {'name': 'b0', 'granularity': 64 * KIB, 'size': SIZE,
             'enabled': True, 'in-use': False}])
        out = self.path('bits')
        bale_iotests.run(reader, 'extract', '--bitmap', 'b0', '--checkpoint',
                         '--compare', self.image, out, check=0)
        bits = bytearray(SIZE // (64 * KIB) // 8)
        for bit in (16, 17, 31 * 16):
            bits[bit // 8] |= 1 << bit % 8
        with open(out, 'rb') as file:
            self.assertEqual(file.read(), bits)


class UnchangedTest(bale_iotests.TestCase):
    """skip-unchanged: what differs is found without a bitmap."""

    def setUp(self):
        # Extents of whole clusters: only these are compared
        self.raw = make_raw(self.random, self.path('disk.raw'), SIZE, parts=2,
                            part_length=4 * MIB)

    def change(self, count):
        """Changes @count clusters of 64 KiB that hold data."""
        with open(self.raw, 'r+b') as file:
            for i in range(count):
                file.seek(i * 5 * 64 * KIB + 100)
                file.write(self.random.randbytes(300))

    def copy(self, target, on=True):
        qemu_img('convert', '-n', '-S', '0', '--target-image-opts', '-f',
                 'raw', self.raw, f'driver=bale,file.filename={target},'
                 f'skip-unchanged={"on" if on else "off"}')

    def live(self, path):
        return json.loads(bale('info', '--json', path,
                               check=0).out)['live-bytes']

    def test_over_a_snapshot(self):
        store = self.path('store.bale')
        create(store, SIZE)
        self.copy(store)
        full = self.live(store)
        bale('image', 'snapshot', store, '@old', check=0)
        old = self.path('old.raw')
        bale_iotests.run('cp', '--sparse=always', self.raw, old, check=0)
        self.copy(store)
        self.assertLess(self.live(store) - full, 32 * KIB)
        self.change(5)  # of 512 clusters: 1 %
        self.copy(store)
        grown = self.live(store) - full
        self.assertGreater(grown, 1500)
        self.assertLess(grown, 5 * 65 * KIB)
        same_image(self.raw, store)
        bale('export', '-i', '@old', store, 'x.raw', check=0)
        qemu_img('compare', '-q', '-f', 'raw', '-F', 'raw', old, 'x.raw')
        check(store)
        self.copy(store, on=False)
        self.assertGreater(self.live(store), full * 3 // 2)
        same_image(self.raw, store)

    def test_import_update(self):
        store = self.path('store.bale')
        bale('import', self.raw, store, check=0)
        full = self.live(store)
        bitmap(store, '--add', 'b0')
        bale('image', 'snapshot', store, '@old', check=0)
        self.change(5)
        with open(self.raw, 'r+b') as file:
            file.seek(256 * KIB)
            file.write(bytes(128 * KIB))
            file.truncate(SIZE + MIB)
        bale('import', '--update', self.raw, store, check=0)
        self.assertLess(self.live(store) - full, 5 * 65 * KIB)
        same_image(self.raw, store)
        self.assertTrue(stored(store)['b0']['inconsistent'])
        check(store)
        self.assert_one_line_error(
            bale('import', '--update', '--force', self.raw, store),
            '--force')
        top = self.path('top.bale')
        qemu_img('create', '-q', '-f', 'bale', '-b', store, '-F', 'bale', top)
        self.assert_one_line_error(bale('import', '--update', self.raw, top),
                                   'backing')

    def test_over_a_backing_file(self):
        """By a backup job; zeroes over zeroes take nothing either."""
        for fmt in ('bale', 'qcow2'):
            base, top = self.path('base.' + fmt), self.path(f'{fmt}.bale')
            qemu_img('convert', '-O', fmt, self.raw, base)
            qemu_img('create', '-q', '-f', 'bale', '-b', base, '-F', fmt,
                     top)
            self.change(5)
            with open(self.raw, 'r+b') as file:
                file.seek(SIZE - MIB)
                file.write(bytes(64 * KIB))
            with Qemu(DAEMON) as qemu:
                qemu.command('blockdev-add', driver='raw', node_name='n',
                             file={'driver': 'file', 'filename': self.raw})
                qemu.command('blockdev-add', driver='bale', node_name='t',
                             skip_unchanged=True,
                             file={'driver': 'file', 'filename': top})
                qemu.command('blockdev-backup', job_id='j', device='n',
                             target='t', sync='full')
                self.assertEqual(qemu.run_job('j'), '')
            same_image(self.raw, top)
            info = json.loads(bale('info', '--json', top, check=0).out)
            self.assertLessEqual(info['images'][0]['allocated-clusters'], 6)
            check(top)

    def test_reopen(self):
        store = self.path('store.bale')
        create(store, SIZE)
        with Qemu(DAEMON) as qemu:
            options = {'driver': 'bale', 'node-name': 't',
                       'file': {'driver': 'file', 'node-name': 'f',
                                'filename': store}}
            qemu.command('blockdev-add', driver='bale', node_name='t',
                         file=options['file'])
            for on in (True, False):
                qemu.command('blockdev-reopen', options=[
                    {**options, 'skip-unchanged': on}])


def same_image(raw, image):
    qemu_img('compare', '-q', '-f', 'raw', '-F', 'bale', raw, image)


def stored_in_use(node, path):
    """As somebody sees it who looks at the file now."""
    copy = path + '.copy'
    bale_iotests.run('cp', path, copy, check=0)
    found = stored(copy)
    os.unlink(copy)
    return all(b['inconsistent'] for b in found.values()) and bool(found)


if __name__ == '__main__':
    bale_iotests.main()
