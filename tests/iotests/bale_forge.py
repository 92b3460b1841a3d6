# SPDX-License-Identifier: GPL-2.0-or-later
"""
Forges Bale stores byte by byte, for tests: good ones without the engine, and
hostile ones whose checksums are right.

Layouts and checksums come from scripts/bale-reader.py, which in turn comes
from docs/format.md; nothing is shared with the engine.

    f = Forge(size=1 * MiB, cluster_size=4096)
    f.open_page()
    f.segment([f.image(), f.data(0, b'x' * 4096), f.zero(1, 3)])
    f.finish(clean=True)                # checkpoint and superblocks
    f.write('x.bale')

    f = Forge.load('x.bale')            # any store
    f.patch_super(0, version=2)         # reseals that copy
    f.patch_record(page, offset, count=7)
    f.flip(address)                     # one bit, nothing resealed
    f.write('y.bale')
"""

import ctypes
import importlib.util
import os
import struct
import zlib

_path = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                     '../../scripts/bale-reader.py')
_spec = importlib.util.spec_from_file_location('bale_reader', _path)
reader = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reader)

MiB = reader.MiB
BLOCK = reader.BLOCK
UUID = bytes(range(16))

SUPER_FIELDS = ('magic', 'version', 'length', 'incompatible', 'ro_compatible',
                'compatible', 'uuid', 'generation', 'state', 'cluster_size',
                'page_size', 'super_size', 'block_size', 'copy',
                'root_address', 'root_version', 'root_length', 'root_end',
                'next_sequence', 'device_end', 'max_size', 'checksum')
PAGE_FIELDS = ('magic', 'bucket', 'length', 'page', 'version',
               'first_sequence', 'checksum')
RECORD_FIELDS = ('magic', 'type', 'codec', 'flags', 'payload_length',
                 'header_length', 'sequence', 'version', 'layer', 'count',
                 'cluster', 'payload_sum', 'header_sum')


def deflate(data):
    engine = zlib.compressobj(6, zlib.DEFLATED, -15)
    return engine.compress(data) + engine.flush()


def zstd(data):
    compress = reader.ZSTD.ZSTD_compress
    compress.restype = ctypes.c_size_t
    compress.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p,
                         ctypes.c_size_t, ctypes.c_int)
    out = ctypes.create_string_buffer(len(data) + 1024)
    length = compress(out, len(out), data, len(data), 3)
    return out.raw[:length]


class Forge:
    def __init__(self, size=1 * MiB, cluster_size=4096, page_size=2 * MiB,
                 uuid=UUID):
        self.size = size
        self.cluster_size = cluster_size
        self.page_size = page_size
        self.uuid = uuid
        self.bytes = bytearray(2 * MiB)
        self.generation = 2
        self.sequence = 1
        self.opened = 0
        self.page = None            # the one that segments go to
        self.tails = {}             # page -> offset of the next segment
        self.versions = {}
        self.buckets = {}
        self.firsts = {}
        self.index = {}             # (layer, cluster) -> index value
        self.live = {}              # page -> bytes
        self.tombstones = {}
        self.image_part = None
        self.placed = []            # (dict, page, offset) of every record
        self.root = (0, 0, 0, 0)
        self.identity = reader.checksum(uuid, 0)

    # --- the bytes ---

    def put(self, address, data):
        end = address + len(data)
        if end > len(self.bytes):
            self.bytes.extend(bytes(end - len(self.bytes)))
        self.bytes[address:end] = data

    def get(self, address, length):
        data = bytes(self.bytes[address:address + length])
        return data + bytes(length - len(data))

    def flip(self, address, bit=0):
        self.put(address, bytes([self.get(address, 1)[0] ^ 1 << bit]))

    def write(self, path):
        """Write the store to @path, with holes for zeroes."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, 'wb') as out:
            for at in range(0, len(self.bytes), BLOCK):
                block = bytes(self.bytes[at:at + BLOCK])
                if any(block):
                    out.seek(at)
                    out.write(block)
            out.truncate(len(self.bytes))

    @classmethod
    def load(cls, path):
        """Any readable store, to be patched; not to be appended to."""
        store = reader.Store(path)
        forge = cls(cluster_size=store.sb.cluster_size,
                    page_size=store.sb.page_size, uuid=store.sb.uuid)
        with open(path, 'rb') as file:
            forge.bytes = bytearray(file.read())
        return forge

    # --- addresses and checksums ---

    def base(self, page):
        return reader.SUPER_SIZE + page * self.page_size

    def place(self, page, version, offset):
        return reader.checksum(struct.pack('<QQQ', page, version, offset),
                               self.identity)

    def seal_super(self, copy):
        address = reader.SUPER_ADDRESSES[copy]
        raw = self.get(address, 504)
        self.put(address + 504,
                 struct.pack('<Q', reader.checksum(raw, address)))

    def seal_page(self, page):
        raw = self.get(self.base(page), 56)
        self.put(self.base(page) + 56, struct.pack(
            '<Q', reader.checksum(raw, self.place(page, 0, 0))))

    def seal_record(self, page, offset):
        """Seal header and payload of the record there, by its own lengths
        as far as they make sense."""
        at = self.base(page) + offset
        fields = reader.RECORD.unpack(self.get(at, 64))
        payload_length, header_length, version = (fields[4], fields[5],
                                                  fields[7])
        header_length = min(max(header_length, 64), 256)
        payload = self.get(at + header_length,
                           min(payload_length, reader.PAYLOAD_MAX))
        seed = self.place(page, version, offset)
        self.put(at + 48, struct.pack('<Q', reader.checksum(payload, seed)))
        raw = self.get(at, header_length)
        sealed = raw[:56] + bytes(8) + raw[64:]
        self.put(at + 56, struct.pack('<Q', reader.checksum(sealed, seed)))

    def patch(self, layout, names, address, changes):
        fields = list(layout.unpack(self.get(address, layout.size)))
        for name, value in changes.items():
            fields[names.index(name)] = value
        self.put(address, layout.pack(*fields))

    def patch_super(self, copy, **changes):
        """Change fields of a copy (None: of all) and seal it again."""
        for c in range(4) if copy is None else (copy,):
            self.patch(reader.SUPER, SUPER_FIELDS, reader.SUPER_ADDRESSES[c],
                       changes)
            self.seal_super(c)

    def patch_page(self, page, /, **changes):
        self.patch(reader.PAGE, PAGE_FIELDS, self.base(page), changes)
        self.seal_page(page)

    def patch_record(self, page, offset, **changes):
        self.patch(reader.RECORD, RECORD_FIELDS, self.base(page) + offset,
                   changes)
        self.seal_record(page, offset)

    # --- records (described by dicts until segment() places them) ---

    def record(self, kind, payload=b'', layer=1, cluster=0, count=0, codec=0,
               flags=0, sequence=None, header_length=64):
        if sequence is None:
            sequence = self.sequence
            self.sequence += 1
        return dict(type=kind, payload=payload, layer=layer, cluster=cluster,
                    count=count, codec=codec, flags=flags, sequence=sequence,
                    header_length=header_length)

    def data(self, cluster, data, codec=reader.DEFLATE, **more):
        payload = {reader.NONE: bytes, reader.DEFLATE: deflate,
                   reader.ZSTANDARD: zstd}[codec](data)
        return self.record(reader.DATA, payload, cluster=cluster, count=1,
                           codec=codec, **more)

    def zero(self, cluster, count, **more):
        return self.record(reader.ZERO, cluster=cluster, count=count, **more)

    def drop(self, cluster, count, **more):
        return self.record(reader.DROP, cluster=cluster, count=count, **more)

    def image(self, size=None, image_id=1, layer=1, codec=reader.DEFLATE,
              level=0, name='', backing_file='', backing_format='', **more):
        texts = [t.encode() for t in (name, backing_file, backing_format)]
        payload = reader.IMAGE_HEAD.pack(
            image_id, layer, self.size if size is None else size, codec,
            level, *map(len, texts)) + b''.join(texts)
        return self.record(reader.IMAGE, payload, layer=layer, **more)

    # --- pages and segments ---

    def open_page(self, bucket=0, page=None):
        if page is None:
            page = max(self.tails, default=-1) + 1
        self.opened += 1
        version = self.generation << 32 | self.opened
        self.versions[page], self.buckets[page] = version, bucket
        self.firsts[page] = self.sequence
        self.live.setdefault(page, 0)
        self.put(self.base(page), bytes(BLOCK))
        self.put(self.base(page), reader.PAGE.pack(
            reader.PAGE_MAGIC, bucket, 64, page, version, self.sequence, 0))
        self.seal_page(page)
        self.tails[page] = BLOCK
        self.page = page
        return page

    def put_record(self, page, offset, r):
        header = reader.RECORD.pack(
            reader.RECORD_MAGIC, r['type'], r['codec'], r['flags'],
            len(r['payload']), r['header_length'], r['sequence'],
            self.versions[page], r['layer'], r['count'], r['cluster'], 0, 0)
        header += bytes(r['header_length'] - 64)
        raw = header + r['payload']
        self.put(self.base(page) + offset, raw + bytes(-len(raw) % 16))
        self.seal_record(page, offset)
        return offset + reader.round_up(len(raw), 16)

    def segment(self, records, barriers=(), page=None):
        """Append a segment; the offset of its segment record."""
        page = self.page if page is None else page
        start = self.tails[page]
        last_sequence = max([self.sequence - 1]
                            + [r['sequence'] for r in records])
        head_size = 64 + 24 + 24 * len(barriers)
        at = start + reader.round_up(head_size, 16)
        entries = b''
        for r in records:
            entries += reader.ENTRY.pack(
                r['sequence'], r['cluster'], r['layer'], r['count'], at // 16,
                len(r['payload']), r['type'], r['codec'], r['flags'],
                r['header_length'])
            self.placed.append((r, page, at))
            self.account(r, page, at)
            at = self.put_record(page, at, r)
        directory = self.record(reader.DIRECTORY, entries, layer=0,
                                sequence=last_sequence)
        end = reader.round_up(at + 64 + len(entries), BLOCK)
        payload = reader.SEGMENT_HEAD.pack(end - start, at, len(records),
                                           len(barriers))
        for barrier in barriers:
            payload += reader.BARRIER.pack(*barrier)
        self.put_record(page, start, self.record(
            reader.SEGMENT, payload, layer=0, sequence=last_sequence))
        last = self.put_record(page, at, directory)
        self.put(self.base(page) + last, bytes(end - last))
        assert end <= self.page_size
        self.tails[page] = end
        return start

    def barrier_all(self):
        """Barriers for everything appended so far."""
        return [(p, self.versions[p], end) for p, end in self.tails.items()]

    def account(self, r, page, offset):
        """Keep the index that a checkpoint will hold."""
        address = self.base(page) + offset
        kind, layer = r['type'], r['layer']
        if kind in (reader.ZERO, reader.DROP, reader.IMAGE):
            self.tombstones[page] = max(self.tombstones.get(page, 0),
                                        r['sequence'])
        if kind == reader.IMAGE:
            self.image_part = (r, page, address)
        if kind not in (reader.DATA, reader.ZERO, reader.DROP):
            return
        if r['count'] > 1 << 20:
            return              # tests with those have no checkpoint
        for cluster in range(r['cluster'], r['cluster'] + r['count']):
            old = self.index.pop((layer, cluster), 0)
            if old:
                old_page = ((old & ~15) - reader.SUPER_SIZE) // self.page_size
                self.live[old_page] -= self.live_of(old)
            if kind == reader.DROP:
                continue
            size_class = (0 if kind == reader.ZERO else
                          reader.size_class(len(r['payload']),
                                            self.cluster_size))
            self.index[layer, cluster] = address | size_class
            self.live[page] += self.live_of(size_class)

    def live_of(self, value):
        return 64 + reader.CLASSES[value & 15] * self.cluster_size // 256

    # --- checkpoint and superblocks ---

    def checkpoint(self, page=None):
        """Append a checkpoint to @page (else to a new page of metadata)."""
        if page is None:
            page = self.open_page(bucket=1)
        parts, records = [], []

        def part(kind, a, b, payload):
            records.append(self.record(reader.PART, payload, layer=0))
            parts.append([kind, len(payload), None, self.versions[page], a,
                          b])
        chunks = {}
        for (layer, cluster), value in self.index.items():
            chunk = chunks.setdefault((layer, cluster // reader.CHUNK), {})
            chunk[cluster % reader.CHUNK] = value
        for (layer, chunk), values in sorted(chunks.items()):
            payload = b''.join(struct.pack('<Q', values.get(i, 0))
                               for i in range(max(values) + 1))
            part(reader.PART_INDEX, layer, chunk * reader.CHUNK, payload)
        count = max(self.tails) + 1
        part(reader.PART_PAGES, 0, count, bytes(48 * count))
        table = records[-1]
        root = self.record(reader.ROOT, bytes(
            32 + 40 * (len(parts) + (self.image_part is not None))), layer=0)
        # Where everything will be is known before it is written.
        barriers = self.barrier_all()
        at = self.tails[page] + reader.round_up(
            64 + 24 + 24 * len(barriers), 16)
        for r, p in zip(records, parts):
            p[2] = self.base(page) + at
            at += reader.round_up(64 + len(r['payload']), 16)
        root_offset = at
        at += reader.round_up(64 + len(root['payload']), 16)
        end = reader.round_up(at + 64 + 40 * (len(records) + 1), BLOCK)
        rows = b''
        for p in range(count):
            if p not in self.tails:
                rows += bytes(48)
                continue
            rows += reader.PAGE_ENTRY.pack(
                self.versions[p], self.buckets[p], 0,
                0 if p == page else self.tails[p], self.live[p],
                self.firsts[p], self.tombstones.get(p, 0))
        table['payload'] = rows
        if self.image_part:
            r, image_page, address = self.image_part
            parts.append([reader.PART_IMAGE, len(r['payload']), address,
                          self.versions[image_page], 1, 0])
        root['payload'] = reader.ROOT_HEAD.pack(
            self.sequence, count, len(parts)) + b''.join(
                reader.PART_ENTRY.pack(*p) for p in parts)
        self.segment(records + [root], barriers, page)
        assert self.tails[page] == end
        self.root = (self.base(page) + root_offset, self.versions[page],
                     64 + len(root['payload']), end // BLOCK)

    def superblocks(self, clean=True):
        address, version, length, end = self.root
        for copy, at in enumerate(reader.SUPER_ADDRESSES):
            self.put(at, bytes(BLOCK))
            self.put(at, reader.SUPER.pack(
                reader.SUPER_MAGIC, 1, 512, 0, 0, 0, self.uuid,
                self.generation + (copy & 1), reader.STATE_CLEAN if clean
                else 0, self.cluster_size, self.page_size, reader.SUPER_SIZE,
                BLOCK, copy, address, version, length, end, self.sequence,
                len(self.bytes), 0, 0))
            self.seal_super(copy)

    def finish(self, clean=True):
        if clean:
            self.checkpoint()
        self.superblocks(clean)
