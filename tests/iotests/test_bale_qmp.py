#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands, jobs and events of the driver bale (qapi/bale.json), in
qemu-system-x86_64 and qemu-storage-daemon."""

import os
import re
import time

import bale_iotests
from bale_images import MIB, check, compare, create, io
from bale_iotests import TOP, run, wait_until
from bale_qmp import Qemu, QmpError

SYSTEM, DAEMON = 'qemu-system-x86_64', 'qemu-storage-daemon'


class Base(bale_iotests.TestCase):
    def add(self, qemu, path='a.bale', node='a', file=None, **options):
        qemu.command('blockdev-add', driver='bale', node_name=node, file={
            **(file or {'driver': 'file', 'filename': path}),
            'node-name': f'{node}-file'}, **options)

    def info(self, qemu, node='a'):
        info, = qemu.command('query-bale', node_name=node)
        return info

    def io(self, qemu, *commands, node='a', good=True):
        for command in commands:
            out = qemu.hmp(f'qemu-io {node} "{command}"')
            if good:
                self.assertNotRegex(out, 'rror|ailed', command)

    def wait_job(self, qemu, job):
        """Waits until the job is gone; its error, or None."""
        error = None
        while True:
            jobs = {j['id']: j for j in qemu.command('query-jobs')}
            if job not in jobs:
                return error
            error = jobs[job].get('error', error)
            if jobs[job]['status'] == 'concluded':
                qemu.command('job-dismiss', id=job)
            time.sleep(0.02)

    def garbage(self, path='a.bale', size=32 * MIB):
        """A store each of whose pages has some garbage, but not enough for it
        to be compacted in the background."""
        create(path, size, 'page_size=2M')
        with open('noise', 'wb') as file:
            file.write(self.random.randbytes(4 * MIB))
        for _ in range(2):
            io(path, *(f'write -q -s noise {i * 4 * MIB} 4M'
                       for i in range(size // (4 * MIB))))
        io(path, *(f'write -q -P 1 {i}M 128k' for i in range(size // MIB)))


class QueryTest(Base):
    def test_everything_that_the_engine_counts_is_told(self):
        with open(os.path.join(TOP, 'include/extstore/store.h'),
                  encoding='utf-8') as file:
            header = re.search(r'typedef struct BaleStoreStats \{(.*?)\n\}',
                               file.read(), re.S).group(1)
        header = re.sub(r'/\*.*?\*/', '', header, flags=re.S)
        names = set()
        for line in header.split(';'):
            words = line.split(None, 1)
            if len(words) == 2:
                names |= {re.sub(r'\[.*', '', word).strip().replace('_', '-')
                          for word in words[1].split(',')}
        self.assertGreater(len(names), 60)
        create('a.bale', '16M')
        with Qemu(SYSTEM) as qemu:
            self.add(qemu)
            self.assertEqual(set(self.info(qemu)['stats']), names)

    def test_state_and_statistics(self):
        create('a.bale', '16M', 'compression_type=deflate',
               'compression_level=2')
        with Qemu(SYSTEM) as qemu:
            self.add(qemu)
            self.io(qemu, 'write -P 7 0 1M', 'write -P 8 100 1000',
                    'read -P 7 64k 64k')
            info = self.info(qemu)
            self.assertEqual(info, qemu.command('query-bale')[0])
            self.assertEqual(info['file-node-name'], 'a-file')
            store, image = info['store'], info['image']
            self.assertRegex(store['uuid'], '^[0-9a-f]{8}-[0-9a-f-]{27}$')
            self.assertEqual(store['cluster-size'], 65536)
            self.assertEqual(
                [store[k] for k in ('clean', 'corrupt', 'failed')],
                [True, False, False])
            self.assertEqual(image['size'], 16 * MIB)
            self.assertEqual(image['compression-type'], 'deflate')
            self.assertEqual(image['compression-level'], 2)
            self.assertEqual(image['allocated-clusters'], 16)
            self.assertNotIn('name', image)
            self.assertNotIn('backing-file', image)
            stats = info['stats']
            self.assertEqual(stats['writes'], 2)
            self.assertEqual(stats['write-bytes'], MIB + 1000)
            self.assertEqual(stats['reads'], 1)
            self.assertEqual(stats['write-latency']['count'], 2)
            self.assertEqual(sum(b['count'] for b in stats['write-ns']), 2)
            limits = [b['limit'] for b in stats['write-ns']]
            self.assertEqual(limits, sorted(limits))
            self.assertLess(stats['durable-bytes'], stats['tail-bytes'])

            qemu.command('bale-flush', node_name='a')
            stats = self.info(qemu)['stats']
            self.assertEqual(stats['durable-bytes'], stats['tail-bytes'])
            self.assertGreater(stats['cache-max-bytes'], 8 * MIB)
            qemu.command('bale-set', node_name='a', cache_size=8 * MIB)
            self.io(qemu, 'read -P 7 64k 64k')
            self.assertEqual(self.info(qemu)['stats']['cache-max-bytes'],
                             8 * MIB)
            for size in (0, 1 << 36, 16 * MIB):
                qemu.command('bale-set', node_name='a', cache_size=size)
                self.io(qemu, 'read -P 7 64k 64k', 'read -P 7 0 64k')
            for size in ((1 << 40) + 1, (1 << 63) - 1):
                self.assertIn("'cache-size' must be at most", qemu.fails(
                    'bale-set', node_name='a', cache_size=size))
            self.assertEqual(self.info(qemu)['stats']['cache-max-bytes'],
                             16 * MIB)
            qemu.command('bale-reset-stats', node_name='a')
            stats = self.info(qemu)['stats']
            self.assertEqual((stats['writes'], stats['write-ns']), (0, []))
            self.assertGreater(stats['used-bytes'], 0)

    def test_wrong_nodes_are_refused(self):
        create('a.bale', '16M')
        with Qemu(DAEMON) as qemu:
            self.add(qemu)
            for name, more in (('query-bale', {}), ('bale-flush', {}),
                               ('bale-checkpoint', {}), ('bale-set', {}),
                               ('bale-reset-stats', {}),
                               ('bale-compact', {'job_id': 'j'}),
                               ('bale-verify', {'job_id': 'j'})):
                self.assertIn("Failed to find node with node-name='b'",
                              qemu.fails(name, node_name='b', **more))
                self.assertIn('is a file node, not a bale node', qemu.fails(
                    name, node_name='a-file', **more))
            self.assertEqual(qemu.command('query-jobs'), [])

    def test_commands_of_both_programs_are_described(self):
        for program in (SYSTEM, DAEMON):
            with self.subTest(program), Qemu(program) as qemu:
                ours = {'query-bale', 'bale-flush', 'bale-checkpoint',
                        'bale-reset-stats', 'bale-set', 'bale-compact',
                        'bale-verify', 'bale-image-list',
                        'bale-image-flatten'}
                names = {c['name'] for c in qemu.command('query-commands')}
                self.assertLessEqual(ours, names)
                schema = {e['name']: e
                          for e in qemu.command('query-qmp-schema')}
                self.assertLessEqual(ours | {
                    'BALE_STORE_FAILED', 'BALE_STORE_RECOVERED',
                    'BALE_SPACE_THRESHOLD', 'BALE_VERIFY_COMPLETED',
                    'BALE_COMPACT_COMPLETED'}, set(schema))
                jobs = [e for e in schema.values() if e['meta-type'] == 'enum'
                        and 'snapshot-save' in e['values']]
                self.assertEqual(len(jobs), 1)
                self.assertLessEqual(
                    {'bale-compact', 'bale-verify', 'bale-flatten'},
                    set(jobs[0]['values']))

    def test_checkpoint_is_where_recovery_begins(self):
        create('a.bale', '16M')
        with Qemu(SYSTEM) as qemu:
            self.add(qemu)
            self.io(qemu, 'write -P 7 0 1M')
            qemu.command('bale-checkpoint', node_name='a')
            run('cp', 'a.bale', 'copy.bale', check=0)
            self.io(qemu, 'write -P 8 0 1M')
            self.assertGreater(self.info(qemu)['stats']['checkpoints'], 0)
        with Qemu(SYSTEM) as qemu:
            self.add(qemu, 'copy.bale', **{'read-only': True})
            # There is nothing behind the checkpoint
            self.assertEqual(self.info(qemu)['store']['recovered-records'], 0)
            self.io(qemu, 'read -P 7 0 1M')
            self.assertIn('is read-only', qemu.fails(
                'bale-checkpoint', node_name='a'))
        check('a.bale')
        io('a.bale', 'read -P 8 0 1M')

    def test_the_size_of_the_cache_changes_while_open(self):
        create('a.bale', 4 * MIB)
        with Qemu(DAEMON) as qemu:
            self.add(qemu)
            for size in (2 * MIB, 0, 64 * MIB):
                qemu.command('blockdev-reopen', options=[{
                    'driver': 'bale', 'node-name': 'a', 'file': 'a-file',
                    'cache-size': size}])
                info, = qemu.command('query-bale', node_name='a')
                self.assertEqual(info['stats']['cache-max-bytes'], size)
        check('a.bale')

    def test_the_number_of_threads_changes_while_open(self):
        create('a.bale', 4 * MIB)
        with Qemu(SYSTEM) as qemu:
            self.add(qemu)

            def threads(number):
                return {'options': [{
                    'driver': 'bale', 'node-name': 'a', 'file': 'a-file',
                    'compression-threads': number}]}
            for number in (3, 1, 5):
                qemu.command('blockdev-reopen', **threads(number))
                info, = qemu.command('query-bale', node_name='a')
                self.assertEqual(info['stats']['workers'], number)
            self.assertIn('256', qemu.fails('blockdev-reopen',
                                            **threads(257)))
            for number in (2, 4, 1):
                qemu.command('bale-set', node_name='a',
                             compression_threads=number)
                info, = qemu.command('query-bale', node_name='a')
                self.assertEqual(info['stats']['workers'], number)
                self.io(qemu, f'write -P {number} 0 1M',
                        f'read -P {number} 0 1M')
            # One for each core, as when the node is opened without
            qemu.command('bale-set', node_name='a', compression_threads=0)
            info, = qemu.command('query-bale', node_name='a')
            cores = info['stats']['workers']
            self.assertGreater(cores, 0)
            # Too many: nothing else changes either
            self.assertIn('256', qemu.fails(
                'bale-set', node_name='a', compression_threads=257,
                max_size=64 * MIB, speed=MIB))
            info, = qemu.command('query-bale', node_name='a')
            self.assertEqual([info['stats']['workers'], info['speed'],
                              info['store']['max-size']], [cores, 0, 0])
        check('a.bale')


class ImageTest(Base):
    def listed(self, qemu):
        return {i['name']: i for i in qemu.command('bale-image-list',
                                                   node_name='a')}

    def test_life_of_an_image(self):
        for program in (DAEMON, SYSTEM):
            if os.path.exists('a.bale'):
                os.remove('a.bale')
            create('a.bale', '16M')
            io('a.bale', 'write -q -P 7 0 1M')
            with self.subTest(program), Qemu(program) as qemu:
                self.add(qemu)

                def command(name, image, **arguments):
                    return qemu.command(f'bale-image-{name}', node_name='a',
                                        image=image, **arguments)
                image, = self.listed(qemu).values()
                self.assertEqual((image['name'], image['size'],
                                  image['snapshots']), ('', 16 * MIB, []))
                command('create', 'one', size=8 * MIB,
                        compression_type='deflate', compression_level=1)
                self.assertIn('Node', qemu.fails(
                    'bale-image-create', node_name='a', image='one',
                    size=8 * MIB))
                image = self.listed(qemu)['one']
                self.assertEqual(
                    (image['size'], image['compression-type'],
                     image['compression-level'], image['read-only']),
                    (8 * MIB, 'deflate', 1, False))
                command('rename', 'one', new_name='two')
                command('set-read-only', 'two', read_only=True)
                self.assertTrue(self.listed(qemu)['two']['read-only'])
                command('set-read-only', 'two', read_only=False)
                command('snapshot', 'two', snapshot='before')
                command('rollback', 'two', snapshot='before')
                command('clone', 'two', snapshot='before', new_name='three')
                snapshot, = self.listed(qemu)['two']['snapshots']
                self.assertEqual((snapshot['name'], snapshot['size']),
                                 ('before', 8 * MIB))
                command('snapshot-delete', 'two', snapshot='before')
                for name in ('two', 'three'):
                    command('delete', name)
                self.assertEqual(list(self.listed(qemu)), [''])
            check('a.bale')
            io('a.bale', 'read -P 7 0 1M')

    def test_the_open_image(self):
        create('a.bale', '16M')
        with Qemu(SYSTEM) as qemu:
            self.add(qemu)
            self.io(qemu, 'write -P 7 0 1M')
            qemu.command('bale-image-snapshot', node_name='a', image='',
                         snapshot='s')
            self.io(qemu, 'write -P 8 0 1M')
            qemu.command('bale-image-clone', node_name='a', image='',
                         snapshot='s', new_name='old')
            self.assertEqual(set(self.listed(qemu)), {'', 'old'})
            self.assertIn('is open in node', qemu.fails(
                'bale-image-rollback', node_name='a', image='',
                snapshot='s'))
            qemu.fails('bale-image-delete', node_name='a', image='')
            self.io(qemu, 'read -P 8 0 1M')
            self.assertIsNone(self.verify(qemu))
            qemu.command('bale-image-snapshot-delete', node_name='a',
                         image='', snapshot='s')
            qemu.command('bale-image-delete', node_name='a', image='old')
            self.io(qemu, 'read -P 8 0 1M')
        check('a.bale')

    def test_flatten(self):
        for program in (DAEMON, SYSTEM):
            if os.path.exists('a.bale'):
                os.remove('a.bale')
            create('a.bale', '16M')
            io('a.bale', 'write -q -P 7 0 4M')
            with self.subTest(program), Qemu(program) as qemu:
                self.add(qemu)
                qemu.command('bale-image-snapshot', node_name='a', image='',
                             snapshot='s')
                self.assertEqual(self.listed(qemu)['']['layers'], 2)
                qemu.command('bale-image-flatten', job_id='j', node_name='a',
                             image='')
                self.assertIsNone(self.wait_job(qemu, 'j'))
                self.assertEqual(self.listed(qemu)['']['layers'], 1)
                qemu.command('bale-image-flatten', job_id='j', node_name='a',
                             image='none', auto_dismiss=False)
                self.assertIsNotNone(self.wait_job(qemu, 'j'))
                self.assertIsNone(self.verify(qemu))
            check('a.bale')
            io('a.bale', 'read -P 7 0 4M', 'read -P 0 4M 4M')

    def test_flatten_meets_writes_and_pauses(self):
        create('a.bale', '64M')
        io('a.bale', 'write -q -P 7 0 64M')
        with Qemu(SYSTEM) as qemu:
            self.add(qemu)
            for i in range(3):
                qemu.command('bale-image-snapshot', node_name='a', image='',
                             snapshot=f's{i}')
                self.io(qemu, f'write -P {i} {i}M 1M')
                qemu.command('bale-image-flatten', job_id='j', node_name='a',
                             image='')
                self.io(qemu, f'write -P {i} {i + 10}M 1M')
                for verb in ('pause', 'resume'):
                    # It may have ended
                    try:
                        qemu.command(f'job-{verb}', id='j')
                    except QmpError:
                        pass
                self.io(qemu, f'write -P {i} {i + 20}M 1M')
                if i == 1:
                    try:
                        qemu.command('job-cancel', id='j')
                    except QmpError:
                        pass
                self.wait_job(qemu, 'j')
            self.io(qemu, *(f'read -P {i} {i + n}M 1M' for i in range(3)
                            for n in (0, 10, 20)), 'read -P 7 30M 34M')
        check('a.bale')

    def verify(self, qemu):
        qemu.command('bale-verify', job_id='j', node_name='a')
        return self.wait_job(qemu, 'j')

    def test_mistakes_are_refused(self):
        create('a.bale', '16M')
        with Qemu(DAEMON) as qemu:
            self.add(qemu)
            before = self.listed(qemu)
            for name, arguments in (
                    ('create', {'image': 'a@b', 'size': MIB}),
                    ('create', {'image': 'x' * 256, 'size': MIB}),
                    ('create', {'image': 'c', 'size': 1 << 63}),
                    ('create', {'image': 'c', 'size': MIB,
                                'compression_type': 'best'}),
                    ('create', {'image': 'c', 'size': MIB,
                                'compression_level': 1 << 40}),
                    ('create', {'image': 'c', 'size': MIB,
                                'backing_file': 'x' * 5000}),
                    ('delete', {'image': 'none'}),
                    ('rename', {'image': 'none', 'new_name': 'c'}),
                    ('clone', {'image': '', 'snapshot': 'none',
                               'new_name': 'c'}),
                    ('snapshot', {'image': 'none', 'snapshot': 's'}),
                    ('snapshot-delete', {'image': '', 'snapshot': 's'}),
                    ('rollback', {'image': 'none', 'snapshot': 's'}),
                    ('set-read-only', {'image': 'none',
                                       'read_only': True})):
                qemu.fails(f'bale-image-{name}', node_name='a',
                           **arguments)
            self.assertEqual(self.listed(qemu), before)
            qemu.command('blockdev-del', node_name='a')
            self.add(qemu, **{'read-only': True})
            self.assertEqual(self.listed(qemu), before)
            self.assertIn('is read-only', qemu.fails(
                'bale-image-create', node_name='a', image='c',
                size=MIB))
        check('a.bale')


class JobTest(Base):
    def test_compact(self):
        self.garbage()
        for program in (DAEMON, SYSTEM):
            run('cp', 'a.bale', 'b.bale', check=0)
            with self.subTest(program), Qemu(program) as qemu:
                self.add(qemu, 'b.bale')
                before = self.info(qemu)['stats']
                qemu.command('bale-compact', job_id='j', node_name='a')
                data = qemu.wait_event('BALE_COMPACT_COMPLETED')['data']
                self.assertEqual(data['job-id'], 'j')
                self.assertEqual(data['node-name'], 'a')
                self.assertGreater(data['pages'], 0)
                self.assertLess(data['used-bytes'], before['used-bytes'])
                self.assertIsNone(self.wait_job(qemu, 'j'))
                self.assertNotIn('job', self.info(qemu))
                qemu.command('blockdev-del', node_name='a')
            check('b.bale')
            compare('a.bale', 'b.bale')

    def test_verify_finds_nothing(self):
        self.garbage()
        for program in (DAEMON, SYSTEM):
            with self.subTest(program), Qemu(program) as qemu:
                self.add(qemu)
                qemu.command('bale-verify', job_id='j', node_name='a')
                data = qemu.wait_event('BALE_VERIFY_COMPLETED')['data']
                self.assertEqual(data['checked-bytes'], 32 * MIB)
                self.assertEqual(data['checked-clusters'], 512)
                self.assertEqual((data['damaged'], data['findings']), (0, []))
                self.assertIsNone(self.wait_job(qemu, 'j'))

    def test_verify_finds_damage(self):
        create('a.bale', '16M')
        with open('noise', 'wb') as file:
            file.write(self.random.randbytes(4 * MIB))
        io('a.bale', 'write -q -s noise 0 4M')
        with open('noise', 'rb') as file, open('a.bale', 'r+b') as store:
            content = store.read()
            file.seek(100000)
            store.seek(content.index(file.read(1000)))
            store.write(b'?')
        with Qemu(DAEMON) as qemu:
            self.add(qemu)
            qemu.command('bale-verify', job_id='j', node_name='a',
                         auto_dismiss=False)
            corrupted, data = qemu.wait_events('BLOCK_IMAGE_CORRUPTED',
                                               'BALE_VERIFY_COMPLETED')
            self.assertEqual(corrupted['node-name'], 'a')
            self.assertEqual(data['damaged'], 1)
            self.assertRegex(data['findings'][0],
                             "image '', cluster 1: .* page .* offset")
            self.assertIn('1 damaged record', self.wait_job(qemu, 'j'))

    def start_slow(self, qemu, command, job='j'):
        """A job that takes minutes, well under way."""
        # Or the background is faster.
        qemu.command('bale-set', node_name='a', compact=False)
        qemu.command(command, job_id=job, node_name='a', speed=4096)
        wait_until(lambda: qemu.command('query-jobs')[0]['current-progress'],
                   'progress')
        job, = qemu.command('query-jobs')
        self.assertEqual(job['type'], command)
        self.assertLess(job['current-progress'], job['total-progress'])

    def test_pause_speed_and_cancel(self):
        self.garbage()
        for command, event in (('bale-verify', 'BALE_VERIFY_COMPLETED'),
                               ('bale-compact', 'BALE_COMPACT_COMPLETED')):
            run('cp', 'a.bale', 'b.bale', check=0)
            with self.subTest(command), Qemu(SYSTEM) as qemu:
                self.add(qemu, 'b.bale')
                self.start_slow(qemu, command)
                self.assertEqual(self.info(qemu)['job'], 'j')
                self.assertIn("has a job already: 'j'", qemu.fails(
                    'bale-verify', job_id='k', node_name='a'))
                qemu.command('job-pause', id='j')
                qemu.wait_event('JOB_STATUS_CHANGE', id='j', status='paused')
                self.io(qemu, 'write -P 3 1M 1M')
                qemu.command('bale-flush', node_name='a')
                qemu.command('job-resume', id='j')
                qemu.wait_event('JOB_STATUS_CHANGE', id='j', status='running')
                qemu.command('job-cancel', id='j')
                self.wait_job(qemu, 'j')
                self.start_slow(qemu, command, 'k')
                qemu.command('job-pause', id='k')
                qemu.command('bale-set', node_name='a', speed=0)
                self.assertEqual(self.info(qemu)['speed'], 0)
                qemu.command('job-resume', id='k')
                qemu.wait_event(event, **{'job-id': 'k'})
                self.assertIsNone(self.wait_job(qemu, 'k'))
                self.start_slow(qemu, 'bale-verify')
                qemu.command('job-pause', id='j')
                qemu.command('job-cancel', id='j')
                self.wait_job(qemu, 'j')
                self.io(qemu, 'read -P 3 1M 1M')
            check('b.bale')

    def test_node_stays_while_a_job_runs(self):
        self.garbage()
        with Qemu(DAEMON) as qemu:
            self.add(qemu)
            self.start_slow(qemu, 'bale-compact')
            self.assertIn('in use', qemu.fails('blockdev-del',
                                               node_name='a'))
            self.assertIn('has a job that writes', qemu.fails(
                'blockdev-reopen', options=[{
                    'driver': 'bale', 'node-name': 'a', 'file': 'a-file',
                    'read-only': True}]))
            before = self.info(qemu)['stats']['checkpoints']
            qemu.command('bale-checkpoint', node_name='a')
            self.assertGreater(self.info(qemu)['stats']['checkpoints'],
                               before)
            qemu.command('job-cancel', id='j')
            self.wait_job(qemu, 'j')
            qemu.command('blockdev-del', node_name='a')
        check('a.bale')

    def test_program_ends_while_a_job_runs(self):
        self.garbage()
        for program in (DAEMON, SYSTEM):
            for command in ('bale-compact', 'bale-verify'):
                run('cp', 'a.bale', 'b.bale', check=0)
                with self.subTest((program, command)):
                    with Qemu(program) as qemu:
                        self.add(qemu, 'b.bale')
                        self.start_slow(qemu, command)
                    self.assertEqual(qemu.process.process.returncode, 0,
                                     qemu.process.output())
                check('b.bale')

    def test_writes_and_checkpoints_meet_a_job(self):
        self.garbage()
        with Qemu(SYSTEM, '-object', 'iothread,id=io') as qemu:
            self.add(qemu)
            qemu.command('x-blockdev-set-iothread', node_name='a',
                         iothread='io')
            for i in range(12):
                command = ('bale-compact', 'bale-verify')[i % 2]
                qemu.command(command, job_id='j', node_name='a')
                for n in range(5):
                    self.io(qemu, f'write -P {i + 1} {n * 5 * MIB} 1M')
                    if n == 3 and i % 2:
                        qemu.command('bale-checkpoint', node_name='a')
                self.assertIsNone(self.wait_job(qemu, 'j'))
            self.io(qemu, *(f'read -P 12 {n * 5 * MIB} 1M' for n in range(5)))
            qemu.command('x-blockdev-set-iothread', node_name='a',
                         iothread=None)
        check('a.bale')

    def test_job_ids_and_manual_finalize(self):
        create('a.bale', '16M')
        io('a.bale', 'write 0 1M')
        with Qemu(DAEMON) as qemu:
            self.add(qemu, **{'read-only': True})
            self.assertIn('Invalid job ID', qemu.fails(
                'bale-verify', job_id='?!', node_name='a'))
            self.assertIn('is read-only', qemu.fails(
                'bale-compact', job_id='j', node_name='a'))
            qemu.command('bale-verify', job_id='j', node_name='a',
                         auto_finalize=False, auto_dismiss=False)
            qemu.wait_event('JOB_STATUS_CHANGE', id='j', status='pending')
            self.assertIn('already', qemu.fails(
                'bale-verify', job_id='k', node_name='a'))
            qemu.command('job-finalize', id='j')
            qemu.wait_event('JOB_STATUS_CHANGE', id='j', status='concluded')
            qemu.command('blockdev-del', node_name='a')
            qemu.command('job-dismiss', id='j')


class EventTest(Base):
    def failing(self, event, **rule):
        return {'driver': 'blkdebug', 'image': {
            'driver': 'file', 'filename': 'a.bale'}, 'inject-error': [
                {'event': event, 'errno': 5, **rule}]}

    def test_failed_store(self):
        create('a.bale', '16M')
        with Qemu(SYSTEM) as qemu:
            self.add(qemu, file=self.failing('flush_to_disk'))
            self.io(qemu, 'write 0 1M', 'flush', good=False)
            event = qemu.wait_event('BALE_STORE_FAILED')
            self.assertEqual(event['data']['node-name'], 'a')
            self.assertIn('Input/output error', event['data']['reason'])
            self.assertIn("Could not flush node 'a'", qemu.fails(
                'bale-flush', node_name='a'))
            self.assertTrue(self.info(qemu)['store']['failed'])
            self.assertIn('it takes no more writes', qemu.process.output())

    def test_recovered_store(self):
        create('a.bale', '16M')
        with Qemu(SYSTEM) as qemu:
            self.add(qemu, file=self.failing('flush_to_disk', once=True))
            self.io(qemu, 'write -P 5 0 1M', 'flush', good=False)
            qemu.wait_event('BALE_STORE_FAILED', **{'node-name': 'a'})
            qemu.command('bale-flush', node_name='a')
            qemu.wait_event('BALE_STORE_RECOVERED', **{'node-name': 'a'})
            self.assertFalse(self.info(qemu)['store']['failed'])
            self.io(qemu, 'write -P 5 0 1M', 'flush')
        io('a.bale', 'read -P 5 0 1M')
        check('a.bale')

    def test_failures_in_a_row_are_limited(self):
        create('a.bale', '16M')
        with Qemu(SYSTEM) as qemu:
            self.add(qemu, file=self.failing('flush_to_disk'))
            start = time.monotonic()
            for i in range(200):
                self.io(qemu, f'write {i * 4096} 4k', 'flush', good=False)
            spent_s = time.monotonic() - start
            count = len([e for e in qemu.events
                         if e['event'] == 'BALE_STORE_FAILED'])
            self.assertGreater(count, 0)
            self.assertLessEqual(count, spent_s + 2)

    def test_space_threshold(self):
        create('a.bale', '64M', 'page_size=2M')
        with open('noise', 'wb') as file:
            file.write(self.random.randbytes(4 * MIB))
        noise = self.path('noise')
        with Qemu(SYSTEM) as qemu:
            self.add(qemu)
            qemu.command('bale-set', node_name='a',
                         space_threshold=9 * MIB)
            self.assertEqual(self.info(qemu)['space-threshold'], 9 * MIB)
            self.io(qemu, f'write -s {noise} 0 4M')
            # Two looks at least
            time.sleep(2.5)
            qemu.command('query-bale')
            self.assertNotIn('BALE_SPACE_THRESHOLD',
                             [e['event'] for e in qemu.events])
            self.io(qemu, f'write -s {noise} 8M 4M',
                    f'write -s {noise} 16M 4M')
            data = qemu.wait_event('BALE_SPACE_THRESHOLD')['data']
            self.assertGreaterEqual(data['used-bytes'], 9 * MIB)
            self.assertEqual(data['space-threshold'], 9 * MIB)
            # QEMU's own, on the file
            qemu.command('block-set-write-threshold', node_name='a-file',
                         write_threshold=20 * MIB)
            self.io(qemu, f'write -s {noise} 24M 4M',
                    f'write -s {noise} 32M 4M')
            qemu.wait_event('BLOCK_WRITE_THRESHOLD',
                            **{'node-name': 'a-file'})
            # Down and up again
            qemu.command('bale-set', node_name='a',
                         space_threshold=100 * MIB)
            qemu.command('bale-set', node_name='a', space_threshold=1)
            qemu.wait_event('BALE_SPACE_THRESHOLD',
                            **{'space-threshold': 1})
            qemu.command('bale-set', node_name='a', space_threshold=0)
            qemu.command('blockdev-del', node_name='a')


if __name__ == '__main__':
    bale_iotests.main()
