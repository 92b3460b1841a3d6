#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/backup.md, line by line, and what its client does when it is harder."""

import os
import re

import bale_iotests
from bale_backup import MIB, Disk, Machine, SYSTEM, same
from bale_images import check, compare
from bale_iotests import BUILD, TOP, bale, qemu_img_info, run

CLIENT = f'{TOP}/scripts/bale-backup'


class HowToTest(bale_iotests.TestCase):

    def test_line_by_line(self):
        self.need_root()
        done = run(f'{TOP}/scripts/test-disk', timeout_s=900)
        if done.status:
            self.skipTest(f'no test disk: {done.err[-200:]}')
        with open(f'{TOP}/docs/backup.md', encoding='utf-8') as file:
            blocks = re.findall(r'^```sh\n(.*?)^```$', file.read(),
                                re.MULTILINE | re.DOTALL)
        self.assertGreater(len(blocks), 10)
        script = ''.join(blocks).replace('BALE=/path/to/bale', f'BALE={TOP}')
        script = script.replace('$BALE/build/', f'{BUILD}/')
        try:
            result = run('/bin/bash', '-euxc', script, timeout_s=800,
                         env={'BALE_TOOL': f'{BUILD}/tools/bale'})
            self.assertEqual(result.status, 0, result)
            self.assertEqual([name for name in os.listdir('.')
                              if not name.endswith('.sock')], [])
        finally:
            for name in ('vm', 'look', 'new'):
                if os.path.exists(f'{name}.pid'):
                    with open(f'{name}.pid', encoding='ascii') as file:
                        run('kill', file.read().strip())


class ClientTest(bale_iotests.TestCase):
    """The client and what can happen to it."""

    pieces = 0

    def setUp(self):
        self.python = run(f'{TOP}/scripts/qemu-headers', '--quiet',
                          check=0).out.strip() + '/python'

    def client(self, vm, *args, check_status=0, options=(), where='backups'):
        kind, *nodes = args
        return run('/usr/bin/python3', CLIENT, *options, kind, self.other(vm),
                   where, *nodes, check=check_status,
                   env={'PYTHONPATH': self.python,
                        'BALE_TOOL': f'{BUILD}/tools/bale'})

    def other(self, vm):
        return vm.path + '.client'

    def machine(self, *disks):
        number = Machine.number + 1
        path = os.path.abspath(f'qmp{number}.sock.client')
        return Machine(SYSTEM, *disks, args=[
            '-qmp', f'unix:{path},server=on,wait=off'])

    def test_two_disks_full_and_incremental(self):
        disks = [Disk(self, 'd0'), Disk(self, 'd1', 12 * MIB)]
        points = []
        with self.machine(*disks) as vm:
            for kind in ('full', 'incremental', 'incremental', 'full',
                         'incremental'):
                raws = [disk.freeze(len(points)) for disk in disks]
                done = self.client(vm, kind, 'd0', 'd1')
                points += zip(raws, done.out.split())
                for disk in disks:
                    vm.write(disk)
                    bitmaps = [b for b in vm.command(
                        'query-named-block-nodes', flat=True)
                        if b['node-name'] == disk.name][0]['dirty-bitmaps']
                    self.assertEqual(len(bitmaps), 1)
        self.assertEqual(len(points), 10)
        for raw, image in points:
            check(image)
            same(raw, image)
        self.assertNotIn('backing-filename',
                         qemu_img_info(points[6][1]))
        self.assertEqual(qemu_img_info(points[8][1])['backing-filename'],
                         os.path.basename(points[6][1]))

    def test_gently_and_through_a_cache(self):
        disks = [Disk(self, 'd0'), Disk(self, 'd1', 12 * MIB)]
        names = [disk.name for disk in disks]
        points = []
        with self.machine(*disks) as vm:
            for kind, pending, *options in (
                    ('full', 0, '--gently'),
                    ('incremental', 0, '--gently', '--speed', '50000000'),
                    ('incremental', 2, '--cache', str(2 * MIB)),
                    ('compare', 2, '--cache', str(64 * MIB)),
                    ('full', 2, '--cache', str(64 * MIB), '--gently')):
                raws = [disk.freeze(len(points)) for disk in disks]
                done = self.client(vm, kind, *names, options=options)
                points += zip(raws, done.out.split())
                vm.command('query-jobs')
                self.assertEqual([e['event'] for e in vm.events].count(
                    'BLOCK_JOB_PENDING'), pending, options)
                vm.events.clear()
                self.assertEqual(vm.command('query-seqcache'), [])
                self.assertEqual(vm.command('query-bale'), [])
                for disk in disks:
                    vm.write(disk)
        self.assertEqual(len(points), 10)
        for raw, image in points:
            check(image)
            same(raw, image)

    def test_no_space_behind_a_cache(self):
        """The job is told, by the cache, when it has written all already."""
        disk = Disk(self, 'd', used=72 * MIB)
        bale('create', '--max-size', '18M', '-o', 'page_size=2M,image=other',
             'x.bale', '1M', check=0)
        options = ['--cache', str(64 * MIB), '--compression', 'none']
        with self.machine(disk) as vm:
            failed = self.client(vm, 'full', 'd', options=options,
                                 where='x.bale', check_status=1)
            self.assertIn('No space left on device', failed.err)
            self.assertEqual(vm.command('query-seqcache'), [])
            self.assertEqual(vm.command('query-bale'), [])
            self.assertEqual(self.bitmaps(vm, 'd'), [])
            self.assertNotIn('d/', bale('image', 'list', 'x.bale').out)
            bale('set', '--max-size', '100M', 'x.bale', check=0)
            raw = disk.freeze('then')
            vm.write(disk, [])
            image = self.client(vm, 'full', 'd', options=options,
                                where='x.bale').out.split()[1]
        bale('export', '-i', image, 'x.bale', 'out.raw', check=0)
        compare(raw, 'out.raw', '-f', 'raw', '-F', 'raw')

    def test_a_failed_one_leaves_nothing_and_loses_nothing(self):
        disk = Disk(self, 'd')
        with self.machine(disk) as vm:
            refused = self.client(vm, 'incremental', 'd', check_status=1)
            self.assertIn('needs a full backup first', refused.err)
            self.client(vm, 'full', 'd')
            vm.write(disk)
            before = sorted(os.listdir('backups/d'))
            # Of two nodes the second cannot be: the first is given up, too
            refused = self.client(vm, 'incremental', 'd', 'nobody',
                                  check_status=1)
            self.assertIn('no node "nobody"', refused.err)
            # A job that blocks the disk makes the transaction fail
            self.client(vm, 'full', 'd', 'd', check_status=1)
            self.assertEqual(sorted(os.listdir('backups/d')), before)
            raw = disk.freeze('then')
            image = self.client(vm, 'incremental', 'd').out.strip()
            self.assertEqual(len(os.listdir('backups/d')), len(before) + 1)
        check(image)
        same(raw, image)

    def bitmaps(self, vm, node):
        return [b for n in vm.command('query-named-block-nodes', flat=True)
                if n['node-name'] == node for b in n.get('dirty-bitmaps', [])]

    def test_restarted_killed_and_compared(self):
        """After a restart incrementals go on; after a kill, by comparing."""
        disk = Disk(self, 'd')
        points = []

        def back_up(vm, kind, **more):
            raw = disk.freeze(len(points))
            points.append((raw, self.client(vm, kind, 'd',
                                            **more).out.strip()))

        with self.machine(disk) as vm:
            back_up(vm, 'full')
            vm.write(disk)
        with self.machine(disk) as vm:
            vm.write(disk)
            back_up(vm, 'incremental')
            vm.write(disk)
            vm.process.kill()
        with self.machine(disk) as vm:
            self.assertEqual(self.bitmaps(vm, 'd'), [])
            refused = self.client(vm, 'incremental', 'd', check_status=1)
            self.assertIn('one that compares', refused.err)
            vm.write(disk)
            back_up(vm, 'compare')
            self.assertEqual(len(self.bitmaps(vm, 'd')), 1)
            vm.write(disk)
            back_up(vm, 'incremental')
        for raw, image in points:
            check(image)
            same(raw, image)
        used = [os.stat(image).st_blocks for _, image in points]
        self.assertLess(used[2], used[0])


if __name__ == '__main__':
    bale_iotests.main()
