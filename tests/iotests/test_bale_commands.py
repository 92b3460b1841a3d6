#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands that QEMU already has, on bale nodes, with filters in between:
each works, or refuses cleanly, in the storage daemon and in qemu-system."""

import os

import bale_iotests
from bale_images import MIB, check, create, io
from bale_iotests import qemu_img, qemu_img_info, run
from bale_qmp import Qemu

PROGRAMS = ('qemu-storage-daemon', 'qemu-system-x86_64')


def file(path, **more):
    return {'driver': 'file', 'filename': path, **more}


class Base(bale_iotests.TestCase):
    def add(self, qemu, path, node, **options):
        qemu.command('blockdev-add', driver='bale', node_name=node,
                     **{'file': file(path, **{'node-name': f'{node}-file'}),
                        **options})

    def job(self, qemu, name, /, **arguments):
        qemu.command(name, job_id='j', **arguments)
        self.assertEqual(qemu.run_job('j'), '')

    def images(self, *names, size='16M', base=None):
        """New images, each over the one before, each with data of its own:
        number n holds byte n + 1 in megabyte n and in the first 64 KiB."""
        for i, name in enumerate(names):
            if os.path.exists(name):
                os.remove(name)
            words = [] if base is None else ['-b', base, '-F', 'bale']
            qemu_img('create', '-q', '-f', 'bale', *words, name, size)
            io(name, f'write -q -P {i + 1} {i}M 1M',
               f'write -q -P {i + 1} 8M 64k')
            base = name

    def content(self, name, count, top=None):
        io(name, *(f'read -P {i + 1} {i}M 1M' for i in range(count)),
           f'read -P {top or count} 8M 64k', 'read -P 0 10M 1M')



class NodeTest(Base):
    def test_add_and_del(self):
        self.images('a.bale')
        for program in PROGRAMS:
            with Qemu(program) as qemu:
                self.add(qemu, 'a.bale', 'a')
                self.assertIn('Duplicate nodes', qemu.fails(
                    'blockdev-add', driver='bale', node_name='a',
                    file='a-file'))
                self.assertIn('not owned', qemu.fails(
                    'blockdev-del', node_name='a-file'))
                self.assertIn('in use by node', qemu.fails(
                    'blockdev-add', driver='bale', node_name='b',
                    file=file('a.bale')))
                qemu.command('blockdev-del', node_name='a')
                self.assertIn('Failed to find', qemu.fails(
                    'blockdev-del', node_name='a'))
                self.assertEqual(
                    qemu.command('query-named-block-nodes'), [])

    def test_reopen(self):
        self.images('a.bale', 'b.bale')
        for program in PROGRAMS:
            with Qemu(program) as qemu:
                self.add(qemu, 'a.bale', 'a', **{'read-only': True})
                self.add(qemu, 'b.bale', 'b', backing='a')
                options = {'driver': 'bale', 'node-name': 'b',
                           'file': 'b-file', 'backing': 'a'}

                def reopen(**more):
                    return {'options': [{**options, **more}]}
                for read_only in (True, False):
                    qemu.command('blockdev-reopen',
                                 **reopen(**{'read-only': read_only}))
                    node, = [n for n in qemu.command(
                        'query-named-block-nodes') if n['node-name'] == 'b']
                    self.assertEqual(node['ro'], read_only)
                # The backing node goes and comes back
                qemu.command('blockdev-reopen', **reopen(backing=None))
                qemu.command('blockdev-reopen', **reopen())
                options['cache-size'] = MIB
                qemu.command('blockdev-reopen', **reopen())
                for more, words in (({'compression-threads': 500},
                                     'compression-threads'),
                                    ({'nonsense': 1}, 'nonsense'),
                                    ({'cache-size': 'x'}, 'cache-size'),
                                    ({'cache-size': 1 << 41}, 'at most'),
                                    ({'backing': 'none'}, 'none'),
                                    ({'driver': 'qcow2'}, 'driver')):
                    self.assertIn(words, qemu.fails(
                        'blockdev-reopen', **reopen(**more)))
                self.assertIn('one parameter', qemu.fails(
                    'blockdev-reopen', **reopen(), more={}))
            self.content('b.bale', 2)

    def test_reopen_on_another_file_node(self):
        """Nodes that were drained for it must not stay so."""
        self.images('a.bale', 'b.bale')
        with Qemu('qemu-system-x86_64') as qemu:
            self.add(qemu, 'a.bale', 'a')
            self.add(qemu, 'b.bale', 'b', backing='a')
            qemu.command('object-add', qom_type='throttle-group', id='g')
            qemu.command('blockdev-add', driver='throttle', node_name='slow',
                         throttle_group='g', file='b-file')
            qemu.command('blockdev-add', driver='raw', node_name='raw',
                         file='b-file')
            for number, below in enumerate(('raw', 'slow', 'b-file', 'raw',
                                            'b-file')):
                qemu.command('blockdev-reopen', options=[{
                    'driver': 'bale', 'node-name': 'b', 'file': below,
                    'backing': None if number % 2 else 'a'}])
                for node in ('b', below, 'b-file', 'a'):
                    qemu.hmp(f'qemu-io {node} "read 0 4k"')
                qemu.hmp(f'qemu-io b "write -P {number + 5} 12M 64k"')
                qemu.hmp('qemu-io b flush')
            said = qemu.process.output()
            self.assertNotRegex(said, 'failed|rror')
            self.assertEqual(said.count('wrote 65536/65536'), 5)
        io('b.bale', 'read -P 9 12M 64k')
        self.content('b.bale', 2)
        check('b.bale')

    def test_create_and_amend_refuse(self):
        for program in PROGRAMS:
            with Qemu(program) as qemu:
                self.assertIn("Driver 'bale' does not support", qemu.fails(
                    'blockdev-create', job_id='j', options={
                        'driver': 'bale', 'file': 'x', 'size': MIB}))
                self.assertIn('only by node name', qemu.fails(
                    'blockdev-create', job_id='j', options={
                        'driver': 'qcow2', 'size': MIB, 'file': {
                            'driver': 'bale', 'file': file('none')}}))
                self.assertRegex(qemu.fails(
                    'x-blockdev-amend', job_id='j', node_name='x',
                    options={'driver': 'bale'}),
                    "does not support|has not been found")
                self.assertEqual(qemu.command('query-jobs'), [])

    def test_copy_before_write_takes_a_named_target(self):
        self.images('a.bale', 'b.bale')
        for program in PROGRAMS:
            with Qemu(program) as qemu:
                options = {'driver': 'copy-before-write', 'node-name': 'cbw',
                           'file': {'driver': 'bale',
                                    'file': file('a.bale')}}
                self.assertIn('only by node name', qemu.fails(
                    'blockdev-add', **options, target={
                        'driver': 'bale', 'backing': None,
                        'file': file('b.bale')}))
                self.add(qemu, 'b.bale', 'b', backing=None)
                qemu.command('blockdev-add', **options, target='b')
                qemu.command('blockdev-del', node_name='cbw')

    def test_queries(self):
        self.images('a.bale', 'b.bale')
        for program in PROGRAMS:
            with Qemu(program) as qemu:
                self.add(qemu, 'b.bale', 'b', file={
                    'driver': 'seqcache', 'node-name': 'cache',
                    'file': file('b.bale')})
                for flat in (False, True):
                    nodes = {n['node-name']: n for n in qemu.command(
                        'query-named-block-nodes', flat=flat)}
                    self.assertEqual(nodes['b']['drv'], 'bale')
                    self.assertEqual(nodes['cache']['drv'], 'seqcache')
                    image = nodes['b']['image']
                    self.assertEqual(image['virtual-size'], 16 * MIB)
                    self.assertEqual(image['cluster-size'], 65536)
                    self.assertEqual(image['backing-filename'], 'a.bale')
                    self.assertEqual('backing-image' in image, not flat)
                    # The union over the formats is closed
                    self.assertNotIn('format-specific', image)
                stats, = [s for s in qemu.command('query-blockstats',
                                                  query_nodes=True)
                          if s['node-name'] == 'b']
                self.assertEqual(stats['parent']['node-name'], 'cache')
                self.assertNotIn('driver-specific', stats)
                graph = qemu.command('x-debug-query-block-graph')
                ids = {n['name']: n['id'] for n in graph['nodes']}
                self.assertIn(('backing', ids['b']), {
                    (e['name'], e['parent']) for e in graph['edges']})

    def test_resize(self):
        for program in PROGRAMS:
            self.images('a.bale')
            with Qemu(program) as qemu:
                self.add(qemu, 'a.bale', 'a')
                qemu.command('blockdev-add', driver='copy-on-read',
                             node_name='filter', file='a')
                for size in (32 * MIB, 12 * MIB, 16 * MIB):
                    qemu.command('block_resize', node_name='filter',
                                 size=size)
                    sizes = {n['image']['virtual-size'] for n in
                             qemu.command('query-named-block-nodes')
                             if n['node-name'] in ('a', 'filter')}
                    self.assertEqual(sizes, {size})
                for size in (1000, -512, 1 << 62):
                    qemu.fails('block_resize', node_name='a',
                               size=size)
            self.content('a.bale', 1)
            self.assertEqual(qemu_img_info('a.bale')['virtual-size'],
                             16 * MIB)

    def test_write_threshold(self):
        self.images('a.bale')
        for program in PROGRAMS:
            with Qemu(program) as qemu:
                self.add(qemu, 'a.bale', 'a')
                for node in ('a', 'a-file'):
                    qemu.command('block-set-write-threshold', node_name=node,
                                 write_threshold=123)
                    qemu.command('block-set-write-threshold', node_name=node,
                                 write_threshold=0)


class ChainTest(Base):
    def test_snapshot(self):
        for program in PROGRAMS:
            self.images('a.bale')
            create('b.bale', '16M')
            with Qemu(program) as qemu:
                self.add(qemu, 'a.bale', 'a')
                self.add(qemu, 'b.bale', 'b', backing=None)
                qemu.command('blockdev-snapshot', node='a', overlay='b')
                self.assertIn('busy', qemu.fails(
                    'blockdev-snapshot', node='a', overlay='b'))
                self.assertIn('busy', qemu.fails(
                    'blockdev-del', node_name='a'))
                node, = [n for n in qemu.command('query-named-block-nodes')
                         if n['node-name'] == 'b']
                self.assertEqual(node['backing_file_depth'], 1)

    def test_snapshot_sync(self):
        for program in PROGRAMS:
            self.images('a.bale')
            if os.path.exists('new.bale'):
                os.remove('new.bale')
            with Qemu(program) as qemu:
                self.add(qemu, 'a.bale', 'a')
                qemu.command('blockdev-add', driver='copy-on-read',
                             node_name='filter', file='a')
                qemu.command('blockdev-snapshot-sync', node_name='a',
                             snapshot_file=self.path('new.bale'),
                             snapshot_node_name='new', format='bale')
                nodes = {n['node-name']: n for n in
                         qemu.command('query-named-block-nodes')}
                self.assertEqual(nodes['new']['drv'], 'bale')
                qemu.fails('blockdev-snapshot-sync', node_name='new',
                           snapshot_file=self.path('no/where'),
                           snapshot_node_name='more', format='bale')
            info = qemu_img_info('new.bale')
            self.assertEqual(info['backing-filename-format'], 'bale')
            self.content('new.bale', 1)

    def test_transaction(self):
        for program in PROGRAMS:
            self.images('a.bale')
            self.images('b.bale')
            create('c.bale', '16M')
            create('d.bale', '16M')
            with Qemu(program) as qemu:
                for name in 'abcd':
                    self.add(qemu, f'{name}.bale', name, backing=None)

                def snapshots(*pairs):
                    return [{'type': 'blockdev-snapshot', 'data': {
                        'node': node, 'overlay': overlay}}
                        for node, overlay in pairs]
                qemu.fails('transaction',
                           actions=snapshots('ac', 'bx'))
                depths = {n['backing_file_depth'] for n in
                          qemu.command('query-named-block-nodes')}
                self.assertEqual(depths, {0})
                qemu.command('transaction', actions=snapshots('ac', 'bd'))

    def test_stream(self):
        for program in PROGRAMS:
            self.images('a.bale', 'b.bale', 'c.bale')
            with Qemu(program) as qemu:
                self.add(qemu, 'c.bale', 'c')
                qemu.command('blockdev-add', driver='seqcache',
                             node_name='filter', file='c')
                self.job(qemu, 'block-stream', device='c')
            self.assertNotIn('backing-filename', qemu_img_info('c.bale'))
            os.remove('a.bale')
            os.remove('b.bale')
            self.content('c.bale', 3)
            check('c.bale')

    def test_stream_over_a_filter_in_the_chain(self):
        for program in PROGRAMS:
            self.images('a.bale', 'b.bale')
            with Qemu(program) as qemu:
                self.add(qemu, 'a.bale', 'a', **{'read-only': True})
                qemu.command('blockdev-add', driver='seqcache',
                             node_name='filter', file='a',
                             **{'read-only': True})
                self.add(qemu, 'b.bale', 'b', backing='filter')
                self.job(qemu, 'block-stream', device='b')
            os.remove('a.bale')
            self.content('b.bale', 2)

    def test_commit_of_the_active_image(self):
        for program in PROGRAMS:
            self.images('a.bale', 'b.bale', 'c.bale')
            with Qemu(program) as qemu:
                self.add(qemu, 'a.bale', 'a')
                self.add(qemu, 'b.bale', 'b', backing='a')
                self.add(qemu, 'c.bale', 'c', backing='b', file={
                    'driver': 'seqcache', 'file': file('c.bale')})
                self.job(qemu, 'block-commit', device='c', base_node='a')
            self.content('a.bale', 3)
            check('a.bale')

    def test_commit_in_the_middle(self):
        for program in PROGRAMS:
            self.images('a.bale', 'b.bale', 'c.bale')
            with Qemu(program) as qemu:
                self.add(qemu, 'a.bale', 'a')
                self.add(qemu, 'b.bale', 'b', backing='a')
                self.add(qemu, 'c.bale', 'c', backing='b')
                self.job(qemu, 'block-commit', device='c', base_node='a',
                         top_node='b')
            self.assertEqual(qemu_img_info('c.bale')['backing-filename'],
                             'a.bale')
            os.remove('b.bale')
            self.content('c.bale', 3)

    def test_change_backing_file(self):
        for program in PROGRAMS:
            self.images('a.bale', 'b.bale')
            run('cp', 'a.bale', 'moved.bale', check=0)
            with Qemu(program) as qemu:
                self.add(qemu, 'b.bale', 'b')
                qemu.command('change-backing-file', device='b',
                             image_node_name='b', backing_file='moved.bale')
                qemu.fails('change-backing-file', device='b',
                           image_node_name='b', backing_file='x' * 5000)
            os.remove('a.bale')
            self.content('b.bale', 2)
            self.assertEqual(qemu_img_info('b.bale')['backing-filename'],
                             'moved.bale')

    def test_mirror_to_and_from(self):
        for program in PROGRAMS:
            self.images('a.bale', 'b.bale')
            create('c.bale', '16M')
            if os.path.exists('out.qcow2'):
                os.remove('out.qcow2')
            qemu_img('create', '-q', '-f', 'qcow2', 'out.qcow2', '16M')
            with Qemu(program) as qemu:
                self.add(qemu, 'b.bale', 'b')
                # A filter over the source, one over the target's file
                qemu.command('blockdev-add', driver='copy-on-read',
                             node_name='source', file='b')
                self.add(qemu, 'c.bale', 'c', file={
                    'driver': 'seqcache', 'file': file('c.bale')})
                qemu.command('blockdev-add', driver='qcow2',
                             node_name='out', file=file('out.qcow2'))
                self.job(qemu, 'blockdev-mirror', device='source',
                         target='c', sync='full')
                qemu.command('blockdev-add', driver='bale', node_name='c2',
                             file=file('c.bale', locking='off'),
                             **{'read-only': True, 'force-share': True})
                qemu.command('blockdev-del', node_name='c2')
                self.job(qemu, 'blockdev-mirror', device='c', target='out',
                         sync='full')
            self.content('c.bale', 2)
            check('c.bale')
            qemu_img('compare', '-q', 'c.bale', 'out.qcow2')

    def test_backup(self):
        for program in PROGRAMS:
            self.images('a.bale', 'b.bale')
            for compress in (False, True):
                if os.path.exists('c.bale'):
                    os.remove('c.bale')
                create('c.bale', '16M')
                with Qemu(program) as qemu:
                    self.add(qemu, 'b.bale', 'b')
                    qemu.command('blockdev-add', driver='seqcache',
                                 node_name='target', compress=compress,
                                 file={'driver': 'bale',
                                       'file': file('c.bale')})
                    self.job(qemu, 'blockdev-backup', device='b',
                             target='target', sync='full', compress=compress)
                self.content('c.bale', 2)
                check('c.bale')

    def test_internal_snapshots(self):
        for program in PROGRAMS:
            self.images('a.bale')
            with Qemu(program) as qemu:
                self.add(qemu, 'a.bale', 'a')
                for name in ('one', 'two'):
                    qemu.command('blockdev-snapshot-internal-sync',
                                 device='a', name=name)
                self.assertIn('exists', qemu.fails(
                    'blockdev-snapshot-internal-sync', device='a',
                    name='one'))
                gone = qemu.command('blockdev-snapshot-delete-internal-sync',
                                    device='a', name='one')
                self.assertEqual(gone['name'], 'one')
                qemu.fails('blockdev-snapshot-delete-internal-sync',
                           device='a', name='one')
            names = [s['name'] for s in qemu_img_info('a.bale')['snapshots']]
            self.assertEqual(names, ['two'])
            self.content('a.bale', 1)
            check('a.bale')

    def test_children_cannot_be_added(self):
        self.images('a.bale', 'b.bale')
        for program in PROGRAMS:
            with Qemu(program) as qemu:
                self.add(qemu, 'a.bale', 'a')
                self.add(qemu, 'b.bale', 'b', backing=None)
                qemu.fails('x-blockdev-change', parent='a', node='b')
                qemu.fails('x-blockdev-change', parent='a', child='file')

    def test_reopening_nothing(self):
        """QEMU 7.2 by itself aborts."""
        for program in PROGRAMS:
            with Qemu(program) as qemu:
                qemu.command('blockdev-reopen', options=[])
                qemu.fails('blockdev-reopen')


if __name__ == '__main__':
    bale_iotests.main()
