#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The subcommands of `bale` on a store: what they do when all is well, and
what they say of damage."""

import filecmp
import hashlib
import json
import os
import re
import stat

import bale_iotests
from bale_iotests import bale, run
from bale_forge import MiB, Forge, reader

READER = os.path.join(bale_iotests.TOP, 'scripts/bale-reader.py')


class CliCase(bale_iotests.TestCase):
    def make_raw(self, name='in.raw', size=9 * MiB + 5 * 512):
        """A sparse file with text, noise, zeroes and holes."""
        with open(name, 'wb') as file:
            file.truncate(size)
            at = 0
            while at < size:
                length = min(self.random.randrange(1, 400000), size - at)
                kind = self.random.randrange(4)
                data = {0: b'', 1: bytes(length),
                        2: self.random.randbytes(length),
                        3: (b'%d lorem ipsum ' % at * (length // 12))
                        }[kind][:length]
                file.seek(at)
                file.write(data)
                at += length
        return name

    def json(self, *command, check=0):
        return json.loads(bale(*command, check=check).out)

    def flip(self, name, address):
        with open(name, 'r+b') as file:
            file.seek(address)
            byte = file.read(1)[0]
            file.seek(address)
            file.write(bytes([byte ^ 0x10]))

    def data_records(self, name):
        store = reader.Store(name)
        store.scan_pages()
        return [(store.page_base(r.page) + r.offset, r)
                for page in store.pages for segment in page.segments
                for r in segment.records if r.type == reader.DATA]


class CreateAndInfo(CliCase):
    def test_create(self):
        bale('create', '-o', 'page_size=4M,cluster_size=128K,'
             'compression_type=deflate,compression_level=9', 'x.bale', '10G',
             check=0)
        self.assertEqual(stat.S_IMODE(os.stat('x.bale').st_mode), 0o600)
        info = self.json('info', '--json', 'x.bale')
        self.assertEqual(info['cluster-size'], 128 << 10)
        self.assertEqual(info['page-size'], 4 * MiB)
        self.assertTrue(info['clean'])
        self.assertFalse(info['corrupt'])
        image = info['images'][0]
        self.assertEqual(image['size'], 10 << 30)
        self.assertEqual(image['compression-type'], 'deflate')
        self.assertEqual(image['compression-level'], 9)
        self.assertEqual(image['allocated-clusters'], 0)
        bale('check', 'x.bale', check=0)
        run(READER, 'check', 'x.bale', check=0)

    def test_info_changes_nothing(self):
        bale('create', 'x.bale', '1G', check=0)
        before = open('x.bale', 'rb').read(), os.stat('x.bale').st_mtime_ns
        for command in (('info',), ('info', '--stats'), ('list',), ('check',),
                        ('verify',), ('info', '--json', '--stats')):
            bale(*command, 'x.bale', check=0)
        after = open('x.bale', 'rb').read(), os.stat('x.bale').st_mtime_ns
        self.assertTrue(before == after)

    def test_backing_file_with_a_comma(self):
        bale('create', '-o', 'backing_file=a,,b.raw,backing_fmt=raw',
             'x.bale', '1G', check=0)
        image = self.json('info', '--json', 'x.bale')['images'][0]
        self.assertEqual(image['backing-file'], 'a,b.raw')
        self.assertEqual(image['backing-format'], 'raw')
        self.assertIn('a,b.raw', bale('info', 'x.bale', check=0).out)
        self.assert_one_line_error(bale('export', 'x.bale', 'out.raw'),
                                   'x.bale', 'backing file')
        bale('export', '--ignore-backing', 'x.bale', 'out.raw', check=0)

    def test_force_replaces(self):
        bale('create', 'x.bale', '1G', check=0)
        bale('create', '--force', 'x.bale', '2G', check=0)
        self.assertEqual(self.json('list', '--json', 'x.bale')[0]['size'],
                         2 << 30)

    def test_stats(self):
        bale('import', self.make_raw(), 'x.bale', check=0)
        stats = self.json('info', '--json', '--stats', 'x.bale')['stats']
        self.assertGreater(stats['live-bytes'], 0)
        self.assertGreater(stats['device']['gets'], 0)
        self.assertEqual(len(stats['read-ns']), 40)
        self.assertIn('live-bytes',
                      bale('info', '--stats', 'x.bale', check=0).out)

    def test_help(self):
        names = ('run', 'create', 'info', 'list', 'check', 'verify', 'export',
                 'import')
        listing = bale('--help', check=0).out
        for name in names:
            self.assertIn(f'  {name} ', listing)
            self.assertIn('Usage', bale('help', name, check=0).out)


class ImportAndExport(CliCase):
    def round_trip(self, options, size=9 * MiB + 5 * 512):
        raw = self.make_raw(size=size)
        bale('import', '-o', options, raw, 'x.bale', check=0)
        bale('export', 'x.bale', 'out.raw', check=0)
        self.assertTrue(filecmp.cmp(raw, 'out.raw', shallow=False), options)
        bale('verify', 'x.bale', check=0)
        run(READER, 'check', 'x.bale', check=0)
        run(READER, 'extract', '--compare', 'x.bale', 'reader.raw', check=0)
        self.assertTrue(filecmp.cmp(raw, 'reader.raw', shallow=False),
                        options)
        os.unlink('x.bale')

    def test_codecs(self):
        for codec in ('zstd', 'deflate', 'zlib', 'none'):
            self.round_trip(f'compression_type={codec},page_size=2M')

    def test_cluster_sizes(self):
        for kib in (4, 16, 64, 512, 2048):
            self.round_trip(f'cluster_size={kib}K,page_size=8M')

    def test_sizes(self):
        for size in (0, 512, 4096, 65536, 65536 + 512, MiB - 512):
            self.round_trip('page_size=2M', size)

    def test_odd_size(self):
        # Not a multiple of a sector, as a file may be.
        self.round_trip('page_size=2M', 100001)

    def test_zeroes_take_no_room(self):
        with open('in.raw', 'wb') as file:
            file.write(bytes(8 * MiB))
            file.truncate(1 << 30)
        bale('import', 'in.raw', 'x.bale', check=0)
        info = self.json('info', '--json', 'x.bale')
        self.assertEqual(info['images'][0]['allocated-clusters'], 0)
        bale('export', 'x.bale', 'out.raw', check=0)
        self.assertEqual(os.stat('out.raw').st_size, 1 << 30)
        self.assertLess(os.stat('out.raw').st_blocks * 512, MiB)

    def test_export_replaces_a_longer_file(self):
        raw = self.make_raw(size=MiB)
        bale('import', raw, 'x.bale', check=0)
        with open('out.raw', 'wb') as file:
            file.write(b'old' * MiB)
        bale('export', 'x.bale', 'out.raw', check=0)
        self.assertTrue(filecmp.cmp(raw, 'out.raw', shallow=False))

    def test_progress(self):
        bale('import', self.make_raw(), 'x.bale', check=0)
        for command in (('export', '-p', 'x.bale', 'out.raw'),
                        ('verify', '-p', 'x.bale'),
                        ('import', '-p', 'in.raw', 'y.bale')):
            self.assertIn('/100%', bale(*command, check=0).err)

    def loop(self, name, size):
        self.need_root()
        with open(name, 'wb') as file:
            file.write(b'\xa5' * size)
        result = run('losetup', '--find', '--show', name)
        if result.status != 0:
            self.skipTest('no loop devices')
        device = result.out.strip()
        self.addCleanup(run, 'losetup', '--detach', device)
        return device

    def test_block_devices(self):
        raw = self.make_raw(size=8 * MiB)
        store = self.loop('store.img', 24 * MiB)
        out = self.loop('out.img', 9 * MiB)
        bale('import', '-o', 'page_size=2M', raw, store, check=0)
        self.assert_one_line_error(bale('import', raw, store), store,
                                   'holds a store')
        bale('verify', store, check=0)
        bale('export', store, out, check=0)
        with open(out, 'rb') as file, open(raw, 'rb') as want:
            self.assertTrue(file.read(8 * MiB) == want.read())
            self.assertEqual(file.read(), b'\xa5' * MiB)
        bale('import', '-o', 'page_size=2M', out, 'y.bale', check=0)
        self.assertEqual(self.json('list', '--json', 'y.bale')[0]['size'],
                         9 * MiB)

    def test_block_device_that_is_too_small(self):
        raw = self.make_raw(size=8 * MiB)
        bale('import', raw, 'x.bale', check=0)
        out = self.loop('out.img', 4 * MiB)
        self.assert_one_line_error(bale('export', 'x.bale', out), out)


class Damage(CliCase):
    def damaged_store(self):
        raw = self.make_raw()
        bale('import', '-o', 'page_size=2M', raw, 'x.bale', check=0)
        address, record = self.random.choice(self.data_records('x.bale'))
        self.flip('x.bale', address + record.header_length
                  + self.random.randrange(record.payload_length))
        return record

    def test_verify_names_a_damaged_cluster(self):
        record = self.damaged_store()
        result = bale('verify', 'x.bale', check=2)
        self.assertIn(str(record.cluster), result.out)
        found = self.json('verify', '--json', 'x.bale', check=2)
        self.assertEqual(found['damaged'], 1)
        self.assertEqual(len(found['findings']), 1)
        # The rest goes on.
        self.assertGreater(found['checked-records'], 20)

    def test_export_stops_and_leaves_nothing(self):
        self.damaged_store()
        result = bale('export', 'x.bale', 'out.raw')
        self.assertEqual(result.status, 1, str(result))
        self.assertIn('x.bale', result.err)
        self.assertFalse(os.path.exists('out.raw'))

    def test_salvage(self):
        record = self.damaged_store()
        result = bale('export', '--salvage', 'x.bale', 'out.raw', check=2)
        at = record.cluster * 65536
        self.assertIn(f'at {at} are lost', result.err)
        with open('in.raw', 'rb') as file:
            want = bytearray(file.read())
        want[at:at + 65536] = bytes(len(want[at:at + 65536]))
        with open('out.raw', 'rb') as file:
            self.assertTrue(file.read() == bytes(want))

    def test_repair_keeps_a_damaged_cluster_apart(self):
        record = self.damaged_store()
        bale('check', '-r', 'all', 'x.bale')
        self.assertEqual(bale('verify', 'x.bale').status, 2)
        result = bale('export', '--salvage', 'x.bale', 'out.raw', check=2)
        self.assertEqual(result.err.count('are lost'), 1)

    def test_superblock_copies_are_restored(self):
        bale('import', '-o', 'page_size=2M', self.make_raw(), 'x.bale',
             check=0)
        self.flip('x.bale', 60)
        self.flip('x.bale', MiB + 60)
        self.assertEqual(bale('check', 'x.bale').status, 2)
        bale('check', '-r', 'all', 'x.bale', check=0)
        bale('check', 'x.bale', check=0)
        run(READER, 'check', 'x.bale', check=0)

    def test_damaged_checkpoint_is_rebuilt(self):
        raw = self.make_raw()
        bale('import', '-o', 'page_size=2M', raw, 'x.bale', check=0)
        root = reader.Store('x.bale').sb.root_address
        self.flip('x.bale', root + 70)
        bale('export', 'x.bale', 'out.raw', check=0)
        self.assertTrue(filecmp.cmp(raw, 'out.raw', shallow=False))
        bale('check', '-r', 'all', 'x.bale', check=0)
        bale('check', 'x.bale', check=0)
        # The checkpoint before the damaged one lies in the same page, and is
        # kept until there are two newer ones
        for snapshot in '@one', '@two':
            bale('image', 'snapshot', 'x.bale', snapshot, check=0)
        run(READER, 'check', 'x.bale', check=0)

    def test_rate_limit(self):
        bale('import', self.make_raw(), 'x.bale', check=0)
        bale('verify', '--rate-limit', '100M', 'x.bale', check=0)


class EverySector(CliCase):
    """Damage anywhere is an error and a report, never wrong data."""

    def small_store(self, clean):
        f = Forge(size=256 * 1024)
        want = bytearray(f.size)

        def write(cluster, codec):
            data = self.random.randbytes(64) * 64
            want[cluster * 4096:cluster * 4096 + 4096] = data
            return f.data(cluster, data, codec)
        f.open_page(bucket=1)
        f.segment([f.image()])
        f.open_page()
        f.segment([write(i, i % 3) for i in range(8)], f.barrier_all())
        f.segment([write(i, 2) for i in range(6, 14)], f.barrier_all())
        f.segment([f.zero(2, 2), write(9, 1), f.drop(12, 1)],
                  f.barrier_all())
        want[2 * 4096:4 * 4096] = bytes(2 * 4096)
        want[12 * 4096:13 * 4096] = bytes(4096)
        barriers = f.barrier_all()
        f.open_page()
        f.segment([write(60, 1)], barriers)
        proven = f.barrier_all()
        f.open_page(bucket=2)
        f.segment([f.zero(63, 1)], proven)
        f.finish(clean)
        return f, want

    def check_never_wrong(self, want, what):
        result = bale('export', '--salvage', 'x.bale', 'out.raw')
        self.assertIn(result.status, (0, 1, 2), f'{what} {result}')
        if result.status == 1:
            return 'refused'
        info = self.json('info', '--json', 'x.bale')
        if info['corrupt']:
            # A header and its directory: what is lost cannot be named.
            result = bale('export', 'x.bale', 'not.raw')
            self.assertEqual(result.status, 1, f'{what} {result}')
            self.assertIn('corrupt', result.err)
            return 'corrupt'
        lost = {int(at) // 4096 for at in
                re.findall(r'bytes at (\d+) are lost', result.err)}
        with open('out.raw', 'rb') as file:
            got = file.read()
        for at in range(0, len(want), 4096):
            if at // 4096 not in lost:
                self.assertEqual(got[at:at + 4096] == want[at:at + 4096],
                                 True, f'{what}: cluster {at // 4096} is '
                                 f'wrong and not reported {result}')
        return 'lost' if lost else 'read'

    def damage_all(self, clean):
        f, want = self.small_store(clean)
        good = bytes(f.bytes)
        f.write('x.bale')
        self.assertEqual(self.check_never_wrong(want, 'good'), 'read')
        used = [at for at in range(0, len(good), 512)
                if any(good[at:at + 512])]
        outcomes = {'read': 0, 'lost': 0, 'refused': 0, 'corrupt': 0}
        for at in used:
            for how in ('flip', 'zero', 'swap'):
                f.bytes = bytearray(good)
                if how == 'flip':
                    f.flip(at + self.random.randrange(512),
                           self.random.randrange(8))
                elif how == 'zero':
                    f.put(at, bytes(512))
                else:
                    other = self.random.choice(used)
                    f.put(at, good[other:other + 512])
                    # Of an open store that would be two damaged places, data
                    # and the only barrier that proves it
                    if clean:
                        f.put(other, good[at:at + 512])
                f.write('x.bale')
                outcomes[self.check_never_wrong(want, f'{how} {at}')] += 1
        print(f'# {len(used)} sectors, clean={clean}: {outcomes}')

    def test_cleanly_closed(self):
        self.damage_all(True)

    def test_after_a_crash(self):
        self.damage_all(False)


class Forged(CliCase):
    """The engine reads what the document says, not only what it wrote."""

    def test_forged_stores(self):
        for clean in (True, False):
            f = Forge(size=1 * MiB + 512)
            want = bytearray(f.size)
            f.open_page(bucket=1)
            f.segment([f.image()])
            f.open_page()
            for _ in range(6):
                records = []
                for _ in range(9):
                    cluster = self.random.randrange(256)
                    at = cluster * 4096
                    if self.random.random() < .3:
                        count = self.random.randrange(1, 257 - cluster)
                        records.append(self.random.choice(
                            (f.zero, f.drop))(cluster, count))
                        want[at:at + count * 4096] = bytes(count * 4096)
                    else:
                        data = self.random.randbytes(64) * 64
                        want[at:at + 4096] = data
                        records.append(f.data(cluster, data,
                                              self.random.randrange(3)))
                f.segment(records, f.barrier_all())
            f.open_page(bucket=2)
            f.segment([f.drop(256, 0)], f.barrier_all())
            f.finish(clean)
            f.write('x.bale')
            bale('verify', 'x.bale', check=0)
            bale('export', 'x.bale', 'out.raw', check=0)
            got = open('out.raw', 'rb').read()
            self.assertEqual(hashlib.sha256(got).hexdigest(),
                             hashlib.sha256(want).hexdigest(),
                             f'clean={clean}')


if __name__ == '__main__':
    bale_iotests.main()
