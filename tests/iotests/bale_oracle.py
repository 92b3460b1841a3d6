# SPDX-License-Identifier: GPL-2.0-or-later
"""What an image may hold after a crash: an oracle, and clients that feed it.

An Oracle notes every request before it is sent, what completed, and what a
flush proved. Every sector that is written carries its place and the number of
its request, so that one look tells where it comes from. A sector may hold the
newest request that was proven for it, or any later one; never an older one.

NbdClient talks to an NBD server, with several requests under way, and knows
the status of each. QemuIo feeds qemu-io, one command at a time.
"""

import os
import random
import socket
import struct
import subprocess

from bale_iotests import BALE, TIMEOUT_S

SECTOR = 512
POOL = random.Random(4711).randbytes(1 << 16)
WRITE, ZERO = 'write', 'zero'


def sector_content(number, sector):
    """What request @number puts into a sector. Every third cannot be
    compressed."""
    head = struct.pack('<QQ', number, sector)
    if number % 3 == 0:
        at = (number * 7919 + sector * 104729) % (len(POOL) - SECTOR)
        return head + POOL[at:at + SECTOR - 16]
    return head + bytes([number % 251]) * (SECTOR - 16)


def content(number, sector, count):
    return b''.join(sector_content(number, sector + i) for i in range(count))


class Request:
    """One change of the image; `number` is its place in the story."""

    def __init__(self, number, kind, sector, count, fua=False):
        self.number, self.kind = number, kind
        self.sector, self.count, self.fua = sector, count, fua
        self.completed = self.failed = False
        # Of a request with FUA: from which moment it was known to be durable
        self.mark = None

    def __str__(self):
        how = 'failed' if self.failed else \
            'completed' if self.completed else 'under way'
        return f'{self.number}: {self.kind} {self.sector}+{self.count}' \
            f'{" FUA" if self.fua else ""}, {how}'


class Oracle:
    """What is allowed. Moments (`mark`) are numbers that grow, the length of
    a log for example; without them every acknowledgement counts."""

    def __init__(self, size):
        self.size = size
        self.sectors = size // SECTOR
        self.base = [0] * self.sectors  # number of a request; 0: zeroes
        self.requests = []
        self.proofs = []                # (mark, requests that are durable)
        self.number = 0
        self.flushes = 0

    def issue(self, kind, sector, count, fua=False):
        self.number += 1
        request = Request(self.number, kind, sector, count, fua)
        self.requests.append(request)
        return request

    def complete(self, request, good=True, mark=0):
        request.completed, request.failed = good, not good
        if good and request.fua:
            request.mark = mark

    def flush_begin(self):
        return [r for r in self.requests if r.completed]

    def flush_done(self, snapshot, mark=0):
        self.flushes += 1
        self.proofs.append((mark, snapshot))

    def busy(self, sector, count):
        """Is a request to this range under way? Their order is not known."""
        return any(not r.completed and not r.failed and
                   r.sector < sector + count and sector < r.sector + r.count
                   for r in self.requests)

    def floors(self, mark=None):
        """Of each sector the newest request that is durable, or None."""
        durable = set()
        for when, snapshot in self.proofs:
            if mark is None or when <= mark:
                durable.update(r.number for r in snapshot)
        floors = [None] * self.sectors
        for r in self.requests:
            if r.number in durable or (
                    r.mark is not None and (mark is None or r.mark <= mark)):
                floors[r.sector:r.sector + r.count] = [r] * r.count
        return floors

    def expected(self):
        """What a read must find now, all requests having completed."""
        numbers = list(self.base)
        for r in self.requests:
            if r.completed:
                number = 0 if r.kind == ZERO else r.number
                numbers[r.sector:r.sector + r.count] = [number] * r.count
        return numbers

    def wrong(self, data, mark=None):
        """Sectors of @data that hold what they must not: (sector, story)."""
        by_number = {r.number: r for r in self.requests}
        newest_zero = [0] * self.sectors
        for r in self.requests:
            if r.kind == ZERO:
                newest_zero[r.sector:r.sector + r.count] = \
                    [r.number] * r.count
        zeroes = bytes(SECTOR)
        found_all, bad = [], []
        for sector, floor in enumerate(self.floors(mark)):
            found = data[sector * SECTOR:(sector + 1) * SECTOR]
            least = floor.number if floor else 0
            if found == zeroes:
                number = newest_zero[sector]
                good = number >= least and (number or not self.base[sector])
                value = 0
            else:
                value = number = struct.unpack_from('<Q', found)[0]
                request = by_number.get(number)
                good = found == sector_content(number, sector) and (
                    number == self.base[sector] and not floor or
                    request is not None and request.kind == WRITE and
                    number >= least and request.sector <= sector <
                    request.sector + request.count)
            found_all.append(value)
            if not good:
                bad.append((sector, self.story(sector, number, floor)))
        if len(data) < self.size:
            bad.append((len(data) // SECTOR, 'the image is too short'))
        self.found = found_all
        return bad

    def story(self, sector, found, floor):
        lines = [f'sector {sector} holds {found}, proven is '
                 f'{floor.number if floor else self.base[sector]}; requests:']
        lines += [f'  {r}' for r in self.requests
                  if r.sector <= sector < r.sector + r.count][-8:]
        return '\n'.join(lines)

    def verify(self, data, mark=None):
        bad = self.wrong(data, mark)
        if bad:
            raise AssertionError(f'{len(bad)} sectors are wrong:\n' + '\n'.join(
                story for _, story in bad[:5]))

    def settle(self):
        """What the last verify() found is where the next session begins."""
        self.base = self.found
        self.requests, self.proofs = [], []


# ---- NBD ---------------------------------------------------------------

NBD_READ, NBD_WRITE, NBD_DISC, NBD_FLUSH, NBD_TRIM = 0, 1, 2, 3, 4
NBD_ZEROES = 6
NBD_FUA, NBD_NO_HOLE = 1, 2
NBD_REQUEST_MAGIC, NBD_REPLY_MAGIC = 0x25609513, 0x67446698
# Requests that QEMU's server takes at once, less some
UNDER_WAY_MAX = 12
READ_SECTORS = 64


class NbdClient:
    """A client with several requests under way. Errors of the connection are
    ConnectionError: the server was killed."""

    def __init__(self, path, oracle, mark=None):
        self.oracle = oracle
        # Called when an acknowledgement arrives: which moment is it?
        self.mark = mark or (lambda: 0)
        self.handle = 0
        self.under_way = {}
        self.failures = []  # of requests: (kind, errno)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TIMEOUT_S)
        try:
            self.socket.connect(path)
            self.negotiate()
        except BaseException:
            self.socket.close()
            raise

    def negotiate(self):
        magic, option, flags = struct.unpack('>8s8sH', self.receive(18))
        assert magic == b'NBDMAGIC' and option == b'IHAVEOPT', magic
        self.socket.sendall(struct.pack('>I', flags & 3))
        # The export of no name, the old way: no answer but what it is
        self.socket.sendall(struct.pack('>8sII', b'IHAVEOPT', 1, 0))
        self.size, self.flags = struct.unpack('>QH', self.receive(10))
        if not flags & 2:
            self.receive(124)

    def receive(self, length):
        data = bytearray()
        while len(data) < length:
            part = self.socket.recv(length - len(data))
            if not part:
                raise ConnectionError('the server is gone')
            data += part
        return bytes(data)

    def submit(self, command, offset=0, length=0, flags=0, data=b'',
               what=None):
        while len(self.under_way) >= UNDER_WAY_MAX:
            self.reap()
        self.handle += 1
        self.under_way[self.handle] = (command, length, what)
        self.socket.sendall(struct.pack(
            '>IHHQQI', NBD_REQUEST_MAGIC, flags, command, self.handle, offset,
            length) + data)
        return self.handle

    def reap(self):
        """Takes one answer; (handle, errno, data)."""
        magic, error, handle = struct.unpack('>IIQ', self.receive(16))
        assert magic == NBD_REPLY_MAGIC, hex(magic)
        command, length, what = self.under_way.pop(handle)
        data = self.receive(length) if command == NBD_READ and not error \
            else b''
        if error:
            self.failures.append((command, error))
        if command == NBD_FLUSH:
            if not error:
                self.oracle.flush_done(what, self.mark())
        elif what:
            self.oracle.complete(what, not error, self.mark())
        return handle, error, data

    def wait(self, handle):
        while True:
            found, error, data = self.reap()
            if found == handle:
                return error, data

    def drain(self):
        while self.under_way:
            self.reap()

    def make_way(self, sector, count):
        while self.oracle.busy(sector, count):
            self.reap()

    def write(self, sector, count, fua=False):
        self.make_way(sector, count)
        request = self.oracle.issue(WRITE, sector, count, fua)
        return self.submit(NBD_WRITE, sector * SECTOR, count * SECTOR,
                           NBD_FUA if fua else 0,
                           content(request.number, sector, count), request)

    def zero(self, sector, count, hole=True):
        self.make_way(sector, count)
        request = self.oracle.issue(ZERO, sector, count)
        return self.submit(NBD_ZEROES, sector * SECTOR, count * SECTOR,
                           0 if hole else NBD_NO_HOLE, what=request)

    def flush(self):
        return self.submit(NBD_FLUSH, what=self.oracle.flush_begin())

    def read(self, sector, count):
        return self.wait(self.submit(NBD_READ, sector * SECTOR,
                                     count * SECTOR))

    def check_reads(self):
        """Everything that can be read is right. Returns the number of
        sectors that cannot. Nothing is under way."""
        expected = self.oracle.expected()
        unknown = {s for r in self.oracle.requests if r.failed
                   for s in range(r.sector, r.sector + r.count)}
        errors = 0
        for at in range(0, self.oracle.sectors, READ_SECTORS):
            error, data = self.read(at, READ_SECTORS)
            if error:
                errors += READ_SECTORS
                continue
            for sector in range(at, at + READ_SECTORS):
                number = expected[sector]
                want = sector_content(number, sector) if number \
                    else bytes(SECTOR)
                begin = (sector - at) * SECTOR
                if sector not in unknown and \
                        data[begin:begin + SECTOR] != want:
                    raise AssertionError(f'sector {sector} reads wrong: '
                                         f'{data[begin:begin + 16].hex()} and '
                                         f'not {number}')
        return errors

    def random_request(self, rng):
        """Writes mostly; sizes and places as a guest's."""
        dice = rng.randrange(20)
        count = rng.randrange(1, 17)
        if rng.randrange(6) == 0:
            count = rng.randrange(1, 257)
        count = min(count, self.oracle.sectors)
        sector = rng.randrange(self.oracle.sectors - count + 1)
        if rng.randrange(2):
            sector = sector // 8 * 8
        if dice < 2:
            return self.flush()
        if dice < 4:
            return self.zero(sector, count, hole=dice == 2)
        return self.write(sector, count, fua=dice == 19)

    def close(self):
        try:
            self.drain()
            self.submit(NBD_DISC)
        except (OSError, AssertionError):
            pass
        self.socket.close()

    def abandon(self):
        self.socket.close()


# ---- qemu-io -----------------------------------------------------------

PROMPT = b'qemu-io> '


class QemuIo:
    """qemu-io at the end of a pipe. Only for devices that do not fail: it
    does not say whether a flush succeeded."""

    def __init__(self, oracle, *args):
        self.oracle = oracle
        self.process = subprocess.Popen(
            [BALE, 'run', 'qemu-io', '-f', 'bale', *args],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True)
        self.text = bytearray()
        self.prompt()

    def prompt(self):
        """Reads up to the next prompt: the command before it is done."""
        while not self.text.endswith(PROMPT):
            part = os.read(self.process.stdout.fileno(), 65536)
            if not part:
                raise ConnectionError('qemu-io is gone')
            self.text += part
        text = self.text[:-len(PROMPT)].decode(errors='replace')
        self.text.clear()
        return text

    def command(self, line):
        try:
            self.process.stdin.write(line.encode() + b'\n')
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise ConnectionError('qemu-io is gone') from error
        text = self.prompt()
        if 'failed' in text or 'rror' in text:
            raise AssertionError(f'{line}: {text}')
        return text

    def change(self, rng, pattern):
        """A random write, zero, discard or flush. @pattern: a file to use."""
        dice = rng.randrange(12)
        if dice == 0:
            snapshot = self.oracle.flush_begin()
            self.command('flush')
            self.oracle.flush_done(snapshot)
            return
        count = rng.randrange(1, 257 if rng.randrange(6) == 0 else 17)
        sector = rng.randrange(self.oracle.sectors - count + 1)
        fua = dice == 1
        place = f'{sector * SECTOR} {count * SECTOR}'
        if dice == 2:
            request = self.oracle.issue(ZERO, sector, count)
            self.command(f'write -z {place}')
        else:
            request = self.oracle.issue(WRITE, sector, count, fua)
            with open(pattern, 'wb') as file:
                file.write(content(request.number, sector, count))
            self.command(f'write {"-f " if fua else ""}-s {pattern} {place}')
        self.oracle.complete(request)

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
