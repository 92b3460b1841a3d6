#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver bale in long-running programs: NBD, jobs, iothreads, drains,
reopening, errors of the file under it, SIGKILL."""

import os
import re
import signal
import threading
import time

import bale_iotests
from bale_images import (KIB, MIB, check, check_killed, compare, create, io,
                         make_raw, sha256)
from bale_iotests import BALE, LONG, Background, qemu_img, qemu_io, run, \
    wait_for_nbd, wait_until
from bale_qmp import Qemu

SYSTEM = 'qemu-system-x86_64'


def drive(path, node='n0', more=''):
    return ['-drive', f'if=none,id=drive-{node},driver=bale,node-name={node},'
            f'file.filename={path}{more}']


class NbdTest(bale_iotests.TestCase):

    def serve(self, path, *args):
        server = Background(BALE, 'run', 'qemu-nbd', '-f', 'bale', '-k',
                            self.path('nbd.sock'), '-t', *args, path)
        self.assertTrue(wait_for_nbd(server, 'nbd.sock'), server.output())
        return server

    def url(self):
        return 'nbd+unix:///?socket=' + self.path('nbd.sock')

    def test_restore_through_nbd(self):
        raw = make_raw(self.random, 'disk.raw', 32 * MIB)
        qemu_img('convert', '-O', 'bale', raw, 't.bale')
        with self.serve('t.bale', '-r'):
            qemu_img('convert', '-f', 'raw', '-O', 'raw', self.url(),
                     'out.raw')
        self.assertEqual(sha256(raw), sha256('out.raw'))

    def test_backup_through_nbd(self):
        raw = make_raw(self.random, 'disk.raw', 32 * MIB)
        create('t.bale', 32 * MIB)
        with self.serve('t.bale') as server:
            qemu_img('convert', '-n', '-W', '-m', '16', '-f', 'raw', '-O',
                     'raw', raw, self.url())
            self.assertEqual(server.stop(), 0)
        check('t.bale')
        compare(raw, 't.bale')

    def test_many_clients_at_once(self):
        create('t.bale', 64 * MIB)
        with self.serve('t.bale', '-e', '8') as server:
            threads = []
            for number in range(4):
                words = []
                for i in range(30):
                    words += ['-c', f'aio_write -P {number + 1} '
                              f'{number * 16 * MIB + i * 100 * KIB} 100k']
                threads.append(threading.Thread(target=run, args=(
                    'qemu-io', '-f', 'raw', *words, '-c', 'aio_flush', '-c',
                    'flush', self.url())))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(server.stop(), 0)
        check('t.bale')
        io('t.bale', *[f'read -P {n + 1} {n * 16}M 3000k' for n in range(4)])

    @staticmethod
    def has_ended(pid):
        """Of somebody else's child: gone, or to be waited for."""
        try:
            with open(f'/proc/{pid}/status', encoding='ascii') as file:
                return 'State:\tZ' in file.read()
        except (FileNotFoundError, ProcessLookupError):
            return True

    def test_forking_server(self):
        """qemu-nbd --fork opens the image after it has forked, or before:
        the threads of the engine must be in the process that serves."""
        create('t.bale', 16 * MIB)
        run(BALE, 'run', 'qemu-nbd', '--fork', '-f', 'bale', '-k',
            self.path('nbd.sock'), '--pid-file', self.path('pid'), 't.bale',
            check=0)
        run('qemu-io', '-f', 'raw', '-c', 'write -P 3 0 5M', '-c',
            'read -P 3 0 5M', self.url(), check=0)
        with open('pid', encoding='ascii') as file:
            pid = int(file.read())
        wait_until(lambda: self.has_ended(pid), 'qemu-nbd ends')
        check('t.bale')
        io('t.bale', 'read -P 3 0 5M')


class SystemTest(bale_iotests.TestCase):

    def export(self, vm, node, **more):
        """A file that is the node. By FUSE: NBD servers of QEMU 7.2 abort
        when a client of an export in an iothread goes."""
        if not os.access('/dev/fuse', os.W_OK):
            self.skipTest('no /dev/fuse')
        path = self.path('mount')
        with open(path, 'wb'):
            pass
        self.addCleanup(run, 'umount', '--lazy', path)
        vm.command('block-export-add', type='fuse', id='e0', node_name=node,
                   writable=True, mountpoint=path, **more)
        return path

    def load(self, path, rounds=2):
        """Parallel writes and reads; returns the thread and its verdict."""
        verdict = []

        def work():
            words = []
            for i in range(60):
                words += ['-c', f'aio_write -P {i + 1} {i * 37}k 150k']
            words += ['-c', 'aio_flush', '-c', 'flush']
            for i in range(60):
                words += ['-c', f'read -P {i + 1} {i * 37}k 37k']
            for _ in range(rounds):
                # In order: overlapping writes must end as the last one
                plain = [w.replace('aio_write', 'write') for w in words]
                result = run('qemu-io', '--image-opts', *plain,
                             'driver=file,locking=off,filename=' + path)
                verdict.append(result)

        thread = threading.Thread(target=work)
        thread.start()
        return thread, verdict

    def assert_good(self, verdict, rounds):
        self.assertEqual(len(verdict), rounds)
        for result in verdict:
            self.assertEqual(result.status, 0, result)
            self.assertIsNone(re.search('failed|error', result.out +
                                        result.err), result)

    def test_in_the_main_loop(self):
        create('t.bale', 16 * MIB)
        with Qemu(SYSTEM, *drive('t.bale')) as vm:
            thread, verdict = self.load(self.export(vm, 'n0'))
            thread.join()
        self.assert_good(verdict, 2)
        check('t.bale')

    def test_in_an_iothread(self):
        create('t.bale', 16 * MIB)
        with Qemu(SYSTEM, '-object', 'iothread,id=io0',
                  *drive('t.bale')) as vm:
            thread, verdict = self.load(self.export(
                vm, 'n0', iothread='io0', fixed_iothread=True))
            thread.join()
        self.assert_good(verdict, 2)
        check('t.bale')

    def test_the_context_changes_under_load(self):
        """Requests in flight and a job that runs, while the node moves
        between threads. (Exports of QEMU 7.2 abort when moved under load.)"""
        create('t.bale', 32 * MIB)
        create('target.bale', 32 * MIB)
        with Qemu(SYSTEM, '-object', 'iothread,id=io0', '-object',
                  'iothread,id=io1', *drive('t.bale'),
                  *drive('target.bale', 'n1')) as vm:
            vm.command('drive-mirror', job_id='j', device='drive-n0',
                       target=self.path('mirror.bale'), format='bale',
                       sync='full')
            vm.wait_event('BLOCK_JOB_READY', device='j')
            for number in range(12):
                for i in range(10):
                    vm.hmp(f'qemu-io drive-n0 "aio_write -P {number + i + 1} '
                           f'{i * 3000 + number}k 2900k"')
                context = ('io0', 'io1', None)[number % 3]
                vm.command('x-blockdev-set-iothread', node_name='n0',
                           iothread=context, force=True)
            vm.command('x-blockdev-set-iothread', node_name='n0',
                       iothread=None, force=True)
            vm.hmp('qemu-io drive-n0 "flush"')
            vm.command('block-job-cancel', device='j')
            vm.wait_event('BLOCK_JOB_COMPLETED', device='j')
        check('t.bale')
        check('mirror.bale')
        compare('t.bale', 'mirror.bale')
        io('t.bale', *[f'read -P {i + 12} {i * 3000 + 11}k 2900k'
                       for i in range(10)])

    def test_drains_under_load(self):
        """Each backup job begins and ends with drained sections."""
        create('t.bale', 16 * MIB)
        create('target.bale', 16 * MIB)
        with Qemu(SYSTEM, '-object', 'iothread,id=io0', *drive('t.bale'),
                  *drive('target.bale', 'n1')) as vm:
            thread, verdict = self.load(self.export(vm, 'n0'), rounds=4)
            while True:
                vm.command('blockdev-backup', job_id='j', device='n0',
                           target='n1', sync='full')
                self.assertEqual(vm.run_job('j'), '')
                if not thread.is_alive():
                    break
        self.assert_good(verdict, 4)
        check('t.bale')
        check('target.bale')

    def test_a_drained_node_stays_quiet(self):
        """In a drained section nothing reaches the file, not even what the
        engine has left to write."""
        create('t.bale', 64 * MIB)
        with Qemu(SYSTEM, *drive('t.bale')) as vm:
            vm.hmp('qemu-io n0 "write -P 1 0 20M"')
            vm.command('stop')
            before = vm.command('query-blockstats', query_nodes=True)
            time.sleep(0.3)
            after = vm.command('query-blockstats', query_nodes=True)
            self.assertEqual(before, after)
            vm.command('cont')
        check('t.bale')
        io('t.bale', 'read -P 1 0 20M')

    def test_drive_backup_to_bale(self):
        raw = make_raw(self.random, 'disk.raw', 32 * MIB)
        with Qemu(SYSTEM, '-drive',
                  f'if=none,id=d0,format=raw,file={raw}') as vm:
            vm.command('drive-backup', job_id='j', device='d0',
                       target=self.path('t.bale'), format='bale', sync='full')
            self.assertEqual(vm.run_job('j'), '')
        check('t.bale')
        compare(raw, 't.bale')

    def test_compressed_backup(self):
        raw = make_raw(self.random, 'disk.raw', 32 * MIB)
        with Qemu(SYSTEM, '-drive',
                  f'if=none,id=d0,format=raw,file={raw}') as vm:
            vm.command('drive-backup', job_id='j', device='d0', compress=True,
                       target=self.path('t.bale'), format='bale', sync='full')
            self.assertEqual(vm.run_job('j'), '')
        check('t.bale')
        compare(raw, 't.bale')

    def test_backup_with_many_workers(self):
        raw = make_raw(self.random, 'disk.raw', 32 * MIB)
        create('t.bale', 32 * MIB)
        with Qemu(SYSTEM, '-drive',
                  f'if=none,id=d0,format=raw,file={raw}',
                  *drive('t.bale')) as vm:
            vm.command('blockdev-backup', job_id='j', device='d0',
                       target='n0', sync='full',
                       x_perf={'max-workers': 64, 'max-chunk': 65536})
            self.assertEqual(vm.run_job('j'), '')
        check('t.bale')
        compare(raw, 't.bale')

    def test_incremental_backups_as_a_chain(self):
        raw = make_raw(self.random, 'disk.raw', 16 * MIB)
        with Qemu(SYSTEM, '-drive',
                  f'if=none,id=d0,format=raw,file={raw},node-name=r0') as vm:
            vm.command('block-dirty-bitmap-add', node='r0', name='b0')
            vm.command('drive-backup', job_id='j', device='d0',
                       target=self.path('full.bale'), format='bale',
                       sync='full')
            self.assertEqual(vm.run_job('j'), '')
            below = 'full.bale'
            for number in range(3):
                vm.hmp(f'qemu-io d0 "write -P {number + 60} '
                       f'{number * 3 + 1}M 1500k"')
                name = f'inc{number}.bale'
                create(name, 16 * MIB, f'backing_file={below}',
                       'backing_fmt=bale')
                vm.command('drive-backup', job_id='j', device='d0',
                           target=self.path(name), format='bale',
                           mode='existing', sync='incremental', bitmap='b0')
                self.assertEqual(vm.run_job('j'), '')
                below = name
        compare(raw, 'inc2.bale')
        for name in ('full', 'inc0', 'inc1', 'inc2'):
            check(f'{name}.bale')
        io('inc0.bale', 'read -P 60 1M 1500k')

    def test_mirror_to_bale(self):
        raw = make_raw(self.random, 'disk.raw', 32 * MIB)
        with Qemu(SYSTEM, '-drive',
                  f'if=none,id=d0,format=raw,file={raw}') as vm:
            vm.command('drive-mirror', job_id='j', device='d0',
                       target=self.path('t.bale'), format='bale', sync='full')
            vm.wait_event('BLOCK_JOB_READY', device='j')
            vm.hmp('qemu-io d0 "write -P 77 3M 2M"')
            vm.command('block-job-cancel', device='j')
            vm.wait_event('BLOCK_JOB_COMPLETED', device='j')
        check('t.bale')
        compare(raw, 't.bale')

    def chain(self):
        create('base.bale', 16 * MIB)
        io('base.bale', 'write -P 1 0 8M')
        below = 'base.bale'
        for name, at in (('mid.bale', 2), ('top.bale', 4)):
            create(name, 16 * MIB, f'backing_file={below}',
                   'backing_fmt=bale')
            io(name, f'write -P {at} {at}M 1M', f'write -P {at} 12000 100')
            below = name
        qemu_img('convert', '-O', 'raw', 'top.bale', 'expected.raw')

    def test_stream(self):
        self.chain()
        with Qemu(SYSTEM, *drive('top.bale')) as vm:
            vm.command('block-stream', job_id='j', device='drive-n0')
            vm.hmp('qemu-io drive-n0 "read 0 16M"')
            self.assertEqual(vm.run_job('j'), '')
        for name in ('mid.bale', 'base.bale'):
            os.unlink(name)
        check('top.bale')
        compare('expected.raw', 'top.bale')

    def test_commit_of_the_active_layer(self):
        self.chain()
        with Qemu(SYSTEM, *drive('top.bale')) as vm:
            vm.command('block-commit', job_id='j', device='drive-n0')
            self.assertEqual(vm.run_job('j'), '')
            vm.hmp('qemu-io drive-n0 "write -P 9 9M 1M"')
        check('base.bale')
        qemu_io('-f', 'raw', '-c', 'write -P 9 9M 1M', 'expected.raw')
        compare('expected.raw', 'base.bale')

    def test_commit_of_a_layer_in_between(self):
        self.chain()
        with Qemu(SYSTEM, *drive('top.bale')) as vm:
            vm.command('block-commit', job_id='j', device='drive-n0',
                       top=self.path('mid.bale'))
            self.assertEqual(vm.run_job('j'), '')
        for name in ('base.bale', 'top.bale'):
            check(name)
        os.unlink('mid.bale')
        compare('expected.raw', 'top.bale')

    def test_resize_under_load(self):
        """Requests in flight while the image grows, in one program."""
        create('t.bale', 16 * MIB)
        commands = []
        for number in range(40):
            commands += [f'aio_write -P {number + 1} {number * 400}k 300k',
                         f'truncate {16 + number}M']
        io('t.bale', *commands, 'aio_flush')
        check('t.bale')
        io('t.bale', *[f'read -P {n + 1} {n * 400}k 300k'
                       for n in range(40)], 'read -P 0 16M 39M')

    def migrate(self, source, target):
        socket = self.path('migrate.sock')
        target.command('migrate-incoming', uri='unix:' + socket)
        source.command('migrate', uri='unix:' + socket)
        for vm in (source, target):
            wait_until(lambda vm=vm: vm.command('query-migrate').get('status')
                       in ('completed', 'failed'), 'migration')
            self.assertEqual(vm.command('query-migrate')['status'],
                             'completed')

    def test_hands_over_in_migration(self):
        """What the source wrote is seen by the target, which may write."""
        create('t.bale', 16 * MIB)
        with Qemu(SYSTEM, *drive('t.bale')) as source, \
                Qemu(SYSTEM, *drive('t.bale'), '-incoming',
                     'defer') as target:
            source.hmp('qemu-io n0 "write -P 5 1M 3M"')
            self.migrate(source, target)
            out = target.hmp('qemu-io n0 "read -P 5 1M 3M"')
            self.assertNotIn('failed', out)
            target.hmp('qemu-io n0 "write -P 6 2M 1M"')
        check('t.bale')
        io('t.bale', 'read -P 5 1M 1M', 'read -P 6 2M 1M', 'read -P 5 3M 1M')


class ReopenTest(bale_iotests.TestCase):

    def test_read_only_and_back(self):
        create('t.bale', 16 * MIB)
        result = qemu_io('-f', 'bale', '-c', 'write -P 1 0 1M', '-c',
                         'reopen -r', '-c', 'read -P 1 0 1M', '-c',
                         'reopen -w', '-c', 'write -P 2 1M 1M', '-c',
                         'read -P 2 1M 1M', 't.bale')
        self.assertNotIn('failed', result.out + result.err)
        check('t.bale')
        io('t.bale', 'read -P 1 0 1M', 'read -P 2 1M 1M')

    def test_read_only_image_for_writing(self):
        create('t.bale', 16 * MIB)
        io('t.bale', 'reopen -w', 'write -P 2 1M 1M', options=('-r',))
        io('t.bale', 'read -P 2 1M 1M')

    def test_writing_after_reopening_read_only_is_refused(self):
        create('t.bale', 16 * MIB)
        result = qemu_io('-f', 'bale', '-c', 'reopen -r', '-c',
                         'write 0 4k', 't.bale', check=None)
        self.assertIn('read-only', result.out + result.err)

    def test_cache_modes(self):
        create('t.bale', 16 * MIB)
        io('t.bale', 'write -P 1 0 1M', 'reopen -c none', 'write -P 2 1M 1M',
           'reopen -c writeback', 'read -P 1 0 1M', 'read -P 2 1M 1M')
        check('t.bale')


class FailingFileTest(bale_iotests.TestCase):
    """Errors of the file below, injected by blkdebug."""

    def options(self, event, errno, **more):
        words = ''.join(f',file.inject-error.0.{key}={value}'
                        for key, value in more.items())
        return (f'driver=bale,file.driver=blkdebug,'
                f'file.image.driver=file,file.image.filename=t.bale,'
                f'file.inject-error.0.event={event},'
                f'file.inject-error.0.errno={errno}{words}')

    def qemu_io(self, options, *commands, cache='writeback'):
        words = [word for command in commands for word in ('-c', command)]
        return qemu_io('--image-opts', '-t', cache, *words, options,
                       check=None)

    def setUp(self):
        create('t.bale', 16 * MIB)
        io('t.bale', 'write -P 1 0 4M')

    def test_while_flushes_fail_nothing_succeeds_but_reading(self):
        result = self.qemu_io(
            self.options('flush_to_disk', 5), 'write -P 2 1M 1M',
            'flush', 'write -P 3 2M 1M', 'flush', 'read -P 1 0 1M')
        text = result.out + result.err
        # The write after it fails too, and the last flush; the read does not
        self.assertGreaterEqual(text.count('Input/output error'), 3, result)
        self.assertNotIn('verification failed', text)

    def test_after_one_failed_flush_everything_is_written_again(self):
        result = self.qemu_io(
            self.options('flush_to_disk', 5, once='on'), 'write -P 2 1M 1M',
            'flush', 'write -P 3 2M 1M', 'flush', 'read -P 1 0 1M',
            'sigraise 9')
        text = result.out + result.err
        self.assertIn('Input/output error', text)
        self.assertIn('was written again', text)
        self.assertNotIn('verification failed', text)
        # What the second flush acknowledged was there when it was killed
        check_killed('t.bale')
        io('t.bale', 'read -P 1 0 1M', 'read -P 2 1M 1M', 'read -P 3 2M 1M')

    def test_reopening_clears_a_failed_flush(self):
        self.qemu_io(self.options('flush_to_disk', 5, once='on'),
                     'write -P 2 1M 1M', 'flush')
        check('t.bale')
        io('t.bale', 'read -P 1 0 1M', 'read -P 1 2M 2M', 'write -P 3 1M 1M')
        io('t.bale', 'read -P 3 1M 1M')

    def test_a_failed_write_is_reported(self):
        result = self.qemu_io(self.options('write_aio', 5),
                              'write -P 2 1M 1M', 'flush')
        self.assertIn('Input/output error', result.out + result.err)
        check('t.bale')
        io('t.bale', 'read -P 1 0 1M', 'read -P 1 2M 2M')

    def test_a_full_file_is_reported(self):
        result = self.qemu_io(self.options('write_aio', 28),
                              'write -P 2 1M 1M', 'flush')
        self.assertRegex(result.out + result.err,
                         'No space left on device|Input/output error')
        check('t.bale')
        io('t.bale', 'read -P 1 0 1M', 'read -P 1 2M 2M')

    def test_a_failed_read_is_reported_and_passes(self):
        with open('debug.conf', 'w', encoding='ascii') as file:
            file.write('[inject-error]\nevent = "read_aio"\nerrno = "5"\n'
                       'state = "2"\n'
                       '[set-state]\nevent = "pwritev"\nstate = "1"\n'
                       'new_state = "2"\n')
        result = self.qemu_io(
            'driver=bale,file.driver=blkdebug,file.config=debug.conf,'
            'file.image.driver=file,file.image.filename=t.bale,cache-size=0',
            'read -P 1 0 1M')
        self.assertNotIn('verification failed', result.out + result.err)
        io('t.bale', 'read -P 1 0 4M')


class KillTest(bale_iotests.TestCase):

    def assert_right_or_zero(self, right, found):
        if found == right:
            return
        for at in range(0, len(right), 512):
            sector = found[at:at + 512]
            if sector != right[at:at + 512]:
                self.assertEqual(sector, bytes(512))

    def test_killed_in_the_middle_of_convert(self):
        """The store opens and checks clean; nothing but the right data or
        zeroes is in it."""
        raw = make_raw(self.random, 'disk.raw', 256 * MIB, parts=40,
                       part_length=4 * MIB)
        for number in range(20 if LONG else 5):
            with self.subTest(number=number):
                if os.path.exists('t.bale'):
                    os.unlink('t.bale')
                command = Background(
                    BALE, 'run', 'qemu-img', 'convert', '-t',
                    self.random.choice(('none', 'writeback')), '-f', 'raw',
                    '-O', 'bale', '-o', 'page_size=2M', raw, 't.bale')
                wait_until(lambda: not command.running() or
                           os.path.exists('t.bale') and
                           os.stat('t.bale').st_size > 2 * MIB, 'a store')
                time.sleep(self.random.random() * 0.4)
                command.kill()
                check_killed('t.bale')
                qemu_img('convert', '-f', 'bale', '-O', 'raw', 't.bale',
                         'out.raw')
                with open(raw, 'rb') as one, open('out.raw', 'rb') as other:
                    while block := one.read(64 * KIB):
                        found = other.read(64 * KIB)
                        self.assert_right_or_zero(block, found)
                os.unlink('out.raw')

    def test_what_was_flushed_survives_a_kill(self):
        create('t.bale', 64 * MIB, 'page_size=2M')
        for number in range(30 if LONG else 8):
            with self.subTest(number=number):
                written = self.random.randrange(1, 16)
                words = []
                for i in range(written):
                    words += ['-c', f'write -P {(number + i) % 255 + 1} '
                              f'{i * 3}M {self.random.randrange(1, 3000)}k']
                words += ['-c', 'flush', '-c',
                          f'aio_write -P 200 50M 5M', '-c',
                          f'sigraise {int(signal.SIGKILL)}']
                io('t.bale', *[f'write -z {i * 3}M 3M'
                               for i in range(written)])
                run(BALE, 'run', 'qemu-io', '-f', 'bale', *words, 't.bale')
                check_killed('t.bale')
                reads = []
                for i in range(written):
                    size = words[2 * i + 1].split()[-1]
                    reads.append(f'read -P {(number + i) % 255 + 1} {i * 3}M '
                                 f'{size}')
                io('t.bale', *reads)


if __name__ == '__main__':
    bale_iotests.main()
