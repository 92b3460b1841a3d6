#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A Debian guest from one end to the other, backed up to bale and to qcow2.

The guest runs under TCG and writes files with checksums all the time. It is
backed up over QMP, once in full and three times incrementally, and killed.
Every restore point is converted back, and the checksums of the files in it
are verified. qcow2 is compressed with zstd, its incrementals are overlays as
bale's are. What the guest feels is QEMU's own latency histogram of its disk's
writes: while the backups run, and before the first one.

  tests/bench/bench_guest.py [--rounds N] [--dir DIR] [--out FILE]

The formats take turns. Results go to a JSON file, from which
scripts/render-performance writes docs/performance.md.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time

from bench_convert import BUILD, TOP, machine, summarize

sys.path.insert(0, os.path.join(TOP, 'tests/iotests'))
import bale_guest  # noqa: E402  pylint: disable=wrong-import-position
from bale_iotests import qemu_img  # noqa: E402  pylint: disable=C0413

FORMATS = ('bale', 'qcow2')
INCREMENTALS = 3
CALM_S = 8
DEVICE = '/machine/peripheral/disk0/virtio-backend'
# Of the histogram, nanoseconds: steps of a quarter
BOUNDARIES = [int(20e3 * 1.25 ** i) for i in range(70)]


def create(fmt, name, size, below):
    options = ['-o', 'compression_type=zstd']
    if below:
        options += ['-b', below, '-F', fmt]
    qemu_img('create', '-q', '-f', fmt, *options, name, str(size))


class Latency:
    """Of the guest's writes, since the last reset."""

    def __init__(self, vm):
        self.vm = vm
        self.bins = [0] * (len(BOUNDARIES) + 1)

    def reset(self):
        self.vm.command('block-latency-histogram-set', id=DEVICE,
                        **{'boundaries-write': BOUNDARIES})

    def collect(self):
        for info in self.vm.command('query-blockstats'):
            found = info['stats'].get('wr_latency_histogram')
            if found:
                self.bins = [a + b for a, b in zip(self.bins, found['bins'])]

    def percentile_ms(self, percent):
        """The upper boundary of the bin that it falls in."""
        rank = sum(self.bins) * percent / 100
        for limit, count in zip(BOUNDARIES + BOUNDARIES[-1:], self.bins):
            rank -= count
            if rank <= 0:
                break
        return limit / 1e6


def back_up(vm, fmt, number, points):
    """One restore point; seconds that its job took."""
    name = f'point{number}.{fmt}'
    create(fmt, name, vm.size, points[-1][0] if points else None)
    vm.command('blockdev-add', driver=fmt, node_name='t',
               file={'driver': 'file', 'filename': name})
    points.append((name, vm.written()))
    actions = [{'type': 'blockdev-backup', 'data': {
        'job-id': 'j', 'device': 'd', 'target': 't', 'compress': True,
        'sync': 'incremental' if number else 'full',
        **({'bitmap': 'b'} if number else {})}}]
    if number == 0:
        actions.insert(0, {'type': 'block-dirty-bitmap-add',
                           'data': {'node': 'd', 'name': 'b'}})
    start = time.monotonic()
    vm.command('transaction', actions=actions)
    error = vm.end_of('j')
    took = time.monotonic() - start
    if error:
        raise SystemExit(f'bench_guest: {fmt}: {error}')
    vm.delete('t')
    return took


def measure(fmt, kernel):
    qemu_img('create', '-q', '-f', 'qcow2', '-b', 'd.raw', '-F', 'raw',
             'd.qcow2')
    points, took = [], []
    with bale_guest.Guest(kernel, 'driver=qcow2,file.filename=d.qcow2') as vm:
        vm.size = os.path.getsize('d.raw')
        calm, busy = Latency(vm), Latency(vm)
        vm.wait_written(3)
        calm.reset()
        time.sleep(CALM_S)
        calm.collect()
        for number in range(1 + INCREMENTALS):
            busy.reset()
            took.append(back_up(vm, fmt, number, points))
            busy.collect()
            vm.wait_written(vm.written() + 5)
        vm.process.kill()
    sizes = [os.stat(name).st_blocks * 512 for name, _ in points]
    start = time.monotonic()
    for name, count in points:
        missing = set(range(count)) - bale_guest.files_in(name, fmt)
        if missing:
            raise SystemExit(f'bench_guest: {name} has lost files {missing}')
    restore = time.monotonic() - start
    for name in os.listdir('.'):
        if name.startswith('point') or name == 'd.qcow2':
            os.unlink(name)
    return {'full_s': took[0], 'incremental_s': sum(took[1:]),
            'full_bytes': sizes[0], 'incremental_bytes': sum(sizes[1:]),
            'restore_s': restore, 'writes': sum(busy.bins),
            'files': points[-1][1],
            'calm_p50_ms': calm.percentile_ms(50),
            'calm_p99_ms': calm.percentile_ms(99),
            'p50_ms': busy.percentile_ms(50),
            'p99_ms': busy.percentile_ms(99)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--dir')
    parser.add_argument('--out', default=os.path.join(BUILD, 'bench',
                                                      'guest.json'))
    args = parser.parse_args()
    result = {'bench': 'guest', 'machine': machine(), 'rounds': args.rounds,
              'date': time.strftime('%Y-%m-%d', time.gmtime())}
    found = {fmt: [] for fmt in FORMATS}
    work = tempfile.mkdtemp(prefix='bench-guest-', dir=args.dir)
    os.chdir(work)
    try:
        kernel, why = bale_guest.make_disk('d.raw')
        if not kernel:
            sys.exit(f'bench_guest: {why}')
        for _ in range(args.rounds):
            for fmt in FORMATS:
                found[fmt].append(measure(fmt, kernel))
    finally:
        os.chdir('/')
        shutil.rmtree(work)
    result['summary'] = {
        fmt: {key: summarize([r[key] for r in rounds]) for key in rounds[0]}
        for fmt, rounds in found.items()}
    os.makedirs(os.path.dirname(args.out), exist_ok=True)
    with open(args.out, 'w', encoding='utf-8') as file:
        json.dump(result, file, indent=1)
    print(f'{"":18}' + ''.join(f'{fmt:>24}' for fmt in FORMATS))
    for key in found['bale'][0]:
        scale = 2**20 if key.endswith('bytes') else 1
        print(f'{key:18}' + ''.join(
            '{:>24}'.format('{:.2f} ({:.2f}-{:.2f})'.format(
                *(result['summary'][fmt][key][k] / scale
                  for k in ('median', 'min', 'max')))) for fmt in FORMATS))


if __name__ == '__main__':
    main()
