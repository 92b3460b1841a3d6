#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Pull mode: the machine's disk as it was at a moment, exported over NBD for
somebody else to fetch (fleecing), with bale holding what the guest overwrites;
and restoring into a running machine."""

import bale_iotests
from bale_backup import DAEMON, SYSTEM, Disk, KIB, MIB, Machine, layer, same
from bale_images import check
from bale_iotests import qemu_img

# What copy-before-write copies at once. QEMU before 8.0 takes areas for not
# copied when a request goes beyond the copied part, and then says of their
# block status what the guest's disk has now: a pull loses what the guest has
# overwritten with zeroes (hbitmap_status(), QEMU's commit a4d5224c2cb6). A
# request within one such cluster gets the right answer.
CLUSTER = 64 * KIB


class PullTest(bale_iotests.TestCase):

    pieces = 0

    def test_the_old_way_a_job_that_copies_before_writes(self):
        """sync=none into a bale layer over the disk itself; somebody fetches
        the disk of that moment into a bale image of his own."""
        disk = Disk(self, 'd')
        layer('fleece.bale', disk.size)
        with Machine(SYSTEM, disk) as vm:
            vm.add_target('fleece', 'fleece.bale', backing='d')
            raw = disk.freeze('then')
            vm.command('blockdev-backup', job_id='j', device='d',
                       target='fleece', sync='none')
            url = vm.export('fleece', 'then')
            vm.write(disk, disk.change(40))
            qemu_img('convert', '-f', 'raw', '-O', 'bale', url, 'pulled.bale')
            vm.write(disk, disk.change(40))
            qemu_img('compare', '-q', '-f', 'raw', '-F', 'raw', raw, url)
            vm.unexport('fleece')
            vm.command('block-job-cancel', device='j')
            self.assertEqual(vm.end_of('j'), 'cancelled')
            vm.delete('fleece')
        check('pulled.bale')
        same(raw, 'pulled.bale')
        qemu_img('compare', '-q', '-f', 'raw', '-F', 'qcow2',
                 disk.freeze('now'), disk.file)

    def fleece(self, vm, disk, **options):
        """copy-before-write over the disk, in its export's place."""
        layer('fleece.bale', disk.size)
        vm.add_target('fleece', 'fleece.bale',
                      backing=None)
        vm.unexport(disk.name)
        vm.command('blockdev-add', driver='copy-before-write',
                   node_name='cbw', file=disk.name, target='fleece',
                   **options)
        vm.exported[disk.name] = vm.export('cbw', disk.name, writable=True)
        vm.command('blockdev-add', driver='snapshot-access',
                   node_name='access', file='cbw')
        return vm.export('access', 'then')

    def same_piece(self, vm, raw, start):
        """One cluster of the export, through NBD."""
        options = (f'driver=raw,offset={start},size={CLUSTER},'
                   'file.driver=nbd,file.export=then,file.server.type=unix,'
                   f'file.server.path={vm.path}.nbd')
        qemu_img('convert', '--image-opts', '-O', 'raw', options, 'part.raw')
        with open(raw, 'rb') as file, open('part.raw', 'rb') as part:
            file.seek(start)
            self.assertEqual(part.read(), file.read(CLUSTER), start)

    def end_fleece(self, vm):
        vm.unexport('access')
        vm.delete('access')
        vm.unexport('cbw')
        vm.delete('cbw', 'fleece')

    def test_the_new_way_a_filter_and_its_snapshot(self):
        """A job fetches it, piece by piece: see CLUSTER."""
        disk = Disk(self, 'd')
        with Machine(DAEMON, disk) as vm:
            raw = disk.freeze('then')
            self.fleece(vm, disk)
            for pulled in ('pulled.bale', 'again.bale'):
                vm.write(disk, disk.change(60))
                layer(pulled, disk.size)
                vm.add_target('pulled', pulled)
                vm.command('blockdev-backup', job_id='j', device='access',
                           target='pulled', sync='full', speed=8 * MIB,
                           x_perf={'max-workers': 4, 'max-chunk': CLUSTER})
                vm.write(disk, disk.change(30))
                vm.hurry('j')
                self.assertEqual(vm.end_of('j'), '')
                vm.delete('pulled')
            for _ in range(8):
                start = self.random.randrange(disk.size // CLUSTER) * CLUSTER
                self.same_piece(vm, raw, start)
            self.end_fleece(vm)
        check('fleece.bale')
        for pulled in ('pulled.bale', 'again.bale'):
            check(pulled)
            same(raw, pulled)
        qemu_img('compare', '-q', '-f', 'raw', '-F', 'qcow2',
                 disk.freeze('now'), disk.file)

    def test_a_bitmap_limits_what_is_kept(self):
        """Only what changed since the last backup is needed of the moment."""
        disk = Disk(self, 'd')
        with Machine(DAEMON, disk) as vm:
            vm.command('block-dirty-bitmap-add', node='d', name='b',
                       granularity=64 * KIB)
            commands = disk.change(10)
            changed = [int(command.split()[-2]) // CLUSTER * CLUSTER
                       for command in commands]
            vm.write(disk, commands)
            vm.command('block-dirty-bitmap-disable', node='d', name='b')
            raw = disk.freeze('then')
            url = self.fleece(vm, disk, bitmap={'node': 'd', 'name': 'b'})
            vm.write(disk, disk.change(60))
            for start in changed:
                self.same_piece(vm, raw, start)
            # And the rest of that moment is refused, not made up
            self.assertNotEqual(qemu_img('convert', '-f', 'raw', '-O', 'raw',
                                         url, 'all.raw', check=None).status, 0)
            self.end_fleece(vm)
        check('fleece.bale')
        kept = sum(e['length'] for e in bale_iotests.qemu_img_map(
            'fleece.bale') if e['present'])
        self.assertLessEqual(kept, 10 * 4 * 65536)

    def test_a_guest_write_outlives_a_failing_fleece(self):
        """on-cbw-error=break-snapshot: the guest goes on, the one who pulls
        gets an error and never wrong data."""
        disk = Disk(self, 'd')
        layer('fleece.bale', disk.size)
        with Machine(DAEMON, disk) as vm:
            vm.add_target('fleece', 'fleece.bale', backing=None, file={
                'driver': 'blkdebug',
                'image': {'driver': 'file', 'filename': 'fleece.bale'},
                'inject-error': [{'event': 'write_aio', 'errno': 5}]})
            vm.unexport('d')
            vm.command('blockdev-add', driver='copy-before-write',
                       node_name='cbw', file='d', target='fleece',
                       on_cbw_error='break-snapshot')
            vm.exported['d'] = vm.export('cbw', 'd', writable=True)
            vm.command('blockdev-add', driver='snapshot-access',
                       node_name='access', file='cbw')
            url = vm.export('access', 'then')
            vm.write(disk, disk.change(60))
            result = qemu_img('convert', '-f', 'raw', '-O', 'bale', url,
                              'pulled.bale', check=None)
            self.assertNotEqual(result.status, 0, result)
            self.end_fleece(vm)
        qemu_img('compare', '-q', '-f', 'raw', '-F', 'qcow2',
                 disk.freeze('now'), disk.file)


class RestoreTest(bale_iotests.TestCase):

    pieces = 0

    def backup(self):
        disk = Disk(self, 'd')
        raw = disk.freeze('then')
        qemu_img('convert', '-f', 'qcow2', '-O', 'bale', disk.file,
                 'full.bale')
        return disk, raw

    def test_the_machine_runs_from_the_backup_while_it_is_restored(self):
        """A layer over the backup is the disk at once; block-stream fetches
        the rest into it."""
        disk, _ = self.backup()
        qemu_img('create', '-q', '-f', 'qcow2', '-b', 'full.bale', '-F',
                 'bale', 'new.qcow2')
        disk.file = self.path('new.qcow2')
        with Machine(SYSTEM, disk) as vm:
            vm.write(disk)
            vm.command('block-stream', job_id='j', device='d', speed=4 * MIB)
            vm.write(disk)
            vm.hurry('j')
            self.assertEqual(vm.end_of('j'), '')
        self.assertNotIn('backing-filename',
                         bale_iotests.qemu_img_info('new.qcow2'))
        qemu_img('compare', '-q', '-f', 'raw', '-F', 'qcow2',
                 disk.freeze('now'), 'new.qcow2')
        check('full.bale')

    def test_mirrored_away_from_a_throw_away_layer(self):
        disk, raw = self.backup()
        qemu_img('create', '-q', '-f', 'qcow2', '-b', 'full.bale', '-F',
                 'bale', 'over.qcow2')
        qemu_img('create', '-q', '-f', 'qcow2', 'new.qcow2', disk.size)
        disk.file = self.path('over.qcow2')
        with Machine(SYSTEM, disk) as vm:
            vm.command('blockdev-add', driver='qcow2', node_name='new', file={
                'driver': 'file', 'filename': 'new.qcow2'})
            vm.write(disk)
            vm.command('blockdev-mirror', job_id='j', device='d',
                       target='new', sync='full', speed=8 * MIB)
            vm.write(disk)
            vm.hurry('j')
            vm.event_of({'BLOCK_JOB_READY'}, 'j')
            vm.command('block-job-complete', device='j')
            self.assertEqual(vm.end_of('j'), '')
            vm.write(disk)
        qemu_img('compare', '-q', '-f', 'raw', '-F', 'qcow2',
                 disk.freeze('now'), 'new.qcow2')
        check('full.bale')
        same(raw, 'full.bale')


if __name__ == '__main__':
    bale_iotests.main()
