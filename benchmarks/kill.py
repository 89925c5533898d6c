"""Runs that are killed at random moments, and started again until they end.

  python -m benchmarks.kill --kills=50

Every case is run once undisturbed, then again and again with SIGKILL: half of
the time at a random moment, half of the time while a checkpoint is written.
What the killed runs leave must be what the undisturbed one left, to the last
bit: parameters, each seed's best ones, the whole state of training, and
`metrics.jsonl`.
"""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
from absl import app, flags, logging

from gsgd_jax import checkpoints

_KILLS = flags.DEFINE_integer('kills', 50, 'How many, over all cases.')
_ONLY = flags.DEFINE_list('only', [], 'These cases alone.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the moments.')

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_TRAIN = _ROOT / 'train.py'
_PREPARE = _ROOT / 'examples' / 'prepare_digits.py'
_TIMEOUT_SECONDS = 300

# Continuously saved, and long enough to be killed in.
_SHORT = (
  '--config.checkpoint_minutes=0',
  '--config.hidden=16',
  '--config.seeds=3',
  '--config.updates=12000',
  '--config.evaluate_every=1500',
)
_DANA = '--config.compensation_kwargs.learning_rate=0.018'
_DEVICES = ('--config.updates=1500', '--config.evaluate_every=250')


DATA = 'DATA'  # In flags: the folder of prepared images.


class Case(NamedTuple):
  """What is run.

  Attributes:
    flags: Of train.py.
    devices: How many CPU devices there are.
  """

  flags: tuple[str, ...]
  devices: int = 1


def of_methods(methods, *more, devices=1):
  """A case that trains by these methods."""
  short = _DEVICES if devices > 1 else ()
  return Case((f'--config.methods={methods}', *short, *more), devices)


CASES = {
  'sequential': of_methods('sequential,sequential+consistent'),
  'asynchronous': of_methods(
    'asynchronous,asynchronous+consistent', '--config.arrivals=gamma'
  ),
  'asynchronous-adam': of_methods(
    'asynchronous+random',
    '--config.optimizer=adam',
    '--config.learning_rate=0.003',
    '--config.max_ahead=2',
  ),
  'synchronous': of_methods('synchronous,synchronous+consistent'),
  'synchronous-mean': of_methods(
    'synchronous+consistent', '--config.combine=mean', '--config.wait_for=12'
  ),
  'delayed': of_methods('delayed,delayed+consistent'),
  'data-parallel': of_methods('data_parallel,data_parallel+consistent'),
  'dana': of_methods('asynchronous+dana,asynchronous+dana+consistent', _DANA),
  'early-stopping': of_methods(
    'sequential,asynchronous', '--config.patience=3'
  ),
  'streamed': of_methods(
    'asynchronous+consistent',
    '--config.dataset=tfds:digits',
    f'--config.data_dir={DATA}',
    '--config.stream=True',
    '--config.augmentation=crop_and_flip',
    '--config.updates=4000',
    '--config.evaluate_every=500',
  ),
  '8-devices-asynchronous': of_methods(
    'asynchronous+consistent', '--config.arrivals=gamma', devices=8
  ),
  '8-devices-delayed': of_methods('delayed+consistent', devices=8),
  '8-devices-synchronous': of_methods('synchronous+dana', _DANA, devices=8),
  '8-devices-data-parallel': of_methods('data_parallel+consistent', devices=8),
}


class Killed(NamedTuple):
  """What came of killing a case.

  Attributes:
    kills: How many there were.
    in_saving: How many of them while a checkpoint was written.
    resumed: How many starts went on from a checkpoint.
    differences: What is not as in the undisturbed run; empty if all is.
  """

  kills: int
  in_saving: int
  resumed: int
  differences: list[str]


class Moment(NamedTuple):
  """When to kill a process.

  Attributes:
    saving: Whether that is while a checkpoint is written.
    comes: Asked all the while; true from that moment on.
    late: Seconds after it.
  """

  saving: bool
  comes: Callable[[], bool]
  late: float


def at_random(
  seconds: float, moments: random.Random
) -> Callable[[pathlib.Path], Moment]:
  """Moments within so many seconds, but for the first fifth, when little more
  than imports happens; half of them wait for a checkpoint."""

  def of_start(folder):
    saving = moments.random() < 0.5
    delay, before = moments.uniform(0.2, 1) * seconds, _writing(folder)
    began = time.perf_counter()

    def comes():
      due = time.perf_counter() - began > delay
      return due and (not saving or bool(_writing(folder) - before))

    late = moments.uniform(0, 0.05) if saving else 0.0
    return Moment(saving, comes, late)

  return of_start


def in_saving(folder: pathlib.Path) -> Moment:
  """When a checkpoint is written and another one is there."""

  def comes():
    finished = list(folder.glob('checkpoints/*/*/digests.json'))
    return bool(finished and _writing(folder))

  return Moment(True, comes, 0.0)


class Places(NamedTuple):
  """Folders: of compiled programs, of prepared images."""

  cache: pathlib.Path
  data: pathlib.Path


def undisturbed(case: Case, folder: pathlib.Path, places: Places) -> float:
  """Runs a case as it is; returns seconds."""
  began = time.perf_counter()
  process = _start(case, folder, places)
  _end(process)
  return time.perf_counter() - began


def killed(
  case: Case,
  folder: pathlib.Path,
  places: Places,
  reference: pathlib.Path,
  kills: int,
  moment: Callable[[pathlib.Path], Moment],
) -> Killed:
  """Runs a case, kills it so many times, and compares what it leaves.

  Args:
    case: The case.
    folder: Where it runs.
    places: Other folders.
    reference: Where it ran undisturbed.
    kills: How many, unless it ends before.
    moment: Says when, from the folder; called for each start.
  """
  done = in_saving = resumed = 0
  while True:
    process = _start(case, folder, places)
    if done < kills:
      now = moment(folder)
      if _kill(process, now.comes, now.late):
        done += 1
        in_saving += now.saving
    said = _end(process)
    resumed += said.count('going on from')
    if process.returncode == 0:
      break
  return Killed(done, in_saving, resumed, differences(reference, folder))


def _start(case, folder, places):
  devices = f'--xla_force_host_platform_device_count={case.devices}'
  return subprocess.Popen(
    [
      sys.executable,
      _TRAIN,
      f'--workdir={folder}',
      f'--config.compilation_cache={places.cache}',
      *_SHORT,
      *(flag.replace(DATA, str(places.data)) for flag in case.flags),
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': devices},
  )


def _kill(process, comes, late):
  """Kills it when the moment comes; returns whether it still ran."""
  while process.poll() is None:
    if comes():
      time.sleep(late)
      process.send_signal(signal.SIGKILL)
      return process.wait() == -signal.SIGKILL
    time.sleep(0.001)
  return False


def _writing(folder):
  """What is being written: folders that are not what they will be yet."""
  return set(folder.glob('checkpoints/*/*tmp*'))


def _end(process):
  """Waits for the end of a process; returns what it said."""
  said, _ = process.communicate(timeout=_TIMEOUT_SECONDS)
  if process.returncode not in (0, -signal.SIGKILL) or 'Traceback' in said:
    raise RuntimeError(f'it ended with {process.returncode}:\n{said}')
  return said


def differences(reference: pathlib.Path, folder: pathlib.Path) -> list[str]:
  """What two runs left that is not the same, by name."""
  found = []
  for name in ('config.json', 'metrics.jsonl', 'result.json'):
    if (reference / name).read_bytes() != (folder / name).read_bytes():
      found.append(name)
  timed = [(f / 'timing.jsonl').read_text() for f in (reference, folder)]
  if len({re.sub(r'"seconds".*', '', text) for text in timed}) != 1:
    found.append('timing.jsonl')
  roots = [f / checkpoints.FOLDER for f in (reference, folder)]
  names = [checkpoints.methods(root) for root in roots]
  if names[0] != names[1]:
    return [*found, 'methods']
  for method in names[0]:
    last = [next(checkpoints.usable(root, _fail, method)) for root in roots]
    if last[0].step != last[1].step:
      found.append(f'the last step of {method}')
      continue
    for item in ('params', 'best', 'state'):
      if not _same(*(_arrays(checkpoint, item) for checkpoint in last)):
        found.append(f'{item} of {method}')
  return found


def _fail(sentence):
  raise RuntimeError(sentence)


def _arrays(checkpoint, item):
  """Every array of a part of a checkpoint, by name."""
  leaves = jax.tree_util.tree_leaves_with_path(
    checkpoints.arrays(checkpoint, item)
  )
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _same(one, other):
  return one.keys() == other.keys() and all(
    x.dtype == other[name].dtype and x.tobytes() == other[name].tobytes()
    for name, x in one.items()
  )


def main(argv):
  """Kills every case, and prints what came of it."""
  del argv
  logging.set_verbosity(logging.ERROR)
  moments = random.Random(_SEED.value)
  cases = {
    k: v for k, v in CASES.items() if not _ONLY.value or k in _ONLY.value
  }
  total = identical = 0
  print('| case | kills | in saving | went on from a checkpoint | identical |')
  print('|---|---|---|---|---|')
  with tempfile.TemporaryDirectory() as scratch:
    scratch = pathlib.Path(scratch)
    places = Places(scratch / 'cache', scratch / 'data')
    subprocess.run([sys.executable, _PREPARE, f'--data_dir={places.data}'])
    left = len(cases)
    for number, (name, case) in enumerate(cases.items()):
      kills = -(-(_KILLS.value - total) // left)
      left -= 1
      reference = scratch / f'{number}'
      undisturbed(case, scratch / f'{number}-warm', places)
      seconds = undisturbed(case, reference, places)
      rounds = []
      while (done := sum(r.kills for r in rounds)) < kills:
        folder = scratch / f'{number}-killed-{len(rounds)}'
        more = kills - done
        moment = at_random(seconds, moments)
        rounds.append(killed(case, folder, places, reference, more, moment))
      total += done
      identical += sum(r.kills for r in rounds if not r.differences)
      verdict = ', '.join(d for r in rounds for d in r.differences) or 'yes'
      counts = (sum(getattr(r, c) for r in rounds) for c in Killed._fields[:3])
      print(
        f'| {name} | {" | ".join(map(str, counts))} | {verdict} |', flush=True
      )
  print(f'\n{identical} of {total} kills ended identical')


if __name__ == '__main__':
  app.run(main)
