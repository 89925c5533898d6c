"""The benchmarks run; what they measure is not tested."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def table(*command):
  """The rows of the tables that a benchmark prints, as lists of cells."""
  done = subprocess.run(
    [sys.executable, '-m', *command],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  lines = re.findall(r'^\| (.*) \|$', done.stdout, re.MULTILINE)
  return [[cell.strip() for cell in line.split(' | ')] for line in lines]


def test_what_compensations_cost():
  rows = table(
    'benchmarks.compensation',
    '--sizes=200,9,4',
    '--workers=2,5',
    '--rounds=1',
    '--steps=2',
    '--only=dana,smega2',
  )
  copies = {row[0]: row[-1] for row in rows[2:]}
  # Beyond a gradient for each of 5 workers; the rest is counters.
  assert set(copies) == {'dana', 'smega2'}
  for name, expected in dict(dana=6, smega2=2).items():
    assert expected <= float(copies[name]) <= expected + 0.2, name


def test_what_rounds_send_and_hold():
  rows = table(
    'benchmarks.parallel',
    '--cpu_devices=4',
    '--sizes=8-16-4',
    '--workers=8',
    '--calls=16',
    '--rounds=1',
    '--at_once=1',
  )
  held = [row for row in rows if len(row) == 6][2:]
  assert [row[0] for row in held] == ['8-16-4', '8-16-4, DC-ASGD']
  assert [row[3] for row in held] == ['1.0000', '1.0000']


def test_what_a_delayed_sum_waits_for():
  _, _, ordinary, delayed = table('benchmarks.overlap')
  assert ordinary[3] == '11..11' and delayed[3] == '0..0'


def test_what_convolutions_cost():
  rows = table(
    'benchmarks.convolution', '--rounds=1', '--windows=1', '--slow=False'
  )
  by_name = {row[0]: row for row in rows}
  assert {'free scoring', 'exact'} <= set(by_name)
  assert any('patches' in name for name in by_name)
