#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Limits of devices and nodes, and media that are put into devices and taken
out, with bale images: requests wait while commands drain them, and a device's
node changes under it."""

import time

import bale_iotests
from bale_images import MIB, check, create, io
from bale_qmp import Qemu

SYSTEM = 'qemu-system-x86_64'
DRIVE = 'if=none,id=d,discard=unmap,node-name=a,driver=bale'
LIMITS = ('bps', 'bps_rd', 'bps_wr', 'iops', 'iops_rd', 'iops_wr')


class Base(bale_iotests.TestCase):
    said = 0

    def io(self, qemu, where, *commands):
        """qemu-io in the program, on a device or a node."""
        for command in commands:
            qemu.hmp(f'qemu-io {where} "{command}"')
            output = qemu.process.output()
            said, self.said = output[self.said:], len(output)
            self.assertNotRegex(said, 'failed|rror|No medium|conflict')

    def end_of(self, qemu, job):
        """Waits for one of our jobs, which are no block jobs."""
        while job in [j['id'] for j in qemu.command('query-jobs')]:
            time.sleep(0.02)
        ends = [e['data']['status'] for e in qemu.events
                if e['event'] == 'JOB_STATUS_CHANGE' and
                e['data']['id'] == job]
        self.assertIn('concluded', ends)
        self.assertNotIn('aborting', ends)
        qemu.events.clear()


class ThrottleTest(Base):
    """Requests that wait for their turn, and commands that cannot wait."""

    def commands(self, qemu):
        """Each drains the node while requests wait."""
        queued = ('aio_write -P 2 4M 2M', 'aio_write -P 3 6M 2M',
                  'aio_write -z 8M 1M', 'aio_write -P 4 10M 1M')
        self.io(qemu, 'd', *queued)
        qemu.command('blockdev-snapshot-internal-sync', device='d', name='s')
        self.io(qemu, 'd', *queued)
        qemu.command('block_resize', device='d', size=17 * MIB)
        self.io(qemu, 'd', *queued)
        qemu.command('bale-flush', node_name='a')
        qemu.command('bale-checkpoint', node_name='a')
        qemu.command('bale-compact', job_id='j', node_name='a')
        self.end_of(qemu, 'j')
        self.io(qemu, 'd', 'aio_write -P 5 0 2M', 'aio_write -P 6 2M 2M')

    def end(self, qemu):
        self.io(qemu, 'd', 'aio_flush', 'read -P 2 4M 2M', 'read -P 3 6M 2M',
                'read -P 0 8M 1M', 'read -P 4 10M 1M', 'read -P 5 0 2M',
                'read -P 6 2M 2M')
        qemu.command('quit')
        qemu.process.process.wait()
        check('a.bale')
        io('a.bale', 'read -P 5 0 2M', 'read -P 3 6M 2M', 'read -P 0 11M 6M')

    def test_limits_of_a_device(self):
        create('a.bale', 16 * MIB)

        def limit(**given):
            qemu.execute('block_set_io_throttle', {
                'device': 'd', **dict.fromkeys(LIMITS, 0), **given})
        with Qemu(SYSTEM, '-drive',
                  f'{DRIVE},file.driver=file,file.filename=a.bale') as qemu:
            limit(bps=32 * MIB, group='g')
            info, = [b for b in qemu.command('query-block')
                     if b['device'] == 'd']
            self.assertEqual([info['inserted'][key] for key in (
                'bps', 'iops', 'group')], [32 * MIB, 0, 'g'])
            self.commands(qemu)
            limit(iops=100, iops_wr=0)
            self.io(qemu, 'd', 'read -P 2 4M 1M')
            # Those that wait are let go
            limit()
            self.end(qemu)

    def test_a_filter_with_limits(self):
        """Above and below the image; the limits change while they wait."""
        below = 'file.driver=file,file.filename=a.bale'
        for drive in (
                f'{DRIVE},file.driver=throttle,file.throttle-group=g,'
                + below.replace('file.', 'file.file.'),
                'if=none,id=d,discard=unmap,driver=throttle,throttle-group=g,'
                'file.driver=bale,file.node-name=a,'
                + below.replace('file.', 'file.file.'),
                'if=none,id=d,discard=unmap,driver=seqcache,'
                'file.driver=throttle,file.throttle-group=g,'
                'file.file.driver=bale,file.file.node-name=a,'
                + below.replace('file.', 'file.file.file.')):
            with self.subTest(drive=drive):
                create('a.bale', 16 * MIB)
                with Qemu(SYSTEM, '-object',
                          'throttle-group,id=g,x-bps-write=33554432',
                          '-drive', drive) as qemu:
                    self.commands(qemu)
                    qemu.execute('qom-set', {
                        'path': '/objects/g', 'property': 'limits',
                        'value': {'bps-total': 64 * MIB, 'iops-total': 1000,
                                  'bps-write': 0}})
                    self.io(qemu, 'd', 'read -P 2 4M 1M')
                    qemu.execute('qom-set', {
                        'path': '/objects/g', 'property': 'limits',
                        'value': {'bps-total': 0, 'iops-total': 0}})
                    self.end(qemu)


class MediaTest(Base):
    """Of a CD drive and a floppy drive, in a machine that stands still."""

    def machine(self, *args):
        return Qemu(SYSTEM, '-machine', 'pc', '-S', '-accel', 'tcg',
                    '-device', 'virtio-scsi-pci', '-device', 'scsi-cd,id=cd',
                    '-device', 'floppy,id=fd', *args)

    def media(self):
        for number, name in enumerate(('a.bale', 'b.bale'), 1):
            create(name, '1440k')
            io(name, f'write -q -P {number} 0 1440k')

    def inserted(self, qemu, device):
        """The image in a device, or None."""
        info, = [b for b in qemu.command('query-block')
                 if b.get('qdev') == device]
        return info['inserted']['image']['filename'] \
            if 'inserted' in info else None

    def test_nodes_as_media(self):
        """The long way: tray and medium by commands of their own."""
        self.media()
        with self.machine() as qemu:
            for name in ('a', 'b'):
                qemu.command('blockdev-add', driver='bale', node_name=name,
                             read_only=True, file={
                                 'driver': 'file', 'filename': f'{name}.bale'})
            self.assertIn('not open', qemu.fails(
                'blockdev-insert-medium', id='cd', node_name='a'))
            for name in ('a', 'b', 'a'):
                qemu.command('blockdev-open-tray', id='cd', force=True)
                qemu.command('blockdev-remove-medium', id='cd')
                qemu.command('blockdev-insert-medium', id='cd',
                             node_name=name)
                qemu.command('blockdev-close-tray', id='cd')
                self.assertEqual(self.inserted(qemu, 'cd'), f'{name}.bale')
                self.assertIn('in use', qemu.fails('blockdev-del',
                                                   node_name=name))
            # The one is verified while it is in, the other can be taken away
            qemu.command('bale-verify', job_id='j', node_name='a')
            self.end_of(qemu, 'j')
            qemu.command('blockdev-del', node_name='b')
            qemu.command('blockdev-open-tray', id='cd', force=True)
            qemu.command('blockdev-remove-medium', id='cd')
            self.assertEqual(self.inserted(qemu, 'cd'), None)
            qemu.command('blockdev-del', node_name='a')
        for name in ('a.bale', 'b.bale'):
            check(name)

    def test_files_as_media(self):
        """The short way: opened and closed with the medium."""
        self.media()
        with self.machine() as qemu:
            for device, mode in (('cd', 'read-only'), ('fd', 'read-write'),
                                 ('fd', 'retain')):
                for name in ('a.bale', 'b.bale', 'a.bale'):
                    qemu.command('blockdev-change-medium', id=device,
                                 filename=name, format='bale',
                                 read_only_mode=mode, force=True)
                    self.assertEqual(self.inserted(qemu, device), name)
                    store, = qemu.command('query-bale')
                    self.assertEqual(store['store']['read-only'],
                                     mode == 'read-only')
                # Not one: the old one stays, or is out
                qemu.fails('blockdev-change-medium', id=device,
                           filename='none.bale', format='bale')
                qemu.command('eject', id=device, force=True)
                self.assertEqual(self.inserted(qemu, device), None)
                self.assertEqual(qemu.command('query-bale'), [])
            # A CD drive only reads, whatever is asked for
            qemu.command('blockdev-change-medium', id='cd', force=True,
                         filename='b.bale', format='bale')
            # Another process may write to what was taken out
            io('a.bale', 'read -P 1 0 1440k', 'write -P 3 0 64k')
        for name in ('a.bale', 'b.bale'):
            check(name)

    def test_a_medium_with_a_job(self):
        self.media()
        with self.machine() as qemu:
            qemu.command('blockdev-change-medium', id='fd', filename='a.bale',
                         format='bale', read_only_mode='read-write')
            node, = [i['node-name'] for i in qemu.command('query-bale')]
            qemu.command('bale-verify', job_id='j', node_name=node,
                         auto_finalize=False)
            qemu.wait_event('JOB_STATUS_CHANGE', status='pending', id='j')
            # The job has a reference of its own
            qemu.command('eject', id='fd', force=True)
            self.assertEqual(self.inserted(qemu, 'fd'), None)
            self.assertEqual([i['node-name'] for i in qemu.command(
                'query-bale')], [node])
            qemu.command('job-finalize', id='j')
            self.end_of(qemu, 'j')
            self.assertEqual(qemu.command('query-bale'), [])
        check('a.bale')


if __name__ == '__main__':
    bale_iotests.main()
