# SPDX-License-Identifier: GPL-2.0-or-later
"""What the Python tests share: paths, programs, temporary directories, TAP.

A test file imports this module, defines subclasses of TestCase and ends with

    if __name__ == '__main__':
        bale_iotests.main()

Run one file, class or method:

    tests/iotests/test_loader.py [CLASS[.METHOD]]...

Each test gets an empty directory, self.dir, and runs in it. It is removed when
the test has passed and kept, its name printed, when it has failed. The build
directory is taken from BALE_BUILD, or is build/ in the tree. QEMU programs run
by qemu_img() and its like have the module loaded. Random tests take their seed
from self.seed, which BALE_SEED sets and a failure prints.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

TOP = os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.realpath(__file__))))
BUILD = os.path.realpath(os.environ.get('BALE_BUILD',
                                        os.path.join(TOP, 'build')))
BALE = os.path.join(BUILD, 'tools/bale')
SHIM = os.path.join(BUILD, 'block/bale-preload.so')
MODULE = os.path.join(BUILD, 'block/bale-module.so')
BUILD_IDS = os.path.join(BUILD, 'block/bale.build-ids')
# True: run the full counts and not what fits into every run of the tests
LONG = bool(os.environ.get('BALE_LONG'))
# A single program, or anything waited for, that takes longer than this hangs
TIMEOUT_S = 300

SKIP_STATUS = 77


class Result:
    """What a program did: status, out and err (text), and the command."""

    def __init__(self, command, status, out, err):
        self.command, self.status = command, status
        self.out, self.err = out, err

    def __str__(self):
        return (f'{" ".join(self.command)}\n  status {self.status}\n'
                f'  out: {self.out[-4000:]}\n  err: {self.err[-4000:]}')


def bale_for_everybody(directory):
    """Copies what `bale run` needs to @directory, which other users can reach.

    The build tree may lie where they cannot, in /root for example. Returns the
    path of the command.
    """
    for name in ('tools/bale', 'block/bale-preload.so',
                 'block/bale-module.so', 'block/bale.build-ids'):
        path = os.path.join(directory, name)
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        shutil.copy(os.path.join(BUILD, name), path)
    return os.path.join(directory, 'tools/bale')


def run(*command, check=None, env=None, cwd=None, timeout_s=TIMEOUT_S,
        stdin=None):
    """Runs a program to its end.

    check: the status it must end with, or None for any. env: changes to the
    environment; a value of None removes. stdin: text, or None for /dev/null.
    """
    command = [str(word) for word in command]
    full = dict(os.environ)
    for name, value in (env or {}).items():
        if value is None:
            full.pop(name, None)
        else:
            full[name] = value
    process = subprocess.Popen(
        command, env=full, cwd=cwd, text=True, errors='replace',
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(stdin, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError('hangs: ' + str(
            Result(command, f'killed after {timeout_s} s', out, err))) from None
    result = Result(command, process.returncode, out, err)
    if check is not None and result.status != check:
        raise AssertionError(f'expected status {check}: {result}')
    return result


def bale(*args, **kwargs):
    """Runs the command `bale`."""
    return run(BALE, *args, **kwargs)


def qemu(program, *args, **kwargs):
    """Runs a QEMU program with the module loaded."""
    return run(BALE, 'run', program, *args, **kwargs)


def qemu_img(*args, check=0, **kwargs):
    """Runs qemu-img with the module; it must succeed unless check says else."""
    return qemu('qemu-img', *args, check=check, **kwargs)


def qemu_io(*args, check=0, **kwargs):
    """Runs qemu-io with the module.

    Its status is 0 also when a command of it failed, before 7.2 or with
    several commands: look at the output too.
    """
    return qemu('qemu-io', *args, check=check, **kwargs)


def qemu_img_info(path, *args):
    """`qemu-img info` as a dictionary."""
    return json.loads(qemu_img('info', '--output=json', *args, path).out)


def qemu_img_map(path, *args):
    """`qemu-img map` as a list of dictionaries."""
    return json.loads(qemu_img('map', '--output=json', *args, path).out)


class Background:
    """A program that runs beside the test; use it as a context manager."""

    def __init__(self, *command, env=None):
        self.command = [str(word) for word in command]
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            self.command, env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL, stdout=self.log,
            stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def output(self):
        """What it has printed so far. The file's offset is the program's as
        well: it must not be moved by reading."""
        log = self.log.fileno()
        return os.pread(log, os.fstat(log).st_size, 0).decode(errors='replace')

    def running(self):
        return self.process.poll() is None

    def kill(self):
        """SIGKILL, to the program and all that it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def stop(self, timeout_s=TIMEOUT_S):
        """SIGTERM, then SIGKILL; returns the status."""
        if self.running():
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                pass
        status = self.process.poll()
        self.kill()
        return self.process.returncode if status is None else status


def wait_until(condition, what, timeout_s=TIMEOUT_S):
    """Waits until condition() is true; fails naming `what` when it stays
    false. What it returned is returned."""
    end = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f'still not after {timeout_s} s: {what}')
        time.sleep(0.02)


def nbd_answers(path):
    """Whether an NBD server is ready at a socket.

    That the socket exists does not say so: qemu-nbd makes it before it opens
    the image, and any server a moment before it listens.
    """
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(TIMEOUT_S)
        try:
            client.connect(path)
            return client.recv(1) != b''
        except OSError:
            return False


def wait_for_nbd(server, path):
    """Waits for a Background that serves NBD at @path, to more than one client
    one after the other. False when it has ended instead."""
    wait_until(lambda: not server.running() or nbd_answers(path),
               'the NBD server answers')
    return server.running()


class TestCase(unittest.TestCase):
    """A test with a directory of its own and a seed."""

    maxDiff = None

    def run(self, result=None):
        # The name of a socket in it may have 107 characters
        name = self.id().split('.', 1)[-1][:50]
        self.dir = tempfile.mkdtemp(prefix=f'bale-{name}-',
                                    dir=os.environ.get('BALE_TEST_DIR'))
        self.seed = int(os.environ.get('BALE_SEED') or
                        random.SystemRandom().getrandbits(32))
        self.random = random.Random(self.seed)
        before = os.getcwd()
        os.chdir(self.dir)
        bad = len(result.failures) + len(result.errors) if result else 0
        try:
            super().run(result)
        finally:
            os.chdir(before)
            if result and len(result.failures) + len(result.errors) > bad:
                print(f'# {self.id()}: kept {self.dir}; BALE_SEED={self.seed}')
            else:
                shutil.rmtree(self.dir, ignore_errors=True)
        return result

    def path(self, name):
        """A path in the test's own directory."""
        return os.path.join(self.dir, name)

    def need(self, *programs):
        """Skips the test when a program is not installed."""
        for program in programs:
            if not shutil.which(program):
                self.skipTest(f'{program} is not installed')

    def need_root(self):
        if os.geteuid() != 0:
            self.skipTest('needs root')

    def assert_one_line_error(self, result, *words):
        """Status 1, one line on standard error, and these words in it."""
        self.assertEqual(result.status, 1, str(result))
        lines = [line for line in result.err.splitlines() if line]
        self.assertEqual(len(lines), 1, str(result))
        for word in words:
            self.assertIn(str(word), lines[0], str(result))


class TapResult(unittest.TestResult):
    """Prints one TAP line for each test method."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def line(self, good, test, comment=''):
        self.number += 1
        name = test.id().replace('__main__.', '')
        print(f'{"ok" if good else "not ok"} {self.number} - {name}{comment}',
              flush=True)

    def explain(self, test, error):
        for line in self._exc_info_to_string(error, test).splitlines():
            print(f'# {line}')

    def addSuccess(self, test):
        super().addSuccess(test)
        self.line(True, test)

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.explain(test, err)
        self.line(False, test)

    def addError(self, test, err):
        super().addError(test, err)
        self.explain(test, err)
        self.line(False, test)

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is not None:
            self.explain(subtest, err)
            self.line(False, subtest)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.line(True, test, f' # SKIP {reason}')

    def addExpectedFailure(self, test, err):
        super().addExpectedFailure(test, err)
        self.line(True, test, ' # TODO expected to fail')

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self.line(False, test)


def main():
    """Runs the tests of the file that was started, as TAP."""
    names = sys.argv[1:]
    loader = unittest.TestLoader()
    module = sys.modules['__main__']
    if names:
        suite = loader.loadTestsFromNames(names, module)
    else:
        suite = loader.loadTestsFromModule(module)
    result = TapResult()
    suite.run(result)
    print(f'1..{result.number}')
    sys.exit(0 if result.wasSuccessful() else 1)
