#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What a large store costs, and how it reads and is overwritten.

Parts, all by default:
  scale      a store of many clusters (--clusters): fill, memory of the index,
             open after a clean close and after SIGKILL over several tails, cost
             of a random write and read against a store of 100,000 clusters
  random     random 4 KiB reads of a full real disk, cold and hot, against qcow2
  overwrite  the whole image three times in random order, 64 KiB and 4 KiB,
             against qcow2, and the space used at the end
  compact    compaction of a store half of which was discarded
  flush      4 KiB and a flush at depth 1, against a raw file with fdatasync, on
             blocks that were written before and on such that were not
             (tests/bench/bench-flush)
  growth     stalls while the index grows eightfold (tests/bench/bench-index)

Sides take turns in every round; a ratio is the median of the ratios of the
rounds. Peers run the same program (qemu-img bench; fio over NBD of
qemu-storage-daemon) with O_DIRECT on the same file system. Results go to a
JSON file, from which scripts/render-performance writes docs/performance.md.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time

from bench_convert import BALE, BUILD, CODECS, TOP, BenchError, machine, \
    summarize

STORE = os.path.join(BUILD, 'tests', 'bench', 'bench-store')
FLUSH = os.path.join(BUILD, 'tests', 'bench', 'bench-flush')
INDEX = os.path.join(BUILD, 'tests', 'bench', 'bench-index')
PARTS = ('scale', 'random', 'overwrite', 'compact', 'flush', 'growth')
CLUSTER = 65536
SMALL_CLUSTERS = 100000
# Of the store for "scale": the number of clusters is what matters
SCALE_CLUSTER_SIZE = 4096
HOT_BYTES = 8 << 20
READ_SIZE = 4096
OVERWRITE_MIB = {'64k': 1024, '4k': 256}
FLUSHES = 400
# Compaction has nothing to do when the space is the same for so long, seconds
SETTLED_S = 1.5
SETTLE_MAX_S = 60

TARGETS = {
    'open-clean-s': 0.3, 'cost': 1.2, 'index-mib': 256,
    'cold': 1.3, 'hot': 10.0, 'space': 1.25,
    'compact-mb-per-s': 400, 'compact-mib': 32, 'stall-ms': 5,
    'flush': 1.5, 'flush-blocks': 3,
}


def run(command, **kwargs):
    result = subprocess.run(command, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, check=False,
                            **kwargs)
    if result.returncode not in (0, -9):
        raise BenchError('%s: %s' % (' '.join(command),
                                     result.stderr.strip()))
    return result.stdout


def step(*args):
    return json.loads(run([STORE] + [str(a) for a in args]))


def result(results, name, values, target, at_least):
    v = summarize(values)
    met = None
    if target is not None:
        met = v['median'] >= target if at_least else v['median'] <= target
    results.append({'name': name, 'value': v, 'target': target,
                    'at_least': at_least, 'met': met})


# --- scale

def scale(args, work, results):
    small = os.path.join(work, 'small.bale')
    large = os.path.join(work, 'large.bale')
    out = {'cluster_size': SCALE_CLUSTER_SIZE, 'clusters': args.clusters}
    out['fill_small'] = step('fill', small, SMALL_CLUSTERS,
                             SCALE_CLUSTER_SIZE)
    out['fill'] = step('fill', large, args.clusters, SCALE_CLUSTER_SIZE)
    out['open_clean'] = [step('open', large) for _ in range(args.rounds)]
    costs = {'small': [], 'large': []}
    for _ in range(args.rounds):
        for name, path in (('small', small), ('large', large)):
            costs[name] += step('random', path, args.ops)['rounds']
    out['random'] = costs
    out['open_killed'] = []
    for tail in args.tails:
        if tail <= args.clusters:
            step('kill', large, tail)
            opened = [step('open', large, 1) for _ in range(args.rounds)]
            opened.sort(key=lambda o: o['open_s'])
            opened = opened[len(opened) // 2]
            opened['tail'] = tail
            out['open_killed'].append(opened)
            step('random', large, 1) # and close: the next tail is its own
    out['open_scan'] = step('scan', large)

    result(results, 'index of %d clusters, MiB' % args.clusters,
           [out['fill']['index_peak_bytes'] / 2**20],
           TARGETS['index-mib'] * max(args.clusters / (16 << 20), 1 / 64),
           False)
    result(results, 'open after a clean close, seconds',
           [o['open_s'] for o in out['open_clean']], TARGETS['open-clean-s'],
           False)
    result(results, 'fill, CPU per cluster: times that of a small store',
           [out['fill']['fill_cpu_s'] / args.clusters /
            (out['fill_small']['fill_cpu_s'] / SMALL_CLUSTERS)],
           TARGETS['cost'], False)
    for what in ('write', 'read'):
        for key, name in ((what + '_cpu_us', 'CPU'), (what + '_us', 'time')):
            result(results, 'random %s, %s per cluster: times that of a '
                   'small store' % (what, name),
                   [b[key] / a[key] for a, b in zip(costs['small'],
                                                    costs['large'])],
                   TARGETS['cost'], False)
    return out


# --- random reads

def full_disk(work, disk, limit):
    """The clusters of @disk that hold something, one after the other."""
    path = os.path.join(work, 'full.raw')
    zero = bytes(CLUSTER)
    written = 0
    with open(disk, 'rb') as source, open(path, 'wb') as target:
        pos = 0
        while written < limit:
            try:
                pos = os.lseek(source.fileno(), pos, os.SEEK_DATA)
            except OSError:
                break
            pos -= pos % CLUSTER
            data = os.pread(source.fileno(), CLUSTER, pos)
            pos += CLUSTER
            if len(data) == CLUSTER and data != zero:
                target.write(data)
                written += CLUSTER
    return path


def convert(side, codec, source, target):
    if side == 'bale':
        command = [BALE, 'run', 'qemu-img', 'convert', '-O', 'bale', '-o',
                   'compression_type=' + CODECS[codec][0]]
    else:
        command = ['qemu-img', 'convert', '-c', '-O', 'qcow2', '-o',
                   'compression_type=' + CODECS[codec][1]]
    run(command + ['-W', '-m', '16', '-t', 'none', source, target])


def bench_reads(side, path, size, count, depth, hot):
    """Microseconds a read, and of CPU, by stock qemu-img.

    The stride is an odd number of pieces, so all of them are met, in an order
    that nothing expects.
    """
    opts = 'driver=%s,file.driver=file,file.filename=%s,' \
        'file.cache.direct=on,file.aio=native' % (side, path)
    if hot:
        size = HOT_BYTES
        opts = 'driver=raw,size=%d,offset=%d,%s' % (
            size, 16 << 20, ','.join('file.' + o for o in opts.split(',')))
    stride = (size * 382 // 1000 // READ_SIZE | 1) * READ_SIZE
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = run([BALE, 'run', 'qemu-img', 'bench', '-t', 'none', '-i',
                'native', '-c', str(count), '-d', str(depth), '-s',
                str(READ_SIZE), '-S', str(stride), '--image-opts', opts])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {'us': float(re.search(r'completed in ([0-9.]+)', text)[1]) /
                  count * 1e6, 'cpu_us': cpu / count * 1e6}


def random_reads(args, work, results):
    disk = args.disk or run([os.path.join(TOP, 'scripts',
                                          'test-disk')]).strip()
    full = full_disk(work, disk, args.read_mib << 20)
    size = os.path.getsize(full)
    samples = {}
    for codec in CODECS:
        for side in ('bale', 'qcow2'):
            convert(side, codec, full, os.path.join(work, side + codec))
    for _ in range(args.rounds):
        for codec in CODECS:
            for depth in (1, 16):
                for hot in (False, True):
                    for side in ('qcow2', 'bale'):
                        name = '%s %s %s depth %d' % (
                            'hot' if hot else 'cold', side, codec, depth)
                        samples.setdefault(name, []).append(bench_reads(
                            side, os.path.join(work, side + codec), size,
                            args.reads, depth, hot))
    for codec in CODECS:
        for depth in (1, 16):
            for kind in ('cold', 'hot'):
                name = '%s %%s %s depth %d' % (kind, codec, depth)
                result(results, 'random 4 KiB reads, %s, %s, depth %d: times '
                       'faster than qcow2' % (kind, codec, depth),
                       [q['us'] / b['us']
                        for q, b in zip(samples[name % 'qcow2'],
                                        samples[name % 'bale'])],
                       TARGETS[kind], True)
                result(results, 'the same, times less CPU',
                       [q['cpu_us'] / b['cpu_us']
                        for q, b in zip(samples[name % 'qcow2'],
                                        samples[name % 'bale'])], None, True)
    return {'bytes': size, 'reads': args.reads, 'hot_bytes': HOT_BYTES,
            'us': {name: summarize([x['us'] for x in s])
                   for name, s in samples.items()},
            'samples': samples}


# --- overwriting

@contextlib.contextmanager
def exported(side, path, work):
    """An NBD URI of the image."""
    socket = os.path.join(work, 'nbd.sock')
    command = [BALE, 'run', 'qemu-storage-daemon', '--blockdev',
               'driver=file,node-name=f,filename=%s,cache.direct=on,'
               'aio=native,discard=unmap' % path,
               '--blockdev', 'driver=%s,node-name=a,file=f,discard=unmap' %
               side,
               '--nbd-server', 'addr.type=unix,addr.path=' + socket,
               '--export', 'type=nbd,id=e,node-name=a,name=a,writable=on']
    with subprocess.Popen(command) as daemon:
        try:
            deadline = time.monotonic() + 60
            while not os.path.exists(socket):
                if daemon.poll() is not None or time.monotonic() > deadline:
                    raise BenchError('qemu-storage-daemon does not serve')
                time.sleep(0.05)
            yield 'nbd+unix:///a?socket=' + socket
        finally:
            daemon.terminate()
            daemon.wait()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(socket)


def fio(uri, block, mib, seed):
    """Write everything three times; MB/s."""
    text = run(['fio', '--name=w', '--ioengine=nbd', '--uri=' + uri,
                '--rw=randwrite', '--bs=' + block, '--size=%dM' % mib,
                '--loops=3', '--iodepth=16', '--end_fsync=1',
                '--refill_buffers', '--buffer_compress_percentage=60',
                '--buffer_compress_chunk=4096', '--randseed=%d' % seed,
                '--output-format=json'])
    job = json.loads(text[text.index('{'):])['jobs'][0]
    return job['write']['bw_bytes'] / 1e6


def used(path):
    return os.stat(path).st_blocks * 512


class Peak(threading.Thread):
    """The most space that a file takes while this is entered."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.bytes = 0
        self.stop = threading.Event()

    def run(self):
        while not self.stop.wait(0.1):
            self.bytes = max(self.bytes, used(self.path))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc):
        self.stop.set()
        self.join()


def settle(path):
    """Wait until compaction in the background is done; seconds it took."""
    begin = since = time.monotonic()
    before = used(path)
    while time.monotonic() - since < SETTLED_S and \
            time.monotonic() - begin < SETTLE_MAX_S:
        time.sleep(0.05)
        if used(path) != before:
            before = used(path)
            since = time.monotonic()
    return since - begin


def overwrite_round(side, source, block, mib, number, work):
    path = os.path.join(work, 'over.' + side)
    convert(side, 'zstd', source, path)
    with exported(side, path, work) as uri, Peak(path) as peak:
        speed = fio(uri, block, mib, number)
        settle_s = settle(path) if side == 'bale' else 0
    # MB/s if the time until compaction was done counts, too
    mb = 3 * mib * 2**20 / 1e6
    out = {'mb_per_s': speed, 'settled_mb_per_s': mb / (mb / speed + settle_s),
           'settle_s': settle_s, 'space': used(path), 'peak': peak.bytes}
    if side == 'bale':
        run([BALE, 'compact', path])
        out['compacted'] = used(path)
        new = os.path.join(work, 'fresh')
        run([BALE, 'run', 'qemu-img', 'convert', '-f', 'bale', '-O', 'bale',
             '-W', '-m', '16', path, new])
        out['fresh'] = used(new)
        os.unlink(new)
    os.unlink(path)
    return out


def overwrite(args, work, results):
    out = {}
    for block, mib in OVERWRITE_MIB.items():
        source = os.path.join(work, 'noise.raw')
        with open(source, 'wb') as f:
            for _ in range(mib * 16):
                f.write(os.urandom(CLUSTER * 2 // 5) +
                        bytes(CLUSTER - CLUSTER * 2 // 5))
        runs = {'bale': [], 'qcow2': []}
        for number in range(args.rounds):
            for side, done in runs.items():
                done.append(overwrite_round(side, source, block, mib, number,
                                            work))
        os.unlink(source)

        def ratio(name, key, other, target=None, at_least=False):
            result(results, name, [a[key] / b for a, b in zip(
                runs['bale'], other)], target, at_least)
        fresh = [r['fresh'] for r in runs['bale']]
        speed = [r['mb_per_s'] for r in runs['qcow2']]
        ratio('overwrite three times, %s: times as fast as qcow2' % block,
              'mb_per_s', speed, at_least=True)
        ratio('the same, with the time until compaction was done',
              'settled_mb_per_s', speed, at_least=True)
        ratio('space after that, %s: times that of a fresh store' % block,
              'space', fresh, TARGETS['space'])
        ratio('the same, at its peak meanwhile', 'peak', fresh)
        ratio('the same, after `bale compact`', 'compacted', fresh)
        ratio('space after that, %s: times that of qcow2' % block, 'space',
              [r['space'] for r in runs['qcow2']])
        out[block] = {'mib': mib, 'runs': runs,
                      'space': {side: [r['space'] for r in done]
                                for side, done in runs.items()},
                      'fresh': fresh,
                      'compacted': [r['compacted'] for r in runs['bale']]}
    return out


# --- flushing

def flush(args, work, results):
    out = json.loads(run([FLUSH, work, str(args.rounds), str(FLUSHES)]))
    for way in out['ways']:
        for key, name in (('raw_written_us', 'written before'),
                          ('raw_sparse_us', 'not written yet')):
            result(results, '4 KiB and a flush, %s: times the time of a raw '
                   'file whose blocks were %s' % (way['way'], name),
                   [b / r for b, r in zip(way['bale_us'], way[key])],
                   TARGETS['flush'], False)
        result(results, 'the same, blocks of the device written',
               [way['bale_blocks']], TARGETS['flush-blocks'], False)
    return out


# --- compaction, growth

def compact(args, work, results):
    path = os.path.join(work, 'compact.bale')
    clusters = args.compact_mib * 16
    runs = {'alone': [], 'busy': []}
    for _ in range(args.rounds):
        for name, busy in (('alone', 0), ('busy', 1)):
            step('fill', path, clusters, CLUSTER, CLUSTER * 2 // 5)
            runs[name].append(step('compact', path, busy))
    result(results, 'compaction, MB/s of examined pages',
           [r['examined_bytes'] / r['compact_s'] / 1e6
            for r in runs['alone']], TARGETS['compact-mb-per-s'], True)
    result(results, 'compaction, added memory, MiB',
           [r['added_mib'] for r in runs['alone']], TARGETS['compact-mib'],
           False)
    result(results, 'p99 of reads during compaction: times that without',
           [r['reads_meanwhile']['p99_us'] / r['reads_alone']['p99_us']
            for r in runs['busy']], None, False)
    return runs


def growth(args, work, results):
    out = json.loads(run([INDEX, str(args.clusters)]))

    def longest(name, key):
        return max(thread[key] for thread in out[name].values()
                   if isinstance(thread, dict)) / 1e3

    quiet, growing = 'stalls_without_growth', 'stalls_while_growing'
    result(results, 'longest operation while the index grows eightfold, ms '
           'more than without', [longest(growing, 'longest_us') -
                                 longest(quiet, 'longest_us')],
           TARGETS['stall-ms'], False)
    result(results, 'longest own CPU time of an operation meanwhile, ms',
           [longest(growing, 'longest_cpu_us')], TARGETS['stall-ms'], False)
    result(results, 'the same without growth, ms',
           [longest(quiet, 'longest_cpu_us')], None, False)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('parts', nargs='*', metavar='PART',
                        help='of ' + ', '.join(PARTS))
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--clusters', type=int, default=16 << 20)
    parser.add_argument('--ops', type=int, default=20000,
                        help='random writes, and reads, a round')
    parser.add_argument('--tails', type=int, nargs='*',
                        default=[0, 10000, 100000, 1000000, 4000000])
    parser.add_argument('--reads', type=int, default=20000)
    parser.add_argument('--read-mib', type=int, default=448)
    parser.add_argument('--compact-mib', type=int, default=1024)
    parser.add_argument('--disk', help='raw image (default: the test disk)')
    parser.add_argument('--out', default=os.path.join(BUILD, 'bench',
                                                      'store.json'))
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown or args.rounds < 1:
        parser.error('at least one round of ' + ', '.join(PARTS))

    data = {}
    if os.path.exists(args.out) and args.parts:
        with open(args.out, encoding='utf-8') as f:
            data = json.load(f)
    data.update({'bench': 'store', 'machine': machine(),
                 'date': time.strftime('%Y-%m-%d', time.gmtime())})
    data.setdefault('parts', {})
    for name in args.parts or PARTS:
        # Not /tmp: where that is in memory there is no O_DIRECT.
        work = tempfile.mkdtemp(prefix='bale-bench.',
                                dir=os.environ.get('TMPDIR', '/var/tmp'))
        results = []
        function = random_reads if name == 'random' else globals()[name]
        load = os.getloadavg()[0]
        try:
            part = function(args, work, results)
        except (BenchError, OSError) as e:
            print('bench_store: %s: %s' % (name, e), file=sys.stderr)
            return 1
        finally:
            shutil.rmtree(work)
        data['parts'][name] = {'rounds': args.rounds, 'results': results,
                               'load': [load, os.getloadavg()[0]],
                               'data': part}
        data['parts'] = {part: data['parts'][part] for part in PARTS
                         if part in data['parts']}
        for r in results:
            v = r['value']
            wanted = '' if r['target'] is None else ', wanted %s %.2f: %s' % (
                '>=' if r['at_least'] else '<=', r['target'],
                'yes' if r['met'] else 'NO')
            print('%-66s %8.2f (%.2f to %.2f)%s' % (
                r['name'], v['median'], v['min'], v['max'], wanted))
        os.makedirs(os.path.dirname(os.path.abspath(args.out)),
                    exist_ok=True)
        with open(args.out, 'w', encoding='utf-8') as f:
            json.dump(data, f, indent=1)
            f.write('\n')
    print('\nwritten: %s' % os.path.relpath(args.out))
    return 0


if __name__ == '__main__':
    sys.exit(main())
