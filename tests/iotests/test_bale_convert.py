#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""qemu-img convert from and to bale, with every option that changes how."""

import os

import bale_iotests
from bale_images import (MIB, blocks, check, compare, create,
                         loop_device, make_raw, sha256)
from bale_iotests import qemu_img, qemu_img_info, qemu_img_map, run


class ConvertTest(bale_iotests.TestCase):

    def setUp(self):
        self.raw = make_raw(self.random, 'disk.raw', 48 * MIB)

    def there_and_back(self, *args, source_format='raw', source=None,
                       options=()):
        """raw -> bale with @args, checked, and back: the same bytes."""
        words = []
        for option in options:
            words += ['-o', option]
        qemu_img('convert', *args, *words, '-f', source_format, '-O', 'bale',
                 source or self.raw, 'disk.bale')
        check('disk.bale')
        compare(self.raw, 'disk.bale', '-f', 'raw', '-F', 'bale')
        qemu_img('convert', '-f', 'bale', '-O', 'raw', 'disk.bale',
                 'back.raw')
        self.assertEqual(sha256(self.raw), sha256('back.raw'))

    def test_to_bale_and_back(self):
        self.there_and_back()

    def test_the_chain_raw_bale_qcow2_bale_raw(self):
        qemu_img('convert', '-O', 'bale', self.raw, 'a.bale')
        qemu_img('convert', '-O', 'qcow2', 'a.bale', 'b.qcow2')
        qemu_img('convert', '-O', 'bale', 'b.qcow2', 'c.bale')
        qemu_img('convert', '-O', 'raw', 'c.bale', 'd.raw')
        check('c.bale')
        self.assertEqual(sha256(self.raw), sha256('d.raw'))

    def test_is_smaller_than_the_disk(self):
        self.raw = make_raw(self.random, 'disk.raw', 48 * MIB, parts=24)
        self.there_and_back(options=['page_size=2M'])
        data = sum(e['length'] for e in qemu_img_map(self.raw)
                   if e['data'])
        self.assertLess(blocks('disk.bale'), data)

    def test_compressed_flag(self):
        self.there_and_back('-c')

    def test_out_of_order_with_16_coroutines(self):
        self.there_and_back('-W', '-m', '16')

    def test_compressed_out_of_order(self):
        self.there_and_back('-c', '-W', '-m', '16')

    def test_without_host_cache(self):
        self.there_and_back('-t', 'none', '-T', 'none', '-W', '-m', '16')

    def test_unsafe_cache(self):
        self.there_and_back('-t', 'unsafe')

    def test_writethrough(self):
        self.there_and_back('-t', 'writethrough')

    def test_no_sparse(self):
        self.there_and_back('-S', '0')

    def test_sparse_in_small_pieces(self):
        self.there_and_back('-S', '4k')

    def test_each_codec(self):
        for codec in ('deflate', 'zlib', 'zstd', 'none'):
            with self.subTest(codec=codec):
                self.there_and_back(options=[f'compression_type={codec}'])

    def test_each_level_of_zstd(self):
        for level in (1, 5):
            with self.subTest(level=level):
                self.there_and_back(options=['compression_type=zstd',
                                             f'compression_level={level}'])

    def test_cluster_sizes(self):
        for size in ('4k', '8k', '64k', '1M', '2M'):
            with self.subTest(size=size):
                self.there_and_back(options=[f'cluster_size={size}'])

    def test_small_pages(self):
        self.raw = make_raw(self.random, 'disk.raw', 48 * MIB, parts=24)
        self.there_and_back(options=['page_size=2M'])

    def test_from_qcow2(self):
        qemu_img('convert', '-O', 'qcow2', self.raw, 'disk.qcow2')
        self.there_and_back(source='disk.qcow2', source_format='qcow2')

    def test_from_bale_to_bale(self):
        qemu_img('convert', '-O', 'bale', self.raw, 'first.bale')
        self.there_and_back(source='first.bale', source_format='bale')

    def test_size_that_is_no_multiple_of_the_cluster(self):
        self.raw = make_raw(self.random, 'odd.raw', 5 * MIB + 512)
        self.there_and_back()
        self.there_and_back('-c', '-W')

    def test_size_that_is_no_multiple_of_a_sector(self):
        make_raw(self.random, 'odd.raw', 3 * MIB + 100)
        qemu_img('convert', '-f', 'raw', '-O', 'bale', 'odd.raw', 'odd.bale')
        qemu_img('convert', '-O', 'raw', 'odd.bale', 'back.raw')
        with open('odd.raw', 'rb') as one, open('back.raw', 'rb') as other:
            expected = one.read()
            self.assertEqual(other.read(), expected + bytes(412))

    def test_an_empty_disk(self):
        self.raw = make_raw(self.random, 'empty.raw', 0, part_length=0)
        self.there_and_back()

    def test_into_an_existing_image(self):
        create('disk.bale', 48 * MIB)
        qemu_img('convert', '-n', '-f', 'raw', '-O', 'bale', self.raw,
                 'disk.bale')
        check('disk.bale')
        compare(self.raw, 'disk.bale')

    def test_over_an_image_with_other_data(self):
        """-n writes zeroes too, over what was there."""
        other = make_raw(self.random, 'other.raw', 48 * MIB, parts=8)
        qemu_img('convert', '-f', 'raw', '-O', 'bale', other, 'disk.bale')
        qemu_img('convert', '-n', '-f', 'raw', '-O', 'bale', self.raw,
                 'disk.bale')
        check('disk.bale')
        compare(self.raw, 'disk.bale')

    def test_target_is_zero(self):
        create('disk.bale', 48 * MIB)
        qemu_img('convert', '-n', '--target-is-zero', '-f', 'raw', '-O',
                 'bale', self.raw, 'disk.bale')
        compare(self.raw, 'disk.bale')

    def test_holes_take_no_space(self):
        with open('hole.raw', 'wb') as file:
            file.truncate(1 << 40)
        qemu_img('convert', '-f', 'raw', '-O', 'bale', 'hole.raw',
                 'hole.bale')
        self.assertLess(blocks('hole.bale'), 70 * MIB)
        self.assertEqual(qemu_img_info('hole.bale')['virtual-size'], 1 << 40)

    def test_to_and_from_a_block_device(self):
        self.need_root()
        with open('backing', 'wb') as file:
            file.truncate(256 * MIB)
        with loop_device('backing') as device:
            qemu_img('convert', '-f', 'raw', '-O', 'bale', '-t', 'none',
                     self.raw, device)
            check(device)
            compare(self.raw, device, '-f', 'raw', '-F', 'bale')
            qemu_img('convert', '-f', 'bale', '-O', 'raw', device,
                     'back.raw')
        self.assertEqual(sha256(self.raw), sha256('back.raw'))

    def test_to_a_block_device_with_sectors_of_4_kib(self):
        self.need_root()
        with open('backing', 'wb') as file:
            file.truncate(256 * MIB)
        with loop_device('backing', '--sector-size', '4096',
                         '--direct-io=on') as device:
            qemu_img('convert', '-f', 'raw', '-O', 'bale', '-t', 'none',
                     self.raw, device)
            check(device)
            compare(self.raw, device, '-f', 'raw', '-F', 'bale')

    def test_a_small_block_device_is_full(self):
        self.need_root()
        big = make_raw(self.random, 'big.raw', 64 * MIB, parts=2,
                       part_length=30 * MIB)
        with open('backing', 'wb') as file:
            file.truncate(10 * MIB)
        with loop_device('backing') as device:
            result = qemu_img('convert', '-f', 'raw', '-O', 'bale', '-o',
                              'page_size=2M', big, device, check=1)
            self.assertIn('No space left on device', result.err)
            check(device)

    def test_a_range_by_dd(self):
        """The same as qemu-img dd takes from the raw disk."""
        qemu_img('convert', '-O', 'bale', self.raw, 'disk.bale')
        for name in ('disk.raw', 'disk.bale'):
            qemu_img('dd', '-f', name.split('.')[1], '-O', 'raw', 'bs=64k',
                     'count=30', 'skip=3', f'if={name}', f'of={name}.part')
        self.assertEqual(sha256('disk.raw.part'), sha256('disk.bale.part'))

    def test_dd_to_bale(self):
        qemu_img('dd', '-f', 'raw', '-O', 'bale', 'bs=1M',
                 f'if={self.raw}', 'of=disk.bale')
        check('disk.bale')
        compare(self.raw, 'disk.bale')

    def test_a_partition_table_and_a_file_system(self):
        """A disk with a GPT and ext4, made on the spot."""
        self.need('sfdisk', 'mkfs.ext4')
        with open('disk.img', 'wb') as file:
            file.truncate(64 * MIB)
        run('sfdisk', '-q', 'disk.img', stdin='label: gpt\nstart=1MiB\n',
            check=0)
        with open('fs.img', 'wb') as file:
            file.truncate(62 * MIB)
        # Not this directory: Python makes files in it while tests run
        run('mkfs.ext4', '-q', '-d', os.path.join(bale_iotests.TOP, 'block'),
            'fs.img', check=0)
        run('dd', 'if=fs.img', 'of=disk.img', 'bs=1M', 'seek=1',
            'conv=notrunc,sparse', 'status=none', check=0)
        self.raw = 'disk.img'
        self.there_and_back('-W', '-m', '16', '-t', 'none')


if __name__ == '__main__':
    bale_iotests.main()
