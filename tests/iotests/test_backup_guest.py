#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A Debian guest under TCG, from one end to the other: it writes files with
checksums, is backed up over QMP meanwhile and killed; every restore point is
looked at, and booted from at once. Skipped where the disk cannot be made."""

import os
import re

import bale_iotests
from bale_backup import layer
from bale_guest import Guest, files_in, make_disk
from bale_images import blocks, check, check_killed, sha256
from bale_iotests import qemu_img, run


class GuestTest(bale_iotests.TestCase):

    def setUp(self):
        self.need_root()
        self.kernel, why = make_disk('d.raw')
        if not self.kernel:
            self.skipTest(why)

    def has(self, image, count, image_format='bale'):
        """All that the guest had synced before the backup is there."""
        good = files_in(image, image_format)
        self.assertGreater(count, 0)
        self.assertLessEqual(set(range(count)), good, image)
        return good

    def test_backed_up_while_it_writes_killed_and_restored(self):
        qemu_img('create', '-q', '-f', 'qcow2', '-b', 'd.raw', '-F', 'raw',
                 'd.qcow2')
        size = os.path.getsize('d.raw')
        points = []
        with Guest(self.kernel, 'driver=qcow2,file.filename=d.qcow2') as vm:
            vm.wait_written(3)
            for number in range(4):
                name = f'point{number}.bale'
                layer(name, size, points[-1][0] if points else None)
                vm.add_target('t', name)
                count = vm.written()
                actions = [{'type': 'blockdev-backup', 'data': {
                    'job-id': 'j', 'device': 'd', 'target': 't',
                    'sync': 'incremental' if number else 'full',
                    **({'bitmap': 'b'} if number else {})}}]
                if number == 0:
                    actions.insert(0, {'type': 'block-dirty-bitmap-add',
                                       'data': {'node': 'd', 'name': 'b'}})
                vm.command('transaction', actions=actions)
                self.assertEqual(vm.end_of('j'), '')
                vm.delete('t')
                points.append((name, count))
                vm.wait_written(vm.written() + 3)
            vm.process.kill()
        for name, count in points:
            check(name)
            self.has(name, count)
            if name != 'point0.bale':
                # As large as what was written, which may be much
                self.assertLess(blocks(name), blocks(points[0][0]))
        digests = {name: sha256(name) for name, _ in points}

        # At once through a throw-away layer, and restored while it runs
        last, count = points[-1]
        qemu_img('create', '-q', '-f', 'qcow2', '-b', last, '-F', 'bale',
                 'layer.qcow2')
        qemu_img('create', '-q', '-f', 'qcow2', 'restored.qcow2', size)
        with Guest(self.kernel, 'driver=qcow2,file.filename=layer.qcow2',
                   1) as vm:
            vm.wait_written(2)
            self.assertIn(f'guest: ready with {len(files_in(last))}',
                          vm.told())
            vm.command('blockdev-add', driver='qcow2', node_name='new', file={
                'driver': 'file', 'filename': 'restored.qcow2'})
            vm.command('blockdev-mirror', job_id='j', device='d',
                       target='new', sync='full')
            vm.event_of({'BLOCK_JOB_READY'}, 'j')
            vm.command('block-job-complete', device='j')
            self.assertEqual(vm.end_of('j'), '')
            more = vm.written()
            vm.wait_written(more + 2)
            vm.process.kill()
        self.has('restored.qcow2', count + more, 'qcow2')
        self.assertEqual({name: sha256(name) for name, _ in points}, digests)

    def test_boots_from_a_compressed_backup_and_writes_to_it(self):
        qemu_img('convert', '-O', 'bale', 'd.raw', 'd.bale')
        with Guest(self.kernel, 'driver=bale,file.filename=d.bale,'
                   'snapshot=on') as vm:
            vm.wait_written(2)
            vm.process.kill()
        self.assertEqual(self.read_data('d.bale'), set())
        with Guest(self.kernel, 'driver=bale,file.filename=d.bale', 1) as vm:
            vm.wait_written(5)
            count = vm.written()
            vm.process.kill()
        check_killed('d.bale')
        self.has('d.bale', count)

    def read_data(self, image):
        """Names in /data of an image, without repairs."""
        qemu_img('convert', '-O', 'raw', image, 'r.raw')
        found = run('debugfs', '-R', 'ls /data', 'r.raw').out
        os.unlink('r.raw')
        return set(re.findall(r'\d+\.sum', found))


if __name__ == '__main__':
    bale_iotests.main()
