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
                   target of 20 MB/s (QEMU 7.2 gives it wrong data unless it is
                   gentle: see docs/backup.md)
  gently           the job has one request of 64 KiB under way and at most 100
                   MB/s; with a seqcache it is finalized when that is empty
  slow job         at most 20 MB/s, what the target takes

Variants run in turn, several rounds; what is printed is the median of the
rounds' p50 and p99, how often that of the round without a backup the p99 is,
how long the backup took, and the size of its file. Results go to a JSON file,
from which scripts/render-performance writes docs/performance.md.

  tests/bench/bench_guest_latency.py [--size MIB] [--rounds N] [--dir DIR]
                                     [--out FILE] [--variant TEXT]...
"""

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import struct
import sys
import tempfile
import time

from bench_convert import BUILD, TOP, machine, summarize

sys.path.insert(0, os.path.join(TOP, 'tests/iotests'))
import bale_images  # noqa: E402  pylint: disable=wrong-import-position
from bale_iotests import qemu_img  # noqa: E402  pylint: disable=C0413
from bale_qmp import Qemu  # noqa: E402  pylint: disable=C0413

MIB = 1 << 20
WRITES_PER_S = 200
WRITES_MIN = 1000
WARM_UP = 100
SLOW = 20_000_000
GENTLY = {'x_perf': {'max-workers': 1, 'max-chunk': 65536},
          'speed': 100_000_000}
VARIANTS = ['no backup', 'bale', 'bale, gently', 'qcow2', 'bale 20 MB/s',
            'bale 20 MB/s, gently', 'bale 20 MB/s +seqcache',
            'bale 20 MB/s +seqcache, gently',
            'bale 20 MB/s +seqcache, gently, slow job',
            'bale 20 MB/s, fleecing',
            'bale 20 MB/s, fleecing, gently']


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


def write_on(guest, rng, size, times):
    """Writes at its rate, and notes how long each took."""
    due = time.monotonic()
    while True:
        data = rng.randbytes(2048) + bytes(2048)
        offset = rng.randrange(size // 4096) * 4096
        due = max(due + 1 / WRITES_PER_S, time.monotonic())
        time.sleep(max(0, due - time.monotonic()))
        at = time.monotonic()
        guest.write(offset, data)
        times.append(time.monotonic() - at)
        yield


def has_ended(vm):
    """Whether the job is gone; finalizes it once nothing waits in a cache."""
    jobs = vm.command('query-jobs')
    if jobs and jobs[0]['status'] == 'pending' and \
            is_empty(*vm.command('query-seqcache')):
        vm.command('job-finalize', id='j')
    return not jobs


def is_empty(cache):
    return cache['bytes-dirty'] + cache['bytes-writing'] == 0


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
        times = []
        for _ in write_on(guest, rng, size, times):
            if len(times) == WARM_UP:
                break
        times.clear()
        start = time.monotonic()
        if variant != 'no backup':
            options = dict(GENTLY) if 'gently' in variant else {}
            if 'seqcache, gently' in variant:
                options['auto_finalize'] = False
            if 'slow job' in variant:
                options['speed'] = SLOW
            vm.command('blockdev-backup', job_id='j', device=source,
                       target='target', sync='full',
                       compress=variant == 'qcow2', **options)
        for _ in write_on(guest, rng, size, times):
            if variant == 'no backup':
                if len(times) >= WRITES_MIN:
                    break
            elif len(times) % 20 == 0 and has_ended(vm):
                # The times of after the backup would hide those of during
                break
        ended = time.monotonic() - start if variant != 'no backup' else 0
        guest.sock.close()
    times.sort()
    done = [times[len(times) // 2], times[len(times) * 99 // 100], times[-1],
            ended, 0]
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
    parser.add_argument('--variant', action='append', help='only those')
    parser.add_argument('--out', default=os.path.join(
        BUILD, 'bench', 'guest_latency.json'))
    args = parser.parse_args()
    result = {'bench': 'guest_latency', 'machine': machine(),
              'rounds': args.rounds, 'mib': args.size,
              'date': time.strftime('%Y-%m-%d', time.gmtime())}
    work = tempfile.mkdtemp(prefix='bench-latency-', dir=args.dir)
    os.chdir(work)
    try:
        with open('raw', 'wb') as file:
            rng = random.Random(1)
            while file.tell() < args.size * MIB:
                file.write(bale_images.patterned(rng, MIB))
        found = {variant: [] for variant in args.variant or VARIANTS}
        for number in range(args.rounds):
            for variant in found:
                found[variant].append(measure(variant, 'raw', number))
    finally:
        os.chdir('/')
        shutil.rmtree(work)
    # Of one round, whose writes were made within minutes
    calm = [p99 for _, p99, *_ in found.get(VARIANTS[0], [])]
    for rounds in found.values():
        for done, base in zip(rounds, calm or [done[1] for done in rounds]):
            done.append(done[1] / base)
    result['summary'] = {
        variant: dict(zip(('p50_s', 'p99_s', 'worst_s', 'backup_s', 'bytes',
                           'times'), map(summarize, zip(*rounds))))
        for variant, rounds in found.items()}
    os.makedirs(os.path.dirname(args.out), exist_ok=True)
    with open(args.out, 'w', encoding='utf-8') as file:
        json.dump(result, file, indent=1)
    print(f'{args.size} MiB, {args.rounds} rounds, medians')
    print(f'{"":32}{"p50 ms":>8}{"p99 ms":>9}{"worst":>9}{"x p99":>7}'
          f'{"backup s":>10}{"MiB":>7}')
    for variant, s in result['summary'].items():
        p50, p99, worst, took, used, ratio = (v['median'] for v in s.values())
        print(f'{variant:32}{p50 * 1e3:8.2f}{p99 * 1e3:9.2f}'
              f'{worst * 1e3:9.1f}{ratio:7.1f}{took:10.1f}'
              f'{used / MIB:7.0f}')


if __name__ == '__main__':
    main()
