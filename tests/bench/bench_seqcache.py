#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2 with compressed clusters on an O_DIRECT target, with the filter
seqcache under it and without.

`qemu-img convert -c -W -m 8 -t none` of a real disk. Measured are the requests
that reach the target file (strace), the wall time (rounds in which every
variant runs once, in turn; the ratio is the median of the rounds' ratios), the
wall time on a device of 200 requests a second (QEMU's throttle filter), and
the target's pages left in the page cache (fincore).

  tests/bench/bench_seqcache.py [--disk FILE] [--rounds N] [--dir DIR]
                                [--no-throttle]
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
DEVICE_REQUESTS_PER_S = 200


def options(filter_options, target, direct=True, throttle=False):
    """--target-image-opts: qcow2 over the filter or not, over the file."""
    words, prefix = ['driver=qcow2'], 'file.'
    if direct:
        words.append('cache.direct=on')
    if filter_options is not None:
        words.append(f'{prefix}driver=seqcache')
        words += [f'{prefix}{option}' for option in filter_options]
        prefix += 'file.'
    if throttle:
        words += [f'{prefix}driver=throttle', f'{prefix}throttle-group=slow']
        prefix += 'file.'
    words += [f'{prefix}driver=file', f'{prefix}filename={target}']
    if direct:
        words.append(f'{prefix}cache.direct=on')
    return ','.join(words)


# name -> (options of the filter or None, O_DIRECT)
VARIANTS = {
    'direct': (None, True),
    'direct+seqcache': ([], True),
    'direct+seqcache 1M': (['cluster-size=1M'], True),
    'page cache': (None, False),
}


class Bench:
    def __init__(self, disk, work):
        self.disk, self.work = disk, work
        self.target = os.path.join(work, 'target.qcow2')

    def convert(self, variant, throttle=False, trace=None):
        """One run; its wall time in seconds."""
        filter_options, direct = VARIANTS[variant]
        if os.path.exists(self.target):
            os.remove(self.target)
        subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-o',
                        'compression_type=zstd', self.target,
                        str(os.path.getsize(self.disk))], check=True)
        # What "create" left in the page cache is not the conversion's
        with open(self.target, 'rb') as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        command = [BALE, 'run', 'qemu-img', 'convert', '-n', '-c', '-W',
                   '-m', '8', '-t', 'none' if direct else 'writeback', '-f',
                   'raw']
        if throttle:
            command += ['--object', 'throttle-group,id=slow,x-iops-total='
                        f'{DEVICE_REQUESTS_PER_S}']
        command += ['--target-image-opts', self.disk,
                    options(filter_options, self.target, direct, throttle)]
        if trace:
            command = ['strace', '-f', '-y', '-o', trace, '-e',
                       'trace=pread64,preadv,pwrite64,pwritev,io_submit,'
                       'fdatasync'] + command
        start = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - start

    def count(self, variant):
        """Requests at the target: writes, reads from the first write on, and
        those of them that are smaller than a cluster: to read, merge and
        write."""
        trace = os.path.join(self.work, 'trace')
        self.convert(variant, trace=trace)
        reads = writes = small = 0
        with open(trace, encoding='utf-8', errors='replace') as file:
            for line in file:
                match = re.match(r'\d+ +(pread|pwrite)(?:64|v)?\(\d+<[^>]*'
                                 r'target\.qcow2>', line)
                if not match:
                    continue
                if match.group(1) == 'pwrite':
                    writes += 1
                elif writes:
                    # Before the first write the image is being opened
                    reads += 1
                    # Metadata that qcow2 loads comes in whole clusters
                    small += ', 65536, ' not in line
        return {'reads': reads, 'writes': writes,
                'rmw-reads': small, 'requests': reads + writes}

    def pages(self):
        """Bytes of the target in the page cache."""
        out = subprocess.run(['fincore', '-b', '-n', '-o', 'RES',
                              self.target], check=True,
                             stdout=subprocess.PIPE, text=True).stdout
        return int(out.split()[0])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--disk')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--dir')
    parser.add_argument('--no-throttle', action='store_true')
    args, _ = parser.parse_known_args()

    disk = args.disk or subprocess.run(
        [os.path.join(TOP, 'scripts/test-disk')], check=True,
        stdout=subprocess.PIPE, text=True).stdout.strip()
    work = tempfile.mkdtemp(prefix='bale-bench-', dir=args.dir or BUILD)
    result = {'disk': disk, 'rounds': args.rounds}
    try:
        bench = Bench(disk, work)
        # The source in the page cache, for all
        subprocess.run(['dd', f'if={disk}', 'of=/dev/null', 'bs=1M',
                        'status=none'], check=True)

        if shutil.which('strace'):
            counts = {v: bench.count(v) for v in VARIANTS
                      if v != 'page cache'}
            result['counts'] = counts
            print(f'{"requests at the target":24} {"writes":>8} {"reads":>8} '
                  f'{"small reads":>12} {"fewer":>8}')
            for name, c in counts.items():
                ratio = counts['direct']['requests'] / c['requests']
                c['ratio'] = ratio
                print(f'{name:24} {c["writes"]:8} {c["reads"]:8} '
                      f'{c["rmw-reads"]:12} {ratio:7.1f}x')

        samples = {v: [] for v in VARIANTS}
        pages = {}
        for _ in range(args.rounds):
            for variant in VARIANTS:
                samples[variant].append(bench.convert(variant))
                pages[variant] = bench.pages()
        result['seconds'], result['fincore'] = samples, pages
        print(f'\n{"wall time":24} {"median":>8} {"min":>8} {"max":>8} '
              f'{"to page cache":>14} {"page cache left":>16}')
        for name, times in samples.items():
            ratio = statistics.median(
                t / p for t, p in zip(times, samples['page cache']))
            print(f'{name:24} {statistics.median(times):7.2f}s '
                  f'{min(times):7.2f}s {max(times):7.2f}s {ratio:13.2f}x '
                  f'{pages[name]:15}B')

        if not args.no_throttle:
            slow = {v: bench.convert(v, throttle=True)
                    for v in ('direct', 'direct+seqcache',
                              'direct+seqcache 1M')}
            result['throttled'] = slow
            print(f'\n{f"at {DEVICE_REQUESTS_PER_S} requests/s":24} '
                  f'{"time":>8} {"faster":>8}')
            for name, seconds in slow.items():
                print(f'{name:24} {seconds:7.1f}s '
                      f'{slow["direct"] / seconds:7.1f}x')
    finally:
        shutil.rmtree(work, ignore_errors=True)

    os.makedirs(os.path.join(BUILD, 'bench'), exist_ok=True)
    with open(os.path.join(BUILD, 'bench', 'seqcache.json'), 'w',
              encoding='utf-8') as file:
        json.dump(result, file, indent=1)
    return 0


if __name__ == '__main__':
    sys.exit(main())
