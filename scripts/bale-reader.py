#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""
An independent reader of Bale stores, written from docs/format.md alone.

It shares no code with the engine, so that a store which both read alike is
what the document says.  It never writes to the store, takes no lock, and is
made to be right rather than fast.

    bale-reader.py info STORE
    bale-reader.py list STORE
    bale-reader.py extract [--by WAY] [--compare] [--image NAME[@SNAPSHOT]]
                           [--bitmap NAME]
                           STORE OUT.raw
    bale-reader.py check STORE

There are up to four ways to read a store: "scan" reads all pages, "checkpoint"
serves if the store is clean, "tail" reads the newest checkpoint and what was
appended since, and "previous" the same with the checkpoint before.

Exit status: 0 fine; 1 the store cannot be read, or the arguments are wrong;
2 the store was read, but damage was found.
"""

import argparse
import bisect
import ctypes
import json
import mmap
import os
import struct
import sys
import zlib

try:
    import xxhash

    def checksum(data, seed):
        return xxhash.xxh3_64_intdigest(data, seed)
except ImportError:
    _xxh = ctypes.CDLL('libxxhash.so.0')
    _xxh.XXH3_64bits_withSeed.restype = ctypes.c_uint64
    _xxh.XXH3_64bits_withSeed.argtypes = (ctypes.c_char_p, ctypes.c_size_t,
                                          ctypes.c_uint64)

    def checksum(data, seed):
        return _xxh.XXH3_64bits_withSeed(bytes(data), len(data), seed)

ZSTD = ctypes.CDLL('libzstd.so.1')
ZSTD.ZSTD_decompress.restype = ctypes.c_size_t
ZSTD.ZSTD_decompress.argtypes = (ctypes.c_char_p, ctypes.c_size_t,
                                 ctypes.c_char_p, ctypes.c_size_t)
ZSTD.ZSTD_findFrameCompressedSize.restype = ctypes.c_size_t
ZSTD.ZSTD_findFrameCompressedSize.argtypes = (ctypes.c_char_p,
                                              ctypes.c_size_t)

KiB = 1 << 10
MiB = 1 << 20
BLOCK = 4096
SUPER_SIZE = 2 * MiB
SUPER_ADDRESSES = (0, 512 * KiB, 1 * MiB, 1536 * KiB)
SUPER_LENGTH = 512
SUPER_MAGIC = b'BALESTOR'
PAGE_MAGIC = b'BALEPAGE'
FREED_MAGIC = b'BALEFREE'
PAGE_LENGTH = 64
PAGE_OPEN = 1                   # flag in the page table
RECORD_MAGIC = 0xB41EC0DE
HEADER = 64
HEADER_MAX = 256

INCOMPAT_CORRUPT = 1
STATE_CLEAN = 1

DATA, ZERO, IMAGE, SEGMENT, DIRECTORY, PART, ROOT, DROP, CATALOGUE = range(
    1, 10)
PATCH = 10
TYPE_NAMES = {DATA: 'data', ZERO: 'zero', IMAGE: 'image', SEGMENT: 'segment',
              DIRECTORY: 'directory', PART: 'part', ROOT: 'root',
              DROP: 'drop', CATALOGUE: 'catalogue', PATCH: 'patch'}
BARE = 1                        # flag of a patch: no record held the cluster
SKIPPABLE = 128                 # types from here on may be skipped
NONE, DEFLATE, ZSTANDARD = range(3)
CODEC_NAMES = {NONE: 'none', DEFLATE: 'deflate', ZSTANDARD: 'zstd'}
PART_PAGES, PART_INDEX, PART_IMAGE = range(1, 4)

DEVICE_MAX = 1 << 48
IMAGE_SIZE_MAX = 1 << 60
IMAGE_CLUSTERS_MAX = 1 << 36
PAYLOAD_MAX = 4 * MiB
BARRIERS_MAX = 64
SEGMENT_PAYLOAD_MAX = 24 + BARRIERS_MAX * 24
IMAGE_PAYLOAD_MAX = 32 + 255 + 4095 + 63
CATALOGUE_PAYLOAD_MAX = 1 * MiB
DEPTH_MAX = 256                 # layers under each other
BITMAPS_MAX = 1024              # of one image
BITMAP_BYTES_MAX = 512 * MiB    # bits of one bitmap
BITMAPS_BYTES_MAX = 1024 * MiB  # bits of all bitmaps of an image
PARTS_MAX = 100000
PATCHED_BYTES = 32 * MiB
PATCHED_CLUSTERS_MIN = 8
PATCHES_PER_CLUSTER_MAX = 256
CHUNK = 16384                   # index values in a chunk
# Limits of the size classes, in 1/256 of a cluster
CLASSES = (0, 1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 208, 256)

SUPER = struct.Struct('<8sIIQQQ16sQIIQQIIQQIIQQ24xQ336xQ')
assert SUPER.size == SUPER_LENGTH
CHECKPOINT_REF = struct.Struct('<QQII')     # of a checkpoint root
CHECKPOINT_AT, PREVIOUS_AT = 96, 136        # in a superblock
PAGE = struct.Struct('<8sIIQQQ16xQ')
assert PAGE.size == PAGE_LENGTH
RECORD = struct.Struct('<IBBHIH2xQQIIQQQ')
assert RECORD.size == HEADER
SEGMENT_HEAD = struct.Struct('<QQII')
BARRIER = struct.Struct('<QQQ')
ENTRY = struct.Struct('<QQIIIIBBHH2x')
assert ENTRY.size == 40
IMAGE_HEAD = struct.Struct('<IIQBbHHH8x')
assert IMAGE_HEAD.size == 32
CATALOGUE_HEAD = struct.Struct('<IIIIIIII')
assert CATALOGUE_HEAD.size == 32
LAYER_ENTRY = struct.Struct('<III4xQQ')
assert LAYER_ENTRY.size == 32
ALIAS_ENTRY = struct.Struct('<IIQ')
assert ALIAS_ENTRY.size == 16
SNAPSHOT_ENTRY = struct.Struct('<IIIH2xQI4xQ')
assert SNAPSHOT_ENTRY.size == 40
IMAGE_ENTRY = struct.Struct('<IIIBbHHH4xQ')
assert IMAGE_ENTRY.size == 32
BITMAP_ENTRY = struct.Struct('<IIIBxHQ8x')
assert BITMAP_ENTRY.size == 32
ROOT_HEAD = struct.Struct('<QQI12x')
assert ROOT_HEAD.size == 32
PART_ENTRY = struct.Struct('<IIQQQQ')
assert PART_ENTRY.size == 40
PAGE_ENTRY = struct.Struct('<QIIQQQQ')
assert PAGE_ENTRY.size == 48


class Unreadable(Exception):
    """The store as a whole must be refused."""


class Damage(Exception):
    """One structure does not verify."""


def round_up(value, unit):
    return (value + unit - 1) // unit * unit


def is_zero(data):
    return not any(data)


def power_of_two(value):
    return value > 0 and value & (value - 1) == 0


def inflate_raw(data, length):
    engine = zlib.decompressobj(-15)
    try:
        out = engine.decompress(data, length + 1)
    except zlib.error as error:
        raise Damage(f'deflate: {error}')
    if len(out) != length or not engine.eof or engine.unused_data:
        raise Damage(f'deflate: not exactly one cluster ({len(out)} bytes)')
    return out


def unzstd(data, length):
    """One frame; nothing larger than @length is ever allocated."""
    out = ctypes.create_string_buffer(length)
    got = ZSTD.ZSTD_decompress(out, length, data, len(data))
    if got != length:
        raise Damage('zstd: not exactly one cluster')
    if ZSTD.ZSTD_findFrameCompressedSize(data, len(data)) != len(data):
        raise Damage('zstd: not exactly one frame')
    return out.raw


def size_class(length, cluster_size):
    """The smallest class, from 1 on, that a payload of @length fits in."""
    for number, limit in enumerate(CLASSES):
        if number and length <= limit * cluster_size // 256:
            return number
    raise Damage('payload longer than a cluster')


class Device:
    """The bytes of a file or block device; zeroes behind its end."""

    def __init__(self, path):
        self.path = path
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.size = os.lseek(fd, 0, os.SEEK_END)
            if self.size > DEVICE_MAX:
                raise Unreadable('device larger than 2^48 bytes')
            self.map = (mmap.mmap(fd, self.size, prot=mmap.PROT_READ)
                        if self.size else b'')
        finally:
            os.close(fd)

    def read(self, address, length):
        data = self.map[address:address + length]
        if len(data) < length:
            data += bytes(length - len(data))
        return data


class Superblock:
    def __init__(self, raw, copy):
        (self.magic, self.version, self.length, self.incompatible,
         self.ro_compatible, self.compatible, self.uuid, self.generation,
         self.state, self.cluster_size, self.page_size, self.super_size,
         self.block_size, self.copy, self.root_address, self.root_version,
         self.root_length, self.root_end, self.next_sequence,
         self.device_end, self.max_size, self.checksum) = SUPER.unpack(raw)
        self.newest = CHECKPOINT_REF.unpack_from(raw, CHECKPOINT_AT)
        self.previous = CHECKPOINT_REF.unpack_from(raw, PREVIOUS_AT)
        self.problem = self.find_problem(raw, copy)

    def find_problem(self, raw, copy):
        """None, or why this copy does not count."""
        if self.magic != SUPER_MAGIC:
            return 'no magic' if not is_zero(raw) else 'empty'
        if checksum(raw[:504], SUPER_ADDRESSES[copy]) != self.checksum:
            return 'wrong checksum'
        if self.copy != copy:
            return 'wrong copy number'
        if self.version != 1:
            return None         # said by whoever picks the newest
        if self.length != SUPER_LENGTH:
            return 'wrong length'
        if (not power_of_two(self.cluster_size)
                or not 4 * KiB <= self.cluster_size <= 2 * MiB):
            return 'cluster size out of range'
        if (self.page_size % (2 * MiB) or self.page_size > 1 << 30
                or self.page_size < max(4 * self.cluster_size, 1)):
            return 'page size out of range'
        if self.super_size != SUPER_SIZE or self.block_size != BLOCK:
            return 'super size or block size out of range'
        if self.generation == 0:
            return 'generation is 0'
        return None

    @property
    def clean(self):
        return bool(self.state & STATE_CLEAN)

    @property
    def corrupt(self):
        return bool(self.incompatible & INCOMPAT_CORRUPT)


class Record:
    """A record whose header verified, or what a directory says about one."""

    __slots__ = ('page', 'offset', 'type', 'codec', 'flags', 'payload_length',
                 'header_length', 'sequence', 'version', 'layer', 'count',
                 'cluster', 'payload_sum', 'damage')

    @property
    def end(self):
        return self.offset + round_up(self.header_length
                                      + self.payload_length, 16)

    def describe(self):
        name = TYPE_NAMES.get(self.type, f'type{self.type}')
        text = f'{name} seq={self.sequence} offset={self.offset}'
        if self.type in (DATA, ZERO, DROP):
            text += (f' layer={self.layer} cluster={self.cluster}'
                     f' count={self.count}')
        elif self.type == PATCH:
            text += (f' layer={self.layer} cluster={self.cluster}'
                     f' at={self.count}')
        if self.type == DATA:
            text += f' codec={CODEC_NAMES.get(self.codec, self.codec)}'
        if self.payload_length:
            text += f' payload={self.payload_length}'
        if self.damage:
            text += f' DAMAGED ({self.damage})'
        return text


class Fields:
    """Takes a payload apart."""

    def __init__(self, payload):
        self.payload = payload
        self.at = 0

    def take(self, layout):
        if len(self.payload) - self.at < layout.size:
            raise Damage('image record: too short')
        self.at += layout.size
        return layout.unpack_from(self.payload, self.at - layout.size)

    def text(self, length, limit):
        raw = self.payload[self.at:self.at + length]
        self.at += length
        if length > limit or len(raw) < length or b'\0' in raw:
            raise Damage('image record: a name does not fit')
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise Damage('image record: not UTF-8')

    def done(self):
        if self.at != len(self.payload):
            raise Damage('image record: longer than it says')


class Layer:
    def __init__(self, *fields):
        (self.id, self.parent, self.generation, self.size,
         self.parent_clusters) = fields


class Snapshot:
    pass


class Image:
    pass


class Bitmap:
    def length(self):
        """Bytes of its bits."""
        bits = -(-self.size // self.granularity)
        return -(-bits // 64) * 8


def valid_name(name):
    return (name != '' and '@' not in name
            and not any(ord(c) < 0x20 or ord(c) == 0x7f for c in name))


class Catalogue:
    """What an image or a catalogue record says."""

    def __init__(self, payload, record, cluster_size):
        self.layers = {}        # id -> Layer
        self.aliases = {}       # id -> (layer, clusters)
        self.snapshots = {}     # id -> Snapshot
        self.images = {}        # id -> Image
        self.bitmaps = {}       # layer -> Bitmap
        self.cluster_size = cluster_size
        fields = Fields(payload)
        if record.type == IMAGE:
            self.read_image_record(fields)
        else:
            self.read_catalogue(fields)
        fields.done()
        for image in self.images.values():
            if image.codec not in CODEC_NAMES:
                raise Damage('image record: unknown codec')
            image.size = self.layers[image.layer].size
        for layer in self.layers.values():
            if (layer.size > IMAGE_SIZE_MAX
                    or self.clusters(layer.size) > IMAGE_CLUSTERS_MAX):
                raise Damage('image record: size out of range')

    def clusters(self, size):
        return -(-size // self.cluster_size)

    def read_image_record(self, fields):
        image = Image()
        (image.id, image.layer, size, image.codec, image.level, name_len,
         file_len, format_len) = fields.take(IMAGE_HEAD)
        image.name = fields.text(name_len, 255)
        image.backing_file = fields.text(file_len, 4095)
        image.backing_format = fields.text(format_len, 63)
        image.read_only = False
        if (image.id, image.layer, image.name) != (1, 1, ''):
            raise Damage('image record: layer or id out of range')
        self.images[1] = image
        self.layers[1] = Layer(1, 0, 1, size, 0)

    def read_catalogue(self, fields):
        (layers, aliases, snapshots, images, next_layer, next_image,
         next_snapshot, bitmaps) = fields.take(CATALOGUE_HEAD)
        if 0 in (next_layer, next_image, next_snapshot):
            raise Damage('catalogue: the next id is 0')
        for _ in range(layers):
            self.add(self.layers, Layer(*fields.take(LAYER_ENTRY)),
                     next_layer)
        for layer in self.layers.values():
            self.check_parent(layer)
        for _ in range(aliases):
            number, layer, clusters = fields.take(ALIAS_ENTRY)
            if (number in self.layers or layer not in self.layers
                    or number >= layer
                    or number <= max(self.aliases, default=0)
                    or clusters > self.clusters(self.layers[layer].size)):
                raise Damage('catalogue: a bad alias')
            self.aliases[number] = (layer, clusters)
        for _ in range(snapshots):
            s = Snapshot()
            (s.image, s.id, s.layer, length, s.date, s.date_ns,
             s.vm_clock) = fields.take(SNAPSHOT_ENTRY)
            s.name = fields.text(length, 255)
            self.add(self.snapshots, s, next_snapshot)
            if not valid_name(s.name) or s.layer not in self.layers:
                raise Damage('catalogue: a bad snapshot')
        for _ in range(images):
            i = Image()
            (i.id, i.layer, flags, i.codec, i.level, name_len, file_len,
             format_len, i.date) = fields.take(IMAGE_ENTRY)
            i.read_only = bool(flags & 1)
            i.name = fields.text(name_len, 255)
            i.backing_file = fields.text(file_len, 4095)
            i.backing_format = fields.text(format_len, 63)
            self.add(self.images, i, next_image)
            if (i.layer not in self.layers
                    or i.name and not valid_name(i.name)):
                raise Damage('catalogue: a bad image')
        for _ in range(bitmaps):
            self.read_bitmap(fields)
        self.check_names()
        self.check_bitmaps()

    def read_bitmap(self, fields):
        b = Bitmap()
        b.layer, b.image, flags, bits, length, b.size = fields.take(
            BITMAP_ENTRY)
        b.in_use, b.enabled = bool(flags & 1), bool(flags & 2)
        b.name = fields.text(length, 1023)
        layer = self.layers.get(b.layer)
        if (b.layer <= max(self.bitmaps, default=0) or not b.name
                or not 9 <= bits <= 31 or b.size > IMAGE_SIZE_MAX
                or b.image not in self.images or not layer or layer.parent):
            raise Damage('catalogue: a bad bitmap')
        b.granularity = 1 << bits
        if (b.length() > BITMAP_BYTES_MAX or layer.size !=
                self.clusters(b.length()) * self.cluster_size):
            raise Damage('catalogue: a bitmap of another size')
        self.bitmaps[b.layer] = b

    def check_bitmaps(self):
        used = {i.layer for i in self.images.values()}
        used |= {s.layer for s in self.snapshots.values()}
        used |= {x.parent for x in self.layers.values()}
        if used & set(self.bitmaps):
            raise Damage('catalogue: the layer of a bitmap is used twice')
        for image in self.images:
            own = self.bitmaps_of(image)
            if (len(own) > BITMAPS_MAX
                    or len({b.name for b in own}) < len(own)
                    or sum(b.length() for b in own) > BITMAPS_BYTES_MAX):
                raise Damage('catalogue: too many bitmaps, or of one name')

    def bitmaps_of(self, image):
        return [b for b in self.bitmaps.values() if b.image == image]

    @staticmethod
    def add(entries, entry, next_id):
        if not max(entries, default=0) < entry.id < next_id:
            raise Damage('catalogue: ids do not rise')
        entries[entry.id] = entry

    def check_parent(self, layer):
        layer.depth = 1
        if layer.generation == 0:
            raise Damage('catalogue: a layer without generation')
        if not layer.parent:
            if layer.parent_clusters:
                raise Damage('catalogue: clusters of no parent')
            return
        parent = self.layers.get(layer.parent)
        if (parent is None or parent.id >= layer.id
                or parent.generation >= layer.generation):
            raise Damage('catalogue: a bad parent')
        layer.depth += parent.depth
        if layer.depth > DEPTH_MAX:
            raise Damage('catalogue: too many layers')
        if layer.parent_clusters > self.clusters(min(parent.size,
                                                     layer.size)):
            raise Damage('catalogue: parent clusters out of range')

    def check_names(self):
        names = [i.name for i in self.images.values()]
        tags = [(s.image, s.name) for s in self.snapshots.values()]
        tops = [i.layer for i in self.images.values()]
        frozen = {s.layer for s in self.snapshots.values()}
        frozen |= {x.parent for x in self.layers.values()}
        if (len(set(names)) < len(names) or len(set(tags)) < len(tags)
                or len(set(tops)) < len(tops) or frozen & set(tops)
                or any(s.image not in self.images
                       for s in self.snapshots.values())):
            raise Damage('catalogue: names or layers used twice')

    def resolve(self, number):
        """The layer whose clusters those of layer @number are, and limit."""
        if number in self.layers:
            return number, IMAGE_CLUSTERS_MAX
        return self.aliases.get(number, (None, 0))

    def find(self, name):
        """(image, layer) of IMAGE or IMAGE@SNAPSHOT."""
        name, at, tag = name.partition('@')
        for image in self.images.values():
            if image.name != name:
                continue
            if not at:
                return image, self.layers[image.layer]
            for s in self.snapshots.values():
                if s.image == image.id and tag in (s.name, str(s.id)):
                    return image, self.layers[s.layer]
        raise Unreadable(f'the store holds no image "{name}{at}{tag}"')


class Segment:
    """What was found between two offsets of a page."""

    def __init__(self, page, offset, end):
        self.page = page
        self.offset = offset
        self.end = end
        self.head = None        # the segment record, if it verified
        self.directory_offset = None
        self.records_count = None
        self.barriers = []
        self.directory = None   # list of Records from entries, if it verified
        self.records = []       # all that are known, damaged ones included
        self.complaints = []    # why it is not whole
        self.unnamed = False    # something was lost and cannot be named

    @property
    def whole(self):
        return not self.complaints


class Page:
    def __init__(self, number, base):
        self.number = number
        self.base = base
        self.state = 'free'     # free, used, damaged header, foreign
        self.freed = 0          # version that was given up
        self.blank = False      # the first two blocks are zeroes
        self.start = BLOCK      # where the walk begins
        self.bucket = None
        self.version = None
        self.first_sequence = 0
        self.segments = []      # up to the torn tail
        self.torn = None        # (offset, why) of a torn tail
        self.proven = 0


class Patched(Record):
    """A cluster with patches that no newer record of the cluster hides."""

    __slots__ = ('base', 'patches')

    def __init__(self, base, patches):
        newest = patches[-1]
        self.base, self.patches = base, patches
        self.page, self.offset = newest.page, newest.offset
        self.version, self.sequence = newest.version, newest.sequence
        self.layer, self.cluster = newest.layer, newest.cluster
        self.type, self.count, self.codec = PATCH, 1, NONE
        self.payload_length = newest.payload_length
        self.damage = next((f'patch {p.sequence}: {p.damage}'
                            for p in patches if p.damage), None)


class Ranges:
    """A map of disjoint ranges of clusters; the last assignment wins."""

    def __init__(self):
        self.starts = []
        self.items = []         # (end, value)

    def assign(self, start, end, value):
        starts, items = self.starts, self.items
        if start >= end:
            return
        low = bisect.bisect_right(starts, start) - 1
        if low < 0 or items[low][0] <= start:
            low += 1
        high = bisect.bisect_left(starts, end, low)
        new_starts, new_items = [start], [(end, value)]
        if low < high:
            if starts[low] < start:
                new_starts.insert(0, starts[low])
                new_items.insert(0, (start, items[low][1]))
            last_end, last_value = items[high - 1]
            if last_end > end:
                new_starts.append(end)
                new_items.append((last_end, last_value))
        starts[low:high] = new_starts
        items[low:high] = new_items

    def fill(self, start, end, value):
        """Assign @value where there is none."""
        if end == start + 1:
            if self.lookup(start) is None:
                self.assign(start, end, value)
            return
        at = max(bisect.bisect_right(self.starts, start) - 1, 0)
        for first, (last, old) in list(zip(self.starts[at:],
                                           self.items[at:])):
            if first >= end:
                break
            if old is not None and last > start:
                self.assign(start, min(first, end), value)
                start = max(start, last)
        self.assign(start, end, value)

    def lookup(self, cluster):
        at = bisect.bisect_right(self.starts, cluster) - 1
        if at >= 0 and cluster < self.items[at][0]:
            return self.items[at][1]
        return None

    def __iter__(self):
        for start, (end, value) in zip(self.starts, self.items):
            if value is not None:
                yield start, end, value


class Stale:
    """What a checkpoint's index has for a cluster that was written later."""

    damage = None


STALE = Stale()


class State:
    """What a scan or a checkpoint says about the store."""

    def __init__(self):
        self.catalogue = None
        self.running = False    # from a checkpoint, not clean: see load_chunk
        self.layers = {}        # layer -> Ranges of Records
        self.patches = {}       # (layer, cluster) -> Records in order
        self.next_sequence = 0

    @property
    def images(self):
        return self.catalogue.images if self.catalogue else {}

    def hide_patches(self, layer, start, end):
        self.patches = {
            (number, cluster): patches
            for (number, cluster), patches in self.patches.items()
            if number != layer or not start <= cluster < end}

    def look_through(self, number, cluster):
        """What holds the cluster, in the layer or in one under it."""
        layer = self.catalogue.layers.get(number)
        while layer:
            found = self.layer(layer.id).lookup(cluster)
            if found or cluster >= layer.parent_clusters:
                return found
            layer = self.catalogue.layers.get(layer.parent)
        return None

    def lay_patches(self):
        """The scan is complete: put what is left into the layers."""
        most = {}
        if not self.catalogue:
            return 0
        for (layer, cluster), patches in self.patches.items():
            base = self.look_through(layer, cluster)
            if base is None:
                patches = [p for p in patches if p.flags & BARE]
                if not patches:
                    continue
            self.layer(layer).assign(cluster, cluster + 1,
                                     Patched(base, patches))
            if len({p.sequence for p in patches}) > PATCHES_PER_CLUSTER_MAX:
                raise Unreadable('too many patches of a cluster')
            most[layer] = most.get(layer, 0) + 1
        return max(most.values(), default=0)

    def layer(self, number):
        if number not in self.layers:
            self.layers[number] = Ranges()
        return self.layers[number]


class Store:
    def __init__(self, path):
        self.device = Device(path)
        self.problems = []      # damage, one line each
        self.notes = []         # not damage, but worth a line
        self.corrupt = False    # lost clusters that cannot be named
        self.barriers = {}      # (page, version) -> proven end
        self.strong = set()     # those that nothing can have outdated
        self.pages = None       # as the scan has found them
        self.read_superblocks()

    def problem(self, text):
        if text not in self.problems:       # one way after the other says it
            self.problems.append(text)

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)

    # --- superblock ---

    def read_superblocks(self):
        self.copies = []
        for copy, address in enumerate(SUPER_ADDRESSES):
            raw = self.device.read(address, BLOCK)
            self.copies.append(Superblock(raw[:SUPER_LENGTH], copy))
            if (self.copies[-1].problem is None
                    and not is_zero(raw[SUPER_LENGTH:])):
                self.notes.append(f'superblock copy {copy}: the rest of its '
                                  'block is not zero')
        valid = [c for c in self.copies if c.problem is None]
        if not valid:
            for c in self.copies:
                if c.magic == SUPER_MAGIC and c.version != 1:
                    raise Unreadable(f'format version {c.version} is not '
                                     'supported')
            if any(c.magic == SUPER_MAGIC for c in self.copies):
                raise Unreadable('no superblock copy is valid')
            raise Unreadable('not a Bale store')
        sb = max(valid, key=lambda c: (c.generation, -c.copy))
        if sb.version != 1:
            raise Unreadable(f'format version {sb.version} is not supported')
        unknown = sb.incompatible & ~INCOMPAT_CORRUPT
        if unknown:
            raise Unreadable('unknown incompatible feature bits '
                             f'{unknown:#x}')
        for number, c in enumerate(self.copies):
            if c.problem is not None:
                self.problem(f'superblock copy {number}: {c.problem}')
            elif c.uuid != sb.uuid:
                self.problem(f'superblock copy {number}: of another store')
        self.sb = sb
        self.identity = checksum(sb.uuid, 0)
        if sb.clean and self.device.size < sb.device_end:
            raise Unreadable(f'truncated: {self.device.size} bytes, but '
                             f'{sb.device_end} are in use')
        room = max(self.device.size - SUPER_SIZE, 0)
        self.page_count = (room + sb.page_size - 1) // sb.page_size

    def place(self, page, version, offset):
        return checksum(struct.pack('<QQQ', page, version, offset),
                        self.identity)

    # --- records ---

    def page_base(self, page):
        return SUPER_SIZE + page * self.sb.page_size

    def payload_cap(self, kind):
        if kind in (DATA, PATCH):
            return self.sb.cluster_size
        return {SEGMENT: SEGMENT_PAYLOAD_MAX,
                IMAGE: IMAGE_PAYLOAD_MAX,
                CATALOGUE: CATALOGUE_PAYLOAD_MAX}.get(kind, PAYLOAD_MAX)

    def read_header(self, page, version, offset):
        """The Record at @offset of @page; Damage if it does not verify."""
        room = self.sb.page_size - offset
        if offset < BLOCK or offset % 16 or room < HEADER:
            raise Damage('record outside its page')
        raw = self.device.read(self.page_base(page) + offset, HEADER)
        r = Record()
        (magic, r.type, r.codec, r.flags, r.payload_length, r.header_length,
         r.sequence, r.version, r.layer, r.count, r.cluster, r.payload_sum,
         header_sum) = RECORD.unpack(raw)
        r.page, r.offset, r.damage = page, offset, None
        if magic != RECORD_MAGIC:
            raise Damage('no record magic')
        if (r.header_length % 16 or not HEADER <= r.header_length
                <= HEADER_MAX or r.header_length > room):
            raise Damage('header length out of range')
        raw += self.device.read(self.page_base(page) + offset + HEADER,
                                r.header_length - HEADER)
        sealed = raw[:56] + bytes(8) + raw[64:]
        if checksum(sealed, self.place(page, version, offset)) != header_sum:
            raise Damage('wrong header checksum')
        if r.version != version:
            raise Damage('of another page version')
        if r.payload_length > min(self.payload_cap(r.type),
                                  room - r.header_length):
            raise Damage('payload length out of range')
        return r

    def verify_record(self, r):
        """Payload of @r, verified; Damage if it or a field is wrong."""
        if r.flags & 0xff & ~(BARE if r.type == PATCH else 0):
            raise Damage(f'unknown flags {r.flags:#x}')
        if r.type not in TYPE_NAMES and r.type < SKIPPABLE:
            raise Damage(f'unknown type {r.type}')
        if (r.type not in (DATA, PATCH) and r.codec != NONE
                and r.type < SKIPPABLE):
            raise Damage('codec on a record without compressed bytes')
        if r.type == DATA and (r.count != 1 or r.codec not in CODEC_NAMES):
            raise Damage('count or codec of a data record out of range')
        if r.type == ZERO and r.count == 0:
            raise Damage('zero record without clusters')
        if r.type in (ZERO, DROP) and r.payload_length:
            raise Damage('payload on a zero or drop record')
        if r.type == PATCH and (
                r.codec not in CODEC_NAMES
                or r.count >= self.sb.cluster_size
                or r.payload_length > self.sb.cluster_size
                or r.payload_length < (1 if r.codec == NONE else 5)
                or (r.codec == NONE and
                    r.count + r.payload_length > self.sb.cluster_size)
                or r.cluster > IMAGE_CLUSTERS_MAX):
            raise Damage('patch outside its cluster')
        if (r.type in (DATA, ZERO, DROP)
                and r.cluster + r.count > IMAGE_CLUSTERS_MAX):
            raise Damage('clusters out of range')
        payload = self.device.read(
            self.page_base(r.page) + r.offset + r.header_length,
            r.payload_length)
        if checksum(payload, self.place(r.page, r.version,
                                        r.offset)) != r.payload_sum:
            raise Damage('wrong payload checksum')
        return payload

    def read_record(self, page, version, offset):
        r = self.read_header(page, version, offset)
        return r, self.verify_record(r)

    def patched_cluster(self, r):
        base = r.base
        if base is not None and base.damage:
            raise Damage(base.damage)
        if base is None or base.type == ZERO:
            data = bytearray(self.sb.cluster_size)
        else:
            data = bytearray(self.cluster_of(base))
        for p in r.patches:
            header = self.read_header(p.page, p.version, p.offset)
            payload = self.verify_record(header)
            if header.codec != NONE:
                size = int.from_bytes(payload[:4], 'little')
                if not 0 < size <= len(data) - header.count:
                    raise Damage('compressed patch outside its cluster')
                unpack = inflate_raw if header.codec == DEFLATE else unzstd
                payload = unpack(payload[4:], size)
            data[header.count:header.count + len(payload)] = payload
        return bytes(data)

    def cluster_of(self, r):
        """The bytes of the cluster that data record @r holds."""
        if r.type == PATCH:
            return self.patched_cluster(r)
        size = self.sb.cluster_size
        header = self.read_header(r.page, r.version, r.offset)
        if (header.type, header.layer, header.cluster, header.sequence) != (
                r.type, r.layer, r.cluster, r.sequence):
            raise Damage('another record than expected')
        payload = self.verify_record(header)
        if header.codec == DEFLATE:
            return inflate_raw(payload, size)
        if header.codec == ZSTANDARD:
            return unzstd(payload, size)
        if len(payload) != size:
            raise Damage('stored cluster of the wrong length')
        return payload

    # --- scan ---

    def scan_pages(self):
        """Fill self.pages: all pages, segments and records."""
        if self.pages is None:
            self.barriers, self.strong = {}, set()
            self.add_checkpoint_ends(self.sb.newest)
            self.pages = [self.scan_page(n) for n in range(self.page_count)]
            self.judge_pages(self.pages)

    def judge_pages(self, pages):
        """All of @pages were walked: what is damaged, what torn?"""
        self.resolve_headers(pages)
        for page in pages:
            page.proven = self.barriers.get((page.number, page.version), 0)
            if page.version is not None:
                self.judge_page(page)

    def scan_page(self, number, kept=None):
        """Read the header of a page, and walk it: from the end that a page
        table gives if the page is still the one of its entry @kept."""
        page = self.read_page_header(number)
        if kept:
            self.keep(page, kept)
        if page.version is not None and (page.start == BLOCK or kept['open']):
            self.walk(page)
        return page

    def header_of(self, page, block):
        """Magic and version of a header or mark; None and 0: it is neither."""
        (magic, page.bucket, length, number, version,
         page.first_sequence, header_sum) = PAGE.unpack_from(block)
        valid = (number == page.number and length == PAGE_LENGTH
                 and version != 0
                 and magic in (PAGE_MAGIC, FREED_MAGIC)
                 and checksum(block[:56], self.place(number, 0, 0))
                 == header_sum)
        return (magic, version) if valid else (None, 0)

    def read_page_header(self, number):
        page = Page(number, self.page_base(number))
        block = self.device.read(page.base, BLOCK)
        second = self.device.read(page.base + BLOCK, BLOCK)
        empty = is_zero(block)
        # In this order: what a page in use has second is no header.
        mark, freed = self.header_of(page, second)
        magic, version = self.header_of(page, block)
        if mark == FREED_MAGIC and freed >= version:
            magic, version = mark, freed    # whatever became of the first one
        if magic == PAGE_MAGIC:
            page.state, page.version = 'used', version
            if not is_zero(block[PAGE_LENGTH:]):
                self.note(f'page {number}: the rest of its header block is '
                          'not zero')
        elif magic == FREED_MAGIC:
            page.bucket, page.freed = None, version
        else:
            page.bucket = None
        # A header may be stale, or damaged: the first segment knows.
        found = self.segment_record(page, BLOCK)
        if found and found[0].version > max(page.version or 0, page.freed):
            page.bucket, page.state = None, 'damaged header'
            page.version = found[0].version
        elif page.version is None and not page.freed:
            if not empty or not is_zero(second):
                page.state = 'foreign'
            else:
                page.blank = True
        return page

    def keep(self, page, entry):
        """Is @page the one of the page table's @entry?"""
        version = entry['version']
        if ((page.version or 0) > version or page.freed >= version
                or page.state == 'used' and page.version == version):
            kept = page.version == version
        else:
            # The header is damaged, or stale.
            kept = entry['end'] > 0 and not entry['cut']
            if kept:
                page.state, page.blank = 'damaged header', False
                page.version = version
        if kept:
            page.start = max(entry['end'], BLOCK)

    def resolve_headers(self, pages):
        """Pages of which a barrier knows a higher version than the header:
        it is damaged, or stale."""
        again = True
        while again:            # each round gives a page a higher version
            again = False
            for page in pages:
                known = self.strong if page.blank else self.barriers
                version = max([v for number, v in known
                               if number == page.number], default=0)
                if version > max(page.version or 0, page.freed):
                    page.state, page.blank = 'damaged header', False
                    page.version, page.segments = version, []
                    page.start = BLOCK
                    self.walk(page)
                    again = True

    def page_room(self, page):
        """One past the last offset of @page that exists, in whole blocks."""
        return min(self.sb.page_size,
                   round_up(self.device.size - page.base, BLOCK))

    def segment_record(self, page, offset, version=None):
        """(record, payload) of a valid segment record at @offset, or None.
        Without @version its own is taken."""
        if version is None:
            raw = self.device.read(page.base + offset, HEADER)
            if int.from_bytes(raw[:4], 'little') != RECORD_MAGIC:
                return None
            version = RECORD.unpack(raw)[7]
        try:
            r, payload = self.read_record(page.number, version, offset)
        except Damage:
            return None
        if r.type != SEGMENT or len(payload) < SEGMENT_HEAD.size:
            return None
        length, directory, count, barriers = SEGMENT_HEAD.unpack_from(payload)
        first = offset + round_up(r.header_length + r.payload_length, 16)
        if (length % BLOCK or length == 0 or directory % 16
                or length > self.sb.page_size - offset
                or not first <= directory <= offset + length - HEADER
                or barriers > BARRIERS_MAX
                or len(payload) != SEGMENT_HEAD.size + 24 * barriers):
            return None
        return r, payload

    def walk(self, page):
        """Find all segments of @page, also behind ones that are not whole."""
        offset = page.start
        room = self.page_room(page)
        while offset < room:
            found = self.segment_record(page, offset, page.version)
            if found:
                segment = self.read_segment(page, offset, *found)
            else:
                end = offset + BLOCK
                while end < room and not self.segment_record(page, end,
                                                             page.version):
                    end += BLOCK
                segment = Segment(page, offset, end)
                segment.complaints.append('no valid segment record')
            page.segments.append(segment)
            offset = segment.end

    def read_segment(self, page, offset, head, payload):
        length, directory, count, barriers = SEGMENT_HEAD.unpack_from(payload)
        segment = Segment(page, offset, offset + length)
        segment.head = head
        segment.directory_offset = directory
        segment.records_count = count
        segment.barriers = [BARRIER.unpack_from(payload, 24 + 24 * i)
                            for i in range(barriers)]
        for barrier in segment.barriers:
            self.add_barrier(*barrier,
                             head.sequence >= self.sb.next_sequence)
        self.fill_segment(segment)
        return segment

    def fill_segment(self, segment):
        """Read directory and records of a segment whose record is valid."""
        try:
            segment.directory = self.read_directory(
                segment.page, segment.directory_offset, segment.page.version)
        except Damage as error:
            segment.complaints.append(f'directory: {error}')
        if segment.directory is not None:
            if len(segment.directory) != segment.records_count:
                segment.complaints.append('directory: wrong number of records')
                segment.unnamed = True
            self.records_of_directory(segment)
            return
        at = segment.head.end
        found = 0
        while (found < segment.records_count
               and at < segment.directory_offset):
            try:
                r = self.read_header(segment.page.number,
                                     segment.page.version, at)
            except Damage as error:
                segment.complaints.append(f'record at {at}: {error}')
                segment.unnamed = True
                at += 16
                continue
            self.verify_into(segment, r)
            found += 1
            at = r.end
        if found < segment.records_count:
            segment.unnamed = True

    def read_directory(self, page, offset, version):
        r, payload = self.read_record(page.number, version, offset)
        if r.type != DIRECTORY or len(payload) % ENTRY.size:
            raise Damage('not a directory')
        entries = []
        last = HEADER
        for at in range(0, len(payload), ENTRY.size):
            e = Record()
            (e.sequence, e.cluster, e.layer, e.count, place16,
             e.payload_length, e.type, e.codec, e.flags,
             e.header_length) = ENTRY.unpack_from(payload, at)
            e.page, e.version, e.offset = page.number, version, place16 * 16
            e.payload_sum, e.damage = 0, None
            if (e.offset < last or e.header_length % 16
                    or not HEADER <= e.header_length <= HEADER_MAX
                    or e.payload_length > self.payload_cap(e.type)
                    or e.end > self.sb.page_size):
                raise Damage('entry out of range')
            last = e.end
            entries.append(e)
        return entries

    def records_of_directory(self, segment):
        for e in segment.directory:
            try:
                r = self.read_header(e.page, e.version, e.offset)
            except Damage as error:
                e.damage = str(error)
                segment.complaints.append(e.describe())
                if (e.type in (ZERO, DROP) and not e.flags & 0xff
                        and not e.payload_length):
                    e.damage = None     # the entry says all about it
                segment.records.append(e)
                continue
            for name in ('sequence', 'cluster', 'layer', 'count', 'type',
                         'payload_length', 'codec', 'flags', 'header_length'):
                if getattr(r, name) != getattr(e, name):
                    segment.complaints.append(
                        f'record at {r.offset}: header and directory differ '
                        f'in {name}')
                    break
            self.verify_into(segment, r)

    def verify_into(self, segment, r):
        try:
            self.verify_record(r)
        except Damage as error:
            r.damage = str(error)
            segment.complaints.append(r.describe())
        segment.records.append(r)

    def add_checkpoint_ends(self, ref):
        """What the superblock says of the pages with checkpoint roots
        proves, and the page table of a checkpoint, if it can be read."""
        for address, version, _, end in (self.sb.newest, self.sb.previous):
            if address >= SUPER_SIZE:
                self.add_barrier((address - SUPER_SIZE) // self.sb.page_size,
                                 version,
                                 min(end * BLOCK, self.sb.page_size), True)
        if ref[0] == 0:
            return
        try:
            self.add_ends(self.checkpoint_pages(self.read_root(ref)))
        except Damage as error:
            self.problem(f'checkpoint: {error}')

    def add_ends(self, table):
        for entry in table:
            self.add_barrier(entry['page'], entry['version'], entry['end'],
                             True)

    def add_barrier(self, page, version, end, strong):
        if end > self.sb.page_size or end % BLOCK or version == 0:
            return
        begin = SUPER_SIZE + page * self.sb.page_size
        if not strong and begin >= self.sb.device_end:
            return                    # cut off with its mark, opened later
        key = page, version
        if strong:
            self.strong.add(key)
        self.barriers[key] = max(self.barriers.get(key, 0), end)

    def judge_page(self, page):
        """Drop the torn tail of @page and report damage below its proven
        end."""
        for i, segment in enumerate(page.segments):
            if segment.whole:
                continue
            if segment.offset >= page.proven:
                raw = self.device.read(page.base + segment.offset, BLOCK)
                if not is_zero(raw) or i + 1 < len(page.segments):
                    page.torn = (segment.offset, segment.complaints[0])
                del page.segments[i:]
                return
            if segment.head is None:
                self.search_segment(segment,
                                    min(segment.end,
                                        round_up(page.proven, BLOCK)))

    def search_segment(self, segment, end):
        """The segment record is lost: look for directories and records."""
        page = segment.page
        segment.end = end
        covered = segment.offset    # everything below is named
        loose = []                  # records since, not in a directory
        at = segment.offset + 16
        while at < end:
            try:
                r = self.read_header(page.number, page.version, at)
            except Damage:
                at += 16
                continue
            if r.type == DIRECTORY:
                try:
                    part = Segment(page, covered, end)
                    part.directory = self.read_directory(page, at,
                                                         page.version)
                    self.records_of_directory(part)
                except Damage as error:
                    segment.complaints.append(f'directory: {error}')
                else:
                    first = min([e.offset for e in part.directory] + [at])
                    if first > covered + HEADER_MAX + SEGMENT_PAYLOAD_MAX:
                        segment.unnamed = True
                    segment.records += part.records
                    segment.complaints += part.complaints
                    covered = round_up(r.end, BLOCK)
                    loose = []
                    at = covered
                    continue
            elif r.type != SEGMENT:
                loose.append(r)
            at = r.end
        for r in loose:
            self.verify_into(segment, r)
        if covered < end:
            segment.unnamed = True

    def collect(self, pages, state):
        """The records of @pages in order of sequence, damage reported."""
        applied = []
        for page in pages:
            if page.state == 'damaged header':
                self.problem(f'page {page.number}: damaged header')
            elif page.state == 'foreign':
                self.note(f'page {page.number}: not a page of this store')
            for segment in page.segments:
                for text in segment.complaints:
                    self.problem(f'page {page.number}, segment at '
                                 f'{segment.offset}: {text}')
                if segment.unnamed:
                    self.problem(f'page {page.number}, segment at '
                                 f'{segment.offset}: lost clusters cannot be '
                                 'named')
                    self.corrupt = True
                applied += [r for r in segment.records
                            if r.type in (DATA, ZERO, DROP, IMAGE,
                                          CATALOGUE, PATCH)]
                for r in segment.records:
                    state.next_sequence = max(state.next_sequence,
                                              r.sequence + 1)
            end = page.segments[-1].end if page.segments else page.start
            if end < page.proven:
                self.problem(f'page {page.number}: nothing readable from '
                             f'{end} to its proven end')
                self.corrupt = True
        for number, version in self.strong:
            if number >= self.page_count:
                self.problem(f'page {number} lies behind the end of the '
                             'device')
                self.corrupt = True
        return sorted(applied, key=lambda r: r.sequence)

    def scan(self):
        """Docs, "Opening", steps 3 to 7."""
        self.scan_pages()
        state = State()
        state.next_sequence = self.sb.next_sequence
        applied = self.collect(self.pages, state)
        catalogues = {}
        for r in applied:
            if r.type in (IMAGE, CATALOGUE):
                catalogue = self.catalogue_of(r)
                if catalogue:
                    catalogues[r] = state.catalogue = catalogue
        for r in applied:
            if r in catalogues:
                self.apply_sizes(state, catalogues[r])
            elif r.type not in (IMAGE, CATALOGUE) and state.catalogue:
                self.apply(state, r)
        return self.complete(state)

    def complete(self, state):
        if state.lay_patches() > max(PATCHED_BYTES // self.sb.cluster_size,
                                     PATCHED_CLUSTERS_MIN):
            raise Unreadable('too many clusters with patches')
        return state

    def catalogue_of(self, r):
        if r.damage:
            self.problem(f'{TYPE_NAMES[r.type]} record of layer {r.layer} '
                         'lost')
            self.corrupt = True
            return None
        try:
            return Catalogue(self.verify_record(r), r, self.sb.cluster_size)
        except Damage as error:
            self.problem(f'page {r.page}, record at {r.offset}: {error}')
            self.corrupt = True
            return None

    def apply_sizes(self, state, catalogue):
        done = set()
        for number in sorted(catalogue.layers, reverse=True):
            layer, _ = state.catalogue.resolve(number)
            if layer is None or layer in done:
                continue
            done.add(layer)
            first = catalogue.clusters(catalogue.layers[number].size)
            state.layer(layer).assign(first, IMAGE_CLUSTERS_MAX, None)
            state.hide_patches(layer, first, IMAGE_CLUSTERS_MAX)

    def apply(self, state, r):
        layer, limit = state.catalogue.resolve(r.layer)
        if layer is None:
            return              # the layer was deleted
        if r.type == PATCH:
            if r.cluster < limit:
                self.apply_patch(state, layer, r)
            return
        last = r.cluster + r.count
        if r.type == DROP and r.count == 0:
            last = limit
        last = min(last, limit)
        value = None if r.type == DROP and not r.damage else r
        if r.cluster < last:
            state.layer(layer).assign(r.cluster, last, value)
            if state.patches:
                state.hide_patches(layer, r.cluster, last)

    def apply_patch(self, state, layer, r):
        patches = state.patches.setdefault((layer, r.cluster), [])
        if patches and patches[-1].sequence == r.sequence:
            # Compaction has copied it: either will do.
            if patches[-1].damage:
                patches[-1] = r
            return
        patches.append(r)

    # --- checkpoint ---

    def at_address(self, address, version):
        if address < SUPER_SIZE:
            raise Damage('address in the super area')
        page, offset = divmod(address - SUPER_SIZE, self.sb.page_size)
        if page >= self.page_count:
            raise Damage('address behind the device')
        return self.read_record(page, version, offset)

    def read_root(self, ref):
        """The root of the checkpoint that a superblock's @ref names."""
        address, version, length, end = ref
        if address == 0:
            raise Damage('there is none')
        r, payload = self.at_address(address, version)
        if r.type != ROOT or len(payload) < ROOT_HEAD.size:
            raise Damage('not a checkpoint root')
        if length != r.header_length + r.payload_length:
            raise Damage('root: wrong length')
        next_sequence, pages, parts = ROOT_HEAD.unpack_from(payload)
        if parts > PARTS_MAX or pages * self.sb.page_size > DEVICE_MAX:
            raise Damage('root: pages or parts out of range')
        if len(payload) != ROOT_HEAD.size + parts * PART_ENTRY.size:
            raise Damage('root: wrong payload length')
        entries = [PART_ENTRY.unpack_from(payload, 32 + 40 * i)
                   for i in range(parts)]
        return {'next_sequence': next_sequence, 'pages': pages,
                'parts': entries, 'page': r.page, 'end': end * BLOCK}

    def read_part(self, part):
        kind, length, address, version, a, b = part
        r, payload = self.at_address(address, version)
        # The part of an image need not say its length.
        if length != r.payload_length and (kind, length) != (PART_IMAGE, 0):
            raise Damage('part: wrong payload length')
        if r.type not in ((IMAGE, CATALOGUE) if kind == PART_IMAGE
                          else (PART,)):
            raise Damage('part: wrong record type')
        return r, payload

    def checkpoint_pages(self, root):
        pages = []
        for part in root['parts']:
            kind, length, address, version, first, count = part
            if kind != PART_PAGES:
                continue
            r, payload = self.read_part(part)
            if r.page != root['page']:
                raise Damage('page table: not in the page of the root')
            if len(payload) != count * PAGE_ENTRY.size:
                raise Damage('page table: wrong length')
            if first + count > root['pages']:
                raise Damage('page table: out of range')
            for i in range(count):
                (v, bucket, flags, end, live, first_sequence,
                 tombstone) = PAGE_ENTRY.unpack_from(payload, i * 48)
                if first + i == root['page']:
                    end = root['end']
                if end > self.sb.page_size or end % BLOCK:
                    raise Damage('page table: end out of range')
                pages.append({'page': first + i, 'version': v,
                              'bucket': bucket, 'open': bool(flags & PAGE_OPEN),
                              'end': end, 'live': live,
                              'first_sequence': first_sequence,
                              'tombstone': tombstone})
        if sorted(p['page'] for p in pages) != list(range(root['pages'])):
            raise Damage('page table: pages missing or twice')
        return pages

    def checkpoint(self):
        """The state from the checkpoint; Damage if any part is bad."""
        root = self.read_root(self.sb.newest)
        self.page_table = self.checkpoint_pages(root)
        kept = {p['page']: p for p in self.page_table if p['version']}
        return self.load_checkpoint(root, kept, False)

    def load_checkpoint(self, root, kept, running):
        """Image and index.  Of a checkpoint that was written while the store
        was @running, values may point elsewhere than into pages @kept."""
        state = State()
        state.next_sequence = root['next_sequence']
        state.running = running
        for part in root['parts']:
            kind, length, address, version, a, b = part
            if kind == PART_IMAGE:
                r, payload = self.read_part(part)
                if state.catalogue:
                    raise Damage('two image parts')
                state.catalogue = Catalogue(payload, r, self.sb.cluster_size)
            elif kind not in (PART_PAGES, PART_INDEX):
                raise Damage(f'unknown part kind {kind}')
        if not state.catalogue:
            raise Damage('no image part')
        for part in root['parts']:
            kind, length, address, version, a, b = part
            if kind == PART_INDEX:
                if a not in state.catalogue.layers:
                    raise Damage('index chunk of no layer')
                r, payload = self.read_part(part)
                self.load_chunk(state, kept, payload, a, b)
        return state

    def load_chunk(self, state, kept, payload, layer, first):
        if (first % CHUNK or len(payload) % 8 or len(payload) > 8 * CHUNK
                or first + len(payload) // 8 > IMAGE_CLUSTERS_MAX):
            raise Damage('index chunk out of range')
        ranges = state.layer(layer)
        for i, (value,) in enumerate(struct.iter_unpack('<Q', payload)):
            if value == 0:
                continue
            address, size_class = value & ~0xf, value & 0xf
            if value >> 48 or address < SUPER_SIZE:
                raise Damage('index value out of range')
            page, offset = divmod(address - SUPER_SIZE, self.sb.page_size)
            if page not in kept or (state.running
                                    and offset >= kept[page]['end']):
                if not state.running:
                    raise Damage('index value points into a free page')
                ranges.assign(first + i, first + i + 1, STALE)
                continue
            r = Record()
            r.page, r.offset = page, offset
            r.version = kept[page]['version']
            r.type = ZERO if size_class == 0 else DATA
            r.layer, r.cluster, r.count = layer, first + i, 1
            r.payload_length = r.sequence = r.damage = None
            try:
                header = self.read_header(page, r.version, offset)
            except Damage as error:
                r.damage = str(error)
            else:
                r.sequence = header.sequence
                r.payload_length = header.payload_length
                r.layer = header.layer
                if not (header.type == r.type
                        and state.catalogue.resolve(r.layer)[0] == layer
                        and header.cluster <= first + i
                        < header.cluster + header.count):
                    r.damage = 'another record than the index says'
                elif (r.type == DATA and size_class
                        != self.size_class(header.payload_length)):
                    r.damage = 'another size class than the index says'
            ranges.assign(first + i, first + i + 1, r)

    def size_class(self, length):
        return size_class(length, self.sb.cluster_size)

    # --- checkpoint and tail ---

    def tail(self, previous=False):
        """Docs, "A checkpoint and its tail"; Damage if a part is bad."""
        ref = self.sb.previous if previous else self.sb.newest
        root = self.read_root(ref)
        table = self.checkpoint_pages(root)
        first = root['next_sequence']
        self.barriers, self.strong = {}, set()
        known = {}
        for entry in table:
            entry['cut'] = (previous and first < self.sb.next_sequence and
                            self.page_base(entry['page'])
                            >= self.sb.device_end)
            if entry['version']:
                known[entry['page']] = entry
        pages = [self.scan_page(n, known.get(n))
                 for n in range(self.page_count)]
        kept = self.kept_of(pages, known)
        self.add_ends(kept.values())
        if previous:
            self.add_checkpoint_ends(self.sb.newest)
        self.judge_pages(pages)
        # A barrier may have said that a header is stale.
        kept = self.kept_of(pages, known)
        state = self.load_checkpoint(root, kept, True)
        self.apply_tail(state, self.collect(pages, state), first)
        return self.complete(state)

    @staticmethod
    def kept_of(pages, known):
        """Those of the page table that still are what they were, or should
        be: a page that is cut off now is kept, and its records are lost."""
        return {n: entry for n, entry in known.items()
                if (pages[n].start > BLOCK if n < len(pages)
                    else entry['end'] and not entry['cut'])}

    def apply_tail(self, state, records, first):
        copied = set()          # what was set by copies
        for r in records:
            if r.sequence < first:
                if r.type in (DATA, ZERO):
                    self.apply_copy(state, r, copied)
            elif r.type in (IMAGE, CATALOGUE):
                catalogue = self.catalogue_of(r)
                if catalogue:
                    self.no_longer_stale(state)
                    self.change_catalogue(state, catalogue)
            else:
                self.apply(state, r)
        self.no_longer_stale(state)

    def apply_copy(self, state, r, copied):
        layer, limit = state.catalogue.resolve(r.layer)
        if layer is None:
            return
        last = min(r.cluster + r.count, limit)
        copied.add(r)
        for start, end, value in list(state.layer(layer)):
            if value is STALE or value in copied:
                state.layer(layer).assign(max(start, r.cluster),
                                          min(end, last), r)

    @staticmethod
    def no_longer_stale(state):
        for ranges in state.layers.values():
            for start, end, value in list(ranges):
                if value is STALE:
                    ranges.assign(start, end, None)

    def change_catalogue(self, state, catalogue):
        """@catalogue comes into force: layers went, or became aliases."""
        for number in sorted(state.layers):
            if number in catalogue.layers:
                continue
            other, limit = catalogue.resolve(number)
            gone = state.layers.pop(number)
            if other is not None:
                for start, end, r in gone:
                    state.layer(other).fill(start, min(end, limit), r)
        for number, cluster in list(state.patches):
            if number not in catalogue.layers:
                patches = state.patches.pop((number, cluster))
                other, limit = catalogue.resolve(number)
                if cluster < limit:
                    state.patches.setdefault((other, cluster), patches)
        state.catalogue = catalogue
        self.apply_sizes(state, catalogue)

    # --- whole store ---

    def state(self):
        """What opening the store gives, and how it was found."""
        for way in self.ways()[1:]:
            try:
                return self.read_by(way), way
            except Damage as error:
                self.problem(f'{way}: {error}')
        return self.scan(), 'scan'

    def ways(self):
        """How this store can be read, the scan first."""
        newest = 'checkpoint' if self.sb.clean else 'tail'
        return (['scan'] + [newest] * (self.sb.newest[0] != 0)
                + ['previous'] * (self.sb.previous[0] != 0))

    def read_by(self, way):
        return {'scan': self.scan, 'checkpoint': self.checkpoint,
                'tail': self.tail,
                'previous': lambda: self.tail(previous=True)}[way]()

    def compare(self, state, way):
        """Say where another way than @way leads to another @state."""
        for other in self.ways():
            if other == way:
                continue
            try:
                found = self.read_by(other)
            except Damage as error:
                self.problem(f'{other}: {error}')
                continue
            for line in differences(state, found, self.sb.cluster_size):
                self.problem(f'{way} and {other}: {line}')


def summary(state, cluster_size):
    """Comparable form of @state: images, and what each cluster holds."""
    images = {i.id: (i.layer, i.size, i.codec, i.level, i.name,
                     i.backing_file, i.backing_format)
              for i in state.images.values()}
    tops = {i.id: -(-i.size // cluster_size)
            for i in state.catalogue.layers.values()}
    clusters = {}
    for layer, ranges in state.layers.items():
        runs = []
        for start, end, r in ranges:
            end = min(end, tops.get(layer, end))
            if start >= end:
                continue
            if r.type == ZERO and not r.damage:
                if runs and runs[-1][1] == start and runs[-1][2] == 'zero':
                    runs[-1] = (runs[-1][0], end, 'zero')
                else:
                    runs.append((start, end, 'zero'))
            else:
                runs.append((start, end,
                             ('damaged',) if r.damage else r.sequence))
        if runs:
            clusters[layer] = runs
    return images, clusters


def differences(a, b, cluster_size):
    """Lines that tell where the states @a and @b are not the same."""
    images_a, clusters_a = summary(a, cluster_size)
    images_b, clusters_b = summary(b, cluster_size)
    lines = []
    if images_a != images_b:
        lines.append(f'images differ: {images_a} / {images_b}')
    for layer in sorted(set(clusters_a) | set(clusters_b)):
        runs_a, runs_b = clusters_a.get(layer, []), clusters_b.get(layer, [])
        if runs_a != runs_b:
            only_a = [r for r in runs_a if r not in set(runs_b)][:3]
            only_b = [r for r in runs_b if r not in set(runs_a)][:3]
            lines.append(f'layer {layer} differs: {only_a} / {only_b}')
    return lines


def shown(state, layer):
    """(start, end, Record) of what @layer and those under it show."""
    pieces = [(0, state.catalogue.clusters(layer.size))]
    while layer is not None and pieces:
        rest = []
        for first, last in pieces:
            for start, end, r in state.layer(layer.id):
                start, end = max(start, first), min(end, last)
                if start >= end:
                    continue
                yield start, end, r
                if first < start:
                    rest.append((first, start))
                first = end
            if first < last:
                rest.append((first, last))
        pieces = [(first, min(last, layer.parent_clusters))
                  for first, last in rest if first < layer.parent_clusters]
        layer = state.catalogue.layers.get(layer.parent)


def extract(store, state, name, out_path, bitmap=None):
    """Write an image or snapshot sparsely, or the bits of a @bitmap of it; the
    number of damaged clusters."""
    if state.catalogue is None:
        raise Unreadable('the store holds no image')
    image, layer = state.catalogue.find(name)
    length = layer.size
    if bitmap is not None:
        found = [b for b in state.catalogue.bitmaps_of(image.id)
                 if b.name == bitmap]
        if not found:
            raise Unreadable(f'image "{name}" has no bitmap "{bitmap}"')
        layer, length = state.catalogue.layers[found[0].layer], \
            found[0].length()
        if found[0].in_use:
            store.notes.append(f'bitmap "{bitmap}" is in use: its bits are '
                               'not to be trusted')
    elif image.backing_file:
        store.notes.append(f'backing file "{image.backing_file}" ignored: '
                           'unallocated clusters read as zeroes')
    size = store.sb.cluster_size
    damaged = 0
    fd = os.open(out_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC,
                 0o600)
    with os.fdopen(fd, 'r+b', buffering=0) as out:
        out.truncate(length)
        for start, end, r in shown(state, layer):
            if r.type == ZERO and not r.damage:
                continue
            for cluster in range(start, end):
                try:
                    if r.damage:
                        raise Damage(r.damage)
                    data = store.cluster_of(r)
                except Damage as error:
                    damaged += 1
                    store.problem(f'cluster {cluster} is lost: {error}')
                    continue
                data = data[:max(length - cluster * size, 0)]
                if not is_zero(data):
                    os.pwrite(out.fileno(), data, cluster * size)
    return damaged


def command_info(store, args):
    sb = store.sb
    state, how = store.state()
    images = []
    for image in state.images.values():
        allocated = {'data': 0, 'zero': 0, 'damaged': 0}
        limit = -(-image.size // sb.cluster_size)
        for start, end, r in state.layer(image.layer):
            kind = 'damaged' if r.damage else TYPE_NAMES[r.type]
            kind = 'data' if kind == 'patch' else kind
            allocated[kind] += max(min(end, limit) - start, 0)
        images.append({
            'id': image.id, 'name': image.name, 'size': image.size,
            'layer': image.layer, 'codec': CODEC_NAMES[image.codec],
            'level': image.level, 'backing-file': image.backing_file,
            'backing-format': image.backing_format, 'clusters': allocated,
            'snapshots': [s.name for s in state.catalogue.snapshots.values()
                          if s.image == image.id],
            'bitmaps': [{'name': b.name, 'granularity': b.granularity,
                         'size': b.size, 'enabled': b.enabled,
                         'in-use': b.in_use}
                        for b in state.catalogue.bitmaps_of(image.id)]})
    u = sb.uuid.hex()
    info = {
        'uuid': '-'.join((u[:8], u[8:12], u[12:16], u[16:20], u[20:])),
        'version': sb.version, 'generation': sb.generation,
        'clean': sb.clean, 'corrupt': sb.corrupt or store.corrupt,
        'cluster-size': sb.cluster_size, 'page-size': sb.page_size,
        'max-size': sb.max_size,
        'pages': store.page_count, 'device-size': store.device.size,
        'next-sequence': state.next_sequence, 'read-by': how,
        'images': images}
    if args.json:
        print(json.dumps(info, indent=2))
        return
    for key, value in info.items():
        if key != 'images':
            print(f'{key}: {value}')
    for image in images:
        print(f'image {image["id"]}: ' + ', '.join(
            f'{k} {v}' for k, v in image.items() if k != 'id'))


def command_list(store, args):
    for copy, sb in enumerate(store.copies):
        if sb.problem:
            print(f'superblock {copy}: {sb.problem}')
        else:
            print(f'superblock {copy}: generation {sb.generation}, '
                  f'{"clean" if sb.clean else "not clean"}, checkpoint '
                  f'{sb.root_address}, next sequence {sb.next_sequence}, '
                  f'device end {sb.device_end}')
    store.scan()
    for page in store.pages:
        if page.version is None:
            print(f'page {page.number}: {page.state}')
            continue
        print(f'page {page.number}: {page.state}, bucket {page.bucket}, '
              f'version {page.version >> 32}.{page.version & 0xffffffff}, '
              f'first sequence {page.first_sequence}, '
              f'proven end {page.proven}')
        for segment in page.segments:
            print(f'  segment {segment.offset}..{segment.end}: '
                  f'{len(segment.records)} records, '
                  f'{len(segment.barriers)} barriers'
                  + ('' if segment.whole else ', NOT WHOLE'))
            for number, version, end in segment.barriers:
                print(f'    barrier page {number} version '
                      f'{version >> 32}.{version & 0xffffffff} end {end}')
            for r in segment.records:
                print(f'    {r.describe()}')
        if page.torn:
            print(f'  torn tail at {page.torn[0]}: {page.torn[1]}')


def command_extract(store, args):
    way = 'checkpoint' if args.checkpoint else args.by
    state = store.read_by(way)
    lost = extract(store, state, args.image, args.out, args.bitmap)
    if args.compare:
        store.compare(state, way)
    if lost:
        store.notes.append(f'{lost} clusters were lost')


def command_check(store, args):
    state = store.scan()
    clusters = 0
    for ranges in state.layers.values():
        for start, end, r in ranges:
            if r.type not in (DATA, PATCH):
                continue
            clusters += 1
            try:
                store.cluster_of(r)
            except Damage as error:
                store.problem(f'layer {r.layer} cluster {start}: {error}')
    store.compare(state, 'scan')
    if store.sb.clean:
        try:
            check_page_table(store, store.checkpoint())
        except Damage:
            pass                # compare() has said it
    if store.sb.corrupt:
        store.problem('the corrupt bit is set')
    print(f'{clusters} data clusters verified, '
          f'{len(store.problems)} problems')


def check_page_table(store, state):
    """Compare the checkpoint's page table with what the pages hold."""
    live = {}
    size = store.sb.cluster_size
    for ranges in state.layers.values():
        for start, end, r in ranges:
            if r.payload_length is None:
                continue        # damaged
            number = (store.size_class(r.payload_length) if r.type == DATA
                      else 0)
            live[r.page] = (live.get(r.page, 0) + (end - start)
                            * (64 + CLASSES[number] * size // 256))
    known = {p['page']: p for p in store.page_table}
    for page in store.pages:
        entry = known.get(page.number)
        if entry is None or entry['version'] == 0:
            if page.state == 'used':
                store.problem(f'page {page.number}: in use, but free in the '
                              'page table')
            continue
        if page.state == 'free' and entry['live'] == 0:
            continue            # released after the checkpoint
        if entry['version'] != page.version:
            store.problem(f'page {page.number}: version {page.version}, but '
                          f'{entry["version"]} in the page table')
            continue
        end = page.segments[-1].end if page.segments else BLOCK
        if entry['end'] != end:
            store.problem(f'page {page.number}: ends at {end}, but '
                          f'{entry["end"]} in the page table')
        if entry['bucket'] != 1 and entry['live'] != live.get(page.number, 0):
            store.notes.append(
                f'page {page.number}: {live.get(page.number, 0)} live bytes, '
                f'but {entry["live"]} in the page table')


def main():
    parser = argparse.ArgumentParser(
        description='Read a Bale store by its documentation alone.')
    commands = parser.add_subparsers(dest='command', required=True)
    for name, function in (('info', command_info), ('list', command_list),
                           ('extract', command_extract),
                           ('check', command_check)):
        sub = commands.add_parser(name)
        sub.set_defaults(function=function)
        sub.add_argument('store')
        if name == 'info':
            sub.add_argument('--json', action='store_true')
        if name == 'extract':
            sub.add_argument('out')
            sub.add_argument('--image', default='', metavar='NAME[@SNAPSHOT]',
                             help='instead of the unnamed image')
            sub.add_argument('--bitmap', metavar='NAME',
                             help='the bits of this dirty bitmap of it')
            sub.add_argument('--by', default='scan', choices=(
                'scan', 'checkpoint', 'tail', 'previous'))
            sub.add_argument('--checkpoint', action='store_true',
                             help='the same as --by checkpoint')
            sub.add_argument('--compare', action='store_true',
                             help='check that all ways say the same')
    try:
        args = parser.parse_args()
    except SystemExit as stop:
        sys.exit(1 if stop.code else 0)
    try:
        store = Store(args.store)
        args.function(store, args)
    except (Unreadable, Damage, OSError) as error:
        text = getattr(error, 'strerror', None) or str(error)
        print(f'bale-reader: {args.store}: {text}', file=sys.stderr)
        sys.exit(1)
    for text in store.notes:
        print(f'note: {text}', file=sys.stderr)
    for text in store.problems:
        print(f'damage: {text}', file=sys.stderr)
    sys.exit(2 if store.problems else 0)


if __name__ == '__main__':
    main()
