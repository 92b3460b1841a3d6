#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Backups that do not go well: a full or failing target, cancelled, paused and
limited jobs. The last good backup is never touched, and the machine goes on."""

import contextlib
import os

import bale_iotests
from bale_backup import DAEMON, SLOW, SYSTEM, Disk, MIB, Machine, layer, same
from bale_images import check, check_killed, sha256
from bale_iotests import qemu_img, run, wait_until


class Base(bale_iotests.TestCase):

    pieces = 0

    @contextlib.contextmanager
    def small_disk(self, size):
        """A file system without room, mounted at small/."""
        self.need_root()
        os.mkdir('small')
        run('mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', 'small',
            check=0)
        try:
            yield
        finally:
            run('umount', '--lazy', 'small')

    def full_backup(self, vm, disk, name='full.bale'):
        """A first backup with a bitmap from then on; the image's digest."""
        layer(name, disk.size)
        vm.command('block-dirty-bitmap-add', node=disk.name, name='b')
        vm.add_target('t', name)
        self.assertEqual(vm.backup(disk.name, 't', 'full'), '')
        vm.delete('t')
        return sha256(name)


class FullTargetTest(Base):

    def test_stopped_cleanly_and_the_last_backup_is_untouched(self):
        for program in (SYSTEM, DAEMON):
            with self.subTest(program), self.small_disk('8M'):
                disk = Disk(self, f'd-{program}')
                with Machine(program, disk) as vm:
                    before = self.full_backup(vm, disk, f'{program}.bale')
                    vm.write(disk, disk.change(150))
                    dirty = vm.dirty(disk.name, 'b')
                    layer('small/i.bale', disk.size,
                          self.path(f'{program}.bale'))
                    vm.add_target('t', 'small/i.bale')
                    raw = disk.freeze('then')
                    self.assertEqual(
                        vm.backup(disk.name, 't', 'incremental', bitmap='b'),
                        'No space left on device')
                    vm.delete('t')
                    # Nothing is lost from the bitmap, and the disk is alive
                    self.assertEqual(vm.dirty(disk.name, 'b'), dirty)
                    self.assertEqual(sha256(f'{program}.bale'), before)
                    check('small/i.bale')
                    os.unlink('small/i.bale')
                    # The next attempt has all of it
                    layer('i.bale', disk.size, f'{program}.bale')
                    vm.add_target('t', 'i.bale')
                    self.assertEqual(
                        vm.backup(disk.name, 't', 'incremental', bitmap='b'),
                        '')
                    vm.delete('t')
                    vm.write(disk)
                check('i.bale')
                same(raw, 'i.bale')
                os.unlink('i.bale')
            os.rmdir('small')

    def test_waits_for_room_and_goes_on(self):
        with self.small_disk('8M'):
            disk = Disk(self, 'd', used=24 * MIB)
            layer('small/t.bale', disk.size)
            with Machine(SYSTEM, disk) as vm:
                vm.add_target('t', 'small/t.bale')
                raw = disk.freeze('then')
                vm.command('blockdev-backup', job_id='j', device='d',
                           target='t', sync='full', on_target_error='enospc')
                event = vm.event_of({'BLOCK_JOB_ERROR'}, 'j')
                self.assertEqual(event['data']['action'], 'stop')
                wait_until(lambda: vm.progress('j')['status'] == 'paused',
                           'the job is paused')
                run('mount', '-o', 'remount,size=200M', 'small', check=0)
                vm.command('block-job-resume', device='j')
                self.assertEqual(vm.end_of('j'), '')
                vm.delete('t')
            check('small/t.bale')
            same(raw, 'small/t.bale')

    def test_given_up_after_waiting(self):
        with self.small_disk('8M'):
            disk = Disk(self, 'd', used=24 * MIB)
            layer('small/t.bale', disk.size)
            with Machine(SYSTEM, disk) as vm:
                vm.add_target('t', 'small/t.bale')
                vm.command('blockdev-backup', job_id='j', device='d',
                           target='t', sync='full', on_target_error='stop')
                vm.event_of({'BLOCK_JOB_ERROR'}, 'j')
                vm.command('block-job-cancel', device='j', force=True)
                self.assertEqual(vm.end_of('j'), 'cancelled')
                vm.delete('t')
                vm.write(disk)
            check('small/t.bale')


class FailingTargetTest(Base):

    def blkdebug(self, name, event, **more):
        return {'driver': 'blkdebug',
                'image': {'driver': 'file', 'filename': name},
                'inject-error': [{'event': event, 'errno': 5, **more}]}

    def test_an_error_is_reported_and_the_last_backup_is_untouched(self):
        disk = Disk(self, 'd')
        with Machine(SYSTEM, disk) as vm:
            before = self.full_backup(vm, disk)
            vm.write(disk, disk.change(30))
            dirty = vm.dirty('d', 'b')
            layer('i.bale', disk.size, 'full.bale')
            vm.add_target('t', 'i.bale',
                          file=self.blkdebug('i.bale', 'write_aio'))
            self.assertEqual(vm.backup('d', 't', 'incremental', bitmap='b'),
                             'Input/output error')
            vm.delete('t')
            self.assertEqual(vm.dirty('d', 'b'), dirty)
            self.assertEqual(sha256('full.bale'), before)
            vm.write(disk)
        check('i.bale')

    def resumed_to_the_end(self, vm, job):
        """True when the job is gone; one that stands still is resumed."""
        found = vm.progress(job)
        # `paused` goes as soon as it is told to go on, the status later
        if found and found['paused'] and found['status'] == 'paused':
            vm.command('block-job-resume', device=job)
        return not found

    def test_goes_on_after_one_error(self):
        """The job is told to stop at an error and then to go on: the store
        recovers by itself, and nothing is missing."""
        disk = Disk(self, 'd')
        layer('t.bale', disk.size)
        with Machine(SYSTEM, disk) as vm:
            vm.add_target('t', 't.bale', file=self.blkdebug(
                't.bale', 'write_aio', once=True))
            raw = disk.freeze('then')
            vm.command('blockdev-backup', job_id='j', device='d', target='t',
                       sync='full', on_target_error='stop')
            vm.event_of({'BLOCK_JOB_ERROR'}, 'j')
            wait_until(lambda: self.resumed_to_the_end(vm, 'j'),
                       'the job ends')
            self.assertEqual(vm.end_of('j'), '')
            vm.delete('t')
        check('t.bale')
        same(raw, 't.bale')


class ControlTest(Base):

    def test_cancelled_in_the_middle(self):
        for program in (SYSTEM, DAEMON):
            with self.subTest(program):
                disk = Disk(self, f'd-{program}')
                with Machine(program, disk) as vm:
                    before = self.full_backup(vm, disk, f'{program}.bale')
                    vm.write(disk, disk.change(40))
                    dirty = vm.dirty(disk.name, 'b')
                    layer('i.bale', disk.size, f'{program}.bale')
                    vm.add_target('t', 'i.bale')
                    vm.command('blockdev-backup', job_id='j',
                               device=disk.name, target='t', bitmap='b',
                               sync='incremental', speed=SLOW)
                    vm.command('block-job-cancel', device='j')
                    self.assertEqual(vm.end_of('j'), 'cancelled')
                    self.assertEqual(vm.dirty(disk.name, 'b'), dirty)
                    raw = disk.freeze('then')
                    # The same image takes the next attempt
                    self.assertEqual(vm.backup(
                        disk.name, 't', 'incremental', bitmap='b'), '')
                    vm.delete('t')
                    self.assertEqual(sha256(f'{program}.bale'), before)
                check('i.bale')
                same(raw, 'i.bale')
                os.unlink('i.bale')

    def test_paused_and_limited(self):
        disk = Disk(self, 'd', used=24 * MIB)
        layer('t.bale', disk.size)
        with Machine(SYSTEM, disk) as vm:
            vm.add_target('t', 't.bale')
            raw = disk.freeze('then')
            vm.command('blockdev-backup', job_id='j', device='d', target='t',
                       sync='full', speed=SLOW)
            vm.command('block-job-pause', device='j')
            wait_until(lambda: vm.progress('j')['status'] == 'paused',
                       'the job is paused')
            at = vm.progress('j')['offset']
            self.assertLess(at, disk.size)
            vm.write(disk, disk.change(40))
            # What the guest overwrote was saved before it; nothing else moved
            self.assertEqual(vm.progress('j')['status'], 'paused')
            vm.command('block-job-set-speed', device='j', speed=0)
            vm.command('block-job-resume', device='j')
            self.assertEqual(vm.end_of('j'), '')
            vm.delete('t')
        check('t.bale')
        same(raw, 't.bale')

    def test_killed_in_the_middle(self):
        """The program dies: the disk is as it was, the last good backup too,
        and what lies in the unfinished one is sound."""
        disk = Disk(self, 'd')
        with Machine(SYSTEM, disk) as vm:
            before = self.full_backup(vm, disk)
            vm.write(disk, disk.change(40))
            raw = disk.freeze('then')
            layer('i.bale', disk.size, 'full.bale')
            vm.add_target('t', 'i.bale')
            vm.command('blockdev-backup', job_id='j', device='d', target='t',
                       sync='incremental', bitmap='b', speed=SLOW)
            vm.process.kill()
        self.assertEqual(sha256('full.bale'), before)
        check_killed('i.bale')
        qemu_img('compare', '-q', '-f', 'raw', '-F', 'qcow2', raw, disk.file)


if __name__ == '__main__':
    bale_iotests.main()
