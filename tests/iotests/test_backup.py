#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Backup jobs of running machines into bale images: every kind of
synchronisation, in qemu-system-x86_64 and in qemu-storage-daemon. Each restore
point is compared byte for byte."""

import os

import bale_iotests
from bale_backup import DAEMON, SLOW, SYSTEM, Disk, MIB, Machine, layer, same
from bale_images import check, sha256
from bale_iotests import qemu_img, qemu_img_info, qemu_img_map


class Base(bale_iotests.TestCase):

    pieces = 0

    def restored(self, raw, image):
        """The image is sound and has what the disk had."""
        check(image)
        same(raw, image)


class SyncTest(Base):
    """One job, in both programs."""

    def each_program(self, method):
        for program in (SYSTEM, DAEMON):
            with self.subTest(program):
                method(program)

    def test_full_to_a_node_while_the_guest_writes(self):
        self.each_program(self.full_to_a_node_while_the_guest_writes)

    def full_to_a_node_while_the_guest_writes(self, program):
        disk = Disk(self, f'full-{program}')
        layer('t.bale', disk.size)
        with Machine(program, disk) as vm:
            vm.add_target('t', 't.bale')
            then = disk.freeze('then')
            vm.command('blockdev-backup', job_id='j', device=disk.name,
                       target='t', sync='full', speed=SLOW)
            for _ in range(4):
                vm.write(disk)
            self.assertGreater(vm.progress('j')['speed'], 0)
            vm.hurry('j')
            self.assertEqual(vm.end_of('j'), '')
            vm.delete('t')
        self.restored(then, 't.bale')
        # And the guest's own disk has all that it wrote
        qemu_img('compare', '-q', '-f', 'raw', '-F', 'qcow2',
                 disk.freeze('now'), disk.file)
        os.unlink('t.bale')

    def test_drive_backup_makes_the_image(self):
        self.each_program(self.drive_backup_makes_the_image)

    def drive_backup_makes_the_image(self, program):
        disk = Disk(self, f'drive-{program}')
        with Machine(program, disk) as vm:
            for compress in (False, True):
                then = disk.freeze('then')
                name = f'{program}-{compress}.bale'
                vm.command('drive-backup', job_id='j', device=disk.name,
                           target=self.path(name), format='bale',
                           sync='full', compress=compress)
                self.assertEqual(vm.end_of('j'), '')
                self.restored(then, name)
                vm.write(disk)

    def test_top_takes_the_top_layer_only(self):
        self.each_program(self.top_takes_the_top_layer_only)

    def top_takes_the_top_layer_only(self, program):
        base = Disk(self, f'base-{program}')
        disk = Disk(self, f'top-{program}', below=base)
        with Machine(program, disk) as vm:
            vm.write(disk)
            then = disk.freeze('then')
            # QEMU names the source's backing file as the new image's
            vm.command('drive-backup', job_id='j', device=disk.name,
                       target=self.path('top.bale'), format='bale',
                       sync='top')
            self.assertEqual(vm.end_of('j'), '')
            self.assertEqual(qemu_img_info('top.bale')['backing-filename'],
                             base.file)
            here = sum(e['length'] for e in qemu_img_map('top.bale')
                       if e['depth'] == 0 and e['data'])
            self.assertLess(here, 3 * MIB)
            # To a node, over a full backup of what lies below
            qemu_img('convert', '-O', 'bale', base.file, 'below.bale')
            layer('node.bale', disk.size, 'below.bale')
            vm.add_target('t', 'node.bale')
            self.assertEqual(vm.backup(disk.name, 't', 'top'), '')
            vm.delete('t')
            self.restored(then, 'node.bale')
        same(then, 'top.bale')
        os.unlink('top.bale')

    def test_none_keeps_what_the_guest_overwrites(self):
        self.each_program(self.none_keeps_what_the_guest_overwrites)

    def none_keeps_what_the_guest_overwrites(self, program):
        disk = Disk(self, f'none-{program}')
        qemu_img('create', '-q', '-f', 'bale', '-b', disk.file, '-F',
                 'qcow2', 't.bale')
        with Machine(program, disk) as vm:
            vm.add_target('t', 't.bale', backing=disk.name)
            then = disk.freeze('then')
            vm.command('blockdev-backup', job_id='j', device=disk.name,
                       target='t', sync='none')
            vm.write(disk, disk.change(30))
            url = vm.export('t')
            qemu_img('compare', '-q', '-f', 'raw', '-F', 'raw', then, url)
            vm.unexport('t')
            vm.command('block-job-cancel', device='j')
            self.assertEqual(vm.end_of('j'), 'cancelled')
            vm.delete('t')
        check('t.bale')

    def test_a_seqcache_in_front_collects_small_copies(self):
        disk = Disk(self, 'small')
        layer('t.bale', disk.size)
        with Machine(DAEMON, disk) as vm:
            vm.command('blockdev-add', driver='seqcache', node_name='t',
                       file={'driver': 'bale', 'file': {
                           'driver': 'file', 'filename': 't.bale'}})
            then = disk.freeze('then')
            vm.command('blockdev-backup', job_id='j', device='small',
                       target='t', sync='full', speed=8 * MIB)
            for _ in range(3):
                vm.write(disk)
            vm.hurry('j')
            self.assertEqual(vm.end_of('j'), '')
            vm.delete('t')
        self.restored(then, 't.bale')


class BitmapTest(Base):
    """Backups that hold only what changed."""

    def test_incrementals_over_the_last_backup(self):
        for program in (SYSTEM, DAEMON):
            with self.subTest(program):
                self.chain(program)

    def chain(self, program):
        disk = Disk(self, f'c-{program}')
        points = []
        with Machine(program, disk) as vm:
            vm.command('block-dirty-bitmap-add', node=disk.name, name='b',
                       persistent=True)
            for number in range(4):
                name = f'{program}{number}.bale'
                layer(name, disk.size, points[-1][1] if points else None)
                vm.add_target('t', name)
                raw = disk.freeze(number)
                more = {'sync': 'full'} if number == 0 else {
                    'sync': 'incremental', 'bitmap': 'b'}
                vm.command('blockdev-backup', job_id='j', device=disk.name,
                           target='t', speed=4 * MIB, **more)
                if number != 2:
                    # Belongs to the next one
                    vm.write(disk)
                vm.hurry('j')
                self.assertEqual(vm.end_of('j'), '')
                vm.delete('t')
                points.append((raw, name))
                if number == 2:
                    before = vm.dirty(disk.name, 'b')
                    self.assertEqual(before, 0)
        for raw, name in points:
            self.restored(raw, name)
        # An incremental of nothing holds nothing, one of little holds little
        sizes = [sum(e['length'] for e in qemu_img_map(name)
                     if e['depth'] == 0 and e['present'])
                 for _, name in points]
        self.assertEqual(sizes[3], 0)
        self.assertLess(sizes[1], disk.size // 4)

    def test_bitmap_modes(self):
        disk = Disk(self, 'd')
        with Machine(SYSTEM, disk) as vm:
            layer('full.bale', disk.size)
            vm.command('block-dirty-bitmap-add', node='d', name='b')
            vm.add_target('t', 'full.bale')
            self.assertEqual(vm.backup('d', 't', 'full'), '')
            vm.delete('t')
            vm.write(disk)
            dirty = vm.dirty('d', 'b')
            for mode, left in (('never', dirty), ('on-success', 0)):
                name = f'{mode}.bale'
                layer(name, disk.size, 'full.bale')
                vm.add_target('t', name)
                raw = disk.freeze(mode)
                self.assertEqual(vm.backup('d', 't', 'bitmap', bitmap='b',
                                           bitmap_mode=mode), '')
                vm.delete('t')
                self.assertEqual(vm.dirty('d', 'b'), left)
                self.restored(raw, name)
            # always: a cancelled job goes on where it was, into the same image
            vm.write(disk, disk.change(40))
            raw = disk.freeze('always')
            layer('always.bale', disk.size, 'on-success.bale')
            vm.add_target('t', 'always.bale')
            vm.command('blockdev-backup', job_id='j', device='d', target='t',
                       sync='bitmap', bitmap='b', bitmap_mode='always',
                       speed=SLOW)
            vm.command('block-job-cancel', device='j')
            self.assertEqual(vm.end_of('j'), 'cancelled')
            self.assertEqual(vm.backup('d', 't', 'bitmap', bitmap='b',
                                       bitmap_mode='always'), '')
            vm.delete('t')
            self.restored(raw, 'always.bale')

    def test_two_disks_in_one_transaction(self):
        disks = [Disk(self, 'd0'), Disk(self, 'd1', 12 * MIB)]
        with Machine(SYSTEM, *disks) as vm:
            points = []
            for number in range(3):
                actions, raws = [], []
                for disk in disks:
                    name = f'{disk.name}-{number}.bale'
                    layer(name, disk.size,
                          f'{disk.name}-{number - 1}.bale' if number else None)
                    vm.add_target(f't-{disk.name}', name)
                    raws.append((disk.freeze(number), name))
                    if number == 0:
                        actions.append({
                            'type': 'block-dirty-bitmap-add',
                            'data': {'node': disk.name, 'name': 'b'}})
                    more = {'sync': 'incremental', 'bitmap': 'b'} if number \
                        else {'sync': 'full'}
                    actions.append({'type': 'blockdev-backup', 'data': {
                        'job-id': f'j-{disk.name}', 'device': disk.name,
                        'target': f't-{disk.name}', **more}})
                # Adding a bitmap does not go with the grouped mode
                vm.command('transaction', actions=actions, properties={
                    'completion-mode': 'grouped' if number else 'individual'})
                for disk in disks:
                    vm.write(disk)
                for disk in disks:
                    self.assertEqual(vm.end_of(f'j-{disk.name}'), '')
                    vm.delete(f't-{disk.name}')
                points += raws
        for raw, name in points:
            self.restored(raw, name)

    def test_one_failing_disk_ends_the_transaction_for_both(self):
        """And the bitmaps keep what they had: the next try has all of it."""
        disks = [Disk(self, 'd0'), Disk(self, 'd1', 12 * MIB)]
        with Machine(SYSTEM, *disks) as vm:
            for disk in disks:
                vm.command('block-dirty-bitmap-add', node=disk.name, name='b')
                layer(f'{disk.name}-0.bale', disk.size)
                vm.add_target('t', f'{disk.name}-0.bale')
                self.assertEqual(vm.backup(disk.name, 't', 'full'), '')
                vm.delete('t')
                vm.write(disk, disk.change(30))
            good = {disk.name: sha256(f'{disk.name}-0.bale')
                    for disk in disks}
            for attempt in (1, 2):
                actions, raws = [], []
                for disk in disks:
                    name = f'{disk.name}-{attempt}.bale'
                    layer(name, disk.size, f'{disk.name}-0.bale')
                    raws.append((disk.freeze(attempt), name))
                    file = {'driver': 'file', 'filename': name}
                    if attempt == 1 and disk.name == 'd1':
                        file = {'driver': 'blkdebug', 'image': file,
                                'inject-error': [{'event': 'write_aio',
                                                  'errno': 5}]}
                    vm.add_target(f't-{disk.name}', name, file=file)
                    actions.append({'type': 'blockdev-backup', 'data': {
                        'job-id': f'j-{disk.name}', 'device': disk.name,
                        'target': f't-{disk.name}', 'sync': 'incremental',
                        'bitmap': 'b', 'speed': MIB if attempt == 1 else 0}})
                vm.command('transaction', actions=actions, properties={
                    'completion-mode': 'grouped'})
                ends = [vm.end_of(f'j-{disk.name}') for disk in disks]
                if attempt == 1:
                    self.assertEqual(ends, ['cancelled', 'Input/output error'])
                else:
                    self.assertEqual(ends, ['', ''])
                for disk in disks:
                    vm.delete(f't-{disk.name}')
        for raw, name in raws:
            self.restored(raw, name)
        for disk in disks:
            self.assertEqual(sha256(f'{disk.name}-0.bale'), good[disk.name])


if __name__ == '__main__':
    bale_iotests.main()
