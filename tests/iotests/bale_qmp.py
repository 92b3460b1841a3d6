# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU program with a QMP socket, for tests: a few lines of a client."""

import collections
import json
import os
import socket

from bale_iotests import BALE, TIMEOUT_S, Background, wait_until


class QmpError(Exception):
    """A command was answered with an error; its description."""


class Qemu:
    """A program with the module; use it as a context manager.

    program: 'qemu-system-x86_64' or 'qemu-storage-daemon'. The socket lies in
    the current directory.
    """

    number = 0

    def __init__(self, program, *args):
        Qemu.number += 1
        self.path = os.path.abspath(f'qmp{Qemu.number}.sock')
        if program == 'qemu-storage-daemon':
            monitor = ['--chardev', f'socket,id=qmp,path={self.path},server=on,'
                       'wait=off', '--monitor', 'chardev=qmp']
        else:
            monitor = ['-machine', 'none', '-nodefaults', '-display', 'none',
                       '-qmp', f'unix:{self.path},server=on,wait=off']
        # The monitor first: storage-daemon obeys its options in order. It may
        # not be spoken to before it has done so: 7.2's monitor is then still on
        # its way to another thread, and both would read what comes.
        self.pid_file = self.path + '.pid'
        pid_option = ['-pidfile' if 'system' in program else '--pidfile',
                      self.pid_file]
        self.process = Background(BALE, 'run', program, *monitor, *args,
                                  *pid_option)
        self.events = collections.deque()
        self.socket = self.stream = None

    def __enter__(self):
        wait_until(lambda: os.path.exists(self.pid_file) or
                   not self.process.running(), 'QMP socket')
        try:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(TIMEOUT_S)
            wait_until(self.connect, 'somebody listens')
            # For reading only: a text stream that is written to forgets what
            # it has read ahead, and events with it.
            self.stream = self.socket.makefile('r', encoding='utf-8')
            self.read()
            self.command('qmp_capabilities')
        except (OSError, ValueError, AssertionError) as error:
            self.process.kill()
            raise AssertionError(
                f'no QMP: {error}: {self.process.output()}') from error
        return self

    def connect(self):
        """False: not yet. qemu-system writes its pid before it listens."""
        try:
            self.socket.connect(self.path)
        except (ConnectionRefusedError, FileNotFoundError):
            if not self.process.running():
                raise AssertionError('it has ended') from None
            return False
        return True

    def __exit__(self, *_):
        try:
            if self.process.running():
                self.command('quit')
                self.process.process.wait(TIMEOUT_S)
        except (OSError, ValueError, EOFError):
            pass
        finally:
            self.socket.close()
            self.process.kill()

    def read(self):
        line = self.stream.readline()
        if not line:
            raise EOFError(self.process.output())
        return json.loads(line)

    def command(self, name, /, **arguments):
        """The return value; underscores in names of arguments are dashes."""
        return self.execute(name, {key.replace('_', '-'): value
                                   for key, value in arguments.items()})

    def execute(self, name, arguments):
        self.socket.sendall(json.dumps({
            'execute': name, 'arguments': arguments}).encode() + b'\n')
        while True:
            answer = self.read()
            if 'event' in answer:
                self.events.append(answer)
            elif 'error' in answer:
                raise QmpError(answer['error']['desc'])
            else:
                return answer['return']

    def fails(self, name, /, **arguments):
        """The error's description; the command must fail."""
        try:
            self.command(name, **arguments)
        except QmpError as error:
            return str(error)
        raise AssertionError(f'{name} succeeded')

    def hmp(self, line):
        return self.command('human-monitor-command', command_line=line)

    def next_event(self):
        while not self.events:
            answer = self.read()
            if 'event' in answer:
                self.events.append(answer)
        return self.events.popleft()

    def wait_event(self, name, /, **data):
        """The next event of this name whose data contains these. Those before
        it are forgotten."""
        while True:
            event = self.next_event()
            if event['event'] == name and all(
                    event['data'].get(key) == value
                    for key, value in data.items()):
                return event

    def wait_events(self, *names):
        """The data of the next event of each name: they come in any order."""
        found = {}
        while set(found) != set(names):
            event = self.next_event()
            if event['event'] in names:
                found.setdefault(event['event'], event['data'])
        return [found[name] for name in names]

    def run_job(self, job):
        """Waits for a block job that concludes by itself; its error or ''."""
        while True:
            event = self.wait_event_of({'BLOCK_JOB_COMPLETED',
                                        'BLOCK_JOB_READY'}, job)
            if event['event'] == 'BLOCK_JOB_READY':
                self.command('block-job-complete', device=job)
                continue
            return event['data'].get('error', '')

    def wait_event_of(self, names, device):
        while True:
            event = self.next_event()
            if event['event'] in names and \
                    event['data'].get('device') == device:
                return event
