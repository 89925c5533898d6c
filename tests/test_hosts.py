"""Several processes, started as a user starts them."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from tests import quick

ROOT = pathlib.Path(__file__).parents[1]
SHORT = [
  '--config.dataset=iris',
  '--config.model=softmax_regression',
  '--config.learning_rate=0.05',
  '--config.batch_size=8',
  '--config.workers=8',
  '--config.seeds=2',
]


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def as_users_compile_it(**changes):
  """An environment; that of most of these tests is quick's."""
  return os.environ | changes


def alone(folder, devices, *flags, environment=quick.environment):
  """One process with so many devices."""
  number = f'--xla_force_host_platform_device_count={devices}'
  return subprocess.run(
    [sys.executable, ROOT / 'train.py', *SHORT, *flags, '--workdir=run'],
    cwd=folder,
    env=environment(XLA_FLAGS=number),
    capture_output=True,
    text=True,
    timeout=300,
  )


class Pair:
  """The guide's two processes, with a device each."""

  def __init__(
    self, folder, *flags, own=((), ()), environment=quick.environment
  ):
    commands = re.findall(
      r'^python train.py (--config.distributed.*?)(?: &)?$',
      (ROOT / 'docs' / 'devices.md').read_text(),
      re.MULTILINE,
    )
    assert len(commands) == 2
    port = str(free_port())
    self.folder = folder
    self.processes = [
      subprocess.Popen(
        [
          sys.executable,
          ROOT / 'train.py',
          *command.replace('9911', port).split(),
          *SHORT,
          '--workdir=run',
          *flags,
          *its_own,
        ],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for command, its_own in zip(commands, own, strict=True)
    ]

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()
      process.stdout.close()
      process.stderr.close()

  def begun(self):
    """Waits until something has been measured, and some steps more."""
    metrics = self.folder / 'run' / 'metrics.jsonl'
    end = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('\n') > 1):
      assert time.monotonic() < end
      time.sleep(0.1)

  def end_of(self, number, timeout):
    out, err = self.processes[number].communicate(timeout=timeout)
    return self.processes[number].returncode, out, err


def metrics(folder):
  lines = (folder / 'run' / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_two_processes_end_where_one_does(tmp_path):
  """Also where one has two devices; process 0 alone writes and speaks."""
  flags = [
    '--config.updates=50',
    '--config.evaluate_every=25',
    '--config.delay=3',
  ]
  compiled = dict(environment=as_users_compile_it)
  some = 'sequential,synchronous'  # Of others on devices see test_devices.
  every = f'{some},asynchronous+consistent,delayed'
  folders = [tmp_path / name for name in ('one', 'two', 'pair')]
  for folder in folders:
    folder.mkdir()
  runs = [
    alone(folders[i], i + 1, *flags, f'--config.methods={methods}', **compiled)
    for i, methods in enumerate((every, some))
  ]
  with Pair(
    folders[2], *flags, f'--config.methods={every}', **compiled
  ) as pair:
    ends = [pair.end_of(i, 300) for i in range(2)]
  for run in runs:
    assert run.returncode == 0, run.stderr
  for code, _, err in ends:
    assert code == 0, err
  one, two, both = map(metrics, folders)
  assert len(one) == len(both) == 12
  for other, expected in ((two, one[:6]), (both, one)):
    for ours, theirs in zip(other, expected, strict=True):
      assert ours.keys() == theirs.keys()
      for name in ours:
        if not isinstance(ours[name], list):
          assert ours[name] == theirs[name]
          continue
        values = np.array([ours[name], theirs[name]], float)
        np.testing.assert_allclose(*values, rtol=1e-6, atol=1e-6, err_msg=name)
  (_, said, progress), (_, nothing, quiet) = ends
  assert 'writing to run, training on 2 devices\n' in said
  assert 'test accuracy' in said
  meeting = 'train.py: meeting the other processes at 127.0.0.1:'
  assert meeting in progress and 'asynchronous, guided: completed' in progress
  assert re.fullmatch(re.escape(meeting) + r'\d+\n', quiet)
  assert all(line.startswith('[Gloo]') for line in nothing.splitlines())
  result = json.loads((folders[2] / 'run' / 'result.json').read_text())
  assert (result['devices'], result['processes']) == (2, 2)
  result = json.loads((folders[1] / 'run' / 'result.json').read_text())
  assert (result['devices'], result['processes']) == (2, 1)


GONE = 'another process of this run has gone, '


@pytest.mark.parametrize('killed', [0, 1])
def test_a_process_that_dies_ends_the_other(tmp_path, killed):
  with Pair(tmp_path, '--config.updates=1000000') as pair:
    pair.begun()
    pair.processes[killed].kill()
    code, _, err = pair.end_of(1 - killed, 60)
  assert code == 1
  assert err.count(GONE) == 1 and 'Traceback' not in err, err
  if killed == 1:
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result['status'] == 'failed'


def test_killed_processes_go_on(tmp_path):
  """Both write the checkpoint; the first one's word is where they go on."""
  flags = ['--config.methods=asynchronous+consistent', '--config.updates=600']
  flags += ['--config.evaluate_every=100', '--config.checkpoint_every=50']
  (tmp_path / 'one').mkdir()
  run = alone(tmp_path / 'one', 2, *flags)
  assert run.returncode == 0, run.stderr
  with Pair(tmp_path, *flags) as pair:
    pair.begun()
    while not list(tmp_path.glob('run/checkpoints/*/*/digests.json')):
      assert pair.processes[0].poll() is None
    for process in pair.processes:
      process.kill()
  with Pair(tmp_path, *flags) as pair:
    ends = [pair.end_of(i, 300) for i in range(2)]
  for code, _, err in ends:
    assert code == 0, err
  (_, said, _), (_, nothing, _) = ends
  assert said.count('going on from') == 1 and 'going on' not in nothing
  ours, theirs = metrics(tmp_path), metrics(tmp_path / 'one')
  assert [line['step'] for line in ours] == [line['step'] for line in theirs]
  for line, other in zip(ours, theirs, strict=True):
    for name in ('train_loss', 'gradient_evaluations', 'simulated_time'):
      np.testing.assert_allclose(line[name], other[name], rtol=1e-4)


def test_a_signal_ends_both(tmp_path):
  """The one that gets it as ever, the other as if it had died."""
  with Pair(tmp_path, '--config.updates=1000000') as pair:
    pair.begun()
    pair.processes[0].send_signal(signal.SIGTERM)
    code, _, err = pair.end_of(0, 60)
    other, _, its_err = pair.end_of(1, 60)
  assert code == 130 and 'train.py: interrupted (SIGTERM)' in err
  assert other == 1 and its_err.count(GONE) == 1
  result = json.loads((tmp_path / 'run' / 'result.json').read_text())
  assert result['status'] == 'interrupted'


def test_numbers_that_the_cluster_says(tmp_path):
  """Slurm's environment; no flag but `distributed`."""
  slurm = dict(
    SLURM_JOB_ID=str(free_port()),
    SLURM_STEP_NODELIST='localhost',
    SLURM_NTASKS='2',
  )
  command = [sys.executable, ROOT / 'train.py', *SHORT]
  command += ['--config.distributed=True', '--config.updates=5']
  command += ['--config.methods=sequential', '--workdir=run']
  processes = [
    subprocess.Popen(
      command,
      cwd=tmp_path,
      env=quick.environment(**slurm, SLURM_PROCID=i, SLURM_LOCALID=i),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in '01'
  ]
  for process in processes:
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
  result = json.loads((tmp_path / 'run' / 'result.json').read_text())
  assert result['processes'] == 2


def test_who_waits_for_the_others_can_be_interrupted(tmp_path):
  with Pair(tmp_path) as pair:
    pair.processes[1].kill()
    line = pair.processes[0].stderr.readline()
    assert 'meeting the other processes' in line
    time.sleep(2)
    pair.processes[0].send_signal(signal.SIGINT)
    code, _, err = pair.end_of(0, 20)
  assert code == 130
  assert err == 'train.py: interrupted (SIGINT)\n'


def test_different_settings(tmp_path):
  own = (['--config.updates=10'], ['--config.updates=20'])
  with Pair(tmp_path, own=own) as pair:
    ends = [pair.end_of(i, 120) for i in range(2)]
  assert all(code in (1, 2) for code, *_ in ends)
  assert any(
    'must have the same settings, process_id aside' in err for *_, err in ends
  )
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'flags, sentence',
  [
    (
      ['--config.processes=2'],
      'processes is of a run of several processes and needs '
      '--config.distributed=True',
    ),
    (
      ['--config.distributed=True', '--config.coordinator=here'],
      "coordinator must be HOST:PORT, got 'here'",
    ),
    (
      [
        '--config.distributed=True',
        '--config.processes=2',
        '--config.process_id=2',
      ],
      'process_id must be from 0 to 1, as there are processes=2, got 2',
    ),
    (
      ['--config.distributed=True'],
      'distributed needs --config.coordinator=HOST:PORT, --config.processes '
      'and --config.process_id, unless it runs on a cluster that says them: '
      'coordinator_address should be defined.',
    ),
  ],
)
def test_bad_input(tmp_path, flags, sentence):
  run = alone(tmp_path, 1, *flags)
  assert run.returncode == 2
  assert run.stderr == f'train.py: {sentence}\n'
  assert not list(tmp_path.iterdir())


PROGRAM = """
import json, sys
import jax
jax.config.update('jax_enable_x64', True)
port, number, own = map(int, sys.argv[1:])
if number > 1:
  jax.distributed.initialize(f'127.0.0.1:{port}', number, own)
import jax.numpy as jnp, numpy as np, optax
from gsgd_jax import guided, parallel

def loss_fn(params, batch):
  inputs, labels = batch
  return jnp.mean(jnp.logaddexp(0.0, -labels * (inputs @ params)))

rng = np.random.default_rng(0)
inputs = rng.normal(size=(60, 8, 3))
labels = rng.choice([-1.0, 1.0], size=(60, 8))
like = (inputs[0], labels[0])
make = lambda loss_fn, batch_like: guided(
  optax.sgd(0.1, momentum=0.5), loss_fn, window=5, batch_like=batch_like)
found = []

# Of every batch a process reads its share alone.
program = parallel.data_parallel(make, loss_fn, batch_like=like)
params, state = program.init(jnp.zeros(3))
step = jax.jit(program.step, donate_argnums=(0, 1))
size = 8 // number
for t in range(60):
  mine = tuple(x[t, own * size : (own + 1) * size] for x in (inputs, labels))
  batch = jax.tree.map(
    jax.make_array_from_process_local_data, program.batch_sharding(like), mine)
  params, state, _ = jax.block_until_ready(step(params, state, batch))
found.append(np.asarray(params).tolist())

program = parallel.asynchronous(make, loss_fn, workers=6, batch_like=like)
params, state = program.init(np.zeros(3))
step = jax.jit(program.step, donate_argnums=(0, 1))
params, state, losses = step(params, state, (inputs, labels))
found.append(np.asarray(params).tolist())
print('FOUND', json.dumps(found))
"""


def test_parameters_of_two_processes(tmp_path):
  program = tmp_path / 'program.py'
  program.write_text(textwrap.dedent(PROGRAM))
  port = str(free_port())
  environment = quick.environment(PYTHONPATH=str(ROOT), XLA_FLAGS='')

  def start(number, own):
    return subprocess.Popen(
      [sys.executable, program, port, str(number), str(own)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  found = []
  for processes in ([start(1, 0)], [start(2, 0), start(2, 1)]):
    for process in processes:
      out, err = process.communicate(timeout=200)
      assert process.returncode == 0, err
      found.append(json.loads(re.search('^FOUND (.*)$', out, re.M)[1]))
  np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
  assert found[1] == found[2]
