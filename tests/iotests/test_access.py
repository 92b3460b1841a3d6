#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may come in: modes of new files, locks between programs, descriptors
that children inherit, links, block devices, and raw disks that look like a
store because a guest wants it."""

import contextlib
import os
import re
import stat

import bale_iotests
from bale_images import KIB, MIB, check, create, io, loop_device, make_raw, \
    sha256
from bale_iotests import BALE, Background, bale, qemu, qemu_img, \
    qemu_img_info, qemu_io, run, wait_for_nbd, wait_until
from bale_qmp import Qemu

SYSTEM = 'qemu-system-x86_64'


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


class ModeTest(bale_iotests.TestCase):
    """A backup is as private as the disk it was made of."""

    def setUp(self):
        # The laxest there is: what is private then is private always
        self.addCleanup(os.umask, os.umask(0))
        self.raw = make_raw(self.random, 'disk.raw', 2 * MIB)

    def test_new_stores_of_the_command(self):
        bale('create', 'a.bale', '1M', check=0)
        bale('import', self.raw, 'b.bale', check=0)
        bale('export', 'b.bale', 'c.raw', check=0)
        for name in ('a.bale', 'b.bale', 'c.raw'):
            self.assertEqual(mode(name), 0o600, name)

    def test_new_images_of_qemu_img(self):
        create('a.bale', 1 * MIB)
        qemu_img('convert', '-O', 'bale', self.raw, 'b.bale')
        create('file:c.bale', 1 * MIB)
        qemu_img('dd', '-O', 'bale', 'bs=1M', 'count=1', f'if={self.raw}',
                 'of=d.bale')
        for name in 'abcd':
            self.assertEqual(mode(f'{name}.bale'), 0o600, name)

    def test_new_images_of_a_running_vm(self):
        with Qemu(SYSTEM, '-drive',
                  f'if=none,id=d0,format=raw,file={self.raw}') as vm:
            vm.command('drive-backup', job_id='j', device='d0',
                       target=self.path('t.bale'), format='bale', sync='full')
            self.assertEqual(vm.run_job('j'), '')
            vm.command('blockdev-snapshot-sync', device='d0', format='bale',
                       snapshot_file=self.path('s.bale'))
        for name in ('t.bale', 's.bale'):
            self.assertEqual(mode(name), 0o600, name)

    def test_a_file_that_exists_keeps_its_mode(self):
        """Somebody has made it for a group: that was on purpose."""
        for name in ('a.bale', 'b.bale'):
            with open(name, 'wb'):
                pass
            os.chmod(name, 0o640)
        create('a.bale', 1 * MIB)
        bale('create', '--force', 'b.bale', '1M', check=0)
        self.assertEqual(mode('a.bale'), 0o640)
        self.assertEqual(mode('b.bale'), 0o640)

    def test_a_create_that_fails_leaves_nothing(self):
        qemu_img('create', '-f', 'bale', '-o', 'cluster_size=3k', 'a.bale',
                 '1M', check=1)
        qemu_img('create', '-f', 'bale', 'no/a.bale', '1M', check=1)
        self.assertEqual(os.listdir('.'), ['disk.raw'])


class LockTest(bale_iotests.TestCase):
    """One writer, whoever it is, and by whatever name it comes."""

    @contextlib.contextmanager
    def qemu_writes(self, path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink('nbd.sock')
        with Background(BALE, 'run', 'qemu-nbd', '-f', 'bale', '-k',
                        self.path('nbd.sock'), '-t', path) as server:
            self.assertTrue(wait_for_nbd(server, 'nbd.sock'), server.output())
            yield

    @contextlib.contextmanager
    def command_reads(self, path):
        """A verify that takes its time."""
        with Background(BALE, 'verify', '--rate-limit', '4K', path) as job:
            wait_until(lambda: not job.running() or
                       self.holds(job.process.pid, path), 'bale verify')
            self.assertTrue(job.running(), job.output())
            yield job

    @staticmethod
    def holds(pid, path):
        """Has the process the file open, and a lock on it?"""
        target = os.path.realpath(path)
        try:
            for name in os.listdir(f'/proc/{pid}/fd'):
                if os.readlink(f'/proc/{pid}/fd/{name}') == target:
                    with open(f'/proc/{pid}/fdinfo/{name}',
                              encoding='ascii') as file:
                        if 'lock:' in file.read():
                            return True
        except OSError:
            pass
        return False

    def assert_locked(self, result, path):
        self.assertNotEqual(result.status, 0, str(result))
        self.assertIn('lock', result.err, str(result))
        self.assertIn(os.path.basename(path), result.err, str(result))

    def refused_writers(self, path):
        """Every program that changes a store, on one that is in use."""
        with open('in.raw', 'wb') as file:
            file.truncate(1 * MIB)
        yield bale('check', '-r', 'all', path)
        yield bale('compact', path)
        yield bale('create', '--force', '-o', 'page_size=2M', path, '1M')
        yield bale('import', '--force', '-o', 'page_size=2M', 'in.raw', path)
        yield qemu_img('create', '-q', '-f', 'bale', '-o', 'page_size=2M',
                       path, '1M', check=None)
        yield qemu_img('convert', '-n', '-f', 'raw', '-O', 'bale', 'in.raw',
                       path, check=None)
        yield qemu_img('check', '-r', 'all', '-f', 'bale', path, check=None)
        yield qemu_img('resize', '-f', 'bale', path, '2M', check=None)
        yield qemu_io('-f', 'bale', '-c', 'write 0 4k', path, check=None)

    def make(self):
        create('x.bale', 8 * MIB, 'compression_type=none')
        io('x.bale', 'write -P 1 0 4M')
        os.symlink('x.bale', 'link.bale')
        os.link('x.bale', 'hard.bale')

    def test_beside_a_writer_in_qemu(self):
        self.make()
        for path in ('x.bale', 'link.bale', 'hard.bale'):
            with self.qemu_writes('x.bale'):
                before = sha256('x.bale')
                for result in self.refused_writers(path):
                    self.assert_locked(result, path)
                for command in ('info', 'check', 'verify', 'list'):
                    self.assert_locked(bale(command, path), path)
                self.assertEqual(sha256('x.bale'), before)
                bale('info', '-U', path, check=0)
                qemu_img('info', '-U', '-f', 'bale', path)
        check('x.bale')

    def test_beside_a_reader(self):
        """Readers share; nobody writes meanwhile."""
        self.make()
        with self.command_reads('x.bale') as job:
            before = sha256('x.bale')
            for result in self.refused_writers('link.bale'):
                self.assert_locked(result, 'link.bale')
            bale('info', 'x.bale', check=0)
            io('x.bale', 'read -P 1 0 4M', options=('-r',))
            self.assertEqual(sha256('x.bale'), before)
            self.assertTrue(job.running(), job.output())
        check('x.bale')

    def test_two_vms(self):
        self.make()
        options = ('-drive', 'if=none,id=d0,driver=bale,file.filename=x.bale')
        with Qemu(SYSTEM, *options):
            result = qemu(SYSTEM, '-machine', 'none', '-nodefaults',
                          '-display', 'none', *options)
            self.assert_locked(result, 'x.bale')
        check('x.bale')

    def test_block_device(self):
        self.need_root()
        with open('backing', 'wb') as file:
            file.truncate(128 * MIB)
        if run('losetup', '--find').status:
            self.skipTest('no loop devices')
        with loop_device('backing') as device:
            bale('create', '-o', 'page_size=2M', device, '8M', check=0)
            with self.qemu_writes(device):
                for result in self.refused_writers(device):
                    self.assert_locked(result, device)
                before = sha256(device)
                bale('info', '-U', device, check=0)
                self.assertEqual(sha256(device), before)
            check(device)

    def test_block_device_that_is_mounted(self):
        """Claimed by the kernel: the command does not write to it."""
        self.need_root()
        self.need('mkfs.ext4')
        with open('backing', 'wb') as file:
            file.truncate(64 * MIB)
        if run('losetup', '--find').status:
            self.skipTest('no loop devices')
        with loop_device('backing') as device:
            run('mkfs.ext4', '-q', device, check=0)
            os.mkdir('mnt')
            # Read-only: ext4 writes by itself what mkfs has left undone.
            if run('mount', '-o', 'ro', device, 'mnt').status:
                self.skipTest('cannot mount')
            self.addCleanup(run, 'umount', 'mnt')
            try:
                before = sha256(device)
                self.assert_one_line_error(
                    bale('create', '--force', '-o', 'page_size=2M', device,
                         '8M'), device,
                    'Could not claim')
                self.assertEqual(sha256(device), before)
            finally:
                run('umount', 'mnt', check=0)


class DescriptorTest(bale_iotests.TestCase):
    """No child of a program gets at a store."""

    def inheritable(self, pid, name):
        """Descriptors of @name that a child would have; fails if it has the
        file not open at all."""
        found = bad = 0
        for fd in os.listdir(f'/proc/{pid}/fd'):
            with contextlib.suppress(FileNotFoundError):
                if os.path.basename(os.readlink(f'/proc/{pid}/fd/{fd}')) != \
                        name:
                    continue
                with open(f'/proc/{pid}/fdinfo/{fd}',
                          encoding='ascii') as file:
                    flags = int(re.search(r'flags:\s*([0-7]+)',
                                          file.read()).group(1), 8)
                found += 1
                bad += not flags & os.O_CLOEXEC
        self.assertGreater(found, 0)
        return bad

    def test_of_the_command(self):
        create('x.bale', 8 * MIB, 'compression_type=none')
        io('x.bale', 'write -P 1 0 4M')
        with Background(BALE, 'verify', '--rate-limit', '4K',
                        'x.bale') as job:
            wait_until(lambda: not job.running() or
                       LockTest.holds(job.process.pid, 'x.bale'), 'verify')
            self.assertTrue(job.running(), job.output())
            self.assertEqual(self.inheritable(job.process.pid, 'x.bale'), 0)

    def test_of_a_vm(self):
        create('x.bale', 8 * MIB)
        with Qemu(SYSTEM, '-drive', 'if=none,id=d0,driver=bale,'
                  'file.filename=x.bale') as vm:
            vm.hmp('qemu-io d0 "write -P 1 0 1M"')
            pid = vm.process.process.pid
            self.assertEqual(self.inheritable(pid, 'x.bale'), 0)
            for path in ('bale-module.so', 'bale-preload.so'):
                for fd in os.listdir(f'/proc/{pid}/fd'):
                    with contextlib.suppress(FileNotFoundError):
                        self.assertNotIn(path,
                                         os.readlink(f'/proc/{pid}/fd/{fd}'))


class LinkTest(bale_iotests.TestCase):

    def test_a_new_store_never_follows_a_link(self):
        """In a directory for everybody, somebody may have put one there."""
        os.symlink('victim', 'x.bale')
        with open('in.raw', 'wb') as file:
            file.truncate(MIB)
        for result in (bale('create', 'x.bale', '1M'),
                       bale('import', 'in.raw', 'x.bale')):
            self.assert_one_line_error(result, 'x.bale')
        bale('import', 'in.raw', 'good.bale', check=0)
        self.assertFalse(os.path.lexists('victim'))
        self.assertTrue(os.path.islink('x.bale'))

    def test_a_link_to_a_store_is_the_store(self):
        bale('create', 'real.bale', '1M', check=0)
        os.symlink('real.bale', 'link.bale')
        io('link.bale', 'write -P 1 0 1M')
        bale('verify', 'link.bale', check=0)
        self.assertTrue(os.path.islink('link.bale'))
        io('real.bale', 'read -P 1 0 1M')


class ForgedDiskTest(bale_iotests.TestCase):
    """A guest that writes the header of a store to its raw disk."""

    def forged_sector(self):
        create('forged.bale', 1 * MIB)
        with open('forged.bale', 'rb') as file:
            sector = file.read(512)
        with open('sector', 'wb') as file:
            file.write(sector)
        return 'sector'

    def qcow2_sector(self):
        run('qemu-img', 'create', '-q', '-f', 'qcow2', 'forged.qcow2', '1M',
            check=0)
        with open('forged.qcow2', 'rb') as file, open('sector2', 'wb') as out:
            out.write(file.read(512))
        return 'sector2'

    def test_a_probed_raw_disk_cannot_become_a_store(self):
        """As with other formats: the write is refused while raw was only
        guessed, and QEMU warns of the guess."""
        for sector in (self.forged_sector(), self.qcow2_sector()):
            make_raw(self.random, 'disk.raw', MIB)
            before = sha256('disk.raw')
            result = qemu('qemu-io', '-c', f'write -s {sector} 0 512',
                          'disk.raw')
            self.assertIn('Operation not permitted', result.out + result.err)
            self.assertIn('Specify the \'raw\' format explicitly',
                          result.out + result.err)
            self.assertEqual(sha256('disk.raw'), before)

    def test_a_disk_that_was_said_to_be_raw_stays_raw(self):
        """With the format given a guest may write what it likes, and every
        program that is told reads just that."""
        sector = self.forged_sector()
        make_raw(self.random, 'disk.raw', MIB)
        result = qemu_io('-f', 'raw', '-c', f'write -s {sector} 0 512',
                         'disk.raw')
        self.assertNotIn('not permitted', result.out + result.err)
        self.assertEqual(qemu_img_info('disk.raw', '-f', 'raw')
                         ['virtual-size'], MIB)
        qemu_img('convert', '-f', 'raw', '-O', 'bale', 'disk.raw', 'a.bale')
        bale('import', 'disk.raw', 'b.bale', check=0)
        for name in ('a.bale', 'b.bale'):
            bale('export', name, 'out.raw', check=0)
            self.assertEqual(sha256('out.raw'), sha256('disk.raw'))
            os.unlink('out.raw')

    def test_a_forged_store_is_nothing_to_who_says_raw(self):
        """A guest that was told to be raw can forge a whole store, which names
        a file of the host. Left to guess, QEMU takes it for one, with qcow2
        and with bale: so docs/access.md says when to give the format."""
        with open('secret', 'wb') as file:
            file.write(b'secret' * 10000)
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-u', '-b', 'secret',
            '-F', 'raw', 'qcow2.raw', '1M', check=0)
        bale('create', '-o', 'backing_file=secret,backing_fmt=raw',
             'bale.raw', '1M', check=0)
        for kind in ('qcow2', 'bale'):
            disk = f'{kind}.raw'
            os.truncate(disk, 4 * MIB)
            self.assertEqual(qemu_img_info(disk)['format'], kind)
            self.assertEqual(qemu_img_info(disk, '-f', 'raw')['format'], 'raw')
            qemu_img('convert', '-f', 'raw', '-O', 'raw', disk, 'out.raw')
            self.assertEqual(sha256('out.raw'), sha256(disk))
            # The command takes what it is to import as it is
            bale('import', '--force', disk, 't.bale', check=0)
            bale('export', 't.bale', 'out.raw', check=0)
            self.assertEqual(sha256('out.raw'), sha256(disk))
            # It never follows a name that a store holds
        self.assert_one_line_error(bale('export', 'bale.raw', 'out2.raw'),
                                   'backing file')

    def test_backing_files_need_a_format(self):
        """As with other formats, since QEMU 6.1."""
        make_raw(self.random, 'base.raw', MIB)
        for kind in ('qcow2', 'bale'):
            result = qemu('qemu-img', 'create', '-f', kind, '-b', 'base.raw',
                          f't.{kind}')
            self.assertEqual(result.status, 1, str(result))
            self.assertIn('without a backing format', result.err
                          .replace('without backing', 'without a backing'))

    def test_only_the_first_sector_is_looked_at(self):
        """A store's header anywhere else makes no store."""
        sector = self.forged_sector()
        with open('disk.raw', 'wb') as file:
            file.truncate(4 * MIB)
        for at in (512, 4 * KIB, 512 * KIB, MIB):
            qemu_io('-f', 'raw', '-c', f'write -s {sector} {at} 512',
                    'disk.raw')
        self.assertEqual(qemu_img_info('disk.raw')['format'], 'raw')


if __name__ == '__main__':
    bale_iotests.main()
