#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""
The independent reader: what it makes of good, torn, damaged and foreign
stores.  The stores are forged, without the engine; the tests at the end let
the reader and the engine read each other's idea of the format.
"""

import os
import unittest

import bale_iotests
from bale_forge import (BLOCK, MiB, Forge, reader)

CLUSTER = 4096
READER = os.path.join(bale_iotests.TOP, 'scripts/bale-reader.py')


class Disk:
    """A forged store and the bytes that its image must have."""

    def __init__(self, rng, size=1 * MiB):
        self.rng = rng
        self.forge = Forge(size=size, cluster_size=CLUSTER)
        self.bytes = bytearray(size)

    def write(self, cluster, codec=None):
        data = self.rng.randbytes(32) * (CLUSTER // 32)
        end = min(CLUSTER, len(self.bytes) - cluster * CLUSTER)
        data = data[:end] + bytes(CLUSTER - end)
        at = cluster * CLUSTER
        self.bytes[at:at + end] = data[:end]
        if codec is None:
            codec = self.rng.randrange(3)
        return self.forge.data(cluster, data, codec)

    def clear(self, cluster, count):
        at = cluster * CLUSTER
        self.bytes[at:at + count * CLUSTER] = bytes(count * CLUSTER)

    def zero(self, cluster, count):
        self.clear(cluster, count)
        return self.forge.zero(cluster, count)

    def drop(self, cluster, count):
        self.clear(cluster, count or len(self.bytes) // CLUSTER - cluster)
        return self.forge.drop(cluster, count)


def read(path):
    """(store, state of a scan, bytes, lost clusters) of the store @path."""
    store = reader.Store(path)
    state = store.scan()
    image = state.images[1]
    lost = set()
    out = bytearray(image.size)
    for start, end, r in state.layer(image.layer):
        for cluster in range(start, min(end, -(-image.size // CLUSTER))):
            at = cluster * CLUSTER
            length = min(CLUSTER, image.size - at)
            if r.damage:
                lost.add(cluster)
            elif r.type == reader.DATA:
                try:
                    out[at:at + length] = store.cluster_of(r)[:length]
                except reader.Damage:
                    lost.add(cluster)
    return store, state, bytes(out), lost


class ReaderCase(bale_iotests.TestCase):
    def save(self, disk, name='x.bale'):
        disk.forge.write(self.path(name))
        return self.path(name)

    def check_bytes(self, disk, lost=frozenset(), name='x.bale'):
        store, state, data, gone = read(self.save(disk, name))
        self.assertEqual(gone, set(lost))
        want = bytearray(disk.bytes)
        for cluster in lost:
            want[cluster * CLUSTER:(cluster + 1) * CLUSTER] = bytes(CLUSTER)
        self.assertEqual(data, bytes(want))
        return store

    def two_segments(self):
        """Segments of 8 clusters each in page 0, the first one proven."""
        disk = Disk(self.random)
        f = disk.forge
        f.open_page()
        f.segment([f.image()])
        first = f.segment([disk.write(i) for i in range(8)])
        second = f.segment([disk.write(i) for i in range(8, 16)],
                           f.barrier_all())
        return disk, first, second

    def prove_all(self, disk):
        """A segment in a page of its own with barriers for everything."""
        f = disk.forge
        barriers = f.barrier_all()
        f.open_page()
        f.segment([f.zero(255, 1)], barriers)


class GoodStores(ReaderCase):
    def test_all_codecs_and_types(self):
        disk = Disk(self.random, size=1 * MiB + 1000)
        f = disk.forge
        f.open_page()
        f.segment([f.image()])
        f.segment([disk.write(i, i % 3) for i in range(30)])
        f.segment([disk.zero(3, 4), disk.write(5), disk.write(256),
                   disk.drop(20, 2)], f.barrier_all())
        f.finish()
        store = self.check_bytes(disk)
        self.assertEqual(store.problems, [])
        same = reader.differences(store.scan(), store.checkpoint(), CLUSTER)
        self.assertEqual(same, [])

    def test_random_stores_scan_and_checkpoint_agree(self):
        for i in range(30):
            disk = Disk(self.random)
            f = disk.forge
            f.open_page()
            f.segment([f.image()])
            for _ in range(self.random.randrange(1, 12)):
                records = []
                for _ in range(self.random.randrange(1, 10)):
                    cluster = self.random.randrange(256)
                    count = self.random.randrange(1, 257 - cluster)
                    kind = self.random.randrange(6)
                    if kind == 0:
                        records.append(disk.zero(cluster, count))
                    elif kind == 1:
                        records.append(disk.drop(cluster, count))
                    else:
                        records.append(disk.write(cluster))
                f.segment(records, f.barrier_all())
                if self.random.random() < .2:
                    f.open_page()
            f.finish()
            store = self.check_bytes(disk)
            self.assertEqual(store.problems, [])
            same = reader.differences(store.scan(), store.checkpoint(),
                                      CLUSTER)
            self.assertEqual(same, [])

    def test_newest_sequence_wins_not_the_place(self):
        # A compacted copy lies behind what replaced its original.
        disk = Disk(self.random)
        f = disk.forge
        f.open_page()
        f.segment([f.image()])
        old = disk.write(7)
        new = disk.write(7)
        f.segment([new])
        f.open_page(bucket=2)
        f.segment([old])
        f.superblocks(clean=False)
        self.check_bytes(disk)

    def test_image_record_cuts_off_clusters(self):
        disk = Disk(self.random)
        f = disk.forge
        f.open_page()
        f.segment([f.image(), disk.write(3), disk.write(200)])
        f.segment([f.image(size=100 * CLUSTER)])
        f.segment([f.image(size=256 * CLUSTER)])
        disk.clear(100, 156)
        f.superblocks(clean=False)
        self.check_bytes(disk)

    def test_drop_without_count_drops_all_behind(self):
        disk = Disk(self.random)
        f = disk.forge
        f.open_page()
        f.segment([f.image(), disk.write(3), disk.write(9), disk.write(200)])
        f.segment([disk.drop(9, 0)])
        f.superblocks(clean=False)
        self.check_bytes(disk)

    def test_longer_headers_and_skippable_types(self):
        disk = Disk(self.random)
        f = disk.forge
        f.open_page()
        record = disk.write(3)
        record['header_length'] = 256
        f.segment([f.image(), record,
                   f.record(200, b'from the future'),
                   f.record(reader.ZERO, cluster=9, count=1, flags=0x8000)])
        f.superblocks(clean=False)
        store = self.check_bytes(disk)
        self.assertEqual(store.problems, [])

    def test_extract_is_sparse(self):
        disk = Disk(self.random, size=64 * MiB)
        f = disk.forge
        f.open_page()
        f.segment([f.image(), disk.write(5000)])
        f.finish()
        path = self.save(disk)
        bale_iotests.run(READER, 'extract', '--compare', path, 'out.raw',
                         check=0)
        with open('out.raw', 'rb') as out:
            self.assertEqual(out.read(), bytes(disk.bytes))
        self.assertLess(os.stat('out.raw').st_blocks * 512, 1 * MiB)

    def test_commands(self):
        disk, _, _ = self.two_segments()
        disk.forge.finish()
        path = self.save(disk)
        info = bale_iotests.run(READER, 'info', '--json', path, check=0)
        self.assertIn('"data": 16', info.out)
        listing = bale_iotests.run(READER, 'list', path, check=0)
        self.assertEqual(listing.out.count('data seq='), 16)
        bale_iotests.run(READER, 'check', path, check=0)


class TornStores(ReaderCase):
    def test_unproven_segment_is_dropped_quietly(self):
        disk, _, second = self.two_segments()
        disk.forge.superblocks(clean=False)
        disk.forge.flip(disk.forge.base(0) + second + 64)
        disk.clear(8, 8)
        store = self.check_bytes(disk)
        self.assertEqual(store.problems, [])
        self.assertEqual(store.pages[0].torn[0], second)

    def test_whole_segment_behind_a_torn_one_is_dropped(self):
        disk, first, second = self.two_segments()
        f = disk.forge
        keep = bytes(disk.bytes)
        f.segment([disk.write(1)])      # no barrier: not proven either
        f.superblocks(clean=False)
        f.flip(f.base(0) + second + 64)
        disk.bytes[:] = keep
        disk.clear(8, 8)
        self.check_bytes(disk)

    def test_cut_at_every_block(self):
        disk, first, second = self.two_segments()
        f = disk.forge
        f.superblocks(clean=False)
        whole = bytes(f.bytes)
        start = f.base(0) + second
        for cut in range(start, f.base(0) + f.tails[0], BLOCK):
            f.bytes = bytearray(whole[:cut])
            want = bytes(disk.bytes)
            disk.clear(8, 8)
            store = self.check_bytes(disk)
            self.assertEqual(store.problems, [])
            disk.bytes[:] = want

    def test_page_that_was_opened_only(self):
        disk, _, _ = self.two_segments()
        disk.forge.open_page()
        disk.forge.superblocks(clean=False)
        self.assertEqual(self.check_bytes(disk).problems, [])


class DamagedStores(ReaderCase):
    def test_payload(self):
        disk, first, _ = self.two_segments()
        f = disk.forge
        f.superblocks(clean=False)
        r, page, offset = f.placed[4]
        f.flip(f.base(page) + offset + 64)
        store = self.check_bytes(disk, lost={3})
        self.assertEqual(len(store.problems), 1)
        self.assertFalse(store.corrupt)

    def test_header_is_named_by_the_directory(self):
        disk, first, _ = self.two_segments()
        f = disk.forge
        f.superblocks(clean=False)
        r, page, offset = f.placed[4]
        f.flip(f.base(page) + offset + 40)
        store = self.check_bytes(disk, lost={3})
        self.assertFalse(store.corrupt)

    def test_newer_record_hides_a_damaged_one(self):
        disk, first, _ = self.two_segments()
        f = disk.forge
        f.segment([disk.write(3)])
        f.superblocks(clean=False)
        r, page, offset = f.placed[4]
        f.flip(f.base(page) + offset + 64)
        self.check_bytes(disk)

    def directory_of(self, f, segment):
        raw = f.get(f.base(0) + segment + 64, 16)
        return reader.struct.unpack('<QQ', raw)[1]

    def test_directory(self):
        disk, first, _ = self.two_segments()
        f = disk.forge
        f.superblocks(clean=False)
        f.flip(f.base(0) + self.directory_of(f, first) + 100)
        store = self.check_bytes(disk)
        self.assertEqual(len(store.problems), 1)

    def test_directory_and_header_cannot_be_named(self):
        disk, first, _ = self.two_segments()
        f = disk.forge
        f.superblocks(clean=False)
        f.flip(f.base(0) + self.directory_of(f, first) + 100)
        f.flip(f.base(0) + f.placed[4][2] + 40)
        store, _, _, _ = read(self.save(disk))
        self.assertTrue(store.corrupt)

    def test_segment_record(self):
        disk, first, _ = self.two_segments()
        f = disk.forge
        f.superblocks(clean=False)
        f.flip(f.base(0) + first + 70)
        store = self.check_bytes(disk)
        self.assertTrue(store.problems)
        self.assertFalse(store.corrupt)

    def test_page_header(self):
        for how in ('flip', 'zero'):
            disk, first, _ = self.two_segments()
            f = disk.forge
            f.superblocks(clean=False)
            if how == 'flip':
                f.flip(f.base(0) + 20)
            else:
                f.put(f.base(0), bytes(BLOCK))
            store = self.check_bytes(disk)
            self.assertIn('page 0: damaged header', store.problems)

    def crashed(self):
        """Two pages, the first one proven by the second one, all written
        in the session that the superblocks know nothing of."""
        disk, first, _ = self.two_segments()
        f = disk.forge
        self.prove_all(disk)
        f.superblocks(clean=False)
        f.patch_super(None, next_sequence=1)
        self.assertEqual(self.check_bytes(disk).problems, [])
        return disk, f

    def test_whole_page_zeroed(self):
        disk, f = self.crashed()
        f.put(f.base(0), bytes(f.page_size))
        store = reader.Store(self.save(disk))
        store.scan()
        self.assertTrue(store.corrupt)

    def test_page_cut_off(self):
        # The page that proves the other one comes first on the device.
        disk = Disk(self.random)
        f = disk.forge
        f.open_page(page=1)
        f.segment([f.image(), disk.write(3)])
        barriers = f.barrier_all()
        f.open_page(page=0)
        f.segment([f.image()], barriers)
        f.superblocks(clean=False)
        f.patch_super(None, next_sequence=1)
        self.assertEqual(self.check_bytes(disk).problems, [])
        del f.bytes[f.base(1):]
        store = reader.Store(self.save(disk))
        store.scan()
        self.assertTrue(store.corrupt)

    def test_freed_page_holds_nothing(self):
        disk, f = self.crashed()
        f.segment([f.image()] + [disk.write(i) for i in range(16)])
        f.patch_page(0, magic=b'BALEFREE')
        self.assertEqual(self.check_bytes(disk).problems, [])

    def test_stale_mark_of_a_freed_page(self):
        # The header of the page's second use never came; a barrier did.
        disk, f = self.crashed()
        f.patch_page(0, magic=b'BALEFREE', version=1)
        store = self.check_bytes(disk)
        self.assertIn('page 0: damaged header', store.problems)

    def test_stale_page_version(self):
        # The page's second use begins like its first one.
        disk, first, second = self.two_segments()
        f = disk.forge
        f.superblocks(clean=False)
        f.patch_page(0, version=f.versions[0] + 5)
        store = reader.Store(self.save(disk))
        state = store.scan()
        self.assertEqual(state.images, {})

    def test_swapped_blocks(self):
        disk, first, _ = self.two_segments()
        f = disk.forge
        self.prove_all(disk)
        f.superblocks(clean=False)
        a, b = f.placed[2][2], f.placed[3][2]
        one, two = (f.get(f.base(0) + x, 64) for x in (a, b))
        f.put(f.base(0) + a, two)
        f.put(f.base(0) + b, one)
        self.check_bytes(disk, lost={1, 2})

    def test_every_sector_flipped_and_zeroed(self):
        """Never wrong data: what differs is reported."""
        disk, first, second = self.two_segments()
        f = disk.forge
        f.segment([disk.zero(2, 3), disk.write(9), disk.drop(12, 2)],
                  f.barrier_all())
        self.prove_all(disk)
        f.superblocks(clean=False)
        good = bytes(f.bytes)
        sectors = [a * 512 for a in range(2 * MiB // 512,
                                          (f.base(0) + f.tails[0]) // 512)]
        for sector in sectors:
            if not any(good[sector:sector + 512]):
                continue
            for how in ('flip', 'zero'):
                f.bytes = bytearray(good)
                if how == 'flip':
                    f.flip(sector + self.random.randrange(512),
                           self.random.randrange(8))
                else:
                    f.put(sector, bytes(512))
                self.never_wrong(disk, f'{how} {sector}')

    def never_wrong(self, disk, what):
        try:
            store, _, data, lost = read(self.save(disk))
        except KeyError:
            store = reader.Store(self.path('x.bale'))
            store.scan()
            self.assertTrue(store.corrupt, what)    # the image record is gone
            return
        if store.corrupt:
            return
        for cluster in range(len(disk.bytes) // CLUSTER):
            at = cluster * CLUSTER
            if cluster not in lost:
                self.assertEqual(data[at:at + CLUSTER],
                                 bytes(disk.bytes[at:at + CLUSTER]),
                                 f'{what}: cluster {cluster}')
        if lost:
            self.assertTrue(store.problems, what)

    def test_damaged_checkpoint_falls_back_to_a_scan(self):
        disk, _, _ = self.two_segments()
        f = disk.forge
        f.finish()
        f.flip(f.root[0] + 70)
        store = self.check_bytes(disk)
        state, how = store.state()
        self.assertEqual(how, 'scan')
        self.assertTrue(store.problems)


class Superblocks(ReaderCase):
    def test_one_good_copy_is_enough(self):
        disk, _, _ = self.two_segments()
        f = disk.forge
        f.finish()
        good = bytes(f.bytes)
        for mask in range(1, 16):
            f.bytes = bytearray(good)
            for copy in range(4):
                if not mask & 1 << copy:
                    f.flip(reader.SUPER_ADDRESSES[copy] + 50)
            self.check_bytes(disk)

    def test_newest_generation_counts(self):
        disk, _, _ = self.two_segments()
        f = disk.forge
        f.finish()
        f.patch_super(1, generation=9, next_sequence=12345)
        self.assertEqual(reader.Store(self.save(disk)).sb.next_sequence,
                         12345)

    def refused(self, disk, text):
        before = reader.Device(self.save(disk)).map[:]
        result = bale_iotests.run(READER, 'info', self.path('x.bale'))
        self.assert_one_line_error(result, 'x.bale', text)
        self.assertEqual(reader.Device(self.path('x.bale')).map[:], before)

    def test_refusals(self):
        disk, _, _ = self.two_segments()
        f = disk.forge
        f.finish()
        good = bytes(f.bytes)
        for changes, text in (
                (dict(version=2), 'version 2'),
                (dict(incompatible=4), 'incompatible'),
                (dict(device_end=len(good) + BLOCK), 'truncated'),
                (dict(magic=b'QCOWSTOR'), 'not a Bale store'),
                (dict(cluster_size=3000), 'no superblock'),
                (dict(cluster_size=2048), 'no superblock'),
                (dict(cluster_size=4 * MiB), 'no superblock'),
                (dict(page_size=3 * MiB), 'no superblock'),
                (dict(page_size=0), 'no superblock'),
                (dict(page_size=1 << 40), 'no superblock'),
                (dict(super_size=0), 'no superblock'),
                (dict(block_size=512), 'no superblock'),
                (dict(length=256), 'no superblock')):
            f.bytes = bytearray(good)
            f.patch_super(None, **changes)
            self.refused(disk, text)

    def test_unknown_compatible_bits_are_fine(self):
        disk, _, _ = self.two_segments()
        f = disk.forge
        f.finish()
        f.patch_super(None, compatible=1 << 60, ro_compatible=1 << 61)
        self.check_bytes(disk)

    def test_empty_and_foreign_files(self):
        for content in (b'', b'x', bytes(4096), bytes(3 * MiB),
                        b'QFI\xfb' + bytes(5000)):
            with open('other', 'wb') as file:
                file.write(content)
            self.assert_one_line_error(bale_iotests.run(
                READER, 'check', 'other'), 'other', 'not a Bale store')
        self.assert_one_line_error(bale_iotests.run(
            READER, 'check', 'missing'), 'missing', 'No such file')


class HostileStores(ReaderCase):
    """Right checksums around nonsense: an error or an answer, no crash."""

    def read_anyhow(self, f):
        f.write(self.path('x.bale'))
        try:
            store = reader.Store(self.path('x.bale'))
            store.scan()
            if store.sb.clean:
                store.checkpoint()
        except (reader.Unreadable, reader.Damage):
            pass

    def test_superblock_fields(self):
        disk, _, _ = self.two_segments()
        f = disk.forge
        f.finish()
        good = bytes(f.bytes)
        for name in ('generation', 'state', 'cluster_size', 'page_size',
                     'root_address', 'root_version', 'root_length',
                     'next_sequence', 'device_end'):
            top = (1 << 32) - 1 if name in ('state', 'cluster_size',
                                            'root_length') else (1 << 64) - 1
            for value in (0, 1, 2 * MiB - 1, 1 << 31, top):
                f.bytes = bytearray(good)
                f.patch_super(None, **{name: value})
                self.read_anyhow(f)

    def test_record_fields(self):
        disk, _, _ = self.two_segments()
        f = disk.forge
        f.finish()
        good = bytes(f.bytes)
        width = {'type': 8, 'codec': 8, 'flags': 16, 'header_length': 16,
                 'payload_length': 32, 'layer': 32, 'count': 32}
        places = [(0, 4096), (0, f.placed[2][2])] + [
            (page, offset) for r, page, offset in f.placed[-3:]]
        for page, offset in places:
            for name in ('type', 'codec', 'flags', 'payload_length',
                         'header_length', 'sequence', 'layer', 'count',
                         'cluster'):
                for value in (0, 1, 6, 63, 128, 1 << 31, (1 << 64) - 1):
                    f.bytes = bytearray(good)
                    value &= (1 << width.get(name, 64)) - 1
                    f.patch_record(page, offset, **{name: value})
                    self.read_anyhow(f)

    def test_payload_bytes(self):
        disk, _, _ = self.two_segments()
        f = disk.forge
        f.finish()
        good = bytes(f.bytes)
        places = [(0, 4096), (0, f.placed[0][2])] + [
            (page, offset) for r, page, offset in f.placed[-3:]]
        for _ in range(200):
            f.bytes = bytearray(good)
            page, offset = self.random.choice(places)
            at = f.base(page) + offset
            length = reader.RECORD.unpack(f.get(at, 64))[4]
            for _ in range(self.random.randrange(1, 4)):
                f.put(at + 64 + self.random.randrange(length),
                      bytes([self.random.choice((0, 1, 0x80, 0xff))]))
            f.seal_record(page, offset)
            self.read_anyhow(f)

    def test_bombs(self):
        for bomb in (reader.zlib.compress(bytes(64 * MiB), 9)[2:-4],
                     b'\x28\xb5\x2f\xfd\x80\x00' + b'\xff\xff\xff\xff'):
            disk = Disk(self.random)
            f = disk.forge
            f.open_page()
            codec = (reader.ZSTANDARD if bomb[:4] == b'\x28\xb5\x2f\xfd'
                     else reader.DEFLATE)
            bomb = bomb[:CLUSTER]
            f.segment([f.image(), f.record(reader.DATA, bomb, cluster=3,
                                           count=1, codec=codec)])
            f.superblocks(clean=False)
            self.check_bytes(disk, lost={3})


class EngineStores(bale_iotests.TestCase):
    """Engine, reader and a flat file agree after random sessions, of which
    some end with a flush and a crash."""

    SIZE = 3 * MiB + 512
    ROUNDS = 40 if bale_iotests.LONG else 6

    def commands(self, raw):
        """Random qemu-io commands, done to @raw as well."""
        args = []
        for _ in range(self.random.randrange(1, 25)):
            sectors = self.SIZE // 512
            at = self.random.randrange(sectors)
            count = min(self.random.choice((1, 8, 128, 128, 500, 2000)),
                        sectors - at)
            if self.random.random() < .6:
                at, count = at // 128 * 128, min(round(count, -2) + 128,
                                                 sectors - at // 128 * 128)
            at, length = at * 512, count * 512
            kind = self.random.randrange(8)
            if kind == 0:
                args += ['-c', f'write -z {at} {length}']
                raw[at:at + length] = bytes(length)
            elif kind == 1:
                # What a discard leaves inside a cluster is not promised.
                at = -(-at // 65536) * 65536
                length = (at + length) // 65536 * 65536 - at
                if at + length > self.SIZE or length <= 0:
                    continue
                args += ['-c', f'discard {at} {length}']
                raw[at:at + length] = bytes(length)
            elif kind == 2:
                args += ['-c', 'flush']
            else:
                byte = self.random.randrange(1, 256)
                args += ['-c', f'write -P {byte} {at} {length}']
                raw[at:at + length] = bytes([byte]) * length
        return args

    def check_same(self, raw, clean, what):
        bale_iotests.bale('export', 'x.bale', 'engine.raw', check=0)
        compare = ['--compare'] if clean else []
        result = bale_iotests.run(READER, 'extract', *compare, 'x.bale',
                                  'reader.raw', check=0)
        for name in ('engine.raw', 'reader.raw'):
            with open(name, 'rb') as file:
                got = file.read()
            bad = [i for i in range(0, self.SIZE, 512)
                   if got[i:i + 512] != raw[i:i + 512]]
            self.assertEqual(bad[:4], [], f'{name}: {what} {result}')
        # After a crash a page may wait for the next writer to free it.
        result = bale_iotests.bale('verify', 'x.bale')
        self.assertIn(result.status, (0,) if clean else (0, 3), str(result))
        bale_iotests.run(READER, 'check', 'x.bale', check=0)

    def test_zero_record_keeps_its_page(self):
        """A cluster that was zeroed over a backing file stays zero when all
        else in the page of its record was replaced."""
        self.need('qemu-io')
        if not os.path.exists(bale_iotests.SHIM):
            self.skipTest('built without QEMU')
        with open('base.raw', 'wb') as file:
            file.write(b'\xff' * 8 * MiB)
        bale_iotests.bale(
            'create', '-o', 'page_size=2M,compression_type=none,'
            'backing_file=base.raw,backing_fmt=raw', 'x.bale', '8M', check=0)
        args = ['-c', 'write -z 7M 64k']
        for byte in (1, 2, 3):
            args += ['-c', f'write -P {byte} 0 3M', '-c', 'flush']
        args += ['-c', 'flush', '-c', 'read -P 0 7M 64k']
        for more in (args, ['-c', 'read -P 0 7M 64k', '-c', 'write 0 4k'],
                     ['-c', 'read -P 0 7M 64k']):
            result = bale_iotests.qemu_io('-f', 'bale', *more, 'x.bale')
            self.assertNotIn('failed', result.out, str(result))
            result = bale_iotests.run(READER, 'extract', '--compare',
                                      'x.bale', 'reader.raw', check=0)
            bale_iotests.run(READER, 'check', 'x.bale', check=0)
            self.assertIn('zero', bale_iotests.run(
                READER, 'list', 'x.bale', check=0).out)

    def test_random_sessions(self):
        self.need('qemu-io')
        if not os.path.exists(bale_iotests.SHIM):
            self.skipTest('built without QEMU')
        for _ in range(self.ROUNDS):
            raw = bytearray(self.SIZE)
            codec = self.random.choice(('zstd', 'deflate', 'none'))
            bale_iotests.bale('create', '-f', '-o', 'page_size=2M,'
                              f'compression_type={codec}', 'x.bale',
                              str(self.SIZE), check=0)
            story = []
            for _ in range(self.random.randrange(1, 5)):
                crash = self.random.random() < .5
                args = self.commands(raw)
                if crash:
                    args += ['-c', 'flush', '-c', 'abort']
                story.append(args)
                bale_iotests.run(
                    bale_iotests.BALE, 'run', 'qemu-io', '-f', 'bale', '-d',
                    'unmap', '-t', 'none', *args, 'x.bale',
                    check=-6 if crash else 0)
                self.check_same(raw, not crash, story)


class RangesTest(unittest.TestCase):
    def test_against_a_list(self):
        import random
        seed = int(os.environ.get('BALE_SEED') or 1)
        rng = random.Random(seed)
        for _ in range(300):
            ranges, flat = reader.Ranges(), [None] * 40
            for value in range(12):
                a, b = sorted(rng.randrange(41) for _ in range(2))
                ranges.assign(a, b, value)
                flat[a:b] = [value] * (b - a)
                self.assertEqual([ranges.lookup(i) for i in range(40)], flat,
                                 f'BALE_SEED={seed}')


if __name__ == '__main__':
    bale_iotests.main()
