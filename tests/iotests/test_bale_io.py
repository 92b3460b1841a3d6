#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver bale under single requests: qemu-io against what must be read."""

import re

import bale_iotests
from bale_images import (BALE_DRIVER, GIB, KIB, MIB, check, compare, create,
                         io, make_raw, patterned)
from bale_iotests import LONG, qemu_img, qemu_img_map, qemu_io


class RequestTest(bale_iotests.TestCase):

    def setUp(self):
        create('t.bale', 64 * MIB)

    def status(self, path='t.bale'):
        return [(e['start'], e['length'], e['data'], e['zero'])
                for e in qemu_img_map(path)]

    def test_unwritten_reads_as_zeroes(self):
        io('t.bale', 'read -P 0 0 64M')

    def test_write_is_read_in_the_same_process(self):
        io('t.bale', 'write -P 7 0 1M', 'read -P 7 0 1M',
           'read -P 0 1M 1M')

    def test_write_is_read_after_reopening(self):
        io('t.bale', 'write -P 7 3M 1M')
        io('t.bale', 'read -P 0 0 3M', 'read -P 7 3M 1M',
           'read -P 0 4M 60M')
        check('t.bale')

    def test_overwrite(self):
        io('t.bale', 'write -P 1 0 256k', 'write -P 2 64k 128k')
        io('t.bale', 'read -P 1 0 64k', 'read -P 2 64k 128k',
           'read -P 1 192k 64k')
        check('t.bale')

    def test_part_of_a_cluster(self):
        io('t.bale', 'write -P 1 64k 64k', 'write -P 2 70k 4k',
           'write -P 3 5000 100')
        io('t.bale', 'read -P 1 64k 6k', 'read -P 2 70k 4k',
           'read -P 1 74k 54k', 'read -P 0 0 5000', 'read -P 3 5000 100',
           'read -P 0 5100 100')

    def test_request_across_many_clusters(self):
        io('t.bale', 'write -P 9 1000 5000000')
        io('t.bale', 'read -P 0 0 1000', 'read -P 9 1000 5000000',
           'read -P 0 5001000 1000')

    def test_the_last_byte(self):
        io('t.bale', 'write -P 5 67108352 512')
        io('t.bale', 'read -P 5 67108352 512')

    def test_vectors(self):
        io('t.bale', 'writev -P 4 100k 1k 2k 3k 100k 512',
           'readv -P 4 100k 100k 1k 5k')

    def test_parallel_requests(self):
        writes = [f'aio_write -P {i + 1} {i * 100}k 100k' for i in range(50)]
        reads = [f'read -P {i + 1} {i * 100}k 100k' for i in range(50)]
        io('t.bale', *writes, 'aio_flush', *reads)
        io('t.bale', *reads)
        check('t.bale')

    def test_parallel_parts_of_the_same_clusters(self):
        writes = [f'aio_write -P {i + 1} {i * 4}k 4k' for i in range(64)]
        reads = [f'read -P {i + 1} {i * 4}k 4k' for i in range(64)]
        io('t.bale', *writes, 'aio_flush', *reads)
        io('t.bale', *reads)

    def test_compressed_write(self):
        io('t.bale', 'write -c -P 6 0 64k', 'write -c -P 7 64k 1M')
        io('t.bale', 'read -P 6 0 64k', 'read -P 7 64k 1M')

    def test_fua(self):
        io('t.bale', 'write -f -P 6 0 5k', 'write -z -f 64k 64k')
        io('t.bale', 'read -P 6 0 5k')

    def test_write_zeroes(self):
        io('t.bale', 'write -P 1 0 1M', 'write -z 100k 500k')
        io('t.bale', 'read -P 1 0 100k', 'read -P 0 100k 500k',
           'read -P 1 600k 424k')
        check('t.bale')

    def test_write_zeroes_unmapping(self):
        io('t.bale', 'write -P 1 0 1M', 'write -z -u 64k 128k')
        io('t.bale', 'read -P 1 0 64k', 'read -P 0 64k 128k',
           'read -P 1 192k 832k')

    def test_discard_reads_as_zeroes(self):
        io('t.bale', 'write -P 1 0 1M', 'discard 64k 128k')
        io('t.bale', 'read -P 0 64k 128k', 'read -P 1 192k 832k')
        check('t.bale')

    def test_discard_of_a_part_of_a_cluster_changes_nothing(self):
        io('t.bale', 'write -P 1 0 64k', 'discard 4k 8k', 'read -P 1 0 64k')

    def test_write_after_discard(self):
        io('t.bale', 'write -P 1 0 1M', 'discard 0 1M', 'write -P 2 4k 4k')
        io('t.bale', 'read -P 0 0 4k', 'read -P 2 4k 4k', 'read -P 0 8k 1016k')

    def test_status_of_a_new_image(self):
        self.assertEqual(self.status(), [(0, 64 * MIB, False, True)])

    def test_status_of_data_and_zeroes(self):
        io('t.bale', 'write -P 1 1M 1M', 'write -z 4M 1M')
        data = [entry for entry in self.status() if entry[2]]
        self.assertEqual(data, [(1 * MIB, 1 * MIB, True, False)])
        self.assertEqual(sum(e[1] for e in self.status()), 64 * MIB)

    def test_status_after_discard(self):
        io('t.bale', 'write -P 1 0 1M', 'discard 0 1M')
        self.assertEqual([e for e in self.status() if e[2]], [])

    def test_flush_of_a_clean_image(self):
        io('t.bale', 'flush', 'flush')

    def test_reading_and_writing_beyond_the_end(self):
        for command in ('read 64M 512', 'write 64M 512',
                        'write 67108352 1024'):
            with self.subTest(command=command):
                result = qemu_io('-f', 'bale', '-c', command, 't.bale',
                                 check=None)
                self.assertIn('error', result.out + result.err)

    def test_writing_to_a_read_only_image(self):
        result = qemu_io('-r', '-f', 'bale', '-c', 'write 0 4k', 't.bale',
                         check=None)
        self.assertIn('read-only', result.out + result.err)

    def test_reading_changes_nothing_on_disk(self):
        io('t.bale', 'write -P 1 0 1M')
        with open('t.bale', 'rb') as file:
            before = file.read()
        io('t.bale', 'read -P 1 0 1M', 'flush')
        qemu_img('info', 't.bale')
        qemu_img('check', 't.bale')
        qemu_img('map', '--output=json', 't.bale')
        with open('t.bale', 'rb') as file:
            self.assertTrue(file.read() == before, 'the file has changed')

    def test_runtime_options(self):
        qemu_io('--image-opts', '-c', 'write -P 3 0 1M', '-c',
                'read -P 3 0 1M', BALE_DRIVER +
                't.bale,cache-size=1M,compression-threads=1')
        io('t.bale', 'read -P 3 0 1M')

    def test_no_cache(self):
        qemu_io('--image-opts', '-c', 'write -P 3 0 1M', '-c',
                'read -P 3 0 1M', BALE_DRIVER + 't.bale,cache-size=0')

    def test_a_runtime_option_out_of_range(self):
        for option, words in (('compression-threads=1000', '256'),
                              ('cache-size=2T', 'at most')):
            result = qemu_io('--image-opts', '-c', 'read 0 4k', BALE_DRIVER +
                             't.bale,' + option, check=1)
            self.assert_one_line_error(result, option.split('=')[0], words)

    def test_bench(self):
        qemu_img('bench', '-f', 'bale', '-c', '200', '-d', '16', '-s', '64k',
                 '-w', 't.bale')
        qemu_img('bench', '-f', 'bale', '-c', '200', '-d', '16', '-s', '4k',
                 't.bale')
        qemu_img('bench', '-f', 'bale', '-c', '200', '-d', '16', '-s', '4k',
                 '-w', '--flush-interval=20', 't.bale')
        check('t.bale')

    def test_every_cache_mode(self):
        for number, mode in enumerate(('none', 'writethrough', 'writeback',
                                       'directsync', 'unsafe')):
            with self.subTest(mode=mode):
                write = f'write -P {number + 1} {number}M 300k'
                read = f'read -P {number + 1} {number}M 300k'
                io('t.bale', write, read, options=('-t', mode))
                io('t.bale', read, options=('-t', mode))

    def test_kernel_aio(self):
        io('t.bale', 'write -P 8 0 3M', 'read -P 8 0 3M',
           options=('-t', 'none', '-i', 'native'))
        io('t.bale', 'read -P 8 0 3M',
           options=('-t', 'none', '-i', 'io_uring'))


class RandomTest(bale_iotests.TestCase):
    """Random requests, the same ones on bale and on a raw file."""

    SIZE = 4 * MIB + 3 * 512

    def commands(self, count):
        rng = self.random
        out = []
        for _ in range(count):
            length = rng.choice((512, 4 * KIB, rng.randrange(1, 300) * 512,
                                 64 * KIB, rng.randrange(1, 1 * MIB)))
            length = min(length, self.SIZE)
            offset = rng.randrange(self.SIZE - length + 1)
            if rng.random() < 0.6:
                offset -= offset % 512
            if rng.random() < 0.3:
                offset -= offset % (64 * KIB)
            pattern = rng.randrange(256)
            out.append(rng.choice((
                f'write -P {pattern} {offset} {length}',
                f'write -P {pattern} {offset} {length}',
                f'aio_write -P {pattern} {offset} {length}\naio_flush',
                f'write -z {offset} {length}',
                f'write -z -u {offset} {length}',
                f'write -f -P {pattern} {offset} {length}',
                f'read {offset} {length}',
                f'flush')))
        return '\n'.join(out) + '\nquit\n'

    def run_model(self, rounds, count, *options):
        with open('model.raw', 'wb') as file:
            file.write(patterned(self.random, self.SIZE))
        words = [word for option in options for word in ('-o', option)]
        qemu_img('convert', *words, '-f', 'raw', '-O', 'bale', 'model.raw',
                 't.bale')
        for number in range(rounds):
            commands = self.commands(count)
            for name in ('model.raw', 't.bale'):
                result = qemu_io('-f', name.split('.')[1], name,
                                 stdin=commands)
                self.assertIsNone(re.search('failed|error', result.out +
                                            result.err), result)
            compare('model.raw', 't.bale', '-f', 'raw', '-F', 'bale')
            check('t.bale')
            if number % 2:
                size = self.SIZE - self.random.randrange(1000) * 512
                for name in ('model.raw', 't.bale'):
                    form = name.split('.')[1]
                    qemu_img('resize', '-q', '-f', form, '--shrink', name,
                             size)
                    qemu_img('resize', '-q', '-f', form, name, self.SIZE)

    def test_random_requests_equal_those_on_raw(self):
        self.run_model(40 if LONG else 6, 150)

    def test_small_clusters(self):
        self.run_model(20 if LONG else 3, 100, 'cluster_size=4k',
                       'page_size=2M')

    def test_large_clusters(self):
        self.run_model(20 if LONG else 3, 100, 'cluster_size=2M',
                       'compression_type=deflate')


class LargeTest(bale_iotests.TestCase):

    def test_far_offsets(self):
        create('t.bale', 1 << 50, 'cluster_size=2M')
        io('t.bale', f'write -P 1 {(1 << 50) - 4096} 4k',
           f'write -P 2 {1 << 45} 64k')
        io('t.bale', f'read -P 1 {(1 << 50) - 4096} 4k',
           f'read -P 2 {1 << 45} 64k', f'read -P 0 {1 << 44} 64k')
        check('t.bale')

    def test_large_zero_and_discard(self):
        create('t.bale', 1 << 40)
        io('t.bale', 'write -P 1 100G 1M', 'write -z -n 0 512G',
           'read -P 0 100G 1M', 'write -P 2 200G 1M')
        io('t.bale', 'read -P 2 200G 1M', 'discard 199G 2047M',
           'read -P 0 200G 1M')
        check('t.bale')

    def test_an_image_over_many_pages(self):
        raw = make_raw(self.random, 'disk.raw', 1 * GIB, parts=12,
                       part_length=2 * MIB)
        qemu_img('convert', '-o', 'page_size=2M', '-f', 'raw', '-O', 'bale',
                 raw, 't.bale')
        check('t.bale')
        compare(raw, 't.bale')


if __name__ == '__main__':
    bale_iotests.main()
