#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""
Goal: many images and snapshots in one store, by the command bale; what it
exports is what the independent reader extracts.
"""

import json
import os

import bale_iotests

READER = os.path.join(bale_iotests.TOP, 'scripts', 'bale-reader.py')
SIZE = 1 << 20


class ImagesTest(bale_iotests.TestCase):
    def bale(self, *args, status=0):
        return bale_iotests.bale(*args, check=status).out

    def raw(self, seed):
        data = bytes((i * seed // 4096 + seed) % 251 for i in range(SIZE))
        with open(self.path('in.raw'), 'wb') as f:
            f.write(data)
        return data

    def check(self, name, data):
        for command in (
                (bale_iotests.BALE, 'export', '-i', name, 'x.bale', 'out.raw'),
                (READER, 'extract', '--compare', '--image', name, 'x.bale',
                 'out.raw')):
            if os.path.exists(self.path('out.raw')):
                os.unlink(self.path('out.raw'))
            bale_iotests.run(*command, check=0)
            with open(self.path('out.raw'), 'rb') as f:
                self.assertEqual(f.read(), data, command)

    def names(self):
        images = json.loads(self.bale('image', 'list', '--json', 'x.bale'))
        return {i['name']: [s['name'] for s in i['snapshots']]
                for i in images}

    def test_life_of_images(self):
        """Snapshot, clone, rename, delete, flatten; reader and engine agree."""
        data = self.raw(3)
        empty = bytes(SIZE)
        self.bale('import', '-o', 'image=web01/a', 'in.raw', 'x.bale')
        self.check('web01/a', data)
        self.bale('image', 'snapshot', 'x.bale', 'web01/a@one')
        self.bale('image', 'create', 'x.bale', 'db', '1M')
        self.bale('image', 'clone', 'x.bale', 'web01/a@one', 'copy')
        self.bale('image', 'clone', 'x.bale', 'copy', 'copy of copy')
        self.assertEqual(self.names(), {'web01/a': ['one'], 'db': [],
                                        'copy': [], 'copy of copy': []})
        for name in ('web01/a', 'web01/a@one', 'copy', 'copy of copy'):
            self.check(name, data)
        self.check('db', empty)
        self.bale('image', 'rename', 'x.bale', 'copy', 'second')
        self.bale('image', 'delete', 'x.bale', 'web01/a')
        self.bale('image', 'flatten', 'x.bale', 'copy of copy')
        self.check('second', data)
        self.check('copy of copy', data)
        self.bale('image', 'delete', 'x.bale', 'second')
        self.bale('compact', 'x.bale')
        self.check('copy of copy', data)
        self.bale('verify', 'x.bale')
        self.assertEqual(self.names(), {'db': [], 'copy of copy': []})

    def test_unnamed_image(self):
        data = self.raw(5)
        self.bale('import', 'in.raw', 'x.bale')
        self.bale('image', 'snapshot', 'x.bale', '@tag')
        self.bale('image', 'rollback', 'x.bale', '@tag')
        self.check('', data)
        self.check('@tag', data)
        self.check('@1', data)
        self.bale('image', 'delete', 'x.bale', '@tag')
        self.check('', data)

    def test_refusals_change_nothing(self):
        self.bale('create', 'x.bale', '1M')
        before = self.names()
        for args in (('create', 'a@b', '1M'), ('create', '', '1M'),
                     ('create', 'a', 'much'), ('delete', 'none'),
                     ('delete', '@none'), ('snapshot', 'none@a'),
                     ('snapshot', 'no-snapshot'), ('rollback', '@none'),
                     ('rename', 'none', 'x'), ('clone', '', 'x@y'),
                     ('frobnicate',), ('delete',)):
            self.bale('image', args[0], 'x.bale', *args[1:], status=1)
        self.assertEqual(self.names(), before)
        self.bale('image', 'read-only', 'x.bale', '')
        self.bale('image', 'delete', 'x.bale', '', status=1)
        self.bale('image', 'read-write', 'x.bale', '')
        self.bale('image', 'delete', 'x.bale', '')
        self.assertEqual(self.names(), {})
        self.bale('export', 'x.bale', 'out.raw', status=1)


if __name__ == '__main__':
    bale_iotests.main()
