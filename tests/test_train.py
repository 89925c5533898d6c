"""The command line as a user runs it: a subprocess, an empty directory."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SHORT = ('--config.updates=20', '--config.evaluate_every=10')
SMALL = (*SHORT, '--config.seeds=2', '--config.workers=3')


def train(directory, *arguments):
  return subprocess.run(
    [sys.executable, str(ROOT / 'train.py'), *arguments],
    cwd=directory,
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_the_main_job(tmp_path):
  done = train(tmp_path, *SMALL)
  assert done.returncode == 0, done.stderr
  for label in ('sequential SGD', 'ASGD', 'guided ASGD', 'random replays'):
    assert label in done.stdout
  assert 'delay of 3 workers changes test accuracy' in done.stdout
  assert 'Traceback' not in done.stderr
  (workdir,) = (tmp_path / 'runs').iterdir()
  assert re.fullmatch(r'\d{8}-\d{6}-default', workdir.name)
  assert {p.name for p in workdir.iterdir()} == {'result.json', 'curves.png'}
  result = json.loads((workdir / 'result.json').read_text())
  assert result['config']['updates'] == 20
  assert set(result['methods']) == {
    'sequential',
    'asynchronous',
    'guided',
    'random',
  }
  # 20 applied, 2 more in flight; replays come on top.
  assert result['methods']['sequential']['gradient_evaluations'] == 20
  assert result['methods']['asynchronous']['gradient_evaluations'] == 22
  assert result['methods']['guided']['gradient_evaluations'] > 22
  # The printed table is the file's content.
  for method in result['methods'].values():
    assert f'{method["test_accuracy_percent"]["mean"]:.2f}' in done.stdout


def test_config_and_workdir_and_that_a_run_is_never_overwritten(tmp_path):
  config = f'--config={ROOT}/configs/breast_cancer.py'
  arguments = (
    config,
    '--workdir=here/x',
    '--config.methods=("asynchronous",)',
    *SMALL,
  )
  done = train(tmp_path, *arguments)
  assert done.returncode == 0, done.stderr
  result = tmp_path / 'here' / 'x' / 'result.json'
  before = result.read_text()
  assert json.loads(before)['config']['dataset'] == 'breast_cancer'
  again = train(tmp_path, *arguments)
  assert again.returncode == 2
  assert again.stderr == (
    'train.py: here/x already holds a run (result.json); give another '
    '--workdir\n'
  )
  assert result.read_text() == before


@pytest.mark.parametrize(
  'argument, sentence',
  [
    ('--config.workers=0', 'workers must be at least 1, got 0'),
    ('--config.workers=many', 'invalid literal'),
    ('--config.learning_rte=1', 'no setting .*Did you mean "learning_rate"'),
    ('--config.dataset=mnist', 'must be one of breast_cancer, digits'),
    ('--config=nowhere.py', "No such file or directory: 'nowhere.py'"),
    ('--nosuch=1', 'Unknown command line flag'),
    ('more', 'unexpected argument'),
    ('--workdir=/dev/null/x', '/dev/null'),
    ('--workdir=', 'workdir must name a folder'),
    ("--config.hidden=('a',)", 'hidden must hold positive integers'),
  ],
)
def test_bad_input_is_one_sentence(tmp_path, argument, sentence):
  done = train(tmp_path, argument)
  assert done.returncode == 2
  assert re.search(sentence, done.stderr), done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert done.stdout == ''
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  'source, sentence',
  [
    ('def get_config(:', 'cannot load the config: SyntaxError'),
    ('def get_config(): return 1 / 0', 'ZeroDivisionError: division by zero'),
    ('x = 1', 'cannot load the config: .*get_config'),
    (
      'import ml_collections\n'
      'def get_config(): return ml_collections.ConfigDict()',
      'the config lacks the setting dataset',
    ),
  ],
)
def test_bad_config_files_are_one_sentence(tmp_path, source, sentence):
  (tmp_path / 'mine.py').write_text(source)
  done = train(tmp_path, '--config=mine.py')
  assert done.returncode == 2
  assert re.search(sentence, done.stderr), done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert {p.name for p in tmp_path.iterdir()} <= {'mine.py', '__pycache__'}


@pytest.mark.parametrize('exists', [False, True])
def test_interrupted_it_leaves_what_it_found(tmp_path, exists):
  workdir = tmp_path / 'mine'
  if exists:
    workdir.mkdir()
  run = subprocess.Popen(
    [
      sys.executable,
      str(ROOT / 'train.py'),
      '--workdir=mine',
      '--config.updates=10000000',
    ],
    cwd=tmp_path,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert run.stdout.readline() == 'writing to mine\n'
  time.sleep(8)  # Into the training.
  run.send_signal(signal.SIGINT)
  _, stderr = run.communicate(timeout=60)
  assert run.returncode == 130
  assert stderr == 'train.py: interrupted\n'
  assert workdir.exists() == exists
