#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The filter driver "seqcache" in real QEMU programs: data and order.

Every test runs the workload with the filter and compares with what it must be
without: a byte array, a second image, or the source.
"""

import os
import subprocess
import unittest

import bale_iotests
from bale_iotests import LONG, qemu_img, qemu_io, run

KIB = 1024
MIB = 1024 * KIB

MODEL_REQUESTS = 100000 if LONG else 20000


def filter_opts(filename, node='', direct=False, child='', **options):
    """--image-opts of a seqcache over a file (or what `child` says)."""
    words = ['driver=seqcache']
    if node:
        words.append(f'node-name={node}')
    words += [f'{name.replace("_", "-")}={value}'
              for name, value in options.items()]
    words += [child or f'file.driver=file,file.filename={filename}']
    if direct:
        words.append('file.cache.direct=on')
    return ','.join(words)


def qemu_io_script(opts, commands, *args):
    """Runs commands; returns its output after checking that none failed.

    qemu-io is write-through by default, and each write then a flush: not here.
    """
    if '-t' not in args:
        args = ('-t', 'writeback', *args)
    result = qemu_io(*args, '--image-opts', opts,
                     stdin='\n'.join([*commands, 'quit', '']))
    output = (result.out + result.err).replace('qemu-io> ', '')
    bad = [line for line in output.splitlines()
           if 'failed' in line or 'rror' in line or 'Pattern' in line]
    if bad:
        raise AssertionError('\n'.join(bad[:20]))
    return result.out


class Model:
    """An image as a byte array, and random qemu-io commands that keep both
    the same."""

    def __init__(self, rand, size, zero_alone=False):
        self.rand = rand
        self.size = size
        self.zero_alone = zero_alone  # nothing under way at a write-zeroes
        self.data = bytearray(size)
        self.unknown = bytearray(size)  # 1: after a discard
        self.last_end = 0
        self.busy = []  # ranges of requests under way

    def range(self, most):
        rand = self.rand
        start = (self.last_end if rand.random() < 0.5
                 else rand.randrange(self.size))
        start = min(start, self.size - 1)
        if rand.random() < 0.15:
            start &= ~0xfff
        length = rand.choice([rand.randint(1, 600), rand.randint(1, 20480),
                              rand.randint(1, most), 4096, 65536])
        length = min(length, self.size - start)
        self.last_end = start + length
        return start, length

    def overlaps(self, start, length):
        return any(start < b + n and b < start + length for b, n in self.busy)

    def known_run(self, start):
        """The range from start on that reads as one byte, known."""
        if self.unknown[start]:
            return 0
        byte = self.data[start]
        end = start
        limit = min(self.size, start + 100000)
        while end < limit and self.data[end] == byte and \
                not self.unknown[end]:
            end += 1
        return end - start

    def command(self):
        rand = self.rand
        kind = rand.random()
        if kind < 0.02:
            self.busy = []
            return 'aio_flush'
        if kind < 0.03:
            self.busy = []
            return 'aio_flush\nflush'
        start, length = self.range(200000)
        if self.overlaps(start, length):
            self.busy = []
            return 'aio_flush\n' + self.command()
        if kind < 0.60:
            byte = rand.randint(1, 255)
            self.data[start:start + length] = bytes([byte]) * length
            self.unknown[start:start + length] = bytes(length)
            if rand.random() < 0.7:
                self.busy.append((start, length))
                return f'aio_write -q -P {byte} {start} {length}'
            fua = '-f ' if rand.random() < 0.02 else ''
            return f'write -q {fua}-P {byte} {start} {length}'
        if kind < 0.66:
            self.data[start:start + length] = bytes(length)
            self.unknown[start:start + length] = bytes(length)
            unmap = '-u ' if rand.random() < 0.5 else ''
            before = ''
            if self.zero_alone:
                self.busy = []
                before = 'aio_flush\n'
            return f'{before}write -q -z {unmap}{start} {length}'
        if kind < 0.70:
            self.unknown[start:start + length] = b'\1' * length
            return f'discard -q {start} {length}'
        run_bytes = self.known_run(start)
        if not run_bytes:
            return self.command()
        if self.overlaps(start, run_bytes):
            self.busy = []
            return 'aio_flush\n' + self.command()
        self.last_end = start + run_bytes
        if rand.random() < 0.3:
            self.busy.append((start, run_bytes))
            return f'aio_read -q -P {self.data[start]} {start} {run_bytes}'
        return f'read -q -P {self.data[start]} {start} {run_bytes}'

    def check(self, raw):
        for i in range(0, self.size, 4096):
            if raw[i:i + 4096] == self.data[i:i + 4096]:
                continue
            for j in range(i, i + 4096):
                if not self.unknown[j] and raw[j] != self.data[j]:
                    raise AssertionError(
                        f'byte {j} is {raw[j]}, not {self.data[j]}')


class ModelTest(bale_iotests.TestCase):
    """Random requests against a byte array."""

    def model(self, size, opts, flat, requests=MODEL_REQUESTS, args=(),
              zero_alone=False):
        """Runs the requests on opts; flat() returns the final bytes."""
        print(f'# BALE_SEED={self.seed}')
        model = Model(self.random, size, zero_alone)
        commands = [model.command() for _ in range(requests)]
        commands += ['aio_flush', 'flush']
        with open('commands', 'w', encoding='ascii') as file:
            file.write('\n'.join(commands))
        qemu_io_script(opts, commands, *args)
        model.check(flat())

    def flat_file(self, name):
        def flat():
            with open(name, 'rb') as file:
                return file.read()
        return flat

    def flat_image(self, name):
        def flat():
            qemu_img('convert', '-O', 'raw', name, 'flat')
            return self.flat_file('flat')()
        return flat

    def test_over_a_file(self):
        run('truncate', '-s', '3M', 'a.raw', check=0)
        self.model(3 * MIB, filter_opts('a.raw'), self.flat_file('a.raw'))

    def test_over_o_direct_with_discard(self):
        run('truncate', '-s', '3M', 'a.raw', check=0)
        self.model(3 * MIB, filter_opts('a.raw', direct=True,
                                        **{'file.discard': 'unmap'}),
                   self.flat_file('a.raw'), args=('-d', 'unmap'))

    def test_tiny_cache_of_tiny_clusters(self):
        run('truncate', '-s', '2M', 'a.raw', check=0)
        self.model(2 * MIB, filter_opts('a.raw', cluster_size=512,
                                        cache_size=4096, max_streams=2,
                                        flush_interval=20),
                   self.flat_file('a.raw'), MODEL_REQUESTS // 4)

    def test_small_cache_of_large_clusters(self):
        run('truncate', '-s', '20M', 'a.raw', check=0)
        self.model(20 * MIB, filter_opts('a.raw', cluster_size='4M',
                                         cache_size='12M', max_streams=3),
                   self.flat_file('a.raw'), MODEL_REQUESTS // 4)

    def test_under_qcow2(self):
        # QEMU 7.2's qcow2 itself loses data when a write-zeroes meets a write
        # to other bytes of the same cluster; so they do not meet here.
        qemu_img('create', '-q', '-f', 'qcow2', 'a.qcow2', '3M')
        self.model(3 * MIB, 'driver=qcow2,' + ','.join(
            f'file.{word}' for word in filter_opts(
                'a.qcow2', direct=True).split(',')),
            self.flat_image('a.qcow2'), zero_alone=True)
        qemu_img('check', 'a.qcow2')

    def test_over_qcow2_compressing(self):
        qemu_img('create', '-q', '-f', 'qcow2', 'a.qcow2', '3M')
        self.model(3 * MIB, filter_opts(
            '', compress='on', child='file.driver=qcow2,'
            'file.file.driver=file,file.file.filename=a.qcow2,'
            'file.discard=unmap'),
            self.flat_image('a.qcow2'), args=('-d', 'unmap'))
        qemu_img('check', 'a.qcow2')

    def test_over_qcow2_compressing_with_odd_end(self):
        size = 3 * MIB - 5 * 512
        qemu_img('create', '-q', '-f', 'qcow2', 'a.qcow2', str(size))
        self.model(size, filter_opts(
            '', compress='on', cache_size='256k',
            child='file.driver=qcow2,file.file.driver=file,'
            'file.file.filename=a.qcow2'),
            self.flat_image('a.qcow2'), MODEL_REQUESTS // 4)
        qemu_img('check', 'a.qcow2')

    def test_over_qcow2_with_backing_file(self):
        run('dd', 'if=/dev/urandom', 'of=base.raw', 'bs=64k', 'count=48',
            check=0)
        qemu_img('create', '-q', '-f', 'qcow2', '-F', 'raw', '-b', 'base.raw',
                 'a.qcow2')
        print(f'# BALE_SEED={self.seed}')
        model = Model(self.random, 3 * MIB)
        with open('base.raw', 'rb') as file:
            model.data[:] = file.read()
        commands = [model.command() for _ in range(MODEL_REQUESTS // 4)]
        qemu_io_script(filter_opts('', child='file.driver=qcow2,'
                                   'file.file.driver=file,'
                                   'file.file.filename=a.qcow2'),
                       [*commands, 'aio_flush'])
        model.check(self.flat_image('a.qcow2')())

    def test_two_filters_on_each_other(self):
        run('truncate', '-s', '3M', 'a.raw', check=0)
        self.model(3 * MIB, filter_opts(
            '', cluster_size='4k', cache_size='64k',
            child='file.driver=seqcache,file.cache-size=1M,'
            'file.file.driver=file,file.file.filename=a.raw'),
            self.flat_file('a.raw'), MODEL_REQUESTS // 4)


class WorkersTest(bale_iotests.TestCase):
    """Many streams of small pieces, in any order."""

    def test_64_workers_in_shuffled_order(self):
        size, workers = 32 * MIB, 64
        part = size // workers
        streams = []
        expected = bytearray(size)
        for worker in range(workers):
            pos, pieces = worker * part, []
            while pos < (worker + 1) * part:
                length = min(self.random.randint(1 * KIB, 20 * KIB),
                             (worker + 1) * part - pos)
                byte = self.random.randint(1, 255)
                pieces.append(f'aio_write -q -P {byte} {pos} {length}')
                expected[pos:pos + length] = bytes([byte]) * length
                pos += length
            streams.append(pieces)
        commands = []
        while streams:
            stream = self.random.choice(streams)
            commands.append(stream.pop(0))
            if not stream:
                streams.remove(stream)
        run('truncate', '-s', str(size), 'a.raw', check=0)
        # A bit more shuffled: pieces of one stream overtake each other, too
        for i in range(0, len(commands) - 8, 8):
            block = commands[i:i + 8]
            self.random.shuffle(block)
            commands[i:i + 8] = block
        qemu_io_script(filter_opts('a.raw', direct=True),
                       [*commands, 'aio_flush', 'flush'], '-t', 'none')
        with open('a.raw', 'rb') as file:
            self.assertEqual(file.read(), expected)

    def test_convert_compressed_over_o_direct(self):
        with open('src.raw', 'wb') as file:
            for i in range(300):
                file.write(self.random.randbytes(30000))
                file.write(bytes([i % 256]) * self.random.randint(0, 200000))
        run('truncate', '-s', '48M', 'src.raw', check=0)
        for extra in ((), ('-W', '-m', '8'), ('-t', 'none', '-W', '-m', '16')):
            qemu_img('create', '-q', '-f', 'qcow2', 'dst.qcow2', '48M')
            qemu_img('convert', '-n', '-c', *extra, '-f', 'raw',
                     '--target-image-opts', 'src.raw', 'driver=qcow2,' +
                     ','.join(f'file.{word}' for word in filter_opts(
                         'dst.qcow2', direct=True).split(',')))
            run('qemu-img', 'compare', 'src.raw', 'dst.qcow2', check=0)
            run('qemu-img', 'check', 'dst.qcow2', check=0)
            os.remove('dst.qcow2')


class SizeTest(bale_iotests.TestCase):
    """Growing, shrinking, and the end of the image."""

    def test_file_grows_and_has_exact_data(self):
        run('truncate', '-s', '0', 'a.raw', check=0)
        # raw over the filter resizes; 70000 is neither sector nor cluster
        opts = 'driver=raw,' + ','.join(
            f'file.{word}' for word in filter_opts('a.raw').split(','))
        out = qemu_io_script(opts, ['truncate 100000', 'write -P 1 0 70000',
                                    'length', 'truncate 50000', 'length',
                                    'truncate 200000',
                                    'read -P 1 0 50000',
                                    'read -P 0 50000 150000', 'length'])
        self.assertIn('195.500 KiB', out)
        with open('a.raw', 'rb') as file:
            data = file.read()
        self.assertEqual(data[:50000], b'\1' * 50000)
        self.assertEqual(data[50000:].strip(b'\0'), b'')

    def test_fixed_size_is_kept(self):
        # Sectors, but not blocks of 4 KiB; O_DIRECT would not open that
        for direct, size in ((False, 1000448), (True, 1003520)):
            run('truncate', '-s', str(size), 'a.raw', check=0)
            qemu_io_script('driver=raw,' + ','.join(
                f'file.{word}' for word in filter_opts(
                    'a.raw', direct=direct).split(',')),
                [f'write -P 3 {size - 100} 100', 'flush',
                 f'write -P 4 {size - 5000} 10', 'flush'])
            self.assertEqual(os.path.getsize('a.raw'), size)

    def test_flushes_while_a_file_grows(self):
        run('truncate', '-s', '0', 'a.raw', check=0)
        # qcow2 does this: appends of odd sizes with flushes between them
        commands, data = [], b''
        for i in range(300):
            length = self.random.randint(1, 9000)
            commands.append(f'write -q -P {1 + i % 250} {len(data)} {length}')
            data += bytes([1 + i % 250]) * length
            if self.random.random() < 0.5:
                commands.append('flush')
            if self.random.random() < 0.2:
                at = self.random.randrange(len(data) - 50 if i > 9 else 1)
                commands.append(f'write -q -P 255 {at} 1')
                data = data[:at] + b'\xff' + data[at + 1:]
        for direct in (False, True):
            run('truncate', '-s', '0', 'a.raw', check=0)
            qemu_io_script('driver=raw,' + ','.join(
                f'file.{word}' for word in filter_opts(
                    'a.raw', direct=direct, cluster_size='16k').split(',')),
                ['truncate 8M', *commands])
            with open('a.raw', 'rb') as file:
                self.assertEqual(file.read(len(data)), data)

    def test_truncate_races_write_out(self):
        size = 8 * MIB
        run('truncate', '-s', str(size), 'a.raw', check=0)
        opts = 'driver=raw,' + ','.join(
            f'file.{word}' for word in filter_opts(
                'a.raw', direct=True, cluster_size='64k',
                cache_size='512k').split(','))
        commands = []
        for i in range(200 if LONG else 40):
            cut = self.random.randrange(512, size, 512)
            commands += [f'aio_write -q -P {1 + i % 250} {pos} 12k'
                         for pos in range(0, size - 12 * KIB, 61440)]
            commands += ['aio_flush', f'truncate {cut}', f'truncate {size}',
                         f'read -q -P 0 {cut} {size - cut}']
            last = (cut - 12 * KIB) // 61440 * 61440
            if last >= 0:
                commands.append(f'read -q -P {1 + i % 250} {last} 12k')
        qemu_io_script(opts, commands)

    def test_map_sees_cached_data(self):
        qemu_img('create', '-q', '-f', 'qcow2', 'a.qcow2', '1M')
        out = qemu_io_script(filter_opts(
            '', flush_interval=0, child='file.driver=qcow2,'
            'file.file.driver=file,file.file.filename=a.qcow2'), [
                'write 65536 1000', 'write 200000 100', 'map'])
        # 1000 bytes touch two sectors; the 100 bytes lie in one
        self.assertIn('1 KiB (0x400) bytes     allocated at offset 64 KiB',
                      out)
        self.assertIn('512 bytes (0x200) bytes     allocated at offset '
                      '195 KiB (0x30c00)', out)


class DiscardTest(bale_iotests.TestCase):
    """Discard and write-zeroes against cached and in-flight clusters."""

    def race(self, zero, opts, args=()):
        size = 4 * MIB
        run('truncate', '-s', str(size), 'a.raw', check=0)
        commands = []
        for i in range(100 if LONG else 25):
            byte = 1 + i % 250
            start = self.random.randrange(0, size - 1 * MIB)
            length = self.random.randrange(1, 1 * MIB)
            commands += [f'aio_write -q -P {byte} {pos} 20k'
                         for pos in range(0, size, 20480)
                         if pos + 20480 <= size]
            commands += ['aio_flush', f'{zero} {start} {length}']
            if 'write' in zero:
                commands.append(f'read -q -P 0 {start} {length}')
            # What lies around is what was written
            edge = start // 20480 * 20480
            if edge < start:
                commands.append(f'read -q -P {byte} {edge} {start - edge}')
            commands += [f'write -q -P {byte} {start} {length}', 'flush',
                         f'read -q -P {byte} {start} {length}']
        qemu_io_script(opts, commands, *args)

    def test_write_zeroes_races_write_out(self):
        self.race('write -q -z', filter_opts('a.raw', cache_size='1M'))

    def test_write_zeroes_unmap_races_write_out(self):
        self.race('write -q -z -u', filter_opts(
            'a.raw', direct=True, **{'file.discard': 'unmap'}),
            ('-d', 'unmap'))

    def test_discard_races_write_out(self):
        self.race('discard -q', filter_opts(
            'a.raw', direct=True, **{'file.discard': 'unmap'}),
            ('-d', 'unmap'))

    def test_ignored_discard_keeps_cached_data(self):
        run('truncate', '-s', '1M', 'a.raw', check=0)
        qemu_io_script(filter_opts('a.raw', **{'file.discard': 'ignore'}), [
            'write -P 1 0 1M', 'flush', 'write -P 2 0 1M', 'discard 0 1M',
            'read -P 2 0 1M'], '-d', 'unmap')


class OptionTest(bale_iotests.TestCase):
    """Options and their errors."""

    def refuse(self, words, *expected):
        result = qemu_io('--image-opts', words, '-c', 'quit', check=None)
        self.assertEqual(result.status, 1, str(result))
        for word in expected:
            self.assertIn(word, result.err)

    def test_bad_values_are_refused(self):
        run('truncate', '-s', '1M', 'a.raw', check=0)
        self.refuse(filter_opts('a.raw', cluster_size=3000), 'cluster-size',
                    'power of two')
        self.refuse(filter_opts('a.raw', cluster_size='8M'), 'cluster-size')
        self.refuse(filter_opts('a.raw', cluster_size='256'), 'cluster-size')
        self.refuse(filter_opts('a.raw', cache_size='64k'), 'cache-size')
        self.refuse(filter_opts('a.raw', cache_size='1T'), 'cache-size')
        self.refuse(filter_opts('a.raw', max_streams=0), 'max-streams')
        self.refuse(filter_opts('a.raw', max_streams=100000), 'max-streams')
        self.refuse(filter_opts('a.raw', flush_interval=100000000),
                    'flush-interval')
        self.refuse(filter_opts('a.raw', compress='on'), 'compress')
        self.refuse(filter_opts('a.raw', compress='maybe'), 'compress')
        self.refuse(filter_opts('a.raw', colour='blue'), 'colour')
        self.refuse('driver=seqcache', 'file')

    def test_compressing_needs_the_cluster_size_of_the_child(self):
        qemu_img('create', '-q', '-f', 'qcow2', 'a.qcow2', '1M')
        child = ('file.driver=qcow2,file.file.driver=file,'
                 'file.file.filename=a.qcow2')
        self.refuse(filter_opts('', compress='on', cluster_size='4k',
                                child=child), 'cluster-size', '65536')
        qemu_io_script(filter_opts('', compress='on', cluster_size='128k',
                                   child=child),
                       ['write -P 1 0 200k', 'flush', 'read -P 1 0 200k'])

    def test_compressing_compresses(self):
        qemu_img('create', '-q', '-f', 'qcow2', 'a.qcow2', '8M')
        child = ('file.driver=qcow2,file.file.driver=file,'
                 'file.file.filename=a.qcow2')
        qemu_io_script(filter_opts('', compress='on', child=child),
                       [f'write -q -P 7 {pos} 5000'
                        for pos in range(0, 4 * MIB, 5000)])
        info = bale_iotests.qemu_img_info('a.qcow2')
        self.assertLess(info['actual-size'], 1 * MIB)
        result = qemu_img('check', 'a.qcow2')
        self.assertIn('100.00% compressed', result.out)


if __name__ == '__main__':
    bale_iotests.main()
