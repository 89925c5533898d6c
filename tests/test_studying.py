"""Studies from the command line: their files, and how they are stopped."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from gsgd_jax import studying
from tests import quick, test_train

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from gsgd_jax import study

def get_config():
  config = study.default_config()
  config.dataset, config.model = 'iris', 'softmax_regression'
  config.workers, config.updates, config.evaluate_every = 4, 24, 12
  config.seeds = config.tuning_seeds = config.jobs = 2
  config.lanes = 4
  config.axes.noise = {'clean': {}, 'noisy': {'label_noise': 0.2}}
  config.axes.method = {
    'sequential': {'method': 'sequential'},
    'ASGD': {'method': 'asynchronous'},
  }
  return config
"""
CELLS = 4  # Of two groups.
forked = test_train.forked


def start(folder, *arguments):
  config = folder / 'tiny.py'
  config.write_text(CONFIG)
  return subprocess.Popen(
    [
      sys.executable,
      str(ROOT / 'train.py'),
      f'--config={config}',
      f'--workdir={folder / "study"}',
      *arguments,
    ],
    cwd=folder,
    text=True,
    env=quick.environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def train(folder, *arguments, process=None):
  process = process or start(folder, *arguments)
  out, err = process.communicate(timeout=300)
  assert 'Traceback' not in err, err
  return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def cells_of(folder):
  """By key, all lines; a study that was not disturbed has one a key."""
  path = folder / 'study' / 'cells.jsonl'
  lines = path.read_bytes().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


def by_key(lines):
  return {line['cell']: line for line in lines}


def contents(folder):
  """What is in a folder, but for what depends on the clock."""
  return {
    p.name: p.read_bytes()
    for p in (folder / 'study').iterdir()
    if p.name != 'timing.jsonl'
  }


def workers_of(process):
  """The processes that compute for one."""
  path = pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children')
  pids = [int(n) for n in path.read_text().split()]
  return [n for n in pids if b'crew.work()' in command_of(n)]


def command_of(pid):
  with contextlib.suppress(OSError):
    return pathlib.Path(f'/proc/{pid}/cmdline').read_bytes()
  return b''


def wait_for(true, seconds=60):
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end
    time.sleep(0.02)


def are_gone(pids):
  return not any(b'crew.work()' in command_of(pid) for pid in pids)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """A finished study, and what it has said."""
  folder = tmp_path_factory.mktemp('undisturbed')
  done = train(folder)
  assert done.returncode == 0, done.stderr
  return folder, done


@pytest.fixture
def copied(undisturbed, tmp_path):
  """A copy of it, that may be spoilt."""
  shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
  return tmp_path


def test_a_study(undisturbed):
  folder, done = undisturbed
  lines = cells_of(folder)
  assert len(by_key(lines)) == len(lines) == CELLS
  assert {tuple(line['values'].items()) for line in lines} == {
    (('noise', n), ('method', m))
    for n in ('clean', 'noisy')
    for m in ('sequential', 'ASGD')
  }
  assert f'{CELLS} of {CELLS} cells to compute' in done.stderr
  assert 'clean' in done.stdout and 'ASGD' in done.stdout
  there = contents(folder)
  assert there.keys() >= {'config.json', 'report.md', 'report.html'}
  config = json.loads(there['config.json'])
  assert config['updates'] == 24
  assert list(config['axes']['method']) == ['sequential', 'ASGD']
  assert not any(name.startswith('.') for name in there)
  timing = (folder / 'study' / 'timing.jsonl').read_text().splitlines()
  assert len(timing) == CELLS


def test_once_more_computes_nothing(copied):
  before = contents(copied)
  done = train(copied)
  assert done.returncode == 0
  assert 'to compute' not in done.stderr
  assert contents(copied) == before


@pytest.mark.parametrize(
  'before, after',
  [
    (b'', b''),
    (b'{"cell": 1}\n', b'{"cell": 1}\n'),
    (b'{"cell": 1}\n{"ce', b'{"cell": 1}\n'),
    (b'{"ce', b''),
  ],
)
def test_mend(before, after, tmp_path):
  for name in ('cells.jsonl', 'timing.jsonl'):
    (tmp_path / name).write_bytes(before)
  studying.mend(tmp_path)
  for name in ('cells.jsonl', 'timing.jsonl'):
    assert (tmp_path / name).read_bytes() == after
  assert len(list(tmp_path.iterdir())) == 2


def test_nothing_to_mend(tmp_path):
  studying.mend(tmp_path)
  assert not list(tmp_path.iterdir())


def test_finished_passes_over_what_is_no_line(tmp_path):
  lines = [{'cell': 'a', 'n': 1}, {'cell': 'b'}, {'cell': 'a', 'n': 2}, {}, 3]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (tmp_path / 'cells.jsonl').write_text(text + 'torn}\n{"cell": "c"}')
  found = studying.finished(tmp_path)
  assert found == {'a': {'cell': 'a', 'n': 2}, 'b': {'cell': 'b'}}


def test_without_resuming_all_is_computed_again(copied, undisturbed):
  only = '--config.only=noise=clean,method=sequential'
  done = train(copied, '--config.resume=False', only)
  assert done.returncode == 0
  assert '1 of 1 cells to compute' in done.stderr
  lines = cells_of(copied)
  assert len(lines) == CELLS + 1
  assert by_key(lines) == by_key(cells_of(undisturbed[0]))


def finished_cells(folder):
  path = folder / 'study' / 'cells.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


def test_killed_and_started_again(tmp_path, undisturbed):
  process = start(tmp_path)
  wait_for(lambda: finished_cells(tmp_path))
  workers = workers_of(process)
  process.kill()
  process.wait()
  assert len(workers) == 2
  wait_for(lambda: are_gone(workers), seconds=20)
  process.communicate()
  path = tmp_path / 'study' / 'cells.jsonl'
  there = path.read_bytes()
  path.write_bytes(there[: there.rindex(b'\n') - 20])  # Its last line is torn.
  missing = CELLS - finished_cells(tmp_path)
  done = train(tmp_path)
  assert done.returncode == 0
  assert f'{missing} of {CELLS} cells to compute' in done.stderr
  lines = cells_of(tmp_path)
  assert len(lines) == CELLS
  assert by_key(lines) == by_key(cells_of(undisturbed[0]))
  for name in ('report.md', 'report.html', 'config.json'):
    assert contents(tmp_path)[name] == contents(undisturbed[0])[name]


def test_workers_end_with_who_started_them(tmp_path):
  """At once, not when the cell that they are at is finished."""
  process = start(tmp_path, '--config.updates=100_000_000')
  wait_for(lambda: workers_of(process))
  workers = workers_of(process)
  time.sleep(3)  # They are within a cell, or compile it.
  process.kill()
  process.wait()
  wait_for(lambda: are_gone(workers), seconds=20)
  process.communicate()


def test_interrupted_then_a_worker_is_killed(tmp_path):
  longer = '--config.updates=4800'  # No cell follows the first at once.
  process = start(tmp_path, longer)
  wait_for(lambda: finished_cells(tmp_path))
  workers = workers_of(process)
  process.send_signal(signal.SIGINT)
  done = train(tmp_path, process=process)
  assert done.returncode == 130
  assert f'interrupted; --workdir={tmp_path / "study"} goes on' in done.stderr
  assert are_gone(workers)
  lines = cells_of(tmp_path)
  assert 0 < len(lines) < CELLS
  report = (tmp_path / 'study' / 'report.md').read_text()
  assert f'{len(lines)} of {CELLS} cells' in report

  process = start(tmp_path, longer)
  wait_for(lambda: workers_of(process))
  workers = workers_of(process)
  os.kill(workers[-1], signal.SIGKILL)
  done = train(tmp_path, process=process)
  assert done.returncode == 1
  assert 'cannot go on: a process that computes has ended' in done.stderr
  assert are_gone(workers)
  assert cells_of(tmp_path)[: len(lines)] == lines
  assert (tmp_path / 'study' / 'report.md').exists()


BAD = {
  '--config.workerss=3': 'unknown setting workerss; did you mean workers',
  '--config.only=noise=loud': 'only: the axis noise has no value',
  '--config.updates=0': 'updates must be at least 1, got 0',
  '--config.lanes=0': 'lanes must be at least 1, got 0',
  '--config.budgets=energy,': 'a budget must be one of',
  '--config.jobs=-1': 'jobs must be at least 0, got -1',
  '--config.time=-1': 'time must be positive, got -1',
  '--config.sync_costs=-1.0,': 'sync_costs must be at least 0',
  '--config.validation_share=0': 'learning rates are tuned on validation data',
  '--config.dataset=nowhere.csv': 'nowhere.csv',
  '--config.batch_size=100': 'batch_size must be at most the 90 training',
  '--config.optimizer=sgdd': 'sgdd',
  '--config.dropout=0.5': 'studies have no dropout',
}


@pytest.mark.parametrize('argument', BAD)
def test_bad_settings(argument, tmp_path, forked):
  (tmp_path / 'tiny.py').write_text(CONFIG)
  done = forked(
    tmp_path,
    f'--config={tmp_path / "tiny.py"}',
    f'--workdir={tmp_path / "study"}',
    argument,
  )
  assert done.returncode == 2
  assert BAD[argument] in done.stderr
  assert done.stderr.count('\n') == 1 and done.stdout == ''
  assert not (tmp_path / 'study').exists()
