#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A file system that goes down under a store that is being written: ext4 and
xfs on a loop device, shut down with and without their log being written, then
unmounted, mounted and read. What a flush acknowledged is there.

fdatasync of either may succeed in the moment of a shutdown, although the log
that has the new extent is written no more: 30 lines of C without Bale lose
such writes (ext4 through the page cache, xfs with O_DIRECT, too). In a real
crash nobody lives to see that. So only what was acknowledged before the
shutdown began counts.
"""

import contextlib
import os
import shutil
import time

import bale_iotests
from bale_images import MIB, loop_device
from bale_iotests import BALE, BUILD, LONG, Background, bale, run, \
    wait_for_nbd, wait_until
from bale_oracle import NbdClient, Oracle

STRESS = os.path.join(BUILD, 'tests/stress/stress')
# What mkfs.xfs wants at least
DEVICE_SIZE = 320 * MIB
GOOD, LEAKS = 0, 3


class FileSystemCase(bale_iotests.TestCase):

    kind = None

    @contextlib.contextmanager
    def file_system(self):
        """Makes self.device and the directory mnt; the test mounts it."""
        self.need_root()
        self.need(f'mkfs.{self.kind}', 'xfs_io', 'losetup')
        with open('/proc/filesystems', encoding='ascii') as file:
            if self.kind not in file.read().split():
                self.skipTest(f'this kernel has no {self.kind}')
        with open('backing', 'wb') as file:
            file.truncate(DEVICE_SIZE)
        if run('losetup', '--find').status:
            self.skipTest('no loop devices')
        os.mkdir('mnt')
        with loop_device('backing', '--direct-io=on') as self.device:
            run(f'mkfs.{self.kind}', '-q', self.device, check=0)
            self.mount()
            try:
                yield
            finally:
                run('umount', 'mnt')

    def mount(self):
        result = run('mount', '-t', self.kind, self.device, 'mnt')
        if result.status:
            self.skipTest(f'cannot mount {self.kind}: {result.err.strip()}')

    def shut_down(self):
        """The file system answers nothing any more. Half of the time what its
        log had in memory is gone."""
        words = ['shutdown', '-f'] if self.random.randrange(2) else \
            ['shutdown']
        result = run('xfs_io', '-x', '-c', ' '.join(words), 'mnt')
        if result.status or result.err:
            self.skipTest(f'{self.kind} cannot be shut down here: '
                          f'{result.err.strip()}')

    def crash_and_mount(self):
        # Somebody who died may still be on his way out
        wait_until(lambda: run('umount', 'mnt').status == 0, 'it is unmounted')
        self.mount()

    def check_store(self, path):
        result = bale('check', path)
        self.assertIn(result.status, (GOOD, LEAKS), str(result))


class Tests:
    """For each kind of file system; not a test case by itself."""

    def test_engine(self):
        """tests/stress, on O_DIRECT and through the page cache."""
        count = 40 if LONG else 4
        proven = 0
        with self.file_system():
            for number in range(count):
                options = ['--buffered'] if number % 2 else []
                if number % 4 == 0:
                    run(STRESS, 'create', 'mnt/s.bale', 'state', '--seed',
                        self.random.getrandbits(31), check=0)
                with Background(STRESS, 'run', 'mnt/s.bale', 'state', '--seed',
                                self.random.getrandbits(31), '--phase-ops',
                                '100', '--errors', '--quiet', '--compact',
                                *options) as load:
                    wait_until(lambda: 'running' in load.output() or
                               not load.running(), 'the load')
                    time.sleep(self.random.random() * 0.6)
                    shutil.copy('state', 'before')
                    self.shut_down()
                    # It goes on against the dead file system for a while
                    time.sleep(self.random.random() * 0.2)
                    load.kill()
                    self.assertNotIn('WRONG', load.output())
                self.crash_and_mount()
                result = run(STRESS, 'verify', 'mnt/s.bale', 'state',
                             '--before', 'before')
                self.assertEqual(result.status, 0, str(result))
                proven += int(result.out.split(' proven')[0].split()[-1])
                self.check_store('mnt/s.bale')
                if number % 4 == 3:
                    os.unlink('state')
        print(f'# {self.kind}: {count} crashes, {proven} requests proven in '
              f'them')

    def test_qemu(self):
        """qemu-nbd, with requests under way when it happens. Afterwards
        flushes fail, and nothing that one acknowledged is lost."""
        count, flushes = 30 if LONG else 3, 0
        with self.file_system():
            bale('create', '-o', 'page_size=2M', 'mnt/s.bale', str(4 * MIB),
                 check=0)
            oracle = Oracle(4 * MIB)
            for number in range(count):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink('nbd.sock')
                with Background(BALE, 'run', 'qemu-nbd', '-f', 'bale', '-t',
                                '--cache', ('none', 'writeback')[number % 2],
                                '-k', self.path('nbd.sock'),
                                'mnt/s.bale') as server:
                    self.assertTrue(wait_for_nbd(server, 'nbd.sock'),
                                    server.output())
                    down = []
                    client = NbdClient(self.path('nbd.sock'), oracle,
                                       lambda down=down: len(down))
                    for _ in range(self.random.randrange(10, 200)):
                        client.random_request(self.random)
                    down.append(True)
                    self.shut_down()
                    for _ in range(30):
                        client.random_request(self.random)
                    client.drain()
                    # Something new, and a flush: it cannot succeed
                    client.write(0, 8)
                    client.drain()
                    self.assertNotEqual(client.wait(client.flush())[0], 0)
                    client.close()
                    server.kill()
                self.crash_and_mount()
                self.check_store('mnt/s.bale')
                bale('export', 'mnt/s.bale', 'out.raw', check=0)
                with open('out.raw', 'rb') as file:
                    oracle.verify(file.read(), mark=0)
                oracle.settle()
            flushes = oracle.flushes
        print(f'# {self.kind}: {count} crashes, {flushes} flushes '
              f'acknowledged')


class Ext4Test(Tests, FileSystemCase):
    kind = 'ext4'


class XfsTest(Tests, FileSystemCase):
    kind = 'xfs'


if __name__ == '__main__':
    bale_iotests.main()
