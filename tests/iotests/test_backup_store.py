#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""
Goal: full backups and incrementals of several disks as images of one store;
each restore point verified, and the space of old ones given back.
"""

import json
import os

import bale_iotests
from bale_backup import DAEMON, MIB, SLOW, SYSTEM, Disk, Machine
from bale_images import compare, verify_store
from bale_iotests import BUILD, TOP, bale, qemu_img, run

CLIENT = f'{TOP}/scripts/bale-backup'


class Base(bale_iotests.TestCase):
    pieces = 0

    def images(self):
        return {i['name']: i for i in json.loads(
            bale('image', 'list', '--json', 'x.bale', check=0).out)}

    def same(self, raw, image):
        if os.path.exists('out.raw'):
            os.unlink('out.raw')
        bale('export', '-i', image, 'x.bale', 'out.raw', check=0)
        compare(raw, 'out.raw', '-f', 'raw', '-F', 'raw')
        self.assertEqual(os.path.getsize(raw), os.path.getsize('out.raw'))

    def verify(self, points, killed=False):
        verify_store('x.bale', killed)
        for raw, image in points:
            self.same(raw, image)


class QmpTest(Base):
    """What a client does, command by command."""

    def add(self, vm, image):
        vm.command('blockdev-add', driver='bale', node_name=image,
                   image=image, file={'driver': 'file', 'filename': 'x.bale'})

    def action(self, disk, sync, target, **more):
        return {'type': 'blockdev-backup', 'data': {
            'job-id': f'j-{target}', 'device': disk.name, 'sync': sync,
            'target': target, **more}}

    def add_bitmap(self, disk, name):
        return {'type': 'block-dirty-bitmap-add', 'data': {
            'node': disk.name, 'name': name}}

    def test_two_disks_in_one_transaction(self):
        for program in (SYSTEM, DAEMON):
            disks = [Disk(self, 'd0'), Disk(self, 'd1', 12 * MIB)]
            points = []
            qemu_img('create', '-q', '-f', 'bale', '-o', 'image=d0.0',
                     'x.bale', disks[0].size)
            with Machine(program, *disks) as vm:
                self.add(vm, 'd0.0')
                vm.command('bale-image-create', node_name='d0.0',
                           image='d1.0', size=disks[1].size)
                self.add(vm, 'd1.0')
                for n in range(4):
                    images = [f'{disk.name}.{n}' for disk in disks]
                    points += [(disk.freeze(n), image)
                               for disk, image in zip(disks, images)]
                    actions = []
                    for disk, image in zip(disks, images):
                        if n:
                            vm.command('bale-image-clone', node_name='d0.0',
                                       image=f'{disk.name}.{n - 1}',
                                       new_name=image)
                            self.add(vm, image)
                        how = {'sync': 'full'} if n == 0 else {
                            'sync': 'bitmap', 'bitmap': f'b{n - 1}',
                            'bitmap_mode': 'never'}
                        how = {k.replace('_', '-'): v for k, v in how.items()}
                        actions += [self.add_bitmap(disk, f'b{n}'),
                                    self.action(disk, target=image, **how)]
                    vm.command('transaction', actions=actions)
                    for disk in disks:
                        vm.write(disk)
                    for image in images:
                        self.assertEqual(vm.end_of(f'j-{image}'), '')
                    if n:
                        vm.delete(*images)
                if program == SYSTEM:
                    vm.delete('d1.0', 'd0.0')
                else:
                    # All that was completed must be there
                    vm.process.kill()
            self.assertEqual(self.images()['d0.3']['layers'], 4)
            self.verify(points, killed=program == DAEMON)
            os.unlink('x.bale')

    def test_an_incremental_holds_what_changed(self):
        disk = Disk(self, 'd')
        qemu_img('create', '-q', '-f', 'bale', '-o', 'image=i0', 'x.bale',
                 disk.size)
        with Machine(DAEMON, disk) as vm:
            vm.command('block-dirty-bitmap-add', node='d', name='b')
            self.add(vm, 'i0')
            self.assertEqual(vm.backup('d', 'i0', 'full'), '')
            vm.command('block-dirty-bitmap-clear', node='d', name='b')
            with open('part', 'wb') as file:
                file.write(self.random.randbytes(128 * 1024))
            vm.write(disk, [f'write -q -s {self.path("part")} 4M 128k'])
            vm.command('bale-image-clone', node_name='i0', image='i0',
                       new_name='i1')
            self.add(vm, 'i1')
            self.assertEqual(vm.backup('d', 'i1', 'incremental', bitmap='b'),
                             '')
            vm.delete('i0', 'i1')
        own = self.images()['i1']['own-bytes']
        self.assertGreaterEqual(own, 128 * 1024)
        self.assertLess(own, 160 * 1024)

    def test_a_cancelled_one_leaves_the_last(self):
        disk = Disk(self, 'd')
        raw = disk.freeze('0')
        qemu_img('create', '-q', '-f', 'bale', '-o', 'image=i0', 'x.bale',
                 disk.size)
        with Machine(DAEMON, disk) as vm:
            vm.command('block-dirty-bitmap-add', node='d', name='b')
            self.add(vm, 'i0')
            self.assertEqual(vm.backup('d', 'i0', 'full'), '')
            vm.write(disk)
            vm.command('bale-image-clone', node_name='i0', image='i0',
                       new_name='i1')
            self.add(vm, 'i1')
            vm.command('blockdev-backup', job_id='j', device='d', target='i1',
                       sync='incremental', bitmap='b', speed=SLOW)
            vm.command('block-job-cancel', device='j', force=True)
            self.assertEqual(vm.end_of('j'), 'cancelled')
            vm.delete('i1')
            vm.command('bale-image-delete', node_name='i0', image='i1')
            vm.delete('i0')
        self.verify([(raw, 'i0')])


class ClientTest(Base):
    """scripts/bale-backup with a store."""

    def setUp(self):
        self.python = run(f'{TOP}/scripts/qemu-headers', '--quiet',
                          check=0).out.strip() + '/python'

    def client(self, vm, *args, check_status=0):
        kind, *nodes = args
        return run('/usr/bin/python3', CLIENT, kind, vm.path + '.client',
                   'x.bale', *nodes, check=check_status,
                   env={'PYTHONPATH': self.python,
                        'BALE_TOOL': f'{BUILD}/tools/bale'})

    def machine(self, *disks):
        path = os.path.abspath(f'qmp{Machine.number + 1}.sock.client')
        return Machine(SYSTEM, *disks, args=[
            '-qmp', f'unix:{path},server=on,wait=off'])

    def back_up(self, vm, kind, *disks):
        """The restore points, as pairs of a raw file and an image."""
        raws = [disk.freeze(self.pieces) for disk in disks]
        self.pieces += 1
        done = self.client(vm, kind, *(disk.name for disk in disks))
        images = [line.split(' ', 1)[1] for line in done.out.splitlines()]
        for disk in disks:
            vm.write(disk)
        return list(zip(raws, images))

    def test_a_day_and_the_next(self):
        disks = [Disk(self, 'd0'), Disk(self, 'd1', 12 * MIB)]
        points = []
        with self.machine(*disks) as vm:
            for kind in ('full', 'incremental', 'incremental', 'full',
                         'incremental'):
                points += self.back_up(vm, kind, *disks)
            self.assertEqual(len([i for i in vm.command(
                'query-named-block-nodes', flat=True)
                if i['drv'] == 'bale']), 0)
        self.assertEqual(set(self.images()), {i for _, i in points})
        self.assertTrue(all(i['read-only'] for i in self.images().values()))
        self.verify(points)
        # The first day goes, but for its last hour, then that as well
        before = os.stat('x.bale').st_blocks
        for old, kept in ((points[:4], points[4:]), (points[4:6],
                                                     points[6:])):
            for _, image in old:
                bale('image', 'read-write', 'x.bale', image, check=0)
                bale('image', 'delete', 'x.bale', image, check=0)
            bale('compact', 'x.bale', check=0)
            self.verify(kept)
        self.assertLess(os.stat('x.bale').st_blocks, before)

    def test_the_store_is_open_in_the_machine(self):
        disks = [Disk(self, 'd0'), Disk(self, 'd1', 12 * MIB)]
        qemu_img('create', '-q', '-f', 'bale', '-o', 'image=else', 'x.bale',
                 '4M')
        points = []
        with self.machine(*disks) as vm:
            vm.command('blockdev-add', driver='bale', node_name='else',
                       image='else', file={'driver': 'file',
                                           'filename': 'x.bale'})
            for kind in ('full', 'incremental'):
                points += self.back_up(vm, kind, *disks)
            vm.delete('else')
        self.verify(points)

    def test_a_failed_one_leaves_nothing_and_loses_nothing(self):
        disk = Disk(self, 'd')
        with self.machine(disk) as vm:
            points = self.back_up(vm, 'full', disk)
            before = self.images()
            self.client(vm, 'full', 'd', 'd', check_status=1)
            self.client(vm, 'incremental', 'd', 'nobody', check_status=1)
            self.assertEqual(self.images(), before)
            points += self.back_up(vm, 'incremental', disk)
        self.verify(points)


if __name__ == '__main__':
    bale_iotests.main()
