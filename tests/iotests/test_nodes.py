#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""
Goal: several images of one store open at once in one process, by one `file`
node or by the file's name, with concurrent requests, closed in any order.
"""

import os

import bale_iotests
from bale_images import MIB, verify_store
from bale_iotests import bale, run
from bale_qmp import Qemu

SYSTEM, DAEMON = 'qemu-system-x86_64', 'qemu-storage-daemon'
PROGRAMS = (DAEMON, SYSTEM)


class Base(bale_iotests.TestCase):
    def store(self, *images, size='16M'):
        """A store x.bale with these images."""
        bale('run', 'qemu-img', 'create', '-q', '-f', 'bale', '-o',
             f'image={images[0]}', 'x.bale', size, check=0)
        for name in images[1:]:
            bale('image', 'create', 'x.bale', name, size, check=0)

    def add(self, qemu, image, node=None, *, file=None, **options):
        qemu.command('blockdev-add', driver='bale', node_name=node or image,
                     image=image, **{'file': file or {
                         'driver': 'file', 'filename': 'x.bale'}, **options})

    def add_file(self, qemu, **options):
        qemu.command('blockdev-add', driver='file', node_name='store0',
                     filename='x.bale', **options)

    def delete(self, qemu, *nodes):
        for node in nodes:
            qemu.command('blockdev-del', node_name=node)

    def export(self, qemu, *nodes, **options):
        """Serves nodes for writing; their URLs."""
        path = qemu.path + '.nbd'
        if not os.path.exists(path):
            qemu.command('nbd-server-start', addr={
                'type': 'unix', 'data': {'path': path}}, max_connections=100)
        for node in nodes:
            qemu.command('block-export-add', type='nbd', id=f'e-{node}',
                         node_name=node, name=node, writable=True, **options)
        return [f'nbd+unix:///{node}?socket={path}' for node in nodes]

    def unexport(self, qemu, *nodes):
        for node in nodes:
            qemu.command('block-export-del', id=f'e-{node}', mode='hard')
            qemu.wait_event('BLOCK_EXPORT_DELETED', id=f'e-{node}')

    def io(self, url, *commands, good=True):
        words = [word for command in commands for word in ('-c', command)]
        result = run('qemu-io', '-f', 'raw', *words, url)
        if good:
            self.assertEqual(result.status, 0, result)
            self.assertNotIn('failed', result.out + result.err, result)
        return result

    def expect(self, image, *commands):
        """Reads from the closed store, by qemu-io."""
        words = [word for command in commands for word in ('-c', command)]
        result = bale('run', 'qemu-io', '-r', *words, '--image-opts',
                      f'driver=bale,file.filename=x.bale,image={image}')
        self.assertEqual(result.status, 0, result)
        self.assertNotIn('failed', result.out, result)

    def both_at_once(self, *pairs):
        """Several qemu-io, each with a URL and its commands, together."""
        started = []
        for url, *commands in pairs:
            words = [w for command in commands for w in ('-c', command)]
            started.append(bale_iotests.Background('qemu-io', '-f', 'raw',
                                                   *words, url))
        for process in started:
            process.process.wait(bale_iotests.TIMEOUT_S)
            self.assertNotIn('failed', process.output())
            process.kill()


class NodesTest(Base):
    def test_two_images_by_one_file_node(self):
        for program in PROGRAMS:
            self.store('a', 'b')
            with Qemu(program) as qemu:
                self.add_file(qemu)
                self.add(qemu, 'a', file='store0')
                self.add(qemu, 'b', file='store0')
                a, b = self.export(qemu, 'a', 'b')
                self.both_at_once(
                    (a, *(f'aio_write -P 1 {i}M 1M' for i in range(8)),
                     'aio_flush', 'write -P 3 4k 4k'),
                    (b, *(f'aio_write -P 2 {i}M 1M' for i in range(8)),
                     'aio_flush', 'write -P 4 8k 4k'))
                self.io(a, 'read -P 1 0 4k', 'read -P 3 4k 4k',
                        'read -P 1 8k 8184k', 'read -P 0 8M 8M')
                self.io(b, 'read -P 2 0 8k', 'read -P 4 8k 4k')
                self.unexport(qemu, 'a', 'b')
                self.delete(qemu, 'a')
                self.assertIn('in use', qemu.fails(
                    'blockdev-del', node_name='store0'))
                self.delete(qemu, 'b', 'store0')
                self.assertEqual(qemu.command('query-named-block-nodes'), [])
            self.expect('a', 'read -P 3 4k 4k', 'read -P 1 8k 8184k')
            self.expect('b', 'read -P 2 0 8k', 'read -P 4 8k 4k')
            verify_store('x.bale')

    def test_two_images_by_name_of_the_file(self):
        """The first node goes first: its file stays for the other one."""
        for program in PROGRAMS:
            self.store('a', 'b', 'c')
            with Qemu(program) as qemu:
                self.add(qemu, 'a')
                self.add(qemu, 'b')
                info = qemu.command('query-bale')
                self.assertEqual(len({i['file-node-name'] for i in info}), 1)
                self.assertEqual(len({i['store']['uuid'] for i in info}), 1)
                a, b = self.export(qemu, 'a', 'b')
                self.io(a, 'write -P 1 0 2M')
                self.io(b, 'write -P 2 0 2M')
                self.unexport(qemu, 'a')
                self.delete(qemu, 'a')
                self.io(b, 'write -P 3 1M 64k', 'flush', 'read -P 2 0 1M')
                self.add(qemu, 'a', 'a2')
                self.add(qemu, 'c')
                self.unexport(qemu, 'b')
                self.delete(qemu, 'b')
                a, c = self.export(qemu, 'a2', 'c')
                self.io(a, 'read -P 1 0 2M', 'write -P 5 3M 1M')
                self.io(c, 'read -P 0 0 16M', 'write -P 6 3M 1M')
                self.unexport(qemu, 'c', 'a2')
                self.delete(qemu, 'c', 'a2')
                self.assertEqual(qemu.command('query-named-block-nodes'), [])
            self.expect('a', 'read -P 1 0 2M', 'read -P 5 3M 1M')
            self.expect('b', 'read -P 2 0 1M', 'read -P 3 1M 64k')
            self.expect('c', 'read -P 6 3M 1M')
            verify_store('x.bale')

    def test_same_image_twice(self):
        for program in PROGRAMS:
            self.store('a', 'b')
            bale('image', 'snapshot', 'x.bale', 'a@s', check=0)
            with Qemu(program) as qemu:
                self.add(qemu, 'a')
                for options in ({}, {'read_only': True}):
                    self.assertIn("in use by node 'a'", qemu.fails(
                        'blockdev-add', driver='bale', image='a',
                        node_name='a2', file={
                            'driver': 'file', 'filename': 'x.bale'},
                        **options))
                # A snapshot is another image
                self.add(qemu, 'a@s', 's', **{'read-only': True})
                self.delete(qemu, 'a')
                # ... and two may read the same one, but not while a third
                # writes
                self.add(qemu, 'a@s', 's2', **{'read-only': True})
                self.assertIn('Failed to get "write" lock', qemu.fails(
                    'blockdev-add', driver='bale', image='b',
                    node_name='b', file={
                        'driver': 'file', 'filename': 'x.bale'}))
                self.delete(qemu, 's')
                self.delete(qemu, 's2')
                self.assertEqual(qemu.command('query-named-block-nodes'), [])

    def test_options_of_the_store(self):
        self.store('a', 'b')
        with Qemu(DAEMON) as qemu:
            self.add(qemu, 'a', **{'compression-threads': 2,
                                   'cache-size': 4 * MIB})
            for option, value in (('compression-threads', 1),
                                  ('cache-size', 8 * MIB)):
                self.assertIn(f"'{option}' is of the store", qemu.fails(
                    'blockdev-add', driver='bale', image='b',
                    node_name='b', file={'driver': 'file',
                                         'filename': 'x.bale'},
                    **{option: value}))
            self.add(qemu, 'b', **{'cache-size': 4 * MIB})
            qemu.command('bale-set', node_name='b', cache_size=2 * MIB)
            for info in qemu.command('query-bale'):
                self.assertEqual(info['stats']['cache-max-bytes'], 2 * MIB)
            # Left out in a reopen: as it is, since the store has other nodes
            qemu.command('blockdev-reopen', options=[{
                'driver': 'bale', 'node-name': 'b', 'image': 'b',
                'file': qemu.command('query-bale', node_name='b')[0]
                        ['file-node-name']}])

    def test_reopen_one_of_two(self):
        """From reading to writing and back, while the other is open."""
        for program in PROGRAMS:
            self.store('a', 'b')
            with Qemu(program) as qemu:
                self.add_file(qemu)

                def reopen(node, read_only, file='store0'):
                    qemu.command('blockdev-reopen', options=[{
                        'driver': 'bale', 'node-name': node, 'image': node,
                        'file': file, 'read-only': read_only}])

                self.add(qemu, 'a', file='store0', **{'read-only': True})
                self.add(qemu, 'b', file='store0', **{'read-only': True})
                self.assertTrue(all(i['store']['read-only'] for i in
                                    qemu.command('query-bale')))
                reopen('a', False)
                self.assertFalse(any(i['store']['read-only'] for i in
                                     qemu.command('query-bale')))
                a, = self.export(qemu, 'a')
                self.io(a, 'write -P 1 0 1M')
                self.assertIn('read-only', qemu.fails(
                    'block-export-add', type='nbd', id='x',
                    node_name='b', writable=True))
                reopen('b', False)
                b, = self.export(qemu, 'b')
                self.io(b, 'write -P 2 0 1M')
                self.unexport(qemu, 'a')
                reopen('a', True)
                self.io(b, 'write -P 3 1M 1M')
                # Nobody else may write to the file
                self.assertIn("unshared by node 'a'", qemu.fails(
                    'block-export-add', type='nbd', id='x',
                    node_name='store0', writable=True))
                result = bale('run', 'qemu-io', '-c', 'quit', '--image-opts',
                              'driver=bale,file.filename=x.bale,image=a')
                self.assertIn('lock', result.err)
                self.unexport(qemu, 'b')
                reopen('b', True)
                self.assertTrue(all(i['store']['read-only'] for i in
                                    qemu.command('query-bale')))
                bale('run', 'qemu-img', 'info', 'x.bale')
                # A filter under the only one that is left, not under two
                qemu.command('object-add', qom_type='throttle-group',
                             id='t')
                qemu.command('blockdev-add', driver='throttle',
                             node_name='slow', throttle_group='t',
                             file='store0')
                self.assertIn('cannot be changed', qemu.fails(
                    'blockdev-reopen', options=[{
                        'driver': 'bale', 'node-name': 'a', 'image': 'a',
                        'file': 'slow'}]))
                self.delete(qemu, 'b')
                reopen('a', False, 'slow')
                a, = self.export(qemu, 'a')
                self.io(a, 'write -P 4 2M 1M', 'read -P 1 0 1M')
                self.unexport(qemu, 'a')
                reopen('a', True)
                self.delete(qemu, 'slow')
                self.delete(qemu, 'a', 'store0')
            self.expect('a', 'read -P 1 0 1M', 'read -P 4 2M 1M')
            self.expect('b', 'read -P 2 0 1M', 'read -P 3 1M 1M')
            verify_store('x.bale')

    def test_writer_after_reader(self):
        """The reader's file node cannot be written to: both take the new."""
        for program in PROGRAMS:
            self.store('a', 'b', 'c')
            with Qemu(program) as qemu:
                self.add(qemu, 'a', **{'read-only': True})
                self.add(qemu, 'b')
                b, = self.export(qemu, 'b')
                self.io(b, 'write -P 2 0 1M', 'flush')
                self.assertEqual(len(qemu.command(
                    'query-named-block-nodes')), 3)
                self.delete(qemu, 'a')
                self.add(qemu, 'c', **{'read-only': True})
                self.unexport(qemu, 'b')
                self.delete(qemu, 'b')
                self.assertTrue(qemu.command('query-bale')[0]['store']
                                ['read-only'])
                self.delete(qemu, 'c')
            self.expect('b', 'read -P 2 0 1M')
            verify_store('x.bale')

    def test_reader_that_the_user_owns_is_refused(self):
        self.store('a', 'b')
        with Qemu(DAEMON) as qemu:
            self.add_file(qemu, **{'read-only': True})
            self.add(qemu, 'a', file='store0', **{'read-only': True})
            self.assertIn('read-only', qemu.fails(
                'blockdev-add', driver='bale', image='b',
                node_name='b', file={'driver': 'file',
                                     'filename': 'x.bale'}))
            self.delete(qemu, 'a', 'store0')

    def test_one_over_the_other(self):
        """Two images of a store in one backing chain; commit, stream."""
        for program in PROGRAMS:
            self.store('base', 'mid', 'top')
            with Qemu(program) as qemu:
                self.add(qemu, 'base', **{'read-only': True})
                self.add(qemu, 'mid', backing='base')
                mid, = self.export(qemu, 'mid')
                self.io(mid, 'write -P 5 1M 1M')
                self.unexport(qemu, 'mid')
                self.delete(qemu, 'mid', 'base')
                self.add(qemu, 'base')
                base, = self.export(qemu, 'base')
                self.io(base, 'write -P 4 0 3M')
                self.unexport(qemu, 'base')
                self.delete(qemu, 'base')
                qemu.command('blockdev-add', driver='bale', node_name='top',
                             image='top', file={'driver': 'file',
                                                'filename': 'x.bale'},
                             backing={
                                 'driver': 'bale', 'node-name': 'mid',
                                 'image': 'mid',
                                 'file': {'driver': 'file',
                                          'filename': 'x.bale'},
                                 'backing': {
                                     'driver': 'bale', 'node-name': 'base',
                                     'image': 'base',
                                     'file': {'driver': 'file',
                                              'filename': 'x.bale'}}})
                top, = self.export(qemu, 'top')
                self.io(top, 'read -P 4 0 1M', 'read -P 5 1M 1M',
                        'read -P 4 2M 1M', 'write -P 6 2M 512k',
                        'write -P 7 100k 1k')
                qemu.command('block-commit', job_id='j', device='top',
                             top_node='mid', base_node='base')
                self.assertEqual(qemu.run_job('j'), '')
                self.io(top, 'read -P 4 0 100k', 'read -P 7 100k 1k',
                        'read -P 5 1M 1M', 'read -P 6 2M 512k')
                qemu.command('block-stream', job_id='s', device='top')
                self.assertEqual(qemu.run_job('s'), '')
                self.unexport(qemu, 'top')
                self.delete(qemu, 'top')
            self.expect('top', 'read -P 4 0 100k', 'read -P 7 100k 1k',
                        'read -P 5 1M 1M', 'read -P 6 2M 512k')
            self.expect('base', 'read -P 5 1M 1M')
            verify_store('x.bale')

    def test_iothread(self):
        """The nodes of a store go to one thread together."""
        self.store('a', 'b', 'c')
        with Qemu(SYSTEM) as qemu:
            def say(node, *commands):
                for command in commands:
                    out = qemu.hmp(f'qemu-io {node} "{command}"')
                    self.assertNotRegex(out, 'rror|ailed')

            qemu.command('object-add', qom_type='iothread', id='t')
            self.add(qemu, 'a')
            self.add(qemu, 'b')
            qemu.command('x-blockdev-set-iothread', node_name='a',
                         iothread='t')
            say('a', 'write -P 1 0 8M', 'write -P 3 4k 4k', 'flush')
            say('b', 'write -P 2 0 8M', 'write -P 4 8k 4k', 'flush')
            self.delete(qemu, 'a')
            qemu.command('x-blockdev-set-iothread', node_name='b',
                         iothread=None)
            say('b', 'read -P 2 0 8k')
            qemu.command('x-blockdev-set-iothread', node_name='b',
                         iothread='t')
            # Somebody who does not let it go: no client of 7.2's server may
            # come to a thread, but the node stays there
            self.export(qemu, 'b', iothread='t', **{'fixed-iothread': True})
            for _ in range(2):
                self.add(qemu, 'c')
                say('c', 'write -P 9 0 3M', 'write -P 8 1k 1k', 'flush')
                self.add(qemu, 'a', **{'read-only': True})
                say('a', 'read -P 3 4k 4k')
                self.delete(qemu, 'a', 'c')
            self.unexport(qemu, 'b')
            self.delete(qemu, 'b')
        self.expect('a', 'read -P 3 4k 4k', 'read -P 1 8k 8184k')
        self.expect('b', 'read -P 2 0 8k', 'read -P 4 8k 4k')
        self.expect('c', 'read -P 9 0 1k', 'read -P 8 1k 1k')
        verify_store('x.bale')

    def test_failed_store_is_told_for_each_node(self):
        self.store('a', 'b')
        with Qemu(SYSTEM) as qemu:
            qemu.command('blockdev-add', driver='blkdebug', node_name='bad',
                         image={'driver': 'file', 'filename': 'x.bale'},
                         inject_error=[{'event': 'flush_to_disk', 'errno': 5,
                                        'once': False}])
            self.add(qemu, 'a', file='bad')
            self.add(qemu, 'b', file='bad')
            qemu.hmp('qemu-io a "write 0 1M"')
            qemu.hmp('qemu-io a flush')
            told = {qemu.wait_event('BALE_STORE_FAILED')['data']['node-name']
                    for _ in range(2)}
            self.assertEqual(told, {'a', 'b'})
            self.assertTrue(all(i['store']['failed'] for i in
                                qemu.command('query-bale')))

    def test_jobs_and_commands_see_the_other_nodes(self):
        self.store('a', 'b')
        bale('image', 'snapshot', 'x.bale', 'b@s', check=0)
        with Qemu(DAEMON) as qemu:
            self.add(qemu, 'a')
            self.add(qemu, 'b')
            self.assertIn("open in node 'b'", qemu.fails(
                'bale-image-rollback', node_name='a', image='b',
                snapshot='s'))
            self.assertIn('in use', qemu.fails(
                'bale-image-delete', node_name='a', image='b'))
            qemu.command('bale-verify', job_id='v', node_name='a',
                         auto_finalize=False)
            self.assertIn('has a job already', qemu.fails(
                'bale-verify', job_id='w', node_name='b'))
            # The one without the job can go
            self.delete(qemu, 'b')
            self.add(qemu, 'b')
            qemu.wait_event('JOB_STATUS_CHANGE', id='v', status='pending')
            qemu.command('job-finalize', id='v')
            qemu.wait_event('JOB_STATUS_CHANGE', id='v', status='null')
            qemu.command('bale-image-create', node_name='b', image='c',
                         size=4 * MIB)
            self.add(qemu, 'c')
            self.delete(qemu, 'b')
            qemu.command('bale-image-delete', node_name='a', image='b')
            self.delete(qemu, 'a')
            qemu.command('bale-image-delete', node_name='c', image='a')
            self.assertEqual([i['name'] for i in qemu.command(
                'bale-image-list', node_name='c')], ['c'])
        verify_store('x.bale')

    def test_killed_with_both_open(self):
        self.store('a', 'b')
        with Qemu(DAEMON) as qemu:
            self.add(qemu, 'a')
            self.add(qemu, 'b')
            a, b = self.export(qemu, 'a', 'b')
            self.io(a, 'write -P 1 0 4M', 'write -P 3 5000 100', 'flush')
            self.io(b, 'write -P 2 0 4M', 'write -P 4 6000 100', 'flush')
            qemu.process.kill()
        self.expect('a', 'read -P 3 5000 100', 'read -P 1 1M 3M')
        self.expect('b', 'read -P 4 6000 100', 'read -P 2 1M 3M')
        verify_store('x.bale', killed=True)

    def test_handed_over_and_back(self):
        """A migration that is cancelled: all nodes inactive, then active."""
        self.store('a', 'b')
        with Qemu(SYSTEM) as qemu:
            self.add(qemu, 'a')
            self.add(qemu, 'b')
            qemu.hmp('qemu-io a "write -P 1 0 1M"')
            qemu.hmp('qemu-io b "write -P 2 0 1M"')
            qemu.command('migrate', uri='exec:cat > /dev/null')
            while qemu.command('query-migrate')['status'] not in (
                    'completed', 'failed'):
                pass
            self.assertEqual(qemu.command('query-migrate')['status'],
                             'completed')
            # Somebody else has it now
            words = 'driver=bale,file.filename=x.bale,image='
            for image in 'a', 'b':
                bale('run', 'qemu-io', '-c', 'write -P 7 2M 1M',
                     '--image-opts', words + image, check=0)
            qemu.command('cont')
            for image, byte in (('a', 1), ('b', 2)):
                for command in (f'read -P {byte} 0 1M', 'read -P 7 2M 1M',
                                'write -P 8 3M 1M', 'flush'):
                    out = qemu.hmp(f'qemu-io {image} "{command}"')
                    self.assertNotRegex(out, 'rror|ailed')
            self.assertNotIn('failed', qemu.process.output())
        for image, byte in (('a', 1), ('b', 2)):
            self.expect(image, f'read -P {byte} 0 1M', 'read -P 7 2M 1M',
                        'read -P 8 3M 1M')
        verify_store('x.bale')


if __name__ == '__main__':
    bale_iotests.main()
