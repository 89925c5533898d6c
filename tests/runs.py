"""Small runs of the application, in this process, that end where they are told.

Programs that were compiled for one run serve the next one like it.
"""

import contextlib
import io
import json
import os
import pathlib
import shutil
import signal
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from gsgd_jax import (
  application,
  checkpoints,
  events,
  experiment,
  files,
  programs,
  report,
  resuming,
  settings,
)

_COMPILED = {}


def config_of(*methods, **changes):
  config = settings.default_config()
  config.update(
    dict(
      methods=methods,
      dataset='iris',
      model='softmax_regression',
      learning_rate=0.05,
      batch_size=16,
      seeds=2,
      workers=4,
      delay=3,
      window=3,
      updates=40,
      evaluate_every=10,
      checkpoint_minutes=None,
      checkpoint_every=7,
    )
  )
  for name, value in changes.items():
    if isinstance(value, dict):
      config[name].update(value)
    else:
      config[name] = value
  return config


def short(*methods, **changes):
  """Checkpoints at 7, 14, ... 35 and 40; all are kept."""
  changes = dict(checkpoints=9) | changes
  return config_of(*(methods or ('sequential',)), **changes)


def pair(**changes):
  """Two methods."""
  return short('sequential', 'delayed', **changes)


def prepare(monkeypatch):
  """As users run it, in all threads; no pictures; nothing is compiled twice."""
  # What `strict` has changed, and changes back.
  jax.config.update('jax_enable_x64', False)
  jax.config.update('jax_numpy_rank_promotion', 'allow')
  jax.config.update('jax_numpy_dtype_promotion', 'standard')
  draw = lambda path, config, histories: path.write_bytes(b'drawn')
  monkeypatch.setattr(report, 'draw', draw)
  monkeypatch.setattr(report, 'draw_staleness', draw)
  make = programs.make

  def made(config, method, task, datasets, mesh):
    same = {
      name: value
      for name, value in config.to_dict().items()
      if name not in (*resuming.ELSEWHERE, 'methods', 'patience', 'updates')
    }
    key = json.dumps([files.plain(same), method.name, mesh.size])
    if key not in _COMPILED:
      _COMPILED[key] = make(config, method, task, datasets, mesh)
    return _COMPILED[key]

  monkeypatch.setattr(programs, 'make', made)
  initial = experiment._initial_params

  def initial_params(model, seeds):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    key = f'{shapes} {seeds}'
    if key not in _COMPILED:
      _COMPILED[key] = initial(model, seeds)
    return _COMPILED[key]

  monkeypatch.setattr(experiment, '_initial_params', initial_params)


class Stop(NamedTuple):
  """Where a run is stopped: after an evaluation."""

  how: str  # 'leaves', as a signal asks it to, or 'breaks'.
  method: str
  step: int


class Done(NamedTuple):
  """What a run has come to."""

  code: int
  out: str
  err: str


def go(config, workdir, stop=None):
  """`train.py` in a folder that may hold a run."""
  out, err = io.StringIO(), io.StringIO()
  workdir.mkdir(exist_ok=True)
  with (
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
    _stopped(stop),
  ):
    if files.of_a_run(workdir) is not None:
      resuming.check(experiment.resolved(config), workdir)
    done = application.done_before(config, workdir)
    code = application.run(config, workdir, time.perf_counter(), done)
  assert 'Traceback' not in err.getvalue()
  return Done(code, out.getvalue(), err.getvalue())


def once(tmp_path_factory):
  """Runs that nothing has stopped, by the function that makes their config."""
  there = {}

  def run(make):
    if make not in there:
      there[make] = tmp_path_factory.mktemp('runs') / make.__name__
      assert go(make(), there[make]).code == application.DONE
    return there[make]

  return run


@contextlib.contextmanager
def _stopped(stop):
  stream = experiment.stream

  def stopped(config, profile_to, writer, done, say):
    for event in stream(config, profile_to, writer, done, say):
      yield event
      if not isinstance(event, events.Evaluation):
        continue
      if (event.method.name, event.step) == (stop.method, stop.step):
        if stop.how == 'breaks':
          raise OSError('the power is gone')
        os.kill(os.getpid(), signal.SIGINT)
        while not writer.leaving:
          time.sleep(0.001)

  experiment.stream = stream if stop is None else stopped
  try:
    yield
  finally:
    experiment.stream = stream


def text_of(workdir, *names):
  """Files by name, all but those of the clock."""
  names = names or ('config.json', 'metrics.jsonl', 'result.json')
  return {name: (workdir / name).read_text() for name in names}


def lines_of(workdir, name='metrics.jsonl'):
  lines = (workdir / name).read_text().splitlines()
  return [json.loads(line) for line in lines]


def steps_of(workdir, method):
  """Steps of the checkpoints of a method."""
  folder = workdir / checkpoints.FOLDER / method
  return sorted(int(p.name) for p in folder.iterdir())


def last_of(workdir, method=None) -> checkpoints.Found:
  """The last checkpoint, which must be whole."""
  said = []
  root = workdir / checkpoints.FOLDER
  found = next(checkpoints.usable(root, said.append, method))
  assert said == []
  return found


def arrays_of(found) -> dict[str, Any]:
  there = [
    n for n in ('params', 'best', 'state') if (found.folder / n).exists()
  ]
  return {name: checkpoints.arrays(found, name) for name in there}


def assert_equal(a, b):
  """Trees of arrays are the same, to the last bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def assert_same_run(workdir: pathlib.Path, other: pathlib.Path):
  """Two runs have come to the same: files, and each method's last arrays."""
  assert text_of(workdir) == text_of(other)
  timing = [
    [
      (line['method'], line['step'])
      for line in lines_of(folder, 'timing.jsonl')
    ]
    for folder in (workdir, other)
  ]
  assert timing[0] == timing[1]
  roots = [folder / checkpoints.FOLDER for folder in (workdir, other)]
  assert checkpoints.methods(roots[0]) == checkpoints.methods(roots[1])
  for method in checkpoints.methods(roots[0]):
    found = [last_of(folder, method) for folder in (workdir, other)]
    assert found[0].step == found[1].step
    assert found[0].position == found[1].position
    assert_equal(*map(arrays_of, found))


def copy_of(workdir, folder):
  """A run that may be spoilt."""
  return pathlib.Path(shutil.copytree(workdir, folder))


def broken(workdir, folder, step, method='sequential'):
  """A copy of a run of one method, as it was after a step's checkpoint."""
  folder = copy_of(workdir, folder)
  (folder / 'result.json').unlink()
  for path in (folder / checkpoints.FOLDER / method).iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  return folder
