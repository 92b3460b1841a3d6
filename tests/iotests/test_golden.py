#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""
Golden images: stores that an engine wrote once (tests/images/make-images) are
read alike, for ever, by the engine of today and by the independent reader; and
those that are wrong are refused with the same words.
"""

import hashlib
import json
import lzma
import os

import bale_iotests
from bale_forge import reader
from bale_iotests import bale, run
from bale_qmp import Qemu

IMAGES = os.path.join(bale_iotests.TOP, 'tests/images')
READER = os.path.join(bale_iotests.TOP, 'scripts/bale-reader.py')

with open(os.path.join(IMAGES, 'golden.json')) as _file:
    GOLDEN = json.load(_file)


def digest(path):
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


class GoldenTest(bale_iotests.TestCase):
    def unpack(self, name):
        with lzma.open(os.path.join(IMAGES, f'{name}.bale.xz')) as file:
            data = file.read()
        with open('x.bale', 'wb') as out:
            for at in range(0, len(data), 4096):
                block = data[at:at + 4096]
                if any(block):
                    out.seek(at)
                    out.write(block)
            out.truncate(len(data))

    def check_refused(self, expect):
        before = digest('x.bale')
        for command in (('info',), ('check',), ('check', '-r', 'all')):
            self.assert_one_line_error(bale(*command, 'x.bale'), 'x.bale',
                                       expect['error'])
        self.assert_one_line_error(run(READER, 'info', 'x.bale'), 'x.bale',
                                   expect['error'])
        self.assertEqual(digest('x.bale'), before)

    def check_status(self, command, expect):
        """A missing status is 0; null is any but that of not opening."""
        status = expect.get(command, 0)
        result = bale(command, 'x.bale')
        if status is None:
            self.assertIn(result.status, (0, 2, 3), str(result))
        else:
            self.assertEqual(result.status, status, str(result))

    def check_extract(self, expect, command, statuses, *args):
        for image, want in expect.get('images', {'': expect}).items():
            result = run(*command, image, *args, 'x.bale', 'out.raw')
            self.assertIn(result.status, statuses, str(result))
            self.assertEqual(os.stat('out.raw').st_size, want['size'])
            self.assertEqual(digest('out.raw'), want['sha256'], str(result))
            os.unlink('out.raw')

    def check_read(self, expect):
        before = digest('x.bale')
        for name, want in expect.get('images', {'': expect}).items():
            if '@' in name:
                continue
            info = json.loads(bale('info', '--json', '-i', name, 'x.bale',
                                   check=0).out)
            self.assertEqual(info['clean'], expect.get('clean', True))
            self.assertEqual(info['corrupt'], expect.get('corrupt', False))
            image = info['images'][0]
            self.assertEqual(image['size'], want['size'])
            for key in ('backing-file', 'backing-format'):
                self.assertEqual(image.get(key), want.get(key))
        self.check_both(expect)
        self.check_bitmaps(expect)
        if expect.get('corrupt'):
            self.check_doubtful()
            self.check_mark(expect)
        self.check_status('check', expect)
        self.check_status('verify', expect)
        self.assertEqual(digest('x.bale'), before)

    def check_doubtful(self):
        """QEMU reads a store that is marked corrupt only when told to."""
        options = 'driver=bale,file.filename=x.bale'
        for salvage, good in ('off', False), ('on', True):
            result = run(bale_iotests.BALE, 'run', 'qemu-io', '-r',
                         '--image-opts', f'{options},salvage={salvage}',
                         '-c', 'read 0 512')
            self.assertEqual('Input/output error' not in result.out, good,
                             str(result))
            self.assertEqual('marked corrupt' not in result.err, good,
                             str(result))

    def check_mark(self, expect):
        """The mark is one finding, not one for each cluster."""
        found = json.loads(bale('check', '--json', 'x.bale', check=2).out)
        self.assertTrue(found['corrupt'])
        self.assertEqual(found['damaged'], expect.get('damaged', 0), found)
        result = run(bale_iotests.BALE, 'run', 'qemu-img', 'check', 'x.bale')
        self.assertEqual(result.status, 2, str(result))

    def check_both(self, expect):
        """The engine and the reader extract what went in."""
        lost = 2 if expect.get('lost') else 0
        self.check_extract(
            expect, [bale_iotests.BALE, 'export', '--salvage',
                     '--ignore-backing', '-i'],
            # A repair takes the mark away.
            [lost, 2] if expect.get('corrupt') else [lost])
        # The reader looks at everything and tells also of harmless damage.
        statuses = [lost, expect.get('reader', lost)]
        self.check_extract(expect, [READER, 'extract', '--image'], statuses)
        for way in self.ways():
            self.check_extract(expect, [READER, 'extract', '--image'],
                               statuses, '--by', way)

    def check_bitmaps(self, expect):
        """QEMU, the engine and the reader know the same bitmaps, and the
        same bits of those that can be trusted."""
        for image, want in expect.get('bitmaps', {}).items():
            listed = bale('info', '--json', '-i', image, 'x.bale', check=0)
            found = json.loads(listed.out)['images'][0]['bitmaps']
            self.assertEqual(
                {b['name']: (b['granularity'], b['enabled'],
                             not b['inconsistent']) for b in found},
                {name: (b['granularity'], b['enabled'], 'bits' in b)
                 for name, b in want.items()})
            found = json.loads(run(READER, 'info', '--json', 'x.bale',
                                   check=0).out)
            found, = [i for i in found['images'] if i['name'] == image]
            self.assertEqual(
                {b['name']: (b['granularity'], b['enabled'],
                             not b['in-use']) for b in found['bitmaps']},
                {name: (b['granularity'], b['enabled'], 'bits' in b)
                 for name, b in want.items()})
            for name, b in want.items():
                result = run(READER, 'extract', '--image', image, '--bitmap',
                             name, 'x.bale', 'out.bits', check=0)
                self.assertEqual('not to be trusted' in result.err,
                                 'bits' not in b, str(result))
                if 'bits' in b:
                    self.assertEqual(digest('out.bits'), b['bits'], name)
            with Qemu('qemu-storage-daemon') as vm:
                vm.command('blockdev-add', driver='bale', node_name='n',
                           image=image, read_only=True,
                           file={'driver': 'file', 'filename': 'x.bale'})
                node, = [n for n in vm.command('query-named-block-nodes')
                         if n['node-name'] == 'n']
                self.assertEqual(
                    {b['name']: (b['granularity'],
                                 not b.get('inconsistent', False))
                     for b in node['dirty-bitmaps']},
                    {name: (b['granularity'], 'bits' in b)
                     for name, b in want.items()})
                for name, b in want.items():
                    if 'bits' in b:
                        self.assertEqual(vm.command(
                            'x-debug-block-dirty-bitmap-sha256', node='n',
                            name=name)['sha256'], b['bits'], name)

    def ways(self):
        """Checkpoints of the store that are intact."""
        ways = reader.Store('x.bale').ways()[1:]
        for way in list(ways):
            try:
                reader.Store('x.bale').read_by(way)
            except reader.Damage:
                ways.remove(way)
        return ways

    def check_repaired(self, expect):
        """After a repair, or just a session, everything is as before."""
        bale('check', '-r', 'all', 'x.bale')
        self.check_both(expect)
        self.check_bitmaps(expect)


def add(name, expect):
    def test(self):
        self.unpack(name)
        if 'error' in expect:
            self.check_refused(expect)
        else:
            self.check_read(expect)
            self.check_repaired(expect)
    setattr(GoldenTest, 'test_' + name.replace('-', '_'), test)


for _name, _expect in GOLDEN.items():
    add(_name, _expect)


if __name__ == '__main__':
    bale_iotests.main()
