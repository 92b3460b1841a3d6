#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The monitor's side: commands, blockdev-add and the command line, errors on
write-out, backup jobs; in qemu-storage-daemon and qemu-system-x86_64."""

import json
import os

import bale_iotests
import bale_qmp
from bale_iotests import BALE, LONG, TIMEOUT_S, qemu_img, qemu_img_info, run, \
    wait_until

KIB = 1024
MIB = 1024 * KIB

DAEMON = ('qemu-storage-daemon',)
SYSTEM = ('qemu-system-x86_64', '-accel', 'tcg', '-display', 'none')


class Qmp(bale_qmp.Qemu):
    """A call is a command; it must end well."""

    __call__ = bale_qmp.Qemu.command

    def __exit__(self, kind, *_):
        try:
            if kind is None and self.process.running():
                self.stop()
        finally:
            super().__exit__()

    def stop(self):
        """Ends the program in good order; returns what it has printed."""
        self('quit')
        status = self.process.process.wait(TIMEOUT_S)
        if status:
            raise AssertionError(f'status {status}: {self.process.output()}')
        return self.process.output()


class Base(bale_iotests.TestCase):
    def setUp(self):
        run('truncate', '-s', '8M', 'a.raw', check=0)

    def each(self):
        """(name, command line, option that opens a node) of both programs."""
        return (('daemon', DAEMON, '--blockdev'),
                ('system', SYSTEM, '-blockdev'))

    def cache_options(self, node='cache0', filename='a.raw', **more):
        return {'driver': 'seqcache', 'node-name': node,
                'file': {'driver': 'file', 'node-name': f'{node}-file',
                         'filename': filename}, **more}

    def write_through_nbd(self, qmp, node, *commands, options=()):
        """qemu-io commands on a node, through an NBD export."""
        if not getattr(qmp, 'nbd', None):
            qmp.nbd = self.path('nbd.sock')
            qmp('nbd-server-start', addr={'type': 'unix', 'data': {
                'path': qmp.nbd}})
        if node not in getattr(qmp, 'exported', set()):
            qmp('block-export-add', id=f'export-{node}', type='nbd',
                node_name=node, writable=True, name=node)
            qmp.exported = getattr(qmp, 'exported', set()) | {node}
        words = [word for command in commands for word in ('-c', command)]
        result = run('qemu-io', '-t', 'writeback', *options, '-f', 'raw',
                     *words, f'nbd+unix:///{node}?socket={qmp.nbd}')
        return result.out + result.err


class CommandTest(Base):
    """The three commands."""

    def test_commands_are_listed_and_described(self):
        for name, command, _ in self.each():
            with self.subTest(name), Qmp(*command) as qmp:
                names = {c['name'] for c in qmp('query-commands')}
                self.assertLessEqual({'query-seqcache', 'seqcache-flush',
                                      'seqcache-reset-stats',
                                      'query-bale-module'}, names)
                schema = qmp('query-qmp-schema')
                entities = {}
                for entity in schema:
                    self.assertNotIn(entity['name'], entities)
                    entities[entity['name']] = entity
                self.assertEqual(
                    entities['query-seqcache']['meta-type'], 'command')
                # Every type that anything refers to is there
                def refs(value, key=''):
                    if isinstance(value, dict):
                        for k, v in value.items():
                            yield from refs(v, k)
                    elif isinstance(value, list):
                        for v in value:
                            yield from refs(v, key)
                    elif key in ('type', 'arg-type', 'ret-type',
                                 'element-type'):
                        yield value
                for ref in refs(schema):
                    self.assertIn(ref, entities)
                drivers = [e for e in schema if e['meta-type'] == 'enum' and
                           'throttle' in e['values'] and 'qcow2' in e['values']]
                self.assertEqual(len(drivers), 1)
                self.assertIn('seqcache', drivers[0]['values'])
                self.assertIn('bale', drivers[0]['values'])
                options = [e for e in schema if any(
                    v['case'] == 'seqcache' for v in e.get('variants', []))
                    and e['name'] != 'BaleBlockdevOptions']
                self.assertEqual(len(options), 1)
                case = [v for v in options[0]['variants']
                        if v['case'] == 'seqcache'][0]
                self.assertLessEqual(
                    {'cluster-size', 'compress', 'file'},
                    {m['name'] for m in entities[case['type']]['members']})

    def test_statistics(self):
        with Qmp(*DAEMON) as qmp:
            qmp('blockdev-add', **self.cache_options(flush_interval=0))
            self.write_through_nbd(qmp, 'cache0', 'write -P 1 0 1000',
                                   'write -P 2 1000 70000')
            info, = qmp('query-seqcache', node_name='cache0')
            self.assertEqual(info, qmp('query-seqcache')[0])
            self.assertEqual(info['child-node-name'], 'cache0-file')
            self.assertEqual(info['cluster-size'], 65536)
            self.assertEqual(info['cache-size'], 16 * MIB)
            self.assertEqual(info['writes-in'], 2)
            self.assertEqual(info['bytes-in'], 71000)
            self.assertEqual(info['merges'], 1)
            self.assertEqual(info['write-outs-whole'], 1)
            # The client flushes when it ends
            self.assertEqual(info['bytes-out'], 71000)
            self.assertEqual(info['clusters-open'], 0)
            self.assertEqual(sum(b['count'] for b in info['write-out-ns']), 2)
            self.assertNotIn('error', info)
            qmp('seqcache-reset-stats', node_name='cache0')
            info, = qmp('query-seqcache', node_name='cache0')
            self.assertEqual(info['writes-in'], 0)
            self.assertEqual(info['write-out-ns'], [])

    def test_wrong_nodes_are_named(self):
        for name, command, _ in self.each():
            with self.subTest(name), Qmp(*command) as qmp:
                qmp('blockdev-add', **self.cache_options())
                for what in ('query-seqcache', 'seqcache-flush',
                             'seqcache-reset-stats'):
                    self.assertEqual(
                        qmp.fails(what, node_name='nobody'),
                        "Failed to find node with node-name='nobody'")
                    self.assertEqual(
                        qmp.fails(what, node_name='cache0-file'),
                        "Node 'cache0-file' is a file node, not a seqcache "
                        "node")
                self.assertIn('node-name',
                              qmp.fails('seqcache-flush'))
                self.assertIn('unexpected',
                              qmp.fails('seqcache-flush', node_name='cache0',
                                        colour='blue'))

    def test_flush_writes_out(self):
        for name, command, _ in self.each():
            with self.subTest(name), Qmp(*command) as qmp:
                qmp('blockdev-add', **self.cache_options())
                qmp('seqcache-flush', node_name='cache0')
                self.assertEqual(
                    qmp('query-seqcache')[0]['flushes'], 1)


class BlockdevTest(Base):
    """blockdev-add, blockdev-reopen, --blockdev and -blockdev."""

    def test_add_and_delete(self):
        for name, command, _ in self.each():
            with self.subTest(name), Qmp(*command) as qmp:
                for _ in range(3):
                    qmp('blockdev-add', **self.cache_options())
                    nodes = {n['node-name']: n
                             for n in qmp('query-named-block-nodes')}
                    self.assertEqual(nodes['cache0']['drv'], 'seqcache')
                    qmp('blockdev-del', node_name='cache0')
                    self.assertEqual(qmp('query-seqcache'), [])

    def test_add_under_and_over_qcow2(self):
        qemu_img('create', '-q', '-f', 'qcow2', 'a.qcow2', '8M')
        for name, command, _ in self.each():
            with self.subTest(name), Qmp(*command) as qmp:
                qmp('blockdev-add', driver='seqcache', node_name='over',
                    compress=True, file={
                        'driver': 'qcow2', 'node-name': 'image',
                        'file': {'driver': 'seqcache', 'node-name': 'under',
                                 'file': {'driver': 'file',
                                          'filename': 'a.qcow2'}}})
                self.assertEqual(
                    {i['node-name'] for i in qmp('query-seqcache')},
                    {'over', 'under'})
                qmp('blockdev-del', node_name='over')

    def test_add_over_a_node_that_exists(self):
        with Qmp(*DAEMON) as qmp:
            qmp('blockdev-add', driver='file', node_name='f',
                filename='a.raw')
            qmp('blockdev-add', driver='seqcache', node_name='c', file='f')
            self.assertIn('in use',
                          qmp.fails('blockdev-del', node_name='f'))
            qmp('blockdev-del', node_name='c')
            qmp('blockdev-del', node_name='f')

    def test_add_over_a_drained_node(self):
        """The filter is drained with the node below it before it is open."""
        with Qmp(*DAEMON) as qmp:
            for node in ('below', 'copy'):
                qmp('blockdev-add', driver='null-co', node_name=node,
                    size=MIB, read_zeroes=True)
            # Drained between its completion and its finalization
            qmp('blockdev-mirror', job_id='j', device='below', target='copy',
                sync='full', auto_finalize=False)
            qmp.wait_event('BLOCK_JOB_READY')
            qmp('block-job-complete', device='j')
            qmp.wait_event('BLOCK_JOB_PENDING')
            qmp('blockdev-add', driver='seqcache', node_name='c', file='below',
                read_only=True)
            qmp('job-finalize', id='j')
            qmp.wait_event('BLOCK_JOB_COMPLETED')
            self.assertEqual(
                qmp('query-seqcache', node_name='c')[0]['bytes-dirty'], 0)
            qmp('blockdev-del', node_name='c')

    def test_reopening_with_no_node_as_child(self):
        """QEMU aborts when something else comes so far."""
        with Qmp(*DAEMON) as qmp:
            qmp('blockdev-add', driver='seqcache', node_name='c',
                file={'driver': 'null-co', 'size': MIB})
            for bad in (1 << 31, 0.5, True, None, {}, [], ['c'], {'file': 5}):
                self.assertIn("'file'", qmp.fails('blockdev-reopen', options=[
                    {'driver': 'seqcache', 'node-name': 'c', 'file': bad}]))

    def test_bad_options_are_refused(self):
        for name, command, _ in self.each():
            with self.subTest(name), Qmp(*command) as qmp:
                bad = [
                    ({'cluster-size': 3000}, 'power of two'),
                    ({'cluster-size': '64k'}, "'cluster-size' expects uint64"),
                    ({'compress': 'on'}, "'compress', expected: boolean"),
                    ({'colour': 'blue'}, "'colour' is unexpected"),
                    ({'max-streams': -1}, 'max-streams'),
                    ({'file': 'nobody'}, 'nobody'),
                    ({'file': {'driver': 'file', 'filename': 'a.raw',
                               'colour': 'blue'}}, 'colour'),
                    ({'file': {'driver': 'file', 'filename': 3}},
                     "'filename', expected: string"),
                    ({'file': {'driver': 'nothing'}}, 'nothing'),
                    ({'discard': 'maybe'}, 'discard'),
                ]
                for more, word in bad:
                    options = self.cache_options()
                    options.update(more)
                    self.assertIn(word, qmp.fails('blockdev-add', **options))
                self.assertIn("'file' is missing", qmp.fails(
                    'blockdev-add', driver='seqcache', node_name='c'))
                self.assertEqual(
                    qmp.fails('blockdev-add', driver='seqcache', file='f'),
                    "'node-name' must be specified for the root node")
                self.assertIn("'cluster-size'", qmp.fails(
                    'blockdev-add', driver='qcow2', node_name='q', file={
                        'driver': 'seqcache', 'cluster-size': True,
                        'file': {'driver': 'file', 'filename': 'a.raw'}}))
                # Wrong in QEMU's own part of a tree that has ours
                self.assertIn('colour', qmp.fails(
                    'blockdev-add', driver='qcow2', node_name='q',
                    colour='blue', file=self.cache_options('inner')))
                # A tree without ours is QEMU's own affair
                self.assertIn("'driver'", qmp.fails(
                    'blockdev-add', driver='nothing', node_name='q'))
                self.assertEqual(qmp('query-named-block-nodes'), [])

    def test_reopen(self):
        for name, command, _ in self.each():
            with self.subTest(name), Qmp(*command) as qmp:
                options = self.cache_options()
                qmp('blockdev-add', **options)
                options['file'] = 'cache0-file'
                options['cache-size'] = 1 * MIB
                options['flush-interval'] = 77
                qmp('blockdev-reopen', options=[options])
                info, = qmp('query-seqcache')
                self.assertEqual(info['cache-size'], 1 * MIB)
                self.assertEqual(info['flush-interval'], 77)
                options['cluster-size'] = 4096
                self.assertIn('cluster-size', qmp.fails(
                    'blockdev-reopen', options=[options]))
                options['cluster-size'] = 65536
                options['read-only'] = True
                qmp('blockdev-reopen', options=[options])
                options['read-only'] = False
                qmp('blockdev-reopen', options=[options])
                self.assertIn('node-name not specified', qmp.fails(
                    'blockdev-reopen', options=[
                        {'driver': 'seqcache', 'file': 'cache0-file'}]))
                self.assertIn("node-name='other'", qmp.fails(
                    'blockdev-reopen', options=[
                        {'driver': 'seqcache', 'node-name': 'other',
                         'file': 'cache0-file'}]))
                # The filter goes away from under a node, and comes back
                qmp('blockdev-add', driver='raw', node_name='top',
                    file='cache0')
                qmp('blockdev-reopen', options=[
                    {'driver': 'raw', 'node-name': 'top',
                     'file': 'cache0-file'}])
                qmp('blockdev-reopen', options=[
                    {'driver': 'raw', 'node-name': 'top', 'file': 'cache0'}])

    def test_command_line(self):
        keyval = ('seqcache,node-name=c,cache-size=1M,compress=off,'
                  'file.driver=file,file.filename=a.raw')
        for name, command, option in self.each():
            for argument in (keyval, 'driver=' + keyval, json.dumps(
                    self.cache_options('c', **{'cache-size': MIB}))):
                with self.subTest(name, argument=argument), Qmp(
                        *command, option, 'driver=null-co,node-name=n',
                        option, argument, option,
                        'driver=raw,node-name=top,file=c') as qmp:
                    self.assertEqual(
                        {n['node-name'] for n in
                         qmp('query-named-block-nodes')} & {'n', 'c', 'top'},
                        {'n', 'c', 'top'})
                    self.assertEqual(
                        qmp('query-seqcache')[0]['cache-size'], MIB)
                    if name == 'system':
                        self.assertEqual(
                            [c['label'] for c in qmp('query-chardev')],
                            ['compat_monitor0'])

    def test_command_line_errors(self):
        for name, command, option in self.each():
            for argument, word in (
                    ('seqcache,node-name=c', "'file' is missing"),
                    ('seqcache,node-name=c,file=nobody', 'nobody'),
                    ('seqcache,file.driver=null-co', "'node-name' must be"),
                    ('seqcache,node-name=c,file.driver=null-co,compress=x',
                     'compress'),
                    ('qcow2,node-name=q,file.driver=seqcache,file.colour=b,'
                     'file.file.driver=null-co', 'colour')):
                with self.subTest(name, argument=argument):
                    result = run(BALE, 'run', *command, option, argument)
                    self.assertEqual(result.status, 1, str(result))
                    self.assertIn(word, result.err)

    def test_closed_unions_refuse(self):
        for name, command, _ in self.each():
            with self.subTest(name), Qmp(*command) as qmp:
                self.assertIn('bale', qmp.fails(
                    'blockdev-create', job_id='j',
                    options={'driver': 'bale', 'size': MIB}))
                self.assertIn('node name', qmp.fails(
                    'blockdev-create', job_id='j', options={
                        'driver': 'qcow2', 'size': MIB,
                        'file': self.cache_options('c')}))
                qmp('blockdev-add', **self.cache_options())
                self.assertIn('seqcache', qmp.fails(
                    'x-blockdev-amend', job_id='j', node_name='cache0',
                    options={'driver': 'seqcache'}))
                # By name it works
                qmp('blockdev-create', job_id='j', options={
                    'driver': 'qcow2', 'size': MIB, 'file': 'cache0'})
                qmp.wait_event('JOB_STATUS_CHANGE', id='j',
                               status='concluded')
                job, = qmp('query-jobs')
                self.assertNotIn('error', job)
                qmp('job-dismiss', id='j')
        run('qemu-img', 'check', '-f', 'qcow2', 'a.raw', check=0)

    def test_backing_format_bale_is_accepted(self):
        qemu_img('create', '-q', '-f', 'qcow2', '-u', '-F', 'bale', '-b',
                 'x.bale', 'a.qcow2', '1M')
        self.assertEqual(
            qemu_img_info('a.qcow2', '-U')['backing-filename-format'], 'bale')


class ErrorTest(Base):
    """Write-outs that fail."""

    def failing(self, qmp, once=True, event='pwritev', errno=5, **more):
        qmp('blockdev-add', **{
            'driver': 'seqcache', 'node-name': 'cache0', 'flush-interval': 0,
            'file': {'driver': 'blkdebug', 'node-name': 'below',
                     'inject-error': [{'event': event, 'errno': errno,
                                       'once': once}],
                     'image': {'driver': 'file', 'filename': 'a.raw'}},
            **more})

    def fail_in_the_background(self, qmp):
        """Fills a cluster, so it is written out at once, and fails. The
        client is killed, so that it does not flush."""
        self.write_through_nbd(qmp, 'cache0', 'write -P 1 0 4096', 'abort')
        wait_until(lambda: qmp('query-seqcache')[0]['errors'],
                   'the write-out fails')

    def test_error_reaches_flush_and_data_stays(self):
        with Qmp(*DAEMON) as qmp:
            self.failing(qmp)
            out = self.write_through_nbd(qmp, 'cache0', 'write -P 1 100 200',
                                         'flush', 'read -P 1 100 200')
            self.assertNotIn('Pattern', out)
            # The client's flush at its end, or ours, found the device well
            qmp('seqcache-flush', node_name='cache0')
            info, = qmp('query-seqcache')
            self.assertEqual(info['errors'], 1)
            self.assertNotIn('error', info)
            err = qmp.stop()
            self.assertIn("seqcache node 'cache0': could not write back 200 "
                          "bytes at offset 100 to node 'below': Input/output "
                          "error", err)
        with open('a.raw', 'rb') as file:
            self.assertEqual(file.read(300), bytes(100) + b'\1' * 200)

    def test_background_error_reaches_the_next_flush(self):
        with Qmp(*DAEMON) as qmp:
            self.failing(qmp, **{'cluster-size': 4096})
            qmp.nbd = None
            self.fail_in_the_background(qmp)
            info, = qmp('query-seqcache')
            self.assertEqual(info['errors'], 1)
            self.assertIn("offset 0 to node 'below'", info['error'])
            self.assertEqual(info['clusters-failed'], 1)
            out = self.write_through_nbd(qmp, 'cache0', 'read -P 1 0 4096',
                                         'write 8192 100')
            self.assertIn('write failed', out)
            qmp('seqcache-flush', node_name='cache0')
            info, = qmp('query-seqcache')
            self.assertNotIn('error', info)
            self.assertEqual(info['clusters-failed'], 0)
            out = self.write_through_nbd(qmp, 'cache0', 'read -P 1 0 4096',
                                         'write -P 2 8192 100')
            self.assertNotIn('failed', out)

    def test_untold_error_is_told_once(self):
        with Qmp(*DAEMON) as qmp:
            self.failing(qmp, **{'cluster-size': 4096})
            self.fail_in_the_background(qmp)
            self.assertIn("offset 0 to node 'below'",
                          qmp.fails('seqcache-flush', node_name='cache0'))
            qmp('seqcache-flush', node_name='cache0')

    def test_full_device_then_room(self):
        self.need_root()
        os.mkdir('mnt')
        run('mount', '-t', 'tmpfs', '-o', 'size=1M', 'none', 'mnt', check=0)
        try:
            run('truncate', '-s', '4M', 'mnt/a.raw', check=0)
            with Qmp(*DAEMON) as qmp:
                qmp('blockdev-add', **self.cache_options(
                    filename='mnt/a.raw', **{'flush-interval': 0}))
                self.write_through_nbd(qmp, 'cache0', 'write -P 7 0 2M',
                                       'abort')
                self.assertIn('No space left', qmp.fails(
                    'seqcache-flush', node_name='cache0'))
                info, = qmp('query-seqcache')
                self.assertIn('No space left', info['error'])
                self.assertGreater(info['clusters-failed'], 0)
                self.assertIn('No space left', qmp.fails(
                    'seqcache-flush', node_name='cache0'))
                run('mount', '-o', 'remount,size=8M', 'mnt', check=0)
                qmp('seqcache-flush', node_name='cache0')
                out = self.write_through_nbd(qmp, 'cache0',
                                             'read -P 7 0 2M',
                                             'write -P 8 2M 1M')
                self.assertNotIn('ailed', out)
            with open('mnt/a.raw', 'rb') as file:
                self.assertEqual(file.read(3 * MIB),
                                 b'\7' * (2 * MIB) + b'\x08' * MIB)
        finally:
            run('umount', 'mnt')

    def test_lost_data_is_told_at_close(self):
        with Qmp(*DAEMON) as qmp:
            self.failing(qmp, once=False)
            self.write_through_nbd(qmp, 'cache0', 'write -P 1 0 1000',
                                   'abort')
            qmp('block-export-del', id='export-cache0', mode='hard')
            qmp.exported = set()
            qmp.wait_event('BLOCK_EXPORT_DELETED', id='export-cache0')
            qmp('blockdev-del', node_name='cache0')
            err = qmp.stop()
            self.assertIn('1000 bytes that could not be written back', err)

    def test_failed_child_flush_reaches_the_caller(self):
        with Qmp(*DAEMON) as qmp:
            self.failing(qmp, event='flush_to_disk')
            out = self.write_through_nbd(qmp, 'cache0', 'write -P 1 0 1000',
                                         'abort')
            self.assertIn("Could not flush node 'cache0'",
                          qmp.fails('seqcache-flush', node_name='cache0'))
            del out


class OrderTest(Base):
    """What is flushed lies below before the flush."""

    def read_log(self, name):
        """The entries of a blklogwrites log: (sector, sectors, flags)."""
        with open(name, 'rb') as file:
            data = file.read()
        sector_size = int.from_bytes(data[24:28], 'little')
        count = int.from_bytes(data[16:24], 'little')
        entries, at = [], sector_size
        for _ in range(count):
            sector, sectors, flags, length = (
                int.from_bytes(data[at + i:at + i + 8], 'little')
                for i in (0, 8, 16, 24))
            at += sector_size
            body = b''
            if not flags & 4:  # not a discard
                body = data[at:at + sectors * 512]
                at += sectors * 512
            del length
            entries.append((sector, sectors, flags, body))
        return entries

    def test_flush_is_a_barrier(self):
        run('truncate', '-s', '16M', 'log', check=0)
        commands, marks = [], []
        size = 4 * MIB
        model = bytearray(size)
        for i in range(400 if LONG else 100):
            for _ in range(self.random.randint(1, 12)):
                start = self.random.randrange(0, size - 30000)
                length = self.random.randint(1, 30000)
                byte = self.random.randint(1, 255)
                model[start:start + length] = bytes([byte]) * length
                commands.append(f'write -q -P {byte} {start} {length}')
            if self.random.random() < 0.2:
                commands[-1] = commands[-1].replace('-q', '-q -f')
            else:
                commands.append('flush')
            marks.append(bytes(model))
        result = bale_iotests.qemu_io(
            '-t', 'writeback', '--image-opts',
            'driver=seqcache,cache-size=1M,file.driver=blklogwrites,'
            'file.file.driver=file,file.file.filename=a.raw,'
            'file.log.driver=file,file.log.filename=log',
            stdin='\n'.join([*commands, 'quit', '']))
        self.assertNotIn('ailed', result.out + result.err)
        state = bytearray(8 * MIB)
        left = list(marks)
        for sector, sectors, flags, body in self.read_log('log'):
            if flags & 1 and left and state[:size] == left[0]:  # a flush
                left.pop(0)
            state[sector * 512:sector * 512 + len(body)] = body
            if flags & 4:
                state[sector * 512:(sector + sectors) * 512] = bytes(
                    sectors * 512)
        if left and state[:size] == left[0]:
            left.pop(0)
        self.assertEqual(len(left), 0,
                         f'{len(left)} of {len(marks)} flushes find less')

    def test_background_flusher_bounds_the_age(self):
        def written():
            with open('a.raw', 'rb') as file:
                return file.read(1077)[77:]

        with Qmp(*DAEMON) as qmp:
            qmp('blockdev-add', **self.cache_options(
                **{'flush-interval': 100}))
            self.write_through_nbd(qmp, 'cache0', 'write -P 5 77 1000',
                                   'abort')
            wait_until(
                lambda: qmp('query-seqcache')[0]['bytes-dirty'] == 0,
                'old data is written out')
            self.assertEqual(qmp('query-seqcache')[0]['flushes'], 0)
            # What is on its way is not dirty any more.
            wait_until(
                lambda: written() == b'\5' * 1000,
                'it is there')


class JobTest(Base):
    """Block jobs with the filter over and under their target."""

    def make_source(self):
        with open('src.raw', 'wb') as file:
            for i in range(60):
                file.write(self.random.randbytes(40000))
                file.write(bytes([i]) * self.random.randint(0, 200000))
        run('truncate', '-s', '16M', 'src.raw', check=0)
        run('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', 'src.raw',
            'src.qcow2', check=0)

    def source(self, qmp):
        qmp('blockdev-add', driver='qcow2', node_name='src',
            file={'driver': 'file', 'filename': 'src.qcow2'})

    def wait_job(self, qmp, job):
        event = qmp.wait_event('BLOCK_JOB_COMPLETED', device=job)
        self.assertNotIn('error', event['data'])
        # Its nodes are the job's until it is gone
        wait_until(lambda: job not in [j['id'] for j in qmp('query-jobs')],
                   'the job is gone')

    def test_compressed_backup_through_filter_under_qcow2(self):
        self.make_source()
        for name, command, _ in self.each():
            qemu_img('create', '-q', '-f', 'qcow2', 'dst.qcow2', '16M')
            with self.subTest(name), Qmp(*command) as qmp:
                self.source(qmp)
                qmp('blockdev-add', driver='qcow2', node_name='dst', file={
                    'driver': 'seqcache', 'node-name': 'cache', 'file': {
                        'driver': 'file', 'filename': 'dst.qcow2',
                        'cache': {'direct': True}}})
                qmp('blockdev-backup', job_id='j', device='src',
                    target='dst', sync='full', compress=True,
                    x_perf={'max-workers': 64})
                self.wait_job(qmp, 'j')
                info, = qmp('query-seqcache')
                self.assertGreater(info['merges'], 0)
            run('qemu-img', 'compare', 'src.qcow2', 'dst.qcow2', check=0)
            run('qemu-img', 'check', 'dst.qcow2', check=0)

    def test_backup_through_compressing_filter_over_qcow2(self):
        self.make_source()
        qemu_img('create', '-q', '-f', 'qcow2', 'dst.qcow2', '16M')
        with Qmp(*DAEMON) as qmp:
            self.source(qmp)
            qmp('blockdev-add', driver='seqcache', node_name='cache',
                compress=True, file={
                    'driver': 'qcow2', 'file': {
                        'driver': 'file', 'filename': 'dst.qcow2'}})
            qmp('blockdev-backup', job_id='j', device='src', target='cache',
                sync='full', x_perf={'max-workers': 32, 'max-chunk': 65536})
            self.wait_job(qmp, 'j')
        run('qemu-img', 'compare', 'src.qcow2', 'dst.qcow2', check=0)
        self.assertIn('compressed clusters',
                      qemu_img('check', 'dst.qcow2').out)
        self.assertLess(os.path.getsize('dst.qcow2'), 4 * MIB)

    def test_commands_while_an_iothread_writes(self):
        # A job in an I/O thread: 7.2's NBD server crashes in one by itself
        run('dd', 'if=/dev/urandom', 'of=src.raw', 'bs=1M', 'count=48',
            check=0)
        run('truncate', '-s', '48M', 'a.raw', check=0)
        with Qmp(*SYSTEM, '-object', 'iothread,id=io') as qmp:
            qmp('blockdev-add', driver='file', node_name='src',
                filename='src.raw')
            qmp('x-blockdev-set-iothread', node_name='src', iothread='io')
            options = self.cache_options(**{'cache-size': 1 * MIB,
                                            'flush-interval': 30})
            qmp('blockdev-add', **options)
            # Slowed down so that the commands meet it
            qmp('blockdev-backup', job_id='j', device='src',
                target='cache0', sync='full', speed=100 * MIB,
                x_perf={'max-workers': 32, 'max-chunk': 65536})
            asked = 0
            while not [e for e in qmp.events
                       if e['event'] == 'BLOCK_JOB_COMPLETED']:
                self.assertEqual(len(qmp('query-seqcache')), 1)
                qmp('seqcache-flush', node_name='cache0')
                if asked % 5 == 0:
                    qmp('seqcache-reset-stats', node_name='cache0')
                asked += 1
            self.wait_job(qmp, 'j')
            options['file'] = 'cache0-file'
            qmp('blockdev-reopen', options=[options])
            qmp('blockdev-del', node_name='cache0')
            self.assertGreater(asked, 0)
        run('cmp', 'src.raw', 'a.raw', check=0)

    def test_incremental_backup_with_bitmaps(self):
        self.make_source()
        qemu_img('create', '-q', '-f', 'qcow2', 'full.qcow2', '16M')
        qemu_img('create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b',
                 'full.qcow2', 'inc.qcow2')
        with Qmp(*DAEMON) as qmp:
            # The bitmap lives in the source, which lies on a filter, too
            qmp('blockdev-add', driver='qcow2', node_name='src', file={
                'driver': 'seqcache', 'node-name': 'cache-src', 'file': {
                    'driver': 'file', 'filename': 'src.qcow2'}})
            qmp('block-dirty-bitmap-add', node='src', name='b',
                persistent=True)
            for target in ('full', 'inc'):
                more = {'sync': 'full'}
                if target == 'inc':
                    more = {'sync': 'incremental', 'bitmap': 'b'}
                    self.write_through_nbd(
                        qmp, 'src', *(f'write -P {i + 1} {i * 900000} 5000'
                                      for i in range(16)))
                qmp('blockdev-add', driver='qcow2', node_name=target, file={
                    'driver': 'seqcache', 'file': {
                        'driver': 'file', 'filename': f'{target}.qcow2'}},
                    **({'backing': None} if target == 'inc' else {}))
                qmp('blockdev-backup', job_id='j', device='src',
                    target=target, compress=True, **more)
                self.wait_job(qmp, 'j')
                qmp('blockdev-del', node_name=target)
        run('qemu-img', 'compare', 'src.qcow2', 'inc.qcow2', check=0)
        info = qemu_img_info('src.qcow2')
        self.assertEqual(
            info['format-specific']['data']['bitmaps'][0]['name'], 'b')
        for name in ('src', 'full', 'inc'):
            run('qemu-img', 'check', f'{name}.qcow2', check=0)

    def test_snapshot_under_the_filter_has_all_completed_writes(self):
        qemu_img('create', '-q', '-f', 'qcow2', 'old.qcow2', '8M')
        qemu_img('create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b',
                 'old.qcow2', 'new.qcow2')
        with Qmp(*DAEMON) as qmp:
            qmp('blockdev-add', driver='seqcache', node_name='cache', file={
                'driver': 'qcow2', 'node-name': 'old', 'file': {
                    'driver': 'file', 'filename': 'old.qcow2'}},
                **{'flush-interval': 0})
            qmp('blockdev-add', driver='qcow2', node_name='new',
                backing=None,
                file={'driver': 'file', 'filename': 'new.qcow2'})
            self.write_through_nbd(qmp, 'cache', 'write -P 1 1000 70000',
                                   'abort')
            qmp('blockdev-snapshot', node='old', overlay='new')
            self.write_through_nbd(qmp, 'cache', 'write -P 2 2000 1000')
        out = run('qemu-io', '-r', '-f', 'qcow2', '-c',
                  'read -P 1 1000 70000', 'old.qcow2').out
        self.assertNotIn('ailed', out)
        out = run('qemu-io', '-r', '-f', 'qcow2', '-c', 'read -P 2 2000 1000',
                  'new.qcow2').out
        self.assertNotIn('ailed', out)


if __name__ == '__main__':
    bale_iotests.main()
