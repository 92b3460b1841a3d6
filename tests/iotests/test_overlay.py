#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The same sources inside QEMU: scripts/qemu-overlay.

Always: what the overlay writes into QEMU's files is a schema that QEMU's
generator takes. With BALE_LONG: QEMU's tools are built with the drivers in them
(two minutes on two cores) and pass the driver's tests with nothing preloaded.
"""

import os
import shutil
import subprocess
import unittest

import bale_iotests
from bale_iotests import BUILD, LONG, TOP, run

OVERLAY = os.path.join(TOP, 'scripts/qemu-overlay')
CONFIGURE = ('--disable-system', '--disable-user', '--enable-tools',
             '--with-git-submodules=ignore', '--disable-docs',
             '--disable-guest-agent', '--enable-linux-aio',
             '--meson=/usr/bin/meson')
TOOLS = ('qemu-img', 'qemu-io', 'qemu-nbd',
         'storage-daemon/qemu-storage-daemon')
BUILD_TIMEOUT_S = 3600
DRIVER_TESTS = ('test_bale_io', 'test_bale_create', 'test_bale_backing',
                'test_bale_bad_input', 'test_bale_convert', 'test_seqcache')


def qemu_source():
    """Where QEMU's source is, unpacked."""
    return run(os.path.join(TOP, 'scripts/qemu-headers'),
               check=0).out.splitlines()[-1]


class OverlayTest(bale_iotests.TestCase):
    """The overlay and what becomes of it."""

    def copy_source(self, *names):
        """A copy of QEMU's source, or of some files of it, in qemu/."""
        source = qemu_source()
        if not names:
            shutil.copytree(source, 'qemu', symlinks=True,
                            ignore=lambda path, _: {'build', 'roms'}
                            if path == source else set())
            return
        for name in names:
            target = os.path.join('qemu', name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            copy = shutil.copytree if os.path.isdir(
                os.path.join(source, name)) else shutil.copy
            copy(os.path.join(source, name), target)

    def overlay(self, check=0):
        return run(OVERLAY, 'qemu', check=check)

    def test_schema_is_valid(self):
        self.copy_source('VERSION', 'block/meson.build', 'qapi',
                         'scripts/qapi', 'scripts/qapi-gen.py')
        self.overlay()
        once = open('qemu/qapi/block-core.json', encoding='utf-8').read()
        run('/usr/bin/python3', 'qemu/scripts/qapi-gen.py', '-o', 'out',
            'qemu/qapi/qapi-schema.json', check=0)
        with open('out/qapi-types-block-core.h', encoding='utf-8') as file:
            text = file.read()
        for name in ('BLOCKDEV_DRIVER_BALE', 'BLOCKDEV_DRIVER_SEQCACHE',
                     'IMAGE_INFO_SPECIFIC_KIND_BALE', 'SeqcacheInfo'):
            self.assertIn(name, text)
        # A second time changes nothing
        self.overlay()
        self.assertEqual(
            once, open('qemu/qapi/block-core.json', encoding='utf-8').read())

    def test_another_tree_is_refused(self):
        os.mkdir('qemu')
        result = self.overlay(check=1)
        self.assertIn('no source tree of QEMU 7.2', result.err)
        self.copy_source('VERSION')
        os.makedirs('qemu/qapi')
        os.makedirs('qemu/block')
        for name in ('block/meson.build', 'qapi/block-core.json'):
            with open(f'qemu/{name}', 'w', encoding='utf-8') as file:
                file.write('something else\n')
        self.assertIn('expected exactly one', self.overlay(check=1).err)

    @unittest.skipUnless(LONG, 'builds QEMU: only with BALE_LONG')
    def test_built_in_drivers_pass_the_tests(self):
        self.copy_source()
        self.overlay()
        run('./configure', *CONFIGURE, cwd='qemu', check=0)
        run('ninja', '-C', 'qemu/build', *TOOLS, check=0,
            timeout_s=BUILD_TIMEOUT_S)
        run(OVERLAY, '--tests', 'tests', 'qemu', check=0,
            env={'BALE_BUILD': BUILD})
        env = dict(os.environ, BALE_BUILD=self.path('tests'))
        env.pop('BALE_LONG')
        for name in DRIVER_TESTS:
            result = subprocess.run(
                [os.path.join(TOP, f'tests/iotests/{name}.py')], env=env,
                stdout=subprocess.PIPE, text=True, check=False)
            self.assertEqual(result.returncode, 0, result.stdout)


if __name__ == '__main__':
    bale_iotests.main()
