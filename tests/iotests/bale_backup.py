# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of backup jobs share: a disk that is known byte by byte, and
a running QEMU program that it belongs to."""

import os
import re

from bale_images import KIB, MIB, compare, io, patterned
from bale_iotests import qemu_img, qemu_img_info, run
from bale_qmp import Qemu, QmpError

SYSTEM, DAEMON = 'qemu-system-x86_64', 'qemu-storage-daemon'
# qemu-io takes the bytes to write from a file of this length
PIECE = 192 * KIB
# Bytes a second: a backup job of these disks is not at its end by itself within
# minutes, so that it can be watched, paused and cancelled on any machine
SLOW = 16 * KIB


class Disk:
    """A disk of the running machine and what must be in it.

    The node is called as the disk; it is qcow2 in a file, so that bitmaps can
    be persistent and backing files be used. data is the truth.
    """

    def __init__(self, case, name, size=24 * MIB, used=8 * MIB, below=None):
        self.case, self.name, self.size = case, name, size
        self.file = case.path(f'{name}.qcow2')
        self.rng = case.random
        self.data = bytearray(below.data if below else size)
        more = ['-b', below.file, '-F', 'qcow2'] if below else []
        qemu_img('create', '-q', '-f', 'qcow2', *more, self.file, size)
        if not below:
            # The start, the end and something in between
            for start in (0, size // 2, size - used // 4):
                length = min(used // 3, size - start)
                self.data[start:start + length] = patterned(self.rng, length)
            raw = self.freeze('initial')
            qemu_img('convert', '-n', '-f', 'raw', '-O', 'qcow2', raw,
                     self.file)
            os.unlink(raw)

    def freeze(self, label):
        """What is in the disk now, as a raw file; returns its path."""
        path = self.case.path(f'{self.name}-{label}.raw')
        with open(path, 'wb') as file:
            file.truncate(self.size)
            for at in range(0, self.size, MIB):
                part = self.data[at:at + MIB]
                if any(part):
                    file.seek(at)
                    file.write(part)
        return path

    def change(self, count=12):
        """Random changes: updates the truth, returns qemu-io commands."""
        commands = []
        for _ in range(count):
            length = self.rng.choice([512, 4096, 24 * KIB, 64 * KIB, PIECE])
            start = self.rng.randrange((self.size - length) // 512) * 512
            if self.rng.randrange(8) == 0:
                self.data[start:start + length] = bytes(length)
                commands.append(f'write -q -z {start} {length}')
                continue
            piece = patterned(self.rng, length)
            path = self.case.path(f'piece{self.case.pieces}')
            self.case.pieces += 1
            with open(path, 'wb') as file:
                file.write(piece)
            self.data[start:start + length] = piece
            commands.append(f'write -q -s {path} {start} {length}')
        return commands


class Machine(Qemu):
    """A machine with disks. What its guest would write comes by qemu-io."""

    def __init__(self, program, *disks, args=()):
        if program == SYSTEM:
            # A device's place, which stays above the filter of a job
            for disk in disks:
                args = [*args, '-drive',
                        f'if=none,id=drive-{disk.name},driver=qcow2,'
                        f'node-name={disk.name},file.filename={disk.file},'
                        'discard=unmap']
        super().__init__(program, *args)
        self.program, self.disks = program, disks
        self.serving = False
        self.exported = {}
        self.said = 0

    def __enter__(self):
        super().__enter__()
        if self.program == DAEMON:
            for disk in self.disks:
                self.command('blockdev-add', driver='qcow2', discard='unmap',
                             node_name=disk.name, file={
                                 'driver': 'file', 'filename': disk.file})
                # Now: nobody may begin to write during a job
                self.exported[disk.name] = self.export(disk.name,
                                                       writable=True)
        return self

    def export(self, node, name=None, writable=False):
        """Exports a node; returns its URL."""
        if not self.serving:
            self.serving = True
            self.command('nbd-server-start', addr={
                'type': 'unix', 'data': {'path': self.path + '.nbd'}},
                max_connections=100)
        self.command('block-export-add', type='nbd', id=f'export-{node}',
                     node_name=node, name=name or node, writable=writable)
        return f'nbd+unix:///{name or node}?socket={self.path}.nbd'

    def unexport(self, node):
        self.command('block-export-del', id=f'export-{node}', mode='hard')
        self.wait_event('BLOCK_EXPORT_DELETED', id=f'export-{node}')

    def write(self, disk, commands=None):
        """Makes changes to a disk, as its guest would, and flushes."""
        commands = disk.change() if commands is None else commands
        if self.program == SYSTEM:
            for command in commands + ['flush']:
                self.hmp(f'qemu-io drive-{disk.name} "{command}"')
            output = self.process.output()
            said, self.said = output[self.said:], len(output)
        else:
            words = [w for c in commands + ['flush'] for w in ('-c', c)]
            result = run('qemu-io', '-f', 'raw', *words,
                         self.exported[disk.name], check=0)
            said = result.out + result.err
        # Of qemu-io; what the drivers say of targets is none of the guest's
        if re.search('^(write|flush).*failed|conflict', said, re.MULTILINE):
            raise AssertionError(said)
        for name in os.listdir('.'):
            if name.startswith('piece'):
                os.unlink(name)

    def add_target(self, node, path, **more):
        """blockdev-add of a bale file that exists."""
        more.setdefault('file', {'driver': 'file', 'filename': path})
        self.command('blockdev-add', driver='bale', node_name=node, **more)

    def delete(self, *nodes):
        for node in nodes:
            self.command('blockdev-del', node_name=node)

    def backup(self, device, target, sync, **more):
        """A whole blockdev-backup; its error, or ''."""
        self.command('blockdev-backup', job_id='j', device=device,
                     target=target, sync=sync, **more)
        return self.end_of('j')

    def end_of(self, job):
        """Waits for a job; its error, 'cancelled' or ''."""
        event = self.event_of({'BLOCK_JOB_COMPLETED',
                               'BLOCK_JOB_CANCELLED'}, job)
        # The node is the job's until the job is gone
        while any(j['id'] == job for j in self.command('query-jobs')):
            pass
        if event['event'] == 'BLOCK_JOB_CANCELLED':
            return 'cancelled'
        return event['data'].get('error', '')

    def event_of(self, names, job):
        """The next event of a job; those of others stay."""
        while True:
            for event in self.events:
                if event['event'] in names and \
                        event['data'].get('device') == job:
                    self.events.remove(event)
                    return event
            answer = self.read()
            if 'event' in answer:
                self.events.append(answer)

    def hurry(self, job):
        """Takes the limit from a job that may have ended already."""
        try:
            self.command('block-job-set-speed', device=job, speed=0)
        except QmpError:
            pass

    def progress(self, job):
        jobs = [j for j in self.command('query-block-jobs')
                if j['device'] == job]
        return jobs[0] if jobs else None

    def dirty(self, node, bitmap):
        """Dirty bytes of a bitmap."""
        for info in self.command('query-named-block-nodes', flat=True):
            if info['node-name'] == node:
                for found in info.get('dirty-bitmaps', []):
                    if found['name'] == bitmap:
                        return found['count']
        raise AssertionError(f'no bitmap {bitmap} in {node}')


def layer(path, size, below=None):
    """A new bale image, over another one if below is given."""
    more = ['-b', below, '-F', 'bale'] if below else []
    qemu_img('create', '-q', '-f', 'bale', *more, path, size)
    return path


def same(raw, image):
    """Byte for byte, and of the same length."""
    compare(raw, image, '-f', 'raw', '-F', 'bale')
    if qemu_img_info(image)['virtual-size'] != os.path.getsize(raw):
        raise AssertionError(f'{image} is not as long as {raw}')


__all__ = ['DAEMON', 'SLOW', 'SYSTEM', 'Disk', 'KIB', 'MIB', 'Machine', 'io',
           'layer', 'same']
