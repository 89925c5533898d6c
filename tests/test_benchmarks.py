"""The benchmarks run; what they measure is not tested."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_what_compensations_cost():
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'benchmarks.compensation',
      '--sizes=200,9,4',
      '--workers=2,5',
      '--rounds=1',
      '--steps=2',
      '--only=dana,smega2',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  rows = re.findall(
    r'^\| (\w.*?) *\|.*\| (\S+) *\|$', done.stdout, re.MULTILINE
  )
  copies = dict(rows[1:])
  # Beyond a gradient for each of 5 workers; the rest is counters.
  assert set(copies) == {'dana', 'smega2'}
  for name, expected in dict(dana=6, smega2=2).items():
    assert expected <= float(copies[name]) <= expected + 0.2, name
