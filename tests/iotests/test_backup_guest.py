#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A Debian guest under TCG, from one end to the other: it writes files with
checksums, is backed up over QMP meanwhile and killed; every restore point is
looked at, and booted from at once. Skipped where the disk cannot be made."""

import os
import re
import shutil

import bale_iotests
from bale_backup import MIB, Machine, SYSTEM, layer
from bale_images import check, sha256
from bale_iotests import TOP, qemu_img, run, wait_until

# The guest's first and only program
INIT = '''#!/bin/sh
mount -t proc proc /proc
mkdir -p /data
n=$(ls /data | grep -c sum)
echo "guest: ready with $n" > /dev/ttyS0
while :; do
    head -c $((65536 + n * 1000)) /dev/urandom > /data/$n
    (cd /data && sha256sum $n > $n.sum)
    sync
    echo "guest: wrote $n" > /dev/ttyS0
    n=$((n + 1))
    [ $n -lt 300 ] || n=0
done
'''
BOOT_S = 240


class Guest(Machine):
    """A machine that boots; its disk is `-drive` @drive, as drive-d."""

    def __init__(self, kernel, drive, number=0):
        self.console = os.path.abspath(f'console{number}')
        super().__init__(SYSTEM, args=[
            '-machine', 'pc', '-accel', 'tcg', '-m', '512', '-no-reboot',
            '-kernel', f'{kernel}.vmlinuz', '-initrd', f'{kernel}.initrd',
            '-append', 'root=/dev/vda rw console=ttyS0 init=/bale-init quiet',
            '-serial', f'file:{self.console}',
            '-drive', f'if=none,id=drive-d,node-name=d,{drive}',
            '-device', 'virtio-blk-pci,drive=drive-d'])

    def told(self):
        with open(self.console, encoding='utf-8', errors='replace') as file:
            return file.read()

    def written(self):
        """How many files the guest has written and synced."""
        return len(re.findall('guest: wrote', self.told()))

    def wait_written(self, count):
        wait_until(lambda: self.written() >= count or
                   not self.process.running(),
                   f'the guest writes {count} files: {self.told()[-1000:]}',
                   BOOT_S)


class GuestTest(bale_iotests.TestCase):

    def setUp(self):
        self.need_root()
        done = run(f'{TOP}/scripts/test-disk', timeout_s=900)
        if done.status:
            self.skipTest(f'no test disk: {done.err[-200:]}')
        raw = done.out.strip()
        self.kernel = raw[:-len('.raw')]
        run('cp', '--sparse=always', raw, 'd.raw', check=0)
        with open('init', 'w', encoding='ascii') as file:
            file.write(INIT)
        run('debugfs', '-w', '-f', '-', 'd.raw', check=0, stdin=(
            'write init bale-init\nsif bale-init mode 0100755\n'))

    def files_in(self, image, image_format='bale'):
        """Numbers of the files of a restore point; each checksum is right,
        but that of the one being written."""
        qemu_img('convert', '-f', image_format, '-O', 'raw', image, 'r.raw')
        self.assertIn(run('e2fsck', '-fy', 'r.raw').status, (0, 1))
        shutil.rmtree('out', ignore_errors=True)
        os.mkdir('out')
        run('debugfs', '-R', 'rdump /data out', 'r.raw', check=0)
        good = set()
        for name in os.listdir('out/data'):
            if name.endswith('.sum'):
                with open(f'out/data/{name}', encoding='ascii') as file:
                    digest = file.read().split()
                if digest and sha256(f'out/data/{name[:-4]}') == digest[0]:
                    good.add(int(name[:-4]))
        os.unlink('r.raw')
        return good

    def has(self, image, count, image_format='bale'):
        """All that the guest had synced before the backup is there."""
        good = self.files_in(image, image_format)
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
                self.assertLess(os.stat(name).st_blocks * 512, 64 * MIB)
        digests = {name: sha256(name) for name, _ in points}

        # At once through a throw-away layer, and restored while it runs
        last, count = points[-1]
        qemu_img('create', '-q', '-f', 'qcow2', '-b', last, '-F', 'bale',
                 'layer.qcow2')
        qemu_img('create', '-q', '-f', 'qcow2', 'restored.qcow2', size)
        with Guest(self.kernel, 'driver=qcow2,file.filename=layer.qcow2',
                   1) as vm:
            vm.wait_written(2)
            self.assertIn(f'guest: ready with {len(self.files_in(last))}',
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
        check('d.bale')
        self.has('d.bale', count)

    def read_data(self, image):
        """Names in /data of an image, without repairs."""
        qemu_img('convert', '-O', 'raw', image, 'r.raw')
        found = run('debugfs', '-R', 'ls /data', 'r.raw').out
        os.unlink('r.raw')
        return set(re.findall(r'\d+\.sum', found))


if __name__ == '__main__':
    bale_iotests.main()
