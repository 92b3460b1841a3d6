#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The maximum size of a store, and what happens when it is reached: with
qemu-img, qemu-io, the command bale, a backup job, and on a block device."""

import json
import os

import bale_iotests
from bale_images import MIB, check, compare, create, io, loop_device
from bale_iotests import bale, qemu_io, run
from bale_qmp import Qemu, QmpError

SYSTEM = 'qemu-system-x86_64'
NO_SPACE = 'No space left on device'


def info(path):
    return json.loads(bale('info', '--json', path, check=0).out)


class Base(bale_iotests.TestCase):
    def noise(self, name='noise', size=MIB):
        with open(name, 'wb') as file:
            file.write(self.random.randbytes(size))
        return name

    def fill(self, path, most):
        """Writes MiB after MiB of noise; how many there was room for."""
        self.noise()
        for i in range(most):
            result = qemu_io('-f', 'bale', '-c', f'write -q -s noise {i}M 1M',
                             path, check=None)
            if result.status or 'failed' in result.out + result.err:
                self.assertIn(NO_SPACE, result.out + result.err)
                return i
        self.fail(f'{most} MiB fit')


class CommandTest(Base):
    def test_create_and_set(self):
        create('a.bale', '1G', 'max_size=64M')
        self.assertEqual(info('a.bale')['max-size'], 64 * MIB)
        self.assertEqual(info('a.bale')['page-size'], 4 * MIB)
        self.assertIn('maximum size:      64 MiB',
                      bale('info', 'a.bale', check=0).out)
        bale('set', '--max-size', '128M', 'a.bale', check=0)
        self.assertEqual(info('a.bale')['max-size'], 128 * MIB)
        bale('set', '--max-size', 'none', 'a.bale', check=0)
        self.assertEqual(info('a.bale')['max-size'], 0)
        self.assertIn('maximum size', bale('set', '--max-size', '1M',
                                           'a.bale', check=1).err)
        self.assertIn('nothing to set', bale('set', 'a.bale', check=1).err)
        bale('create', '--max-size', '1G', 'b.bale', '10G', check=0)
        self.assertEqual(info('b.bale')['max-size'], 1024 * MIB)
        self.assertIn('maximum size', bale('create', '--max-size', '3M',
                                           'c.bale', '10G', check=1).err)
        self.assertFalse(os.path.exists('c.bale'))

    def test_full(self):
        create('a.bale', '256M', 'max_size=26M', 'page_size=2M')
        count = self.fill('a.bale', 24)
        self.assertGreater(count, 15)
        self.assertLessEqual(os.path.getsize('a.bale'), 26 * MIB)
        check('a.bale')
        # Once there is some room, compaction finds it again and again.
        io('a.bale', *(f'discard {i}M 256k' for i in range(count)))
        for i in range(10):
            io('a.bale', 'write -q -s noise 100M 1M')
        self.assertLessEqual(os.path.getsize('a.bale'), 26 * MIB)
        bale('set', '--max-size', 'none', 'a.bale', check=0)
        io('a.bale', 'write -q -s noise 32M 16M')
        check('a.bale')

    def test_block_device(self):
        if run('losetup', '--find').status:
            self.skipTest('needs loop devices')
        with open('backing', 'wb') as file:
            file.truncate(26 * MIB)
        with loop_device('backing') as device:
            bale('create', device, '256M', check=0)
            self.assertEqual(info(device)['page-size'], 2 * MIB)
            count = self.fill(device, 24)
            self.assertGreater(count, 12)
            check(device)
            io(device, 'discard 0 8M', 'write -q -s noise 100M 4M')
            check(device)


class QmpTest(Base):
    def add(self, qemu, path='a.bale', **options):
        qemu.command('blockdev-add', driver='bale', node_name='a', file={
            'driver': 'file', 'filename': path}, **options)

    def query(self, qemu):
        return qemu.command('query-bale', node_name='a')[0]

    def io(self, qemu, commands):
        for command in commands:
            qemu.hmp(f'qemu-io a "{command}"') # its errors go to stdout

    def test_options(self):
        create('a.bale', '256M', 'max_size=26M', 'page_size=2M')
        noise = os.path.abspath(self.noise(size=4 * MIB))
        with Qemu(SYSTEM) as qemu:
            self.add(qemu, max_size=20 * MIB, compact=False,
                     compact_rate=MIB)
            answer = self.query(qemu)
            self.assertEqual(answer['store']['max-size'], 20 * MIB)
            self.assertEqual((answer['compact'], answer['compact-rate']),
                             (False, MIB))
            qemu.command('bale-set', node_name='a', compact=True)
            self.assertEqual(self.query(qemu)['compact'], True)
            self.assertEqual(self.query(qemu)['compact-rate'], MIB)
            self.io(qemu, [f'write -s {noise} {4 * i}M 4M'
                           for i in range(10)])
            used = self.query(qemu)['stats']['used-bytes']
            self.assertGreater(used, 10 * MIB)
            self.assertLessEqual(used, 20 * MIB)
            with self.assertRaises(QmpError):
                qemu.command('bale-set', node_name='a', max_size=MIB)
            qemu.command('bale-set', node_name='a', max_size=64 * MIB)
            self.assertEqual(self.query(qemu)['store']['max-size'], 64 * MIB)
            self.io(qemu, [f'write -s {noise} {4 * i}M 4M'
                           for i in range(10)])
            self.assertGreater(self.query(qemu)['stats']['live-bytes'],
                               40 * MIB)
        self.assertEqual(info('a.bale')['max-size'], 64 * MIB)
        check('a.bale')

    def test_backup_waits_for_space(self):
        self.noise('source', 32 * MIB)
        create('a.bale', 32 * MIB, 'max_size=20M', 'page_size=2M')
        with Qemu(SYSTEM) as qemu:
            self.add(qemu)
            qemu.command('blockdev-add', driver='raw', node_name='s', file={
                'driver': 'file', 'filename': 'source'})
            qemu.command('blockdev-backup', job_id='j', device='s',
                         target='a', sync='full',
                         on_target_error='enospc')
            event = qemu.wait_event('BLOCK_JOB_ERROR')
            self.assertEqual(event['data']['action'], 'stop')
            job, = qemu.command('query-block-jobs')
            self.assertEqual((job['paused'], job['io-status']),
                             (True, 'nospace'))
            qemu.command('bale-set', node_name='a', max_size=0)
            qemu.command('block-job-resume', device='j')
            event = qemu.wait_event('BLOCK_JOB_COMPLETED')
            self.assertNotIn('error', event['data'])
        compare('source', 'a.bale', '-f', 'raw', '-F', 'bale')
        check('a.bale')


if __name__ == '__main__':
    bale_iotests.main()
