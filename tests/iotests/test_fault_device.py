#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A device that really fails: nbdkit, under a file that FUSE makes of it
(nbdfuse) and as the NBD child of the driver. Writes fail while a file exists;
flushes fail and lose what was not flushed, as kernels do with pages that they
could not write. What a flush acknowledged is there, whatever came after it.

Without /dev/fuse only the tests through NBD run.
"""

import contextlib
import os
import re
import shlex
import shutil
import struct
import time

import bale_iotests
from bale_images import KIB, MIB
from bale_iotests import BALE, BUILD, LONG, Background, bale, run, \
    wait_for_nbd, wait_until
from bale_oracle import NbdClient, Oracle
from bale_qmp import Qemu

STRESS = os.path.join(BUILD, 'tests/stress/stress')
SIZE = 2 * MIB
DEVICE_SIZE = 64 * MIB
GOOD, LEAKS = 0, 3

# A device with a volatile cache, for nbdkit's eval: disk.img is what reads
# see, durable.img what a power cut leaves. A flush that fails loses the cache.
CACHE = {
    'get_size': 'stat -c %s disk.img',
    'can_write': 'exit 0',
    'can_flush': 'exit 0',
    'can_fua': 'echo emulate',
    'can_zero': 'exit 3',
    'can_trim': 'exit 3',
    'pread': 'dd if=disk.img bs=1M iflag=skip_bytes,count_bytes,fullblock '
             'skip=$4 count=$3 status=none',
    'pwrite': 'if [ -e fail-write ]; then echo EIO no >&2; exit 1; fi; '
              'dd of=disk.img bs=1M iflag=fullblock oflag=seek_bytes '
              'conv=notrunc seek=$4 status=none',
    'flush': 'if [ -e fail-flush ]; then '
             'cp --sparse=always durable.img disk.img; '
             'echo EIO lost >&2; exit 1; fi; '
             'cp --sparse=always disk.img durable.img.new && '
             'mv durable.img.new durable.img',
}


class DeviceCase(bale_iotests.TestCase):

    def setUp(self):
        self.need('nbdkit', 'nbdfuse')

    @contextlib.contextmanager
    def nbdkit(self, *words):
        """nbdkit on kit.sock."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink('kit.sock')
        with Background('nbdkit', '-f', '-U', self.path('kit.sock'),
                        *words) as server:
            self.assertTrue(wait_for_nbd(server, 'kit.sock'), server.output())
            yield

    def errors(self):
        """The plain one: writes fail while the file fail-write exists."""
        return ('--filter=error', 'file', self.path('disk.img'),
                'error-pwrite=EIO', 'error-pwrite-rate=100%',
                f'error-pwrite-file={self.path("fail-write")}')

    def cache(self):
        """The one with a volatile cache; also flushes fail."""
        shutil.copy('disk.img', 'durable.img')
        where = f'cd {shlex.quote(self.dir)}; '
        return ('eval', *(f'{name}={where}{script}'
                          for name, script in CACHE.items()))

    @contextlib.contextmanager
    def fuse(self):
        """A file that is the device."""
        self.need_root()
        if not os.access('/dev/fuse', os.W_OK):
            self.skipTest('no /dev/fuse')
        with open('device', 'wb'):
            pass
        with Background('nbdfuse', self.path('device'), '--unix',
                        self.path('kit.sock')) as mount:
            try:
                wait_until(lambda: os.stat('device').st_size or
                           not mount.running(), 'nbdfuse')
                self.assertTrue(mount.running(), mount.output())
                yield
            finally:
                run('umount', '--lazy', 'device')

    def make_disk(self, *options):
        bale('create', '-o', 'page_size=2M,cluster_size=' +
             self.random.choice(('4K', '16K', '64K')), 'disk.img', str(SIZE),
             check=0)
        os.truncate('disk.img', DEVICE_SIZE)

    def arm(self, what):
        with open(what, 'wb'):
            pass

    def disarm(self, what):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(what)

    def check_store(self, path):
        result = bale('check', path)
        self.assertIn(result.status, (GOOD, LEAKS), str(result))


class EngineTest(DeviceCase):
    """tests/stress on the file of FUSE, while the device fails and works in
    turn. It revives the store whenever it is poisoned."""

    def flushes(self):
        """Acknowledged so far: tests/stress keeps the number there."""
        with open('state', 'rb') as file:
            return struct.unpack('<QQQ', file.read(24))[2]

    def let_flush(self, load):
        goal = self.flushes() + self.random.randrange(1, 8)
        wait_until(lambda: self.flushes() >= goal or not load.running(),
                   'flushes')

    def load(self, what, rounds, lost):
        proven = failed = 0
        for _ in range(rounds):
            with self.fuse():
                with Background(STRESS, 'run', 'device', 'state', '--seed',
                                self.random.getrandbits(31), '--phase-ops',
                                '200', '--errors') as load:
                    wait_until(lambda: 'running' in load.output() or
                               not load.running(), 'the load')
                    self.let_flush(load)
                    for _ in range(self.random.randrange(1, 4)):
                        time.sleep(self.random.random() * 0.3)
                        self.arm(what)
                        time.sleep(self.random.random() * 0.3)
                        self.disarm(what)
                    if not lost:
                        self.let_flush(load)
                    time.sleep(self.random.random() * 0.3)
                    load.kill()
                    self.assertNotIn('WRONG', load.output())
                    failed += load.output().count('error:')
            self.disarm(what)
            yield
            result = run(STRESS, 'verify', self.store, 'state')
            self.assertEqual(result.status, 0, str(result))
            proven += int(result.out.split(' proven')[0].split()[-1])
            self.check_store(self.store)
        print(f'# {rounds} kills, {proven} requests proven, {failed} failed')

    def make_disk(self, *options):
        run(STRESS, 'create', 'disk.img', 'state', '--seed',
            self.random.getrandbits(31), check=0)
        os.truncate('disk.img', DEVICE_SIZE)

    def test_failing_writes(self):
        self.make_disk()
        self.store = 'disk.img'
        with self.nbdkit(*self.errors()):
            for _ in self.load('fail-write', 20 if LONG else 3, False):
                pass

    def test_failing_flushes(self):
        """After each kill the cache of the device is lost, too."""
        self.make_disk()
        self.store = 'durable.img'
        with self.nbdkit(*self.cache()):
            for _ in self.load('fail-flush', 12 if LONG else 2, True):
                shutil.copy('durable.img', 'disk.img')


class DriverTest(DeviceCase):
    """qemu-nbd with the driver on the device."""

    def serve(self, child):
        with contextlib.suppress(FileNotFoundError):
            os.unlink('nbd.sock')
        options = f'driver=bale,cache-size=0,{child}'
        return Background(BALE, 'run', 'qemu-nbd', '-t', '--cache',
                          'writeback', '-k', self.path('nbd.sock'),
                          '--image-opts', options)

    def fail_once(self, child, what, oracle, lost):
        """Works, fails, works: then it is killed."""
        with self.serve(child) as server:
            self.assertTrue(wait_for_nbd(server, 'nbd.sock'), server.output())
            client = NbdClient(self.path('nbd.sock'), oracle)
            for _ in range(self.random.randrange(5, 40)):
                client.random_request(self.random)
            client.drain()
            self.assertEqual(client.failures, [])
            self.assertEqual(client.wait(client.flush())[0], 0)
            settled = self.random.randrange(2)
            if settled:
                self.assertEqual(client.check_reads(), 0)

            self.arm(what)
            if what == 'fail-flush':
                # Writes reach the device, and are lost by the flush
                for _ in range(self.random.randrange(1, 20)):
                    client.write(self.random.randrange(oracle.sectors - 16),
                                 16)
                client.drain()
            else:
                for _ in range(self.random.randrange(1, 20)):
                    client.random_request(self.random)
                client.write(0, 8)
                client.drain()
            # Later flushes fail, too, for as long as the device does
            for _ in range(3):
                client.write(self.random.randrange(oracle.sectors - 8), 8)
                client.drain()
                self.assertNotEqual(client.wait(client.flush())[0], 0)
            errors = client.check_reads()
            if not lost:
                self.assertEqual(errors, 0, 'reads fail, nothing is lost')
            wait_until(lambda: re.search('bale.*failed', server.output()),
                       'it says so')

            self.disarm(what)
            client.failures.clear()
            for _ in range(self.random.randrange(1, 30)):
                client.random_request(self.random)
            client.drain()
            client.write(0, 8)
            good = client.wait(client.flush())[0] == 0
            client.abandon()
            server.kill()
        return good

    def run_many(self, transport, what, rounds):
        oracle = Oracle(SIZE)
        self.make_disk()
        lost = what == 'fail-flush'
        kit = self.cache() if lost else self.errors()
        store = 'durable.img' if lost else 'disk.img'
        revived = 0
        with self.nbdkit(*kit):
            for _ in range(rounds):
                if transport == 'fuse':
                    with self.fuse():
                        revived += self.fail_once(
                            'file.driver=file,file.filename=device', what,
                            oracle, lost)
                else:
                    revived += self.fail_once(
                        'file.driver=nbd,file.server.type=unix,'
                        f'file.server.path={self.path("kit.sock")}', what,
                        oracle, lost)
                self.check_store(store)
                bale('export', store, 'out.raw', check=0)
                with open('out.raw', 'rb') as file:
                    oracle.verify(file.read())
                oracle.settle()
                if lost:
                    shutil.copy('durable.img', 'disk.img')
        print(f'# {transport}: {rounds} failures, {oracle.flushes} flushes '
              f'acknowledged, {revived} times one after the failure')

    def test_a_vm_is_told(self):
        """Events when the device fails and when all is well again."""
        self.make_disk()
        with self.nbdkit(*self.errors()):
            with Qemu('qemu-system-x86_64', '-drive',
                      'if=none,id=d0,driver=bale,node-name=n0,'
                      'file.driver=nbd,file.server.type=unix,'
                      f'file.server.path={self.path("kit.sock")}') as vm:
                vm.hmp('qemu-io d0 "write -P 1 0 1M"')
                vm.hmp('qemu-io d0 "flush"')
                self.arm('fail-write')
                vm.hmp('qemu-io d0 "write -P 2 1M 64k"')
                vm.hmp('qemu-io d0 "flush"')
                event = vm.wait_event('BALE_STORE_FAILED')
                self.assertEqual(event['data']['node-name'], 'n0')
                self.assertIn('Input/output error', event['data']['reason'])
                self.assertNotIn('failed', vm.hmp(
                    'qemu-io d0 "read -P 1 0 1M"'))
                self.disarm('fail-write')
                vm.hmp('qemu-io d0 "write -P 3 512k 64k"')
                vm.hmp('qemu-io d0 "flush"')
                event = vm.wait_event('BALE_STORE_RECOVERED')
                self.assertEqual(event['data']['node-name'], 'n0')
        self.check_store('disk.img')
        bale('export', 'disk.img', 'out.raw', check=0)
        with open('out.raw', 'rb') as file:
            data = file.read()
        self.assertTrue(data[512 * KIB:576 * KIB] == b'\3' * 64 * KIB)
        self.assertTrue(data[:512 * KIB] == b'\1' * 512 * KIB)

    def test_failing_writes_through_fuse(self):
        self.run_many('fuse', 'fail-write', 20 if LONG else 3)

    def test_failing_writes_through_nbd(self):
        self.run_many('nbd', 'fail-write', 20 if LONG else 3)

    def test_failing_flushes_through_fuse(self):
        self.run_many('fuse', 'fail-flush', 15 if LONG else 2)

    def test_failing_flushes_through_nbd(self):
        self.run_many('nbd', 'fail-flush', 15 if LONG else 2)


if __name__ == '__main__':
    bale_iotests.main()
