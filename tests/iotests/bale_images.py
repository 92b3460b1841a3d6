# SPDX-License-Identifier: GPL-2.0-or-later
"""Images and small tools that the tests of the driver bale share."""

import contextlib
import hashlib
import os
import re

from bale_iotests import bale, qemu_img, qemu_io, run

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BALE_DRIVER = 'driver=bale,file.filename='


def patterned(rng, length):
    """Bytes like a disk's: text, random bytes and zeroes in turn."""
    out = bytearray()
    words = [rng.randbytes(rng.randrange(2, 9)) for _ in range(200)]
    while len(out) < length:
        kind = rng.randrange(4)
        run_length = rng.randrange(1, 96 * KIB)
        if kind == 0:
            out += bytes(run_length)
        elif kind == 1:
            out += rng.randbytes(run_length)
        else:
            chunk = b''.join(rng.choices(words, k=run_length // 6 + 1))
            out += chunk[:run_length]
    return bytes(out[:length])


def make_raw(rng, path, size, parts=4, part_length=1 * MIB):
    """A sparse raw file of @size bytes with some @parts of data in it, one at
    the beginning and one at the end. Returns the path."""
    with open(path, 'wb') as file:
        file.truncate(size)
        part_length = min(part_length, size)
        places = [0, size - part_length]
        places += [rng.randrange(size - part_length + 1)
                   for _ in range(parts - 2)]
        for place in places:
            file.seek(place)
            file.write(patterned(rng, part_length))
    return path


def sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(MIB):
            digest.update(chunk)
    return digest.hexdigest()


def create(path, size, *options):
    """qemu-img create -f bale, with -o for each of the options."""
    words = []
    for option in options:
        words += ['-o', option]
    return qemu_img('create', '-q', '-f', 'bale', *words, path, size)


def io(path, *commands, options=()):
    """Commands of qemu-io on a bale image; each must succeed."""
    words = []
    for command in commands:
        words += ['-c', command]
    result = qemu_io('-f', 'bale', *options, *words, path)
    bad = re.search(r'failed|error|Error|Invalid', result.out + result.err)
    if bad:
        raise AssertionError(f'qemu-io reports {bad.group()}: {result}')
    return result


def check(path):
    """qemu-img check must find nothing."""
    return qemu_img('check', '-q', '-f', 'bale', path)


def check_killed(path):
    """After a kill there may also be pages that the next session gives back,
    which count as leaks."""
    result = qemu_img('check', '-q', '-f', 'bale', path, check=None)
    if result.status not in (0, 3):
        raise AssertionError(f'damage after a kill: {result}')


def verify_store(path, killed=False):
    """The command bale finds nothing either, but what check_killed() allows."""
    result = bale('check', path)
    if result.status not in ((0, 3) if killed else (0,)):
        raise AssertionError(f'bale check finds something: {result}')
    bale('verify', path, check=0)


def compare(one, other, *args):
    return qemu_img('compare', '-q', *args, one, other)


@contextlib.contextmanager
def loop_device(path, *args):
    """A loop device over a file; skips nothing: the caller needs root."""
    device = run('losetup', '--find', '--show', *args, path,
                 check=0).out.strip()
    try:
        yield device
    finally:
        run('losetup', '--detach', device)


def blocks(path):
    """Bytes that a file takes from its file system."""
    return os.stat(path).st_blocks * 512
