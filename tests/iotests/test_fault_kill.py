#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGKILL of real processes at random moments, on files with O_DIRECT and
through the page cache, and on loop devices with sectors of 512 and 4096 bytes.
What a flush acknowledged is there, the rest is old or new, check is clean;
then the same store is used on, and killed again.

Seeds choose geometry, requests and moments; the moments fall where the
machine's speed puts them.
"""

import contextlib
import os
import time

import bale_iotests
from bale_images import KIB, MIB, loop_device, patterned
from bale_iotests import BALE, BUILD, LONG, Background, bale, qemu_img, run, \
    wait_for_nbd, wait_until
from bale_oracle import SECTOR, NbdClient, Oracle, QemuIo

READER = os.path.join(bale_iotests.TOP, 'scripts/bale-reader.py')
STRESS = os.path.join(BUILD, 'tests/stress/stress')
# Of a kill after the start of a process, in seconds
DELAY_MAX_S = 0.5
# `bale check`: nothing wrong; pages that the next session gives back
GOOD, LEAKS = 0, 3
DEVICES = ('direct', 'buffered', 'loop512', 'loop4096')
READER_EVERY = 5
# Of images of 16 MiB, written over and over: writers wait for compaction here
DEVICE_SIZE = 96 * MIB


class KillCase(bale_iotests.TestCase):

    @contextlib.contextmanager
    def device(self, kind):
        """Where the store lies: a name of a file or of a loop device."""
        if not kind.startswith('loop'):
            yield 's.bale'
            return
        self.need_root()
        with open('backing', 'wb') as file:
            file.truncate(DEVICE_SIZE)
        if run('losetup', '--find').status:
            self.skipTest('no loop devices')
        with loop_device('backing', '--direct-io=on', '--sector-size',
                         kind[4:]) as device:
            yield device

    def check_store(self, path):
        """check finds nothing, but for space that is not given back yet."""
        result = bale('check', path)
        self.assertIn(result.status, (GOOD, LEAKS), str(result))
        return result.status == LEAKS

    def moment(self):
        """Seconds until the next kill: often while the store opens."""
        return self.random.random() ** 2 * DELAY_MAX_S


class EngineTest(KillCase):
    """The engine without QEMU: tests/stress."""

    def stress(self, *words):
        result = run(STRESS, *words)
        self.assertEqual(result.status, 0, str(result))
        return result.out

    def kill_many(self, kind, kills):
        options = ['--buffered'] if kind == 'buffered' else []
        number = proven = leaks = 0
        with self.device(kind) as path:
            while number < kills:
                # A new geometry now and then
                self.stress('create', path, 'state', '--seed',
                            self.random.getrandbits(31), *options)
                for _ in range(min(10, kills - number)):
                    number += 1
                    seed = self.random.getrandbits(31)
                    with Background(STRESS, 'run', path, 'state', '--seed',
                                    seed, '--phase-ops', '100',
                                    '--compact', *options) as load:
                        wait_until(lambda: 'running' in load.output() or
                                   not load.running(), 'the load')
                        time.sleep(self.moment())
                        running = load.running()
                        load.kill()
                        self.assertTrue(running or
                                        load.process.returncode == 0,
                                        load.output())
                        self.assertNotIn('WRONG', load.output())
                    if number % READER_EVERY == 0:
                        # Scan, and both checkpoints with their tails
                        run(READER, 'check', path, check=0)
                    out = self.stress('verify', path, 'state', *options)
                    proven += int(out.split(' proven')[0].split()[-1])
                    leaks += self.check_store(path)
                self.assertEqual(bale('verify', path).status in (GOOD, LEAKS),
                                 True)
                os.unlink('state')
        print(f'# {kind}: {number} kills, {proven} requests proven in them; '
              f'{leaks} times a page was left to be given back')

    def test_file_with_o_direct(self):
        self.kill_many('direct', 250 if LONG else 10)

    def test_file_in_the_page_cache(self):
        self.kill_many('buffered', 100 if LONG else 5)

    def test_loop_device_of_512_bytes(self):
        self.kill_many('loop512', 200 if LONG else 8)

    def test_loop_device_of_4_kib(self):
        self.kill_many('loop4096', 200 if LONG else 8)


class QemuTest(KillCase):
    """The driver: qemu-nbd with requests under way, qemu-io."""

    SIZE = 4 * MIB

    def create(self, path):
        size = self.random.choice((4, 16, 64, 128))
        codec = self.random.choice(('zstd', 'deflate', 'none'))
        bale('create', '--force', '-o', f'page_size=2M,cluster_size={size}K,'
             f'compression_type={codec}', path, str(self.SIZE), check=0)

    def verify(self, path, oracle):
        leaks = self.check_store(path)
        bale('export', path, 'out.raw', check=0)
        with open('out.raw', 'rb') as file:
            oracle.verify(file.read())
        oracle.settle()
        return leaks

    def run_nbd(self, path, oracle):
        with contextlib.suppress(FileNotFoundError):
            os.unlink('nbd.sock')
        cache = 'none' if path.startswith('/dev') else \
            self.random.choice(('none', 'writeback'))
        with Background(BALE, 'run', 'qemu-nbd', '-f', 'bale', '-t', '--cache',
                        cache, '--discard', 'unmap', '-k',
                        self.path('nbd.sock'), path) as server:
            self.assertTrue(wait_for_nbd(server, 'nbd.sock'), server.output())
            client = NbdClient(self.path('nbd.sock'), oracle)
            end = time.monotonic() + self.moment()
            while time.monotonic() < end:
                client.random_request(self.random)
            server.kill()
            # Answers that were sent before it died count
            with contextlib.suppress(OSError):
                client.drain()
            client.abandon()
            self.assertEqual(client.failures, [])

    def run_io(self, path, oracle):
        mode = ['-t', 'none'] if path.startswith('/dev') else \
            ['-t', self.random.choice(('none', 'writeback'))]
        io = QemuIo(oracle, *mode, path)
        try:
            end = time.monotonic() + self.moment()
            while time.monotonic() < end:
                io.change(self.random, 'pattern')
        finally:
            io.kill()

    def kill_many(self, kind, kills, load):
        number = flushes = leaks = 0
        with self.device(kind) as path:
            while number < kills:
                self.create(path)
                oracle = Oracle(self.SIZE)
                for _ in range(min(8, kills - number)):
                    number += 1
                    load(path, oracle)
                    leaks += self.verify(path, oracle)
                flushes += oracle.flushes
        print(f'# {kind}: {number} kills, {flushes} flushes acknowledged; '
              f'{leaks} times a page was left to be given back')

    def test_nbd_server(self):
        for kind in DEVICES if LONG else DEVICES[:1]:
            self.kill_many(kind, 30 if LONG else 6, self.run_nbd)

    def test_nbd_server_on_a_loop_device(self):
        self.kill_many('loop4096', 30 if LONG else 4, self.run_nbd)

    def test_qemu_io(self):
        for kind in DEVICES if LONG else DEVICES[:1]:
            self.kill_many(kind, 15 if LONG else 4, self.run_io)


class ConvertTest(KillCase):
    """One copy over the other: what is there is of the old or of the new."""

    SIZE = 48 * MIB

    def make_raw(self, name):
        with open(name, 'wb') as file:
            file.truncate(self.SIZE)
            for _ in range(6):
                file.seek(self.random.randrange(self.SIZE // SECTOR - 8192) *
                          SECTOR)
                file.write(patterned(self.random, 4 * MIB))
        return name

    def assert_old_or_new(self, old, new, done):
        """Sector by sector; returns what is there now."""
        bale('export', 's', 'now.raw', check=0)
        with open('now.raw', 'rb') as file, open(old, 'rb') as before, \
                open(new, 'rb') as after:
            for at in range(0, self.SIZE, 64 * KIB):
                now, a, b = (f.read(64 * KIB) for f in (file, before, after))
                if now == b or now == a and not done:
                    continue
                for sector in range(0, len(now), SECTOR):
                    part = now[sector:sector + SECTOR]
                    self.assertTrue(
                        part == b[sector:sector + SECTOR] or
                        part == a[sector:sector + SECTOR] and not done,
                        f'sector {(at + sector) // SECTOR} is neither old '
                        f'nor new')

    def kill_many(self, kind, kills, command):
        raws = [self.make_raw('one.raw'), self.make_raw('two.raw')]
        finished = 0
        with self.device(kind) as path:
            bale('create', '-o', 'page_size=2M', path, str(self.SIZE), check=0)
            os.symlink(path, 's')
            with open('old.raw', 'wb') as file:
                file.truncate(self.SIZE)
            for number in range(kills):
                new = raws[number % 2]
                with Background(*command(new)) as copy:
                    time.sleep(self.random.random() * 0.4)
                    done = not copy.running()
                    copy.kill()
                    self.assertTrue(not done or copy.process.returncode == 0,
                                    copy.output())
                self.check_store('s')
                self.assert_old_or_new('old.raw', new, done)
                os.replace('now.raw', 'old.raw')
                finished += done
        print(f'# {kind}: {kills} kills, {finished} of them too late')

    def convert(self, raw):
        cache = self.random.choice(('none', 'writeback'))
        return [BALE, 'run', 'qemu-img', 'convert', '-n', '-W', '-t', cache,
                '-f', 'raw', '-O', 'bale', raw, 's']

    def test_convert_to_a_file(self):
        self.kill_many('direct', 60 if LONG else 4, self.convert)

    def test_convert_to_a_loop_device(self):
        self.kill_many('loop4096', 40 if LONG else 3, self.convert)

    def test_import(self):
        """`bale import` makes the store: it is one, or none at all."""
        raw = self.make_raw('one.raw')
        with open('old.raw', 'wb') as file:
            file.truncate(self.SIZE)
        stores = 0
        for _ in range(60 if LONG else 6):
            with contextlib.suppress(FileNotFoundError):
                os.unlink('s')
            with Background(BALE, 'import', '-o', 'page_size=2M', raw,
                            's') as copy:
                time.sleep(self.random.random() * 0.25)
                done = not copy.running()
                copy.kill()
            if done or os.path.exists('s') and \
                    bale('info', 's').status == 0:
                stores += 1
                if 'no superblock' in bale('check', 's').out:
                    # Killed between the first copies and the others
                    self.assertFalse(done)
                    bale('check', '-r', 'all', 's', check=0)
                    bale('check', 's', check=0)
                self.check_store('s')
                self.assert_old_or_new('old.raw', raw, done)
        print(f'# {stores} of them had made a store')

    def test_the_parts_of_qemu_img_agree(self):
        """After a kill qemu-img check and bale check say the same."""
        raw = self.make_raw('one.raw')
        qemu_img('create', '-q', '-f', 'bale', '-o', 'page_size=2M', 's',
                 str(self.SIZE))
        for _ in range(10 if LONG else 2):
            with Background(*self.convert(raw)) as copy:
                time.sleep(self.random.random() * 0.4)
                copy.kill()
            status = bale('check', 's').status
            self.assertIn(status, (GOOD, LEAKS))
            qemu_img('check', '-q', '-f', 'bale', 's', check=status)


if __name__ == '__main__':
    bale_iotests.main()
