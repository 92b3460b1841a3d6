# SPDX-License-Identifier: GPL-2.0-or-later
"""A Debian guest under TCG that writes files with checksums, for tests and
benchmarks of backups: its disk, the machine, and what is in a restore point."""

import os
import re
import shutil

from bale_backup import Machine, SYSTEM
from bale_images import sha256
from bale_iotests import TOP, qemu_img, run, wait_until

# The guest's first and only program. The disk has room for 15,000 files
INIT = '''#!/bin/sh
mount -t proc proc /proc
mkdir -p /data
cd /data
n=0
while sha256sum -c --status $n.sum; do
    n=$((n + 1))
done 2> /dev/null
echo "guest: ready with $n" > /dev/ttyS0
while :; do
    head -c $((65536 + n % 300 * 1000)) /dev/urandom > $n
    sha256sum $n > $n.sum
    sync
    echo "guest: wrote $n" > /dev/ttyS0
    n=$((n + 1))
done
'''
BOOT_S = 600


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
            '-device', 'virtio-blk-pci,id=disk0,drive=drive-d'])

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


def make_disk(path):
    """Makes a raw disk that boots the guest. Returns (where its kernel lies,
    ''), or ('', why there is none)."""
    done = run(f'{TOP}/scripts/test-disk', timeout_s=900)
    if done.status:
        return '', f'no test disk: {done.err[-200:]}'
    raw = done.out.strip()
    run('cp', '--sparse=always', raw, path, check=0)
    with open('init', 'w', encoding='ascii') as file:
        file.write(INIT)
    run('debugfs', '-w', '-f', '-', path, check=0, stdin=(
        'write init bale-init\nsif bale-init mode 0100755\n'))
    return raw[:-len('.raw')], ''


def files_in(image, image_format='bale'):
    """Numbers of the files of a restore point whose checksum is right: of
    all, but of the one that was being written."""
    qemu_img('convert', '-f', image_format, '-O', 'raw', image, 'r.raw')
    if run('e2fsck', '-fy', 'r.raw').status not in (0, 1):
        raise AssertionError(f'{image}: the file system is damaged')
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


__all__ = ['Guest', 'files_in', 'make_disk']
