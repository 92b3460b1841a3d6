#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Chains: bale over and under other formats; commit, rebase, compare."""

import os

import bale_iotests
from bale_images import KIB, MIB, check, compare, create, io, make_raw
from bale_iotests import qemu_img, qemu_img_info, qemu_img_map

SIZE = 16 * MIB


class BackingTest(bale_iotests.TestCase):

    def setUp(self):
        create('base.bale', SIZE)
        io('base.bale', 'write -P 1 0 8M')

    def overlay(self, name='top.bale', base='base.bale', base_format='bale',
                size=SIZE):
        create(name, size, f'backing_file={base}',
               f'backing_fmt={base_format}')

    def test_info_names_the_backing_file(self):
        self.overlay()
        info = qemu_img_info('top.bale')
        self.assertEqual(info['backing-filename'], 'base.bale')
        self.assertEqual(info['backing-filename-format'], 'bale')

    def test_size_comes_from_the_backing_file(self):
        qemu_img('create', '-q', '-f', 'bale', '-b', 'base.bale', '-F',
                 'bale', 'top.bale')
        self.assertEqual(qemu_img_info('top.bale')['virtual-size'], SIZE)

    def test_shows_what_lies_under_it(self):
        self.overlay()
        io('top.bale', 'read -P 1 0 8M', 'read -P 0 8M 8M')

    def test_a_part_of_a_cluster_is_completed_from_below(self):
        self.overlay()
        io('top.bale', 'write -P 2 10000 5000', 'write -P 3 8380000 20000')
        io('top.bale', 'read -P 1 0 10000', 'read -P 2 10000 5000',
           'read -P 1 15000 8365000', 'read -P 3 8380000 20000',
           'read -P 0 8400000 100000')
        io('base.bale', 'read -P 1 0 8M')
        check('top.bale')

    def test_zeroes_hide_what_lies_under_them(self):
        self.overlay()
        io('top.bale', 'write -z 1M 1M', 'write -z -u 3M 1M',
           'write -z 6000k 100k')
        io('top.bale', 'read -P 1 0 1M', 'read -P 0 1M 1M', 'read -P 1 2M 1M',
           'read -P 0 3M 1M', 'read -P 0 6000k 100k', 'read -P 1 6100k 100k')

    def test_discard_hides_what_lies_under_it(self):
        self.overlay()
        io('top.bale', 'write -P 2 0 1M', 'discard 0 2M')
        io('top.bale', 'read -P 0 0 2M', 'read -P 1 2M 1M')

    def test_a_shorter_backing_file(self):
        self.overlay(size=2 * SIZE)
        io('top.bale', 'read -P 1 0 8M', 'read -P 0 8M 24M',
           f'write -P 5 {SIZE - 1000} 2000')
        io('top.bale', f'read -P 0 {SIZE - 2000} 1000',
           f'read -P 5 {SIZE - 1000} 2000', f'read -P 0 {SIZE + 1000} 1000')
        check('top.bale')

    def test_a_shorter_backing_file_that_ends_in_a_cluster(self):
        make_raw(self.random, 'odd.raw', 1 * MIB + 1536, part_length=10)
        with open('odd.raw', 'r+b') as file:
            file.seek(1 * MIB)
            file.write(b'\7' * 1536)
        self.overlay(base='odd.raw', base_format='raw')
        io('top.bale', 'write -P 5 1070k 1k', 'read -P 7 1M 1536')
        io('top.bale', 'read -P 7 1M 1536', 'read -P 0 1050112 45568',
           'read -P 5 1070k 1k')

    def test_over_raw_and_qcow2(self):
        raw = make_raw(self.random, 'base.raw', SIZE)
        qemu_img('convert', '-O', 'qcow2', raw, 'base.qcow2')
        for form in ('raw', 'qcow2'):
            with self.subTest(base=form):
                self.overlay(f'top-{form}', f'base.{form}', form)
                compare(raw, f'top-{form}')
                io(f'top-{form}', 'write -P 2 1000 1000000')
                io(f'top-{form}', 'read -P 2 1000 1000000')
                check(f'top-{form}')

    def test_under_qcow2(self):
        qemu_img('create', '-q', '-f', 'qcow2', '-b', 'base.bale', '-F',
                 'bale', 'top.qcow2')
        compare('base.bale', 'top.qcow2')

    def test_a_chain_of_four(self):
        names = ['base.bale']
        for number in range(2, 6):
            name = f'l{number}.bale'
            self.overlay(name, names[-1])
            io(name, f'write -P {number} {number}M 1M')
            names.append(name)
        io(names[-1], 'read -P 1 0 2M', 'read -P 2 2M 1M', 'read -P 3 3M 1M',
           'read -P 4 4M 1M', 'read -P 5 5M 1M', 'read -P 1 6M 2M')
        depths = [e['depth'] for e in qemu_img_map(names[-1])
                  if e['start'] in (2 * MIB, 3 * MIB, 4 * MIB, 5 * MIB)]
        self.assertEqual(depths, [3, 2, 1, 0])

    def test_other_cluster_sizes_below(self):
        create('small.bale', SIZE, 'cluster_size=4k', 'backing_file=base.bale',
               'backing_fmt=bale')
        io('small.bale', 'write -P 2 4k 4k', 'write -P 3 100k 1k')
        self.overlay('top.bale', 'small.bale')
        io('top.bale', 'write -P 4 8k 1k')
        io('top.bale', 'read -P 1 0 4k', 'read -P 2 4k 4k', 'read -P 4 8k 1k',
           'read -P 1 9k 91k', 'read -P 3 100k 1k')

    def test_commit(self):
        self.overlay()
        io('top.bale', 'write -P 2 1M 1M', 'write -z 4M 1M',
           'write -P 3 12M 100k')
        qemu_img('convert', '-O', 'raw', 'top.bale', 'expected.raw')
        qemu_img('commit', '-q', '-f', 'bale', 'top.bale')
        compare('expected.raw', 'base.bale')
        compare('expected.raw', 'top.bale')
        for name in ('base.bale', 'top.bale'):
            check(name)
        self.assertEqual([e for e in qemu_img_map('top.bale')
                          if e['depth'] == 0 and e['data']], [])

    def test_commit_keeping_the_overlay(self):
        self.overlay()
        io('top.bale', 'write -P 2 1M 1M')
        qemu_img('commit', '-q', '-d', '-f', 'bale', 'top.bale')
        io('base.bale', 'read -P 2 1M 1M')

    def test_commit_into_a_smaller_base(self):
        self.overlay(size=2 * SIZE)
        io('top.bale', 'write -P 2 20M 1M')
        qemu_img('commit', '-q', '-f', 'bale', 'top.bale')
        io('base.bale', 'read -P 1 0 8M', 'read -P 2 20M 1M')

    def test_commit_from_and_into_other_formats(self):
        for top, base in (('bale', 'qcow2'), ('qcow2', 'bale')):
            with self.subTest(top=top):
                qemu_img('convert', '-O', base, 'base.bale', f'b.{base}')
                qemu_img('create', '-q', '-f', top, '-b', f'b.{base}', '-F',
                         base, f't.{top}')
                bale_iotests.qemu_io('-f', top, '-c', 'write -P 8 3M 2M',
                                     f't.{top}')
                qemu_img('commit', '-q', f't.{top}')
                bale_iotests.qemu_io('-f', base, '-c', 'read -P 8 3M 2M',
                                     f'b.{base}')
                out = bale_iotests.qemu_io('-f', base, '-c',
                                           'read -P 8 3M 2M', f'b.{base}').out
                self.assertNotIn('failed', out)

    def test_rebase_to_another_base(self):
        create('other.bale', SIZE)
        io('other.bale', 'write -P 1 0 4M', 'write -P 9 4M 4M',
           'write -P 8 12M 1M')
        self.overlay()
        io('top.bale', 'write -P 2 1M 1M')
        qemu_img('convert', '-O', 'raw', 'top.bale', 'expected.raw')
        qemu_img('rebase', '-f', 'bale', '-b', 'other.bale', '-F', 'bale',
                 'top.bale')
        compare('expected.raw', 'top.bale')
        check('top.bale')
        self.assertEqual(qemu_img_info('top.bale')['backing-filename'],
                         'other.bale')

    def test_rebase_to_nothing(self):
        self.overlay()
        io('top.bale', 'write -P 2 1M 1M')
        qemu_img('rebase', '-f', 'bale', '-b', '', 'top.bale')
        os.unlink('base.bale')
        io('top.bale', 'read -P 1 0 1M', 'read -P 2 1M 1M', 'read -P 1 2M 6M',
           'read -P 0 8M 8M')
        self.assertNotIn('backing-filename', qemu_img_info('top.bale'))

    def test_rebase_without_copying(self):
        self.overlay()
        os.rename('base.bale', 'moved.bale')
        qemu_img('rebase', '-u', '-f', 'bale', '-b', 'moved.bale', '-F',
                 'bale', 'top.bale')
        io('top.bale', 'read -P 1 0 8M')

    def test_a_missing_backing_file(self):
        self.overlay()
        os.unlink('base.bale')
        result = qemu_img('convert', '-O', 'raw', 'top.bale', 'out.raw',
                          check=1)
        self.assert_one_line_error(result, 'base.bale',
                                   'No such file or directory')

    def test_convert_with_a_backing_file(self):
        self.overlay()
        io('top.bale', 'write -P 2 1M 1M')
        qemu_img('convert', '-f', 'bale', '-O', 'bale', '-B', 'base.bale',
                 '-F', 'bale', 'top.bale', 'copy.bale')
        compare('top.bale', 'copy.bale')
        data = [e for e in qemu_img_map('copy.bale')
                if e['depth'] == 0 and e['data']]
        self.assertEqual(sum(e['length'] for e in data), 1 * MIB)

    def test_flattening(self):
        self.overlay()
        io('top.bale', 'write -P 2 1M 1M')
        qemu_img('convert', '-O', 'bale', 'top.bale', 'flat.bale')
        compare('top.bale', 'flat.bale')
        self.assertNotIn('backing-filename', qemu_img_info('flat.bale'))

    def test_a_random_chain_equals_its_model(self):
        """Writes into the top of a chain, against a flat raw file."""
        rng = self.random
        with open('model.raw', 'wb') as file:
            file.truncate(SIZE)
        bale_iotests.qemu_io('-f', 'raw', '-c', 'write -P 1 0 8M',
                             'model.raw')
        name = 'base.bale'
        for number in range(4):
            below, name = name, f'layer{number}.bale'
            self.overlay(name, below)
            commands = []
            for _ in range(40):
                length = rng.randrange(1, 400 * KIB)
                offset = rng.randrange(SIZE - length)
                commands.append(rng.choice((
                    f'write -P {rng.randrange(256)} {offset} {length}',
                    f'write -z {offset} {length}')))
            io(name, *commands)
            words = [word for command in commands for word in ('-c', command)]
            bale_iotests.qemu_io('-f', 'raw', *words, 'model.raw')
            compare('model.raw', name)
            check(name)
        while qemu_img_info(name).get('backing-filename'):
            below = qemu_img_info(name)['backing-filename']
            qemu_img('commit', '-q', '-d', name)
            name = below
        compare('model.raw', 'base.bale')
        check('base.bale')


if __name__ == '__main__':
    bale_iotests.main()
