#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole stack in QEMU, broken between the driver and its file.

blklogwrites on the `file` child logs every write and flush. The log is played
back to each of its entries, and to random parts of what was not flushed there,
torn at 512 bytes; what was acknowledged by then must be there. blkdebug fails
the n-th read, write, discard or flush. check is clean afterwards.
"""

import contextlib
import os
import shutil
import struct

import bale_iotests
from bale_images import MIB, patterned
from bale_iotests import BALE, LONG, Background, bale, qemu_img, run, \
    wait_for_nbd
from bale_oracle import SECTOR, NbdClient, Oracle

SIZE = 2 * MIB
DEVICE_SIZE = 32 * MIB
GOOD, LEAKS = 0, 3
# qemu-img check looks at each so-manieth state, bale check at all
QEMU_IMG_EVERY = 8
# So many are used on: written, closed, opened
GO_ON_EVERY = 16


class LogEntry:
    """One of dm-log-writes' and blklogwrites' format."""

    FLUSH, FUA, DISCARD = 1, 2, 4

    def __init__(self, offset, data, flags, end):
        self.offset, self.data, self.flags = offset, data, flags
        self.end = end  # in the log: moments are counted in it


def read_log(path):
    with open(path, 'rb') as file:
        magic, version, count, size = struct.unpack('<QQQI', file.read(28))
        assert magic == 0x6a736677736872 and version == 1, hex(magic)
        at = size
        for _ in range(count):
            file.seek(at)
            sector, sectors, flags, _ = struct.unpack('<QQQQ', file.read(32))
            at += size
            if flags & LogEntry.DISCARD:
                data = bytes(sectors * size)
            else:
                file.seek(at)
                data = file.read(sectors * size)
                at += sectors * size
                # The log may end in a hole
                data += bytes(sectors * size - len(data))
            yield LogEntry(sector * size, data, flags, at)


class StackCase(bale_iotests.TestCase):

    def create(self, path):
        size = self.random.choice((4, 16, 64))
        codec = self.random.choice(('zstd', 'deflate', 'none'))
        bale('create', '--force', '-o', f'page_size=2M,cluster_size={size}K,'
             f'compression_type={codec}', path, str(SIZE), check=0)
        os.truncate(path, DEVICE_SIZE)

    def serve(self, options):
        with contextlib.suppress(FileNotFoundError):
            os.unlink('nbd.sock')
        # writeback: with "unsafe" there are no flushes and no test
        return Background(BALE, 'run', 'qemu-nbd', '-t', '--cache',
                          'writeback', '--discard', 'unmap', '-k',
                          self.path('nbd.sock'), '--image-opts', options)

    def wait_for(self, server):
        """True when it serves, False when it could not open the store."""
        return wait_for_nbd(server, 'nbd.sock')

    def check_store(self, path, also_qemu_img=False):
        # Buffered: O_DIRECT would wait for what the test has just written
        result = bale('check', '--buffered', path)
        self.assertIn(result.status, (GOOD, LEAKS), str(result))
        if also_qemu_img:
            qemu_img('check', '-q', '-f', 'bale', path, check=result.status)

    def exported(self, path):
        bale('export', '--buffered', path, 'out.raw', check=0)
        with open('out.raw', 'rb') as file:
            return file.read()


class LogWritesTest(StackCase):

    def options(self):
        return ('driver=bale,cache-size=0,file.driver=blklogwrites,'
                'file.file.driver=file,file.file.filename=disk.img,'
                'file.log.driver=file,file.log.filename=log.img')

    def record(self, requests):
        """A session with a log; returns its oracle."""
        oracle = Oracle(SIZE)
        with open('log.img', 'wb'):
            pass
        with self.serve(self.options()) as server:
            self.assertTrue(self.wait_for(server), server.output())
            client = NbdClient(self.path('nbd.sock'), oracle,
                               lambda: os.stat('log.img').st_size)
            for _ in range(requests):
                client.random_request(self.random)
            client.drain()
            self.assertEqual(client.failures, [])
            snapshot = oracle.flush_begin()
            client.close()
            self.assertEqual(server.stop(), 0, server.output())
        oracle.flush_done(snapshot, os.stat('log.img').st_size)
        return oracle

    def play(self, verify, budget):
        """Calls verify(state, moment) with states of base.img."""
        entries = list(read_log('log.img'))
        with open('base.img', 'rb') as file:
            durable = bytearray(file.read())
        durable += bytes(DEVICE_SIZE - len(durable))
        shutil.copy('base.img', 'state.img')
        waiting, states = [], 0
        # Each entry's state, and as many samples as the budget allows
        samples = max(0, budget // len(entries) - 1)
        step = max(1, len(entries) // budget)
        with open('state.img', 'r+b') as state:
            def put(entry, torn=False):
                for at in range(0, len(entry.data), SECTOR if torn else
                                max(len(entry.data), 1)):
                    if torn and self.random.randrange(2):
                        continue
                    state.seek(entry.offset + at)
                    state.write(entry.data[at:at + SECTOR] if torn
                                else entry.data)

            def back():
                for entry in waiting:
                    state.seek(entry.offset)
                    state.write(durable[entry.offset:entry.offset +
                                        len(entry.data)])

            for number, entry in enumerate(entries):
                if entry.flags & LogEntry.FLUSH:
                    for done in waiting:
                        durable[done.offset:done.offset + len(done.data)] = \
                            done.data
                        put(done)
                    waiting = []
                if entry.data:
                    waiting.append(entry)
                if number % step:
                    continue
                for sample in range(1 + samples if waiting else 1):
                    for each in waiting:
                        dice = self.random.randrange(3) if sample else 0
                        if dice < 2:
                            put(each, torn=dice == 1)
                    state.flush()
                    verify('state.img', entry.end, states)
                    states += 1
                    back()
        return states, len(entries)

    def go_on(self, oracle, data):
        """The state is used on: what is there stays there."""
        shutil.copy('state.img', 'on.img')
        with self.serve('driver=bale,file.driver=file,'
                        'file.filename=on.img') as server:
            self.assertTrue(self.wait_for(server), server.output())
            after = Oracle(SIZE)
            after.base, after.number = list(oracle.found), oracle.number
            client = NbdClient(self.path('nbd.sock'), after)
            for _ in range(20):
                client.random_request(self.random)
            client.drain()
            self.assertEqual(client.failures, [])
            self.assertEqual(client.check_reads(), 0)
            snapshot = after.flush_begin()
            client.close()
            self.assertEqual(server.stop(), 0, server.output())
        after.flush_done(snapshot)
        after.verify(self.exported('on.img'))
        self.check_store('on.img', also_qemu_img=True)

    def test_requests(self):
        """Random writes, zeroes, discards, FUA and flushes."""
        rounds, budget = (32, 170) if LONG else (2, 75)
        states = entries = flushes = 0
        self.create('disk.img')
        for _ in range(rounds):
            shutil.copy('disk.img', 'base.img')
            oracle = self.record(self.random.randrange(20, 100))
            # Where this session began: what the one before had closed

            def verify(path, moment, number):
                self.check_store(path, number % QEMU_IMG_EVERY == 0)
                data = self.exported(path)
                oracle.base, oracle.number = begin
                oracle.verify(data, moment)
                if number % GO_ON_EVERY == 0:
                    self.go_on(oracle, data)

            begin = (oracle.base, oracle.number)
            done, logged = self.play(verify, budget)
            states, entries = states + done, entries + logged
            flushes += oracle.flushes
            self.create('disk.img')
        print(f'# {states} states of logs with {entries} entries, {flushes} '
              f'flushes acknowledged in them')

    def test_convert(self):
        """qemu-img convert: sectors are zero or right, all right at the
        end."""
        rounds, budget = (5, 120) if LONG else (1, 30)
        states = entries = 0
        for _ in range(rounds):
            with contextlib.suppress(FileNotFoundError):
                os.unlink('disk.img')
            self.create('disk.img')
            shutil.copy('disk.img', 'base.img')
            raw = patterned(self.random, SIZE)
            with open('in.raw', 'wb') as file:
                file.write(raw)
            with open('log.img', 'wb'):
                pass
            qemu_img('convert', '-n', '-W', '-t', 'writeback', '-f', 'raw',
                     '--target-image-opts', 'in.raw', self.options())

            def verify(path, moment, number):
                self.check_store(path, number % QEMU_IMG_EVERY == 0)
                data = self.exported(path)
                if moment == end:
                    self.assertTrue(data == raw)
                    return
                for at in range(0, SIZE, SECTOR):
                    part = data[at:at + SECTOR]
                    self.assertTrue(part == raw[at:at + SECTOR] or
                                    part == bytes(SECTOR),
                                    f'sector {at // SECTOR} is neither')

            end = list(read_log('log.img'))[-1].end
            done, logged = self.play(verify, budget)
            states, entries = states + done, entries + logged
        print(f'# {states} states of logs with {entries} entries')


class BlkdebugTest(StackCase):
    """The n-th call of a kind fails, once or from there on."""

    KINDS = {
        # name: event, iotype, the highest n that makes sense
        'write': ('write_aio', 'write', 40),
        'flush': ('flush_to_disk', 'flush', 20),
        'flush-to-os': ('flush_to_os', 'flush', 20),
        'read': ('read_aio', 'read', 30),
        'zero': ('pwritev_zero', 'write-zeroes', 3),
        'discard': ('write_aio', 'discard', 20),
        'all': ('write_aio', None, 40),
        'after-write': ('pwritev_done', None, 40),
    }

    def config(self, kind, nth, errno, once):
        event, iotype, _ = self.KINDS[kind]
        with open('debug.conf', 'w', encoding='ascii') as file:
            for i in range(1, nth):
                file.write(f'[set-state]\nevent = "{event}"\nstate = "{i}"\n'
                           f'new_state = "{i + 1}"\n')
            file.write(f'[inject-error]\nevent = "{event}"\nerrno = "{errno}"'
                       f'\nstate = "{nth}"\nonce = "{once}"\n')
            if iotype:
                file.write(f'iotype = "{iotype}"\n')

    def case(self, oracle, what):
        """One session with an error in it."""
        with self.serve('driver=bale,cache-size=0,file.driver=blkdebug,'
                        'file.config=debug.conf,file.image.driver=file,'
                        'file.image.filename=disk.img') as server:
            if not self.wait_for(server):
                self.assertRegex(server.output(), 'rror|No space', what)
                return 'not opened'
            client = NbdClient(self.path('nbd.sock'), oracle)
            for _ in range(self.random.randrange(20, 60)):
                client.random_request(self.random)
            client.drain()
            client.check_reads()
            failed = bool(client.failures)
            for _ in range(10):
                client.random_request(self.random)
            client.drain()
            client.check_reads()
            snapshot = oracle.flush_begin()
            good = client.wait(client.flush())[0] == 0
            client.close()
            if self.random.randrange(3):
                # A close that cannot be done says so, and is no crash
                status = server.stop()
                self.assertGreaterEqual(status, 0, server.output())
                if good:
                    oracle.flush_done(snapshot)
            else:
                server.kill()
        return ('failed, ' if failed else 'no error, ') + \
            ('flushed' if good else 'not flushed')

    def test_errors(self):
        cases = 1500 if LONG else 40
        ends = {}
        oracle = None
        for number in range(cases):
            if number % 10 == 0:
                self.create('disk.img')
                oracle = Oracle(SIZE)
            kind = list(self.KINDS)[number % len(self.KINDS)]
            # The first ones mostly: a session has few calls, they are large
            nth = 1 + int(self.random.random() ** 3 * self.KINDS[kind][2])
            errno = self.random.choice((5, 5, 28))
            once = self.random.choice(('on', 'off'))
            what = f'{kind} number {nth}, errno {errno}, once {once}'
            self.config(kind, nth, errno, once)
            with self.subTest(what):
                end = self.case(oracle, what)
                ends[end] = ends.get(end, 0) + 1
                self.check_store('disk.img', True)
                oracle.verify(self.exported('disk.img'))
                oracle.settle()
        print(f'# {cases} errors: {ends}')


if __name__ == '__main__':
    bale_iotests.main()
