#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The scripts that guard the tree: each must fail on what it is there for."""

import json
import os
import re
import shutil
import textwrap

import bale_iotests
from bale_iotests import TOP, run

HEAD = '/* SPDX-License-Identifier: GPL-2.0-or-later */\n'


class TreeTestCase(bale_iotests.TestCase):
    """A small tree of its own, with one of our scripts in it."""

    def take(self, script):
        os.makedirs('scripts', exist_ok=True)
        shutil.copy(os.path.join(TOP, 'scripts', script), 'scripts')

    def put(self, path, text):
        if os.path.dirname(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'w', encoding='utf-8') as file:
            file.write(text)


class LayersTest(TreeTestCase):

    def check(self, path, include):
        self.take('check-layers')
        self.put('include/util/a.h', HEAD)
        self.put('include/extstore/b.h', HEAD)
        self.put('util/a-internal.h', HEAD)
        self.put(path, f'{HEAD}#include {include}\n')
        return run('scripts/check-layers')

    def test_forbidden_arrows(self):
        for path, include in (('util/x.c', '"extstore/b.h"'),
                              ('util/x.c', '"qemu/osdep.h"'),
                              ('util/x.c', '<libaio.h>'),
                              ('include/util/x.h', '"extstore/b.h"'),
                              ('block/extstore/x.c', '"qemu/osdep.h"'),
                              ('block/extstore/x.c', '"block/block_int.h"'),
                              ('block/extstore/x.c', '"a-internal.h"'),
                              ('block/extstore/x.c',
                               '"../../util/a-internal.h"'),
                              ('tools/x.c', '"qemu/osdep.h"'),
                              ('tools/x.c', '"util/a.h"'),
                              ('block/extstore/x.c', '<not/known.h>')):
            with self.subTest(path=path, include=include):
                result = self.check(path, include)
                self.assertEqual(result.status, 1, result)
                self.assertIn(path + ':2:', result.out)
            os.unlink(path)

    def test_allowed_arrows(self):
        for path, include in (('util/x.c', '"util/a.h"'),
                              ('util/x.c', '"a-internal.h"'),
                              ('util/x.c', '<glib.h>'),
                              ('util/x.c', '<sys/mman.h>'),
                              ('block/extstore/x.c', '"util/a.h"'),
                              ('block/extstore/x.c', '<libaio.h>'),
                              ('block/x.c', '"qemu/osdep.h"'),
                              ('block/x.c', '"extstore/b.h"'),
                              ('tools/x.c', '"extstore/b.h"'),
                              ('tests/unit/x.c',
                               '"../../util/a-internal.h"')):
            with self.subTest(path=path, include=include):
                self.assertEqual(self.check(path, include).status, 0)
            os.unlink(path)


class StyleTest(TreeTestCase):

    def check(self, path, text):
        self.take('check-style')
        self.put(path, text)
        return run('scripts/check-style', path)

    def test_good_files(self):
        result = self.check('a.c', HEAD + 'int a;\n')
        self.assertEqual(result.status, 0, result)

    def test_complaints(self):
        host = 'deb.' + 'debian' + '.org'
        for name, text, word in (
                ('a.c', HEAD + '/* ' + 'x' * 80 + ' */\n', 'columns'),
                ('a.c', HEAD + '\tint a;\n', 'tab'),
                ('a.c', HEAD + 'int a; \n', 'space'),
                ('a.c', HEAD + 'int a;', 'newline'),
                ('a.c', HEAD + '// no\n', '//'),
                ('a.c', 'int a;\n', 'SPDX'),
                ('a.h', HEAD + 'size_t a(void);\n', 'compile alone'),
                ('a.py', '# SPDX-License-Identifier: GPL-2.0-or-later\n(\n',
                 'a.py:2'),
                ('a', '#!/bin/sh\n# SPDX-License-Identifier: '
                 'GPL-2.0-or-later\nif\n', 'Syntax error'),
                ('a.md', f'See {host}.\n', host)):
            with self.subTest(name=name, word=word):
                result = self.check(name, text)
                self.assertEqual(result.status, 1, result)
                self.assertIn(word, result.out)


class RunTestsTest(TreeTestCase):

    def run_tests(self, body):
        """scripts/run-tests on one Python test file with this body."""
        self.take('run-tests')
        self.put('build/build.ninja', '')
        self.put('tests/iotests/test_x.py', textwrap.dedent(body))
        return run('scripts/run-tests', 'python',
                   env={'BALE_BUILD': self.path('build'),
                        'BALE_TEST_SUMMARY': self.path('summary')})

    def check(self, body, status, last):
        result = self.run_tests(body)
        self.assertEqual(result.out.splitlines()[-1], last, result)
        self.assertEqual(result.status, status, result)
        with open('summary', encoding='utf-8') as file:
            self.assertEqual(file.read(), last + '\n')
        return result

    def test_counts_lines(self):
        self.check('''
            print('1..3')
            print('ok 1 - a')
            print('ok 2 - b # SKIP not here')
            print('ok 3 - c')
            ''', 0, '2 passed, 0 failed, 1 skipped')

    def test_a_failure_fails(self):
        result = self.check('''
            print('ok 1 - a')
            print('not ok 2 - b')
            print('1..2')
            ''', 1, '1 passed, 1 failed, 0 skipped')
        self.assertIn('failed: b', result.out)

    def test_a_crash_fails(self):
        self.check('''
            import os
            print('1..2\\nok 1 - a', flush=True)
            os.abort()
            ''', 1, '1 passed, 1 failed, 0 skipped')

    def test_missing_results_fail(self):
        self.check('''
            print('1..2')
            print('ok 1 - a')
            ''', 1, '1 passed, 1 failed, 0 skipped')

    def test_no_result_fails(self):
        self.check('pass\n', 1, '0 passed, 1 failed, 0 skipped')

    def test_a_bad_status_fails(self):
        self.check('''
            print('1..1')
            print('ok 1 - a')
            raise SystemExit(3)
            ''', 1, '1 passed, 1 failed, 0 skipped')

    def test_unknown_name_fails(self):
        self.run_tests('')
        result = run('scripts/run-tests', 'python', 'no_such_test',
                     env={'BALE_BUILD': self.path('build')})
        self.assertEqual(result.status, 1, result)


class PackagesTest(bale_iotests.TestCase):

    def install(self, *args, **kwargs):
        return run(os.path.join(TOP, 'scripts/install-packages'), *args,
                   **kwargs)

    def test_lists(self):
        names = self.install('--list', 'qemu', check=0).out.split()
        self.assertIn('qemu-utils', names)
        self.assertNotIn('fio', names)

    def test_unknown_purpose(self):
        self.assert_one_line_error(self.install('wrong'), 'wrong')

    def test_nothing_to_do_says_nothing(self):
        result = self.install('qemu')
        self.assertEqual((result.status, result.out, result.err), (0, '', ''))


class QmpDocsTest(bale_iotests.TestCase):
    """scripts/qmp-docs"""

    def test_the_page_is_up_to_date(self):
        run(os.path.join(TOP, 'scripts/qmp-docs'), '--check', check=0)

    def test_everything_is_on_the_page(self):
        with open(os.path.join(TOP, 'docs/qmp.md'), encoding='utf-8') as file:
            page = file.read()
        for name in os.listdir(os.path.join(TOP, 'qapi')):
            with open(os.path.join(TOP, 'qapi', name),
                      encoding='utf-8') as file:
                for kind, entity in re.findall(
                        r"^{ '(command|event|struct|union|enum)': '([^']*)'",
                        file.read(), re.M):
                    if entity != 'bale-blockdev-options':
                        self.assertIn(f'\n### {entity}\n', page, kind)


class RenderTest(TreeTestCase):
    """The parts of docs/performance.md that need no gnuplot."""

    MACHINE = {'cpu': 'abacus', 'cores': 7, 'memory_mib': 1, 'kernel': 'k',
               'qemu': 'q', 'load_before': 0.5}

    def results(self, bench, summary, **more):
        with open(f'{bench}.json', 'w', encoding='utf-8') as file:
            json.dump({'bench': bench, 'machine': self.MACHINE, 'rounds': 3,
                       'date': '2026-01-02', 'summary': summary, **more},
                      file)
        return f'{bench}.json'

    def test_writes_what_the_guests_felt(self):
        self.take('render-performance')
        os.mkdir('docs')
        shutil.copy(os.path.join(TOP, 'docs/performance.md'), 'docs')
        with open('docs/performance.md', encoding='utf-8') as file:
            before = file.read()
        value = {'median': 2.5, 'min': 1.25, 'max': 4e6}
        ends = {key: value for key in (
            'full_s', 'incremental_s', 'restore_s', 'full_bytes',
            'incremental_bytes', 'p50_ms', 'p99_ms', 'calm_p50_ms',
            'calm_p99_ms')}
        row = {key: value for key in ('p50_s', 'p99_s', 'worst_s', 'times',
                                      'backup_s', 'bytes')}
        run('scripts/render-performance',
            self.results('guest', {'bale': ends, 'qcow2': ends}),
            self.results('guest_latency', {'no backup': row, 'gently': row},
                         mib=11), check=0)
        with open('docs/performance.md', encoding='utf-8') as file:
            page = file.read()
        full = '2.50 (1.25–4000000.00)'
        for line in (f'| full backup, seconds | {full} | {full} |',
                     '| full backup, MB | 0.00 (0.00–4.00) | '
                     '0.00 (0.00–4.00) |',
                     '11 MiB, 3 rounds', '| gently | 2500.00 (1250.00–',
                     '| 2.5 (1.2–4000000.0) | 2500 | 2.5 | 0 |'):
            self.assertIn(line, page)
        self.assertEqual(page.count('on abacus, 7 cores'), 2)
        # What other benchmarks wrote, and the text, has stayed
        for text in (page, before):
            self.assertIn('## What limits it', text)
        self.assertEqual(*(text.partition('<!-- begin: guest')[0]
                           for text in (page, before)))


class HeadersTest(bale_iotests.TestCase):

    def test_the_cache_answers_at_once(self):
        tree = run(os.path.join(TOP, 'scripts/qemu-headers'), check=0).out
        self.assertTrue(os.path.exists(
            os.path.join(tree.strip(), 'build/config-host.h')))

    def test_says_when_there_is_no_network(self):
        with open('apt.conf', 'w', encoding='utf-8') as file:
            file.write('Acquire::http::Proxy "http://127.0.0.1:9";\n'
                       'Acquire::https::Proxy "http://127.0.0.1:9";\n'
                       'Acquire::Retries "0";\n')
        result = run(os.path.join(TOP, 'scripts/qemu-headers'), '--quiet',
                     env={'APT_CONFIG': self.path('apt.conf'),
                          'XDG_CACHE_HOME': self.path('cache')})
        self.assertEqual((result.status, result.out), (1, ''), result)
        self.assertIn('network', result.err.splitlines()[-1])
        left = set(os.listdir(self.path('cache/bale')))
        self.assertEqual(left, {'qemu-headers.lock'})


if __name__ == '__main__':
    bale_iotests.main()
