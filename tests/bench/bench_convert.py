#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Packs a real disk into Bale and into qcow2 with the same qemu-img, and back.

In every round each command runs once, Bale's and qcow2's in turn, so that
whatever else the machine does meets both; a ratio is the median of the ratios
of the rounds. What is printed: median and spread of the time, CPU seconds,
peak memory and size of each command, and how each target is met. All samples
go to a JSON file, from which scripts/render-performance writes
docs/performance.md.

Conditions, the same for both sides: free memory has been used just before
(see warm_memory); the disk is in the page cache; outputs are new files in one
directory, removed after each run, before anything is written back; "direct" is
O_DIRECT for the target, and for the source too when it is a restore; everything
runs with -W -m 16.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

TOP = os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__))))
BUILD = os.path.abspath(os.environ.get('BALE_BUILD',
                                       os.path.join(TOP, 'build')))
BALE = os.path.join(BUILD, 'tools', 'bale')
CODEC = os.path.join(BUILD, 'tests', 'bench', 'bench-codec')

# Our codec, the peer's name for its own, and what both are called in tables
CODECS = {'deflate': ('deflate', 'zlib'), 'zstd': ('zstd', 'zstd')}
CACHES = {'direct': ['-t', 'none'], 'cached': ['-t', 'writeback']}
PARALLEL = ['-W', '-m', '16']
HUGE_SIZE = 4 << 40
WARM_BYTES = 768 << 20

# What issue and README promise; see render-performance for the words
TARGETS = {
    'pack-speed': {('deflate', 'direct'): 6.0, ('deflate', 'cached'): 6.0,
                   ('zstd', 'direct'): 2.0, ('zstd', 'cached'): 1.5},
    'pack-size': {'deflate': 1.01, 'zstd': 1.05},
    'codec-share': 0.90,
    'restore-speed': 1.5,
    'memory-mib': 256,
}


class BenchError(Exception):
    pass


class Bench:
    """The commands to run, and their samples."""

    def __init__(self, disk, work):
        self.disk = disk
        self.work = work
        self.samples = {}   # name -> list of dicts, one per round
        self.commands = {}  # name -> list of words
        self.codec = {}     # codec -> list of dicts

    def path(self, name):
        return os.path.join(self.work, name)

    def run(self, command):
        """Run it; its time, CPU seconds and peak memory."""
        start = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, cwd=self.work) as p:
            err = p.stderr.read()
            _, status, usage = os.wait4(p.pid, 0)
            wall = time.monotonic() - start
            p.returncode = os.waitstatus_to_exitcode(status)
        if p.returncode != 0:
            raise BenchError('%s: %s' % (' '.join(command),
                                         err.decode().strip()))
        return {'wall_s': wall, 'user_s': usage.ru_utime,
                'sys_s': usage.ru_stime, 'rss_kib': usage.ru_maxrss}

    def sample(self, name, command, out):
        self.commands.setdefault(name, command)
        if 'cached' in name:
            warm_memory(self.path('warm'))
        result = self.run(command)
        stat = os.stat(out)
        result['allocated_bytes'] = stat.st_blocks * 512
        self.samples.setdefault(name, []).append(result)
        os.unlink(out)

    def convert(self, side, args, source, out):
        command = ['qemu-img', 'convert'] + PARALLEL + args + [source, out]
        if side != 'qcow2':
            command = [BALE, 'run'] + command
        return command

    def pack(self, side, codec, cache, source, name):
        """side: bale, bale-c (with convert's -c) or qcow2."""
        ours, theirs = CODECS[codec]
        out = self.path('out')
        args = list(CACHES[cache])
        if side == 'qcow2':
            args += ['-c', '-O', 'qcow2', '-o', 'compression_type=' + theirs]
        else:
            args += ['-O', 'bale', '-o', 'compression_type=' + ours]
            if side == 'bale-c':
                args = ['-c'] + args
        self.sample(name, self.convert(side, args, source, out), out)

    def restore(self, side, codec, cache, name):
        out = self.path('out')
        args = list(CACHES[cache]) + ['-T', CACHES[cache][1], '-f', side,
                                      '-O', 'raw']
        source = self.path('%s.%s' % (codec, side))
        self.sample(name, self.convert(side, args, source, out), out)

    def codec_alone(self, passes):
        """Compress and decompress the disk's clusters in memory."""
        text = subprocess.run(
            [CODEC, '-i', self.disk, '-p', str(passes)], check=True,
            stdout=subprocess.PIPE, text=True).stdout
        pattern = re.compile(
            r'(\S+) +(\S+) +level +(\S+) +threads (\d+) +best +(\S+) MB/s.*'
            r'per core +(\S+) MB/s +(\S+) MB -> (\S+) MB')
        for line in text.splitlines():
            m = pattern.match(line)
            if not m:
                raise BenchError('cannot read: ' + line)
            self.codec.setdefault(m[2], []).append({
                'what': m[1], 'threads': int(m[4]), 'mb_per_s': float(m[5]),
                'core_mb_per_s': float(m[6]), 'data_mb': float(m[7]),
                'packed_mb': float(m[8])})

    def prepare(self):
        """Images to restore from; they also warm the page cache."""
        for codec, (ours, theirs) in CODECS.items():
            for side, args in (
                    ('bale', ['-O', 'bale', '-o', 'compression_type=' + ours]),
                    ('qcow2', ['-c', '-O', 'qcow2', '-o',
                               'compression_type=' + theirs])):
                out = self.path('%s.%s' % (codec, side))
                self.run(self.convert(side, args, self.disk, out))
        with open(self.path('empty'), 'wb') as f:
            f.truncate(os.path.getsize(self.disk))
        os.sync()

    def round(self):
        self.codec_alone(2)
        for cache in CACHES:
            for codec in CODECS:
                for side in ('bale', 'qcow2', 'bale-c'):
                    self.pack(side, codec, cache, self.disk,
                              'pack %s %s %s' % (side, codec, cache))
                for side in ('bale', 'qcow2'):
                    self.restore(side, codec, cache,
                                 'restore %s %s %s' % (side, codec, cache))
            for side in ('bale', 'qcow2'):
                self.pack(side, 'zstd', cache, self.path('empty'),
                          'empty %s zstd %s' % (side, cache))

    def huge(self):
        """Peak memory with an image that is a thousand times larger."""
        source = self.path('huge')
        subprocess.run(['cp', '--sparse=always', self.disk, source],
                       check=True)
        os.truncate(source, HUGE_SIZE)
        self.pack('bale', 'zstd', 'direct', source, 'huge bale zstd direct')
        os.unlink(source)


def warm_memory(path):
    """Have the page cache use free memory for a moment.

    In a virtual machine, free memory may have gone back to the host, and large
    blocks of it go first. Without this, the side that writes to the page cache
    in large pieces, and so gets large folios, would pay for the host's page
    faults.
    """
    piece = bytes(2 << 20)
    with open(path, 'wb', buffering=0) as f:
        for _ in range(WARM_BYTES // len(piece)):
            f.write(piece)
    os.unlink(path)


def summarize(values):
    values = sorted(values)
    return {'median': statistics.median(values), 'min': values[0],
            'max': values[-1]}


def summary_of(samples):
    return {
        'rounds': len(samples),
        'wall_s': summarize([s['wall_s'] for s in samples]),
        'cpu_s': summarize([s['user_s'] + s['sys_s'] for s in samples]),
        'rss_mib': max(s['rss_kib'] for s in samples) / 1024,
        'allocated_bytes': summarize([s['allocated_bytes'] for s in samples]),
    }


def ratio(bench, slow, fast, key='wall_s'):
    """Median, least and greatest of slow / fast, round by round."""
    return summarize([a[key] / b[key] for a, b in
                      zip(bench.samples[slow], bench.samples[fast])])


def evaluate(bench):
    """A list of results with their targets."""
    out = []

    def add(name, value, target, at_least):
        middle = value['median']
        met = middle >= target if at_least else middle <= target
        out.append({'name': name, 'value': value, 'target': target,
                    'at_least': at_least, 'met': met})

    for (codec, cache), target in TARGETS['pack-speed'].items():
        add('pack, %s, %s: times faster than qcow2' % (codec, cache),
            ratio(bench, 'pack qcow2 %s %s' % (codec, cache),
                  'pack bale %s %s' % (codec, cache)), target, True)
    for codec, target in TARGETS['pack-size'].items():
        add('size, %s: times that of qcow2' % codec,
            ratio(bench, 'pack bale %s direct' % codec,
                  'pack qcow2 %s direct' % codec, 'allocated_bytes'),
            target, False)
    for codec, (ours, _) in CODECS.items():
        alone = [c for c in bench.codec[ours] if c['what'] == 'compress']
        for cache in CACHES:
            packs = bench.samples['pack bale %s %s' % (codec, cache)]
            empty = bench.samples['empty bale zstd %s' % cache]
            add('pack, %s, %s: share of the codec alone' % (codec, cache),
                summarize([c['data_mb'] / p['wall_s'] / c['mb_per_s']
                           for c, p in zip(alone, packs)]),
                TARGETS['codec-share'], True)
            add('the same, less an empty disk\'s time',
                summarize([c['data_mb'] / (p['wall_s'] - e['wall_s']) /
                           c['mb_per_s']
                           for c, p, e in zip(alone, packs, empty)]),
                TARGETS['codec-share'], True)
    for codec in CODECS:
        for cache in CACHES:
            add('restore, %s, %s: times faster than qcow2' % (codec, cache),
                ratio(bench, 'restore qcow2 %s %s' % (codec, cache),
                      'restore bale %s %s' % (codec, cache)),
                TARGETS['restore-speed'], True)
    peak = max(s['rss_kib'] for name, samples in bench.samples.items()
               for s in samples if 'bale' in name) / 1024
    add('peak memory of every command with Bale, MiB',
        {'median': peak, 'min': peak, 'max': peak}, TARGETS['memory-mib'],
        False)
    return out


def report(bench, results):
    print('%-26s %8s %15s %8s %8s %10s' % (
        'command', 'time s', 'least, most', 'CPU s', 'peak MiB', 'output MB'))
    for name in bench.samples:
        s = summary_of(bench.samples[name])
        print('%-26s %8.2f %7.2f %7.2f %8.2f %8.0f %10.1f' % (
            name, s['wall_s']['median'], s['wall_s']['min'],
            s['wall_s']['max'], s['cpu_s']['median'], s['rss_mib'],
            s['allocated_bytes']['median'] / 1e6))
    for codec in bench.codec:
        for what in ('compress', 'decompress'):
            v = summarize([c['mb_per_s'] for c in bench.codec[codec]
                           if c['what'] == what])
            print('codec alone: %-10s %-7s %7.0f MB/s (%.0f to %.0f)' % (
                what, codec, v['median'], v['min'], v['max']))
    print()
    for r in results:
        v = r['value']
        print('%-50s %7.2f (%.2f to %.2f), wanted %s %.2f: %s' % (
            r['name'], v['median'], v['min'], v['max'],
            '>=' if r['at_least'] else '<=', r['target'],
            'yes' if r['met'] else 'NO'))


def machine():
    with open('/proc/cpuinfo', encoding='utf-8') as f:
        model = re.search(r'model name\s*: (.*)', f.read())
    def line(*command):
        return subprocess.run(command, stdout=subprocess.PIPE, text=True,
                              check=True).stdout.splitlines()[0]
    return {
        'cpu': model[1] if model else 'unknown',
        'cores': len(os.sched_getaffinity(0)),
        'memory_mib': os.sysconf('SC_PHYS_PAGES') *
        os.sysconf('SC_PAGE_SIZE') >> 20,
        'kernel': os.uname().release,
        'qemu': line('qemu-img', '--version'),
        'load_before': os.getloadavg()[0],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--disk', help='raw image (default: the test disk)')
    parser.add_argument('--out', default=os.path.join(
        BUILD, 'bench', 'convert.json'))
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error('at least one round')

    disk = args.disk or subprocess.run(
        [os.path.join(TOP, 'scripts', 'test-disk')], check=True,
        stdout=subprocess.PIPE, text=True).stdout.strip()
    # Not /tmp: where that is in memory there is no O_DIRECT.
    work = tempfile.mkdtemp(prefix='bale-bench.',
                            dir=os.environ.get('TMPDIR', '/var/tmp'))
    bench = Bench(os.path.abspath(disk), work)
    try:
        info = machine()
        bench.prepare()
        for i in range(args.rounds):
            bench.round()
            print('round %d of %d' % (i + 1, args.rounds), file=sys.stderr)
        bench.huge()
    except (BenchError, OSError, subprocess.CalledProcessError) as e:
        print('bench_convert: %s' % e, file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work)

    results = evaluate(bench)
    report(bench, results)
    commands = {name: ' '.join('bale' if w == BALE else os.path.basename(w)
                               for w in command)
                for name, command in bench.commands.items()}
    stat = os.stat(bench.disk)
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    with open(args.out, 'w', encoding='utf-8') as f:
        json.dump({
            'bench': 'convert',
            'date': time.strftime('%Y-%m-%d', time.gmtime()),
            'machine': info,
            'disk': {'size': stat.st_size, 'allocated': stat.st_blocks * 512},
            'rounds': args.rounds,
            'commands': commands,
            'summary': {name: summary_of(samples)
                        for name, samples in bench.samples.items()},
            'results': results,
            'codec': bench.codec,
            'samples': bench.samples,
        }, f, indent=1)
        f.write('\n')
    print('\nwritten: %s' % os.path.relpath(args.out))
    return 0


if __name__ == '__main__':
    sys.exit(main())
