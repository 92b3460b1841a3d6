#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Nothing that a monitor receives ends the process.

Malformed and random requests: broken JSON, wrong types, missing and unknown
members, huge numbers, unknown nodes, and random combinations of valid options
of our drivers, in trees of nodes and in jobs between them. The seed makes the
requests; BALE_SEED repeats a run. The requests of a run that failed are in the
file `requests` of the directory that it leaves. The full counts: BALE_LONG=1.
"""

import json
import os
import select

import bale_iotests
from bale_images import create, io
from bale_iotests import LONG, TIMEOUT_S, qemu_img, run
from bale_qmp import Qemu

REQUESTS = 10000 if LONG else 800

HUGE = [-1, 0, 1, 2, 511, 4096, 65536, 1 << 20, (1 << 31) - 1, 1 << 31,
        (1 << 32) - 1, 1 << 32, 1 << 53, (1 << 63) - 1, 1 << 63, -(1 << 63),
        (1 << 64) - 1, 1 << 64, 0.5, 1e308]
STRINGS = ['', ' ', 'a', '#block', '..', 'x' * 5000, 'ä€𐍈', '%s%n', '"', '\\',
           'on', '65536', '64k', 'null', 'a\x01b']
STORES = ['a.bale', 'b.bale', 'c.bale', 'd.bale', 'e.bale', 'f.bale']
FILES = [*STORES, 'a.raw', 'a.qcow2', 'none', 'dir', '']

OUR_COMMANDS = ['query-bale', 'bale-flush', 'bale-checkpoint',
                'bale-reset-stats', 'bale-set', 'bale-compact', 'bale-verify',
                'query-seqcache', 'seqcache-flush', 'seqcache-reset-stats',
                'query-bale-module', 'bale-blockdev-options',
                'bale-image-list', 'bale-image-create', 'bale-image-delete',
                'bale-image-rename', 'bale-image-set-read-only',
                'bale-image-clone', 'bale-image-snapshot',
                'bale-image-snapshot-delete', 'bale-image-rollback',
                'bale-image-flatten']
IMAGES = ['', '', 'one', 'two', 'two', 'x' * 255, 'x' * 256, 'a@b', 'ä']
BLOCK_COMMANDS = ['blockdev-add', 'blockdev-reopen', 'blockdev-del',
                  'blockdev-create', 'x-blockdev-amend', 'blockdev-mirror',
                  'blockdev-backup', 'blockdev-snapshot', 'block-stream',
                  'block-commit', 'change-backing-file', 'block_resize',
                  'query-named-block-nodes', 'query-blockstats',
                  'x-debug-query-block-graph', 'block-set-write-threshold',
                  'block-dirty-bitmap-add', 'block-dirty-bitmap-remove',
                  'job-pause', 'job-resume', 'job-cancel', 'job-complete',
                  'job-finalize', 'job-dismiss', 'query-jobs', 'transaction',
                  'query-block-jobs', 'block-job-set-speed']
MEMBERS = ['node-name', 'job-id', 'id', 'speed', 'device', 'target', 'sync',
           'options', 'space-threshold', 'cache-size', 'file', 'driver',
           'size', 'node', 'overlay', 'backing-file', 'image-node-name',
           'auto-dismiss', 'auto-finalize', 'write-threshold', 'name',
           'actions', 'compress', 'discard', 'bitmap', 'top-node', 'base-node',
           'image', 'snapshot', 'new-name', 'read-only']


def refers_to_itself(value, names=()):
    """Is a node below blkdebug named as a child of something in it?

    Stock QEMU 7.2 crashes when it opens such a tree.
    """
    if isinstance(value, dict):
        if value.get('driver') == 'blkdebug':
            names = (*names, value.get('node-name'))
        return any(key != 'node-name' and refers_to_itself(part, names)
                   for key, part in value.items())
    if isinstance(value, list):
        return any(refers_to_itself(part, names) for part in value)
    return isinstance(value, str) and value in names


class Fuzzer:
    """Makes requests out of a random number generator."""

    def __init__(self, rng):
        self.rng = rng
        self.nodes = [f'n{i}' for i in range(4)]
        self.jobs = [f'j{i}' for i in range(2)]

    def maybe(self, chance):
        return self.rng.random() < chance

    def value(self, depth=0):
        kind = self.rng.randrange(9)
        if kind < 3:
            return self.rng.choice(HUGE)
        if kind < 5:
            return self.rng.choice(STRINGS + self.nodes + self.jobs + FILES)
        if kind == 5:
            return self.rng.choice([True, False, None])
        if depth > 3:
            return {}
        if kind == 6:
            return [self.value(depth + 1)
                    for _ in range(self.rng.randrange(4))]
        return {self.rng.choice(MEMBERS + STRINGS): self.value(depth + 1)
                for _ in range(self.rng.randrange(4))}

    def node(self):
        """A name, mostly of a node that could be there."""
        if self.maybe(0.05):
            return self.rng.choice(STRINGS)
        return self.rng.choice(self.nodes)

    def size(self):
        if self.maybe(0.2):
            return self.rng.choice(HUGE)
        return 512 << self.rng.randrange(20)

    def some(self, chance=0.2, /, **makers):
        """Some of the members; the names' underscores are dashes."""
        return {name.replace('_', '-'): make()
                for name, make in makers.items() if self.maybe(chance)}

    def boolean(self):
        return self.rng.choice([True, False])

    def common(self):
        return self.some(
            0.07, read_only=self.boolean, auto_read_only=self.boolean,
            force_share=self.boolean,
            detect_zeroes=lambda: self.rng.choice(['on', 'off', 'unmap']),
            discard=lambda: self.rng.choice(['unmap', 'ignore']),
            cache=lambda: {'direct': self.boolean(),
                           'no-flush': self.boolean()})

    def child(self, depth, files=FILES):
        if self.maybe(0.2):
            return self.node()
        if depth > 3 or self.maybe(0.6):
            if self.maybe(0.2):
                files = FILES
            return {'driver': 'file', 'filename': self.rng.choice(files),
                    **({'locking': 'off'} if self.maybe(0.6) else {})}
        return self.definition(depth + 1)

    def definition(self, depth=0):
        """Options of a node, all of the right types."""
        rng = self.rng
        driver = rng.choice(['bale'] * 6 + ['seqcache'] * 4 + [
            'raw', 'qcow2', 'copy-on-read', 'throttle', 'blkdebug',
            'copy-before-write', 'compress', 'null-co', 'preallocate'])
        options = {'driver': driver, **self.common()}
        if driver == 'bale':
            options |= self.some(
                cache_size=self.size,
                compression_threads=lambda: rng.choice([0, 1, 3, 64, 65]),
                backing=lambda: rng.choice([None, self.child(depth + 1)]))
        elif driver == 'seqcache':
            options |= self.some(
                cluster_size=self.size, cache_size=self.size,
                max_streams=lambda: rng.choice([0, 1, 64, 1 << 31]),
                flush_interval=lambda: rng.choice([0, 1, 5000, 1 << 60]),
                compress=self.boolean)
        elif driver == 'raw':
            options |= self.some(offset=self.size, size=self.size)
        elif driver == 'null-co':
            return options | {'size': rng.randrange(64 << 20)}
        elif driver == 'throttle':
            options['throttle-group'] = 'none'
        elif driver == 'copy-before-write':
            options['target'] = self.child(depth)
        if driver == 'blkdebug':
            options['image'] = self.child(depth)
            options |= self.some(**{'inject-error': lambda: [{
                'event': rng.choice(['write_aio', 'read_aio', 'flush_to_disk',
                                     'none']),
                'errno': rng.choice([5, 28]), 'once': self.boolean()}]})
        else:
            options['file'] = self.child(
                depth, STORES if driver == 'bale' else FILES)
        if depth and self.maybe(0.2) or not depth:
            options['node-name'] = self.node()
        return options

    def spoil(self, value, depth=0):
        """One thing in it becomes wrong."""
        if isinstance(value, dict) and value and self.maybe(0.8):
            key = self.rng.choice(sorted(value))
            what = self.rng.randrange(4)
            value = dict(value)
            if what == 0:
                del value[key]
            elif what == 1:
                value[self.rng.choice(MEMBERS + STRINGS)] = self.value()
            else:
                value[key] = self.spoil(value[key], depth + 1)
            return value
        if isinstance(value, list) and value and self.maybe(0.8):
            return [*value[:-1], self.spoil(value[-1], depth + 1)]
        return self.value()

    def job(self, **more):
        return {'job-id': self.rng.choice(self.jobs), **more,
                **self.some(speed=self.size)}

    def our_job(self):
        """Stock QEMU's block-stream leaves a node without a child when it is
        not dismissed by itself, and crashes when it is asked about it."""
        return self.job(**{'node-name': self.node()}, **self.some(
            auto_dismiss=self.boolean, auto_finalize=self.boolean))

    def image(self):
        """Arguments of a command on images; one member too many, at times."""
        name = lambda: self.rng.choice(IMAGES)  # noqa: E731
        return {'node-name': self.node(), **self.some(0.6, image=name), **(
            self.some(0.4, snapshot=name) if self.maybe(0.6) else {}), **(
            self.some(0.4, new_name=name) if self.maybe(0.3) else {}), **(
            self.some(0.7, size=self.size) if self.maybe(0.3) else {}), **(
            self.some(0.3, read_only=self.boolean))}

    def sensible(self):
        """A command with arguments of the right types."""
        rng, node = self.rng, self.node
        make = rng.choice([
            *[lambda: ('blockdev-add', self.definition())] * 10,
            *[lambda: ('blockdev-del', {'node-name': node()})] * 4,
            lambda: ('blockdev-reopen', {'options': [
                self.definition() for _ in range(rng.randrange(1, 3))]}),
            *[lambda: (rng.choice(OUR_COMMANDS), {'node-name': node()})] * 3,
            lambda: ('bale-set', {'node-name': node(), **self.some(
                0.5, speed=self.size, space_threshold=self.size,
                cache_size=self.size,
                compression_threads=lambda: rng.choice([0, 1, 3, 257]))}),
            *[lambda: (rng.choice(['bale-compact', 'bale-verify']),
                       self.our_job())] * 3,
            *[lambda: (rng.choice([n for n in OUR_COMMANDS if 'image' in n]),
                       self.image())] * 5,
            *[lambda: ('job-cancel', {'id': rng.choice(self.jobs)})] * 4,
            *[lambda: (rng.choice(['job-pause', 'job-resume', 'job-dismiss',
                                   'job-finalize', 'job-complete']),
                       {'id': rng.choice(self.jobs)})] * 2,
            lambda: ('bale-image-flatten', self.job(**{
                'node-name': node(), 'image': ''})),
            # No block-stream: when the chain under one changes, stock QEMU
            # loops for ever in bdrv_unfreeze_backing_chain(). test_nodes and
            # test_bale_system stream.
            lambda: ('block-commit', self.job(device=node())),
            lambda: ('blockdev-mirror', self.job(
                device=node(), target=node(),
                sync=rng.choice(['full', 'top', 'none']))),
            lambda: ('blockdev-backup', self.job(
                device=node(), target=node(), **self.some(
                    compress=self.boolean),
                sync=rng.choice(['full', 'top', 'none']))),
            lambda: ('blockdev-snapshot', {'node': node(),
                                           'overlay': node()}),
            lambda: ('change-backing-file', {
                'device': node(), 'image-node-name': node(),
                'backing-file': rng.choice(FILES)}),
            lambda: ('block_resize', {
                'node-name': node(),
                'size': rng.choice([0, 512, 1 << 20, 65 << 20, 1000,
                                    1 << 62, -1])}),
            lambda: ('block-set-write-threshold', {
                'node-name': node(), 'write-threshold': rng.randrange(9)}),
            lambda: ('block-dirty-bitmap-add', {
                'node': node(), 'name': 'b', 'persistent': self.boolean()}),
            lambda: (rng.choice(['query-named-block-nodes',
                                 'query-blockstats', 'query-jobs',
                                 'x-debug-query-block-graph',
                                 'query-bale', 'query-seqcache']), {}),
            lambda: ('blockdev-create', {'job-id': rng.choice(self.jobs),
                                         'options': self.definition()}),
            lambda: ('transaction', {'actions': [
                {'type': 'blockdev-snapshot', 'data': {
                    'node': node(), 'overlay': node()}}]}),
        ])
        return make()

    def request(self, number):
        """One request as bytes, and whether it could be understood."""
        while True:
            text, understood = self.any_request(number)
            if not understood or not refers_to_itself(json.loads(text)):
                return text, understood

    def any_request(self, number):
        kind = self.rng.random()
        if kind < 0.6:
            name, arguments = self.sensible()
        elif kind < 0.8:
            name, arguments = self.sensible()
            arguments = self.spoil(arguments)
        elif kind < 0.95:
            name = self.rng.choice(OUR_COMMANDS * 2 + BLOCK_COMMANDS)
            arguments = {self.rng.choice(MEMBERS): self.value()
                         for _ in range(self.rng.randrange(5))}
        else:
            name, arguments = self.sensible()
            text = bytearray(json.dumps({'execute': name,
                                         'arguments': arguments}).encode())
            what = self.rng.randrange(5)
            if what == 0:
                del text[self.rng.randrange(len(text)):]
            elif what == 1:
                text = b'[' * self.rng.choice([3, 1100]) + text
            elif what == 2:
                text = self.rng.randbytes(40)
            elif what == 3:
                deep = '{"driver":"bale","node-name":"n0","file":' * 900
                text = ('{"execute":"blockdev-add","arguments":' + deep +
                        '1' + '}' * 901).encode()
            else:
                text[self.rng.randrange(len(text))] = self.rng.randrange(256)
            return bytes(text), False
        return json.dumps({'execute': name, 'arguments': arguments,
                           'id': number}).encode(), True


class FuzzTest(bale_iotests.TestCase):
    def setUp(self):
        os.mkdir('dir')
        create('a.bale', '64M', 'page_size=2M')
        io('a.bale', 'write -q -P 1 0 3M', 'write -q -P 2 1M 3M')
        create('b.bale', '8M', 'page_size=2M', 'cluster_size=4k')
        qemu_img('create', '-q', '-f', 'bale', '-b', 'b.bale', '-F', 'bale',
                 'c.bale')
        for name in STORES[3:]:
            run('cp', 'a.bale', name, check=0)
        run('truncate', '-s', '16M', 'a.raw', check=0)
        qemu_img('create', '-q', '-f', 'qcow2', 'a.qcow2', '16M')

    def receive(self, qemu, wanted, number):
        """Reads until the answer `wanted`; False if the program has ended."""
        while True:
            while b'\n' not in self.buffer:
                ready, _, _ = select.select([qemu.socket], [], [], TIMEOUT_S)
                if not ready:
                    raise AssertionError(
                        f'no answer to request {number}: '
                        f'{qemu.process.output()[-2000:]}')
                try:
                    data = qemu.socket.recv(1 << 16)
                except ConnectionResetError:
                    return False  # it ended before it had read all
                if not data:
                    return False
                self.buffer += data
            line, self.buffer = self.buffer.split(b'\n', 1)
            if json.loads(line).get('id') == wanted:
                return True

    def fuzz(self, program, *args):
        fuzzer = Fuzzer(self.random)
        self.buffer = b''
        good = 0
        with Qemu(program, *args) as qemu, open('requests', 'wb') as log:
            for number in range(REQUESTS):
                text, understood = fuzzer.request(number)
                log.write(text.replace(b'\n', b' ') + b'\n')
                log.flush()
                wanted = number
                if not understood:
                    # 0xff is in no token: the parser begins anew after it
                    wanted = f'sync{number}'
                    text += b'\n\xff\n' + json.dumps({
                        'execute': 'query-version', 'id': wanted}).encode()
                try:
                    qemu.socket.sendall(text + b'\n')
                    alive = self.receive(qemu, wanted, number)
                except OSError:
                    alive = False
                if not alive:
                    status = qemu.process.process.wait(TIMEOUT_S)
                    raise AssertionError(
                        f'{program} ended with {status} at request {number}: '
                        f'{text[:2000]!r}: {qemu.process.output()[-2000:]}')
                good += 1
            # It still works, and ends in good order
            qemu.stream = None
            qemu.socket.sendall(b'{"execute":"quit","id":"end"}\n')
            self.assertTrue(self.receive(qemu, 'end', 'quit'))
            status = qemu.process.process.wait(TIMEOUT_S)
            self.assertEqual(status, 0, qemu.process.output()[-2000:])
        self.assertEqual(good, REQUESTS)

    def test_storage_daemon(self):
        self.fuzz('qemu-storage-daemon')

    def test_system(self):
        self.fuzz('qemu-system-x86_64')


if __name__ == '__main__':
    bale_iotests.main()
