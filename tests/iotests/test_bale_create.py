#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Creating, naming, measuring, resizing bale images with qemu-img."""

import json
import os

import bale_iotests
from bale_images import (GIB, KIB, MIB, check, check_killed, compare,
                         create, io, make_raw)
from bale_iotests import qemu_img, qemu_img_info, run


class CreateTest(bale_iotests.TestCase):

    def test_info(self):
        create('t.bale', 3 * GIB, 'cluster_size=128k')
        info = qemu_img_info('t.bale')
        self.assertEqual(info['format'], 'bale')
        self.assertEqual(info['virtual-size'], 3 * GIB)
        self.assertEqual(info['cluster-size'], 128 * KIB)
        self.assertFalse(info['dirty-flag'])

    def test_is_probed(self):
        create('t.bale', 1 * MIB)
        self.assertEqual(qemu_img_info('t.bale')['format'], 'bale')

    def test_a_raw_disk_is_not_probed_as_bale(self):
        make_raw(self.random, 't.raw', 1 * MIB)
        self.assertEqual(qemu_img_info('t.raw')['format'], 'raw')

    def test_defaults(self):
        create('t.bale', 1 * GIB)
        self.assertEqual(qemu_img_info('t.bale')['cluster-size'], 64 * KIB)

    def test_options_are_listed(self):
        out = qemu_img('create', '-f', 'bale', '-o', 'help').out
        for option in ('size=', 'cluster_size=', 'compression_type=',
                       'compression_level=', 'page_size=', 'backing_file=',
                       'backing_fmt='):
            self.assertIn('\n  ' + option, '\n' + out)

    def test_all_options(self):
        create('t.bale', 1 * GIB, 'cluster_size=32k', 'page_size=4M',
               'compression_type=deflate', 'compression_level=9')
        io('t.bale', 'write -P 3 0 5M')
        io('t.bale', 'read -P 3 0 5M')
        check('t.bale')

    def test_size_is_rounded_up_to_a_sector(self):
        create('t.bale', 1000)
        self.assertEqual(qemu_img_info('t.bale')['virtual-size'], 1024)

    def test_an_image_of_no_size(self):
        create('t.bale', 0)
        check('t.bale')
        self.assertEqual(qemu_img_info('t.bale')['virtual-size'], 0)

    def test_over_an_existing_file(self):
        make_raw(self.random, 't.bale', 20 * MIB)
        create('t.bale', 1 * MIB)
        check('t.bale')
        io('t.bale', 'read -P 0 0 1M')

    def test_over_an_existing_store(self):
        create('t.bale', 10 * MIB)
        io('t.bale', 'write -P 1 0 10M')
        create('t.bale', 10 * MIB)
        io('t.bale', 'read -P 0 0 10M')
        check('t.bale')

    def test_the_description_names_no_secret_file(self):
        """A new image is small, and only the file that was named is made."""
        create('t.bale', 1 * GIB)
        self.assertEqual(os.listdir('.'), ['t.bale'])
        self.assertLess(os.stat('t.bale').st_blocks * 512, 70 * MIB)


class MeasureTest(bale_iotests.TestCase):

    def measure(self, *args):
        return json.loads(qemu_img('measure', '--output=json', '-O', 'bale',
                                   *args).out)

    def test_is_an_upper_bound(self):
        raw = make_raw(self.random, 'disk.raw', 100 * MIB)
        measured = self.measure('-f', 'raw', raw)
        qemu_img('convert', '-O', 'bale', '-o', 'compression_type=none', raw,
                 't.bale')
        size = os.stat('t.bale').st_size
        self.assertGreaterEqual(measured['required'], size)
        self.assertGreaterEqual(measured['fully-allocated'],
                                measured['required'])

    def test_by_size(self):
        measured = self.measure('--size', '10G')
        self.assertGreater(measured['fully-allocated'], 10 * GIB)
        self.assertLess(measured['required'], 200 * MIB)

    def test_with_small_pages(self):
        self.assertLess(self.measure('--size', '10G', '-o',
                                     'page_size=2M')['required'], 10 * MIB)

    def test_from_bale(self):
        create('t.bale', 100 * MIB)
        qemu_img('measure', '-O', 'raw', 't.bale')
        qemu_img('measure', '-O', 'qcow2', 't.bale')


class ResizeTest(bale_iotests.TestCase):

    def setUp(self):
        create('t.bale', 8 * MIB)
        io('t.bale', 'write -P 1 0 8M')

    def resize(self, size, *args, **kwargs):
        return qemu_img('resize', '-q', '-f', 'bale', *args, 't.bale', size,
                        **kwargs)

    def test_grow(self):
        self.resize('1G')
        self.assertEqual(qemu_img_info('t.bale')['virtual-size'], 1 * GIB)
        io('t.bale', 'read -P 1 0 8M', 'read -P 0 8M 1016M',
           'write -P 2 1000M 1M')
        io('t.bale', 'read -P 2 1000M 1M')
        check('t.bale')

    def test_shrink_and_grow_shows_zeroes(self):
        for size in (1 * MIB, 1 * MIB - 512, 70000 // 512 * 512, 512):
            with self.subTest(size=size):
                create('t.bale', 8 * MIB)
                io('t.bale', 'write -P 1 0 8M')
                self.resize(size, '--shrink')
                self.assertEqual(qemu_img_info('t.bale')['virtual-size'],
                                 size)
                self.resize('8M')
                io('t.bale', f'read -P 1 0 {size}',
                   f'read -P 0 {size} {8 * MIB - size}')
                check('t.bale')

    def test_shrinking_must_be_asked_for(self):
        result = self.resize('1M', check=1)
        self.assertIn('shrink', result.err)
        io('t.bale', 'read -P 1 0 8M')

    def test_preallocation_is_refused(self):
        result = self.resize('16M', '--preallocation=full', check=1)
        self.assert_one_line_error(result, 'preallocation', 'full')
        self.assertEqual(qemu_img_info('t.bale')['virtual-size'], 8 * MIB)

    def test_growing_over_a_longer_backing_file_shows_zeroes(self):
        create('overlay.bale', 4 * MIB, 'backing_file=t.bale',
               'backing_fmt=bale')
        qemu_img('resize', '-q', '-f', 'bale', 'overlay.bale', '8M')
        io('overlay.bale', 'read -P 1 0 4M', 'read -P 0 4M 4M')
        check('overlay.bale')

    def test_shrinking_and_growing_over_a_backing_file_shows_zeroes(self):
        create('overlay.bale', 8 * MIB, 'backing_file=t.bale',
               'backing_fmt=bale')
        for size, shrink in (('1000K', ['--shrink']), ('8M', [])):
            qemu_img('resize', '-q', '-f', 'bale', *shrink, 'overlay.bale',
                     size)
        io('overlay.bale', 'read -P 1 0 1000k', 'read -P 0 1000k 7192k')
        check('overlay.bale')


class CheckTest(bale_iotests.TestCase):

    def test_counts_clusters(self):
        create('t.bale', 8 * MIB)
        io('t.bale', 'write -P 1 0 1M')
        result = json.loads(qemu_img('check', '--output=json', 't.bale').out)
        self.assertEqual(result['total-clusters'], 128)
        self.assertEqual(result['allocated-clusters'], 16)
        self.assertEqual(result['compressed-clusters'], 16)
        self.assertEqual(result['check-errors'], 0)
        self.assertLessEqual(result['image-end-offset'],
                             os.stat('t.bale').st_size)

    def damaged(self):
        """A store with one bit flipped in what it has of cluster 3, which
        is random, so that it can be found."""
        with open('disk.raw', 'wb') as file:
            file.write(self.random.randbytes(8 * 64 * KIB))
            file.seek(3 * 64 * KIB)
        with open('disk.raw', 'rb') as file:
            file.seek(3 * 64 * KIB)
            wanted = file.read(64 * KIB)[1000:1100]
        qemu_img('convert', '-O', 'bale', '-o', 'page_size=2M', 'disk.raw',
                 't.bale')
        with open('t.bale', 'r+b') as file:
            data = bytearray(file.read())
            self.assertEqual(data.count(wanted), 1)
            place = data.index(wanted)
            file.seek(place)
            file.write(bytes([data[place] ^ 1]))

    def test_damage_is_found_and_named(self):
        self.damaged()
        result = qemu_img('check', '-f', 'bale', 't.bale', check=2)
        self.assertRegex(result.err, 'cluster 3\\b')

    def test_damage_is_never_returned_as_data(self):
        self.damaged()
        result = qemu_img('convert', '-O', 'raw', 't.bale', 'out.raw',
                          check=1)
        self.assertIn('Input/output error', result.err)
        self.assertRegex(result.err, 'cluster 3\\b')

    def test_the_rest_of_a_damaged_store_is_readable(self):
        self.damaged()
        io('t.bale', 'read 0 192k', 'read 256k 256k')

    def test_repair_of_a_good_image_changes_nothing(self):
        raw = make_raw(self.random, 'disk.raw', 8 * MIB)
        qemu_img('convert', '-O', 'bale', raw, 't.bale')
        qemu_img('check', '-r', 'leaks', 't.bale')
        qemu_img('check', '-r', 'all', 't.bale')
        check('t.bale')
        compare(raw, 't.bale')

    def test_of_an_image_that_was_not_closed(self):
        """Killed in the middle of writing: opens, and checks clean."""
        create('t.bale', 64 * MIB, 'page_size=2M')
        run(bale_iotests.BALE, 'run', 'qemu-io', '-f', 'bale', '-c',
            'write -P 1 0 1M', '-c', 'flush', '-c', 'write -P 2 1M 1M', '-c',
            'sigraise 9', 't.bale')
        check_killed('t.bale')
        io('t.bale', 'read -P 1 0 1M', 'write -P 3 2M 1M')
        io('t.bale', 'read -P 1 0 1M', 'read -P 3 2M 1M')


if __name__ == '__main__':
    bale_iotests.main()
