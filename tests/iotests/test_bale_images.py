#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""
Goal: QEMU's programs on images and snapshots of a store: the options `image`,
qemu-img snapshot, convert -l.
"""

import bale_iotests
from bale_iotests import bale


class SnapshotTest(bale_iotests.TestCase):
    def io(self, target, *commands, check=0, read_only=False):
        words = [word for command in commands for word in ('-c', command)]
        flags = ['-r'] if read_only else []
        result = bale('run', 'qemu-io', *flags, *words, '--image-opts',
                      f'driver=bale,file.filename={target}')
        self.assertEqual(result.status, check, result)
        self.assertNotIn('failed', result.out, result)

    def img(self, *args, check=0):
        return bale('run', 'qemu-img', *args, check=check).out

    def test_snapshot_create_apply_list_delete(self):
        self.img('create', '-f', 'bale', 'x.bale', '4M')
        self.io('x.bale', 'write -P 3 0 1M')
        self.img('snapshot', '-c', 'one', 'x.bale')
        self.img('snapshot', '-c', 'one', 'x.bale', check=1)
        self.io('x.bale', 'write -P 5 512k 1M')
        self.assertIn('one', self.img('snapshot', '-l', 'x.bale'))
        self.io('x.bale', 'read -P 3 0 512k', 'read -P 5 512k 1M')
        self.img('convert', '-l', 'one', '-f', 'bale', '-O', 'raw', 'x.bale',
                 'x.raw')
        with open('x.raw', 'rb') as f:
            self.assertEqual(f.read(), b'\3' * (1 << 20) + bytes(3 << 20))
        self.img('snapshot', '-a', 'one', 'x.bale')
        self.io('x.bale', 'read -P 3 0 1M', 'read -P 0 1M 3M')
        self.img('snapshot', '-d', 'one', 'x.bale')
        self.assertNotIn('one', self.img('snapshot', '-l', 'x.bale'))
        self.img('snapshot', '-a', 'one', 'x.bale', check=1)
        self.io('x.bale', 'read -P 3 0 1M', 'read -P 0 1M 3M')
        self.img('check', 'x.bale')

    def test_named_images(self):
        self.img('create', '-f', 'bale', '-o', 'image=web01/a', 'x.bale',
                 '4M')
        bale('image', 'create', 'x.bale', 'db', '2M', check=0)
        self.io('x.bale,image=web01/a', 'write -P 9 0 1M')
        self.io('x.bale,image=db', 'write -P 8 0 1M')
        bale('image', 'snapshot', 'x.bale', 'db@s', check=0)
        self.io('x.bale,image=db', 'write -P 7 0 64k')
        self.io('x.bale,image=web01/a', 'read -P 9 0 1M', 'read -P 0 1M 3M')
        self.io('x.bale,image=db', 'read -P 7 0 64k', 'read -P 8 64k 960k')
        self.io('x.bale,image=db@s', 'read -P 8 0 1M', read_only=True)
        self.io('x.bale,image=db@s', 'read 0 1M', check=1)
        self.io('x.bale,image=none', 'read 0 1M', check=1)
        self.io('x.bale', 'read 0 1M', check=1)
        self.img('create', '-f', 'bale', '-o', 'image=a@b', 'y.bale', '4M',
                 check=1)


if __name__ == '__main__':
    bale_iotests.main()
