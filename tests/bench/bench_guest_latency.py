#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Write latency of a guest while its disk is backed up.

The guest is an NBD client of qemu-storage-daemon: it writes 4 KiB at random
places of a disk, 200 times a second, and each write is timed. Rows:

  no backup        nothing else happens
  bale, qcow2      a full backup (blockdev-backup) to a fast target
  bale 20 MB/s     the same to a target behind QEMU's throttle filter
  +seqcache        a seqcache in front of that, with room for what is copied
  fleecing         a copy-before-write filter over the disk, into a local bale
                   layer; the backup job reads the snapshot and writes to the
                   target of 20 MB/s

Variants run in turn, several rounds; what is printed is the median of the
rounds' p50 and p99, how long the backup took, and the size of its file.

  tests/bench/bench_guest_latency.py [--size MIB] [--rounds N] [--dir DIR]
"""

import argparse
import os
import random
import shutil
import socket
import statistics
import struct
import sys
import tempfile
import time

TOP = os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(TOP, 'tests/iotests'))
import bale_images  # noqa: E402  pylint: disable=wrong-import-position
from bale_iotests import qemu_img  # noqa: E402  pylint: disable=C0413
from bale_qmp import Qemu  # noqa: E402  pylint: disable=C0413

MIB = 1 << 20
WRITES_PER_S = 200
WRITES_MIN = 400
SLOW = 20_000_000
VARIANTS = ['no backup', 'bale', 'qcow2', 'bale 20 MB/s',
            'bale 20 MB/s +seqcache', 'bale 20 MB/s, fleecing']


class Nbd:
    """As much of a client as it takes to write."""

    def __init__(self, path, export):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        assert self.get(18)[:16] == b'NBDMAGICIHAVEOPT'
        self.sock.sendall(struct.pack('>I', 3))  # fixed newstyle, no zeroes
        name = export.encode()
        self.sock.sendall(struct.pack('>8sII', b'IHAVEOPT', 1, len(name)) +
                          name)
        self.size, _ = struct.unpack('>QH', self.get(10))
        self.handle = 0

    def get(self, length):
        data = b''
        while len(data) < length:
            part = self.sock.recv(length - len(data))
            if not part:
                raise EOFError('the server hung up')
            data += part
        return data

    def write(self, offset, data):
        self.handle += 1
        self.sock.sendall(struct.pack('>IHHQQI', 0x25609513, 0, 1, self.handle,
                                      offset, len(data)) + data)
        _, error, _ = struct.unpack('>IIQ', self.get(16))
        assert error == 0, error


def throttled(node):
    return {'driver': 'throttle', 'throttle-group': 'slow', 'file': node}


def add_target(vm, variant, size):
    """Adds the node "target" over a new file."""
    fmt = 'qcow2' if variant == 'qcow2' else 'bale'
    qemu_img('create', '-q', '-f', fmt, 'target', size)
    below = {'driver': 'file', 'filename': 'target'}
    if '20 MB/s' in variant:
        vm.command('object-add', qom_type='throttle-group', id='slow',
                   limits={'bps-write': SLOW})
        below = throttled(below)
    node = {'driver': fmt, 'file': below}
    if 'seqcache' in variant:
        node = {'driver': 'seqcache', 'cache-size': size, 'file': node}
    vm.command('blockdev-add', **node, **{'node-name': 'target'})
    return fmt


def measure(variant, raw, seed):
    """(p50, p99, worst, seconds of the backup, bytes of the target)."""
    rng = random.Random(seed)
    shutil.copy(raw, 'disk')
    size = os.path.getsize('disk')
    sock = os.path.abspath('nbd.sock')
    with Qemu('qemu-storage-daemon') as vm:
        vm.command('blockdev-add', driver='file', node_name='disk',
                   filename='disk')
        top, source = 'disk', 'disk'
        if variant != 'no backup':
            add_target(vm, variant, size)
        if 'fleecing' in variant:
            qemu_img('create', '-q', '-f', 'bale', 'layer', size)
            vm.command('blockdev-add', driver='bale', node_name='layer',
                       backing=None,
                       file={'driver': 'file', 'filename': 'layer'})
            vm.command('blockdev-add', driver='copy-before-write',
                       node_name='cbw', file='disk', target='layer')
            vm.command('blockdev-add', driver='snapshot-access',
                       node_name='then', file='cbw')
            top, source = 'cbw', 'then'
        vm.command('nbd-server-start', addr={'type': 'unix',
                                             'data': {'path': sock}})
        vm.command('block-export-add', type='nbd', id='e', node_name=top,
                   name='disk', writable=True)
        guest = Nbd(sock, 'disk')
        start = time.monotonic()
        if variant != 'no backup':
            vm.command('blockdev-backup', job_id='j', device=source,
                       target='target', sync='full',
                       compress=variant == 'qcow2')
        times, ended, due = [], None, start
        while len(times) < WRITES_MIN or \
                (ended is None and variant != 'no backup'):
            data = rng.randbytes(2048) + bytes(2048)
            offset = rng.randrange(size // 4096) * 4096
            due = max(due + 1 / WRITES_PER_S, time.monotonic())
            time.sleep(max(0, due - time.monotonic()))
            at = time.monotonic()
            guest.write(offset, data)
            times.append(time.monotonic() - at)
            if ended is None and len(times) % 20 == 0 and \
                    variant != 'no backup' and \
                    not vm.command('query-jobs'):
                # The times of after the backup would hide those of during
                ended = time.monotonic() - start
                break
        guest.sock.close()
    times.sort()
    done = [times[len(times) // 2], times[len(times) * 99 // 100], times[-1],
            ended or 0, 0]
    for name in ('target', 'layer'):
        if os.path.exists(name):
            if name == 'target':
                done[4] = os.stat(name).st_blocks * 512
            os.unlink(name)
    return done


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', type=int, default=256, help='MiB')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--dir')
    args = parser.parse_args()
    work = tempfile.mkdtemp(prefix='bench-latency-', dir=args.dir)
    os.chdir(work)
    try:
        with open('raw', 'wb') as file:
            rng = random.Random(1)
            while file.tell() < args.size * MIB:
                file.write(bale_images.patterned(rng, MIB))
        found = {variant: [] for variant in VARIANTS}
        for number in range(args.rounds):
            for variant in VARIANTS:
                found[variant].append(measure(variant, 'raw', number))
        print(f'{args.size} MiB, {args.rounds} rounds, medians')
        print(f'{"":26}{"p50 ms":>8}{"p99 ms":>9}{"worst":>9}{"x p99":>7}'
              f'{"backup s":>10}{"MiB":>7}')
        base = None
        for variant, rounds in found.items():
            p50, p99, worst, took, used = (statistics.median(column)
                                           for column in zip(*rounds))
            base = base or p99
            print(f'{variant:26}{p50 * 1e3:8.2f}{p99 * 1e3:9.2f}'
                  f'{worst * 1e3:9.1f}{p99 / base:7.1f}{took:10.1f}'
                  f'{used / MIB:7.0f}')
    finally:
        os.chdir('/')
        shutil.rmtree(work)


if __name__ == '__main__':
    main()
