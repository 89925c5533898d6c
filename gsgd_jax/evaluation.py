"""`train.py --mode=eval`: what a run's checkpoints are worth."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from gsgd_jax import (
  checkpoints,
  data,
  events,
  experiment,
  parallel,
  report,
  resuming,
  settings,
  tasks,
)

_MAY_DIFFER = ('data_dir', 'measured', 'stream')
# One device evaluates, whoever trained.
_ALONE = dict(devices=1, distributed=False, coordinator=None)
_ALONE |= dict(processes=None, process_id=None, profile=False)


def settings_of(
  workdir: pathlib.Path, given: dict[str, Any]
) -> ml_collections.ConfigDict:
  """The config of a run, with other settings for its evaluation.

  Args:
    workdir: The folder of the run.
    given: Settings by name: ``data_dir``, ``measured`` or ``stream``.

  Raises:
    ValueError: The folder holds no run, or another setting is given.
    OSError: A file cannot be read.
  """
  config = resuming.config_in(workdir)
  for name in given:
    if name not in _MAY_DIFFER:
      raise ValueError(
        f'{name} is a setting of the run in {workdir}, and stays as it is; an '
        f'evaluation can change {", ".join(_MAY_DIFFER)}'
      )
  with config.ignore_type():
    config.update(_ALONE | given)
  settings.check(config)
  return config


def evaluate(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  say: Callable[[str], Any] = lambda sentence: None,
) -> dict[str, Any]:
  """Measures the last checkpoint of every method, on all splits.

  Args:
    config: What `settings_of` has made.
    workdir: The folder of the run; nothing in it is changed.
    say: Called with sentences: which checkpoints cannot be used, and why.

  Returns:
    For each method's name its ``label``; the ``step`` of its last parameters,
    and each seed's of its best ones (``best_step``, None where there are none);
    losses and accuracies of both, ``last`` and ``best``, by name, for every
    seed.

  Raises:
    ValueError: A checkpoint is of another config.
    OSError: There is no checkpoint that can be used, or no data.
  """
  root = workdir / checkpoints.FOLDER
  datasets = experiment.load_all(config)
  task = tasks.make(config, datasets[0])
  mesh = parallel.make_mesh(1)
  arrays = data.stacked(datasets)
  own = data.axes(datasets)
  measure = jax.jit(jax.vmap(task.measure, in_axes=(0, own)))
  shapes = jax.eval_shape(task.model.init, jax.random.key(0))
  like = jax.tree.map(
    lambda x: np.empty((config.seeds, *x.shape), x.dtype), shapes
  )
  measured = {}
  for method in events.methods(config):
    found = next(checkpoints.usable(root, say, method.name), None)
    if found is None:
      continue
    earlier = checkpoints.config_of(found.position)
    with earlier.ignore_type():
      earlier.measured = config.measured
    resuming.refuse_another(f'{found.folder} is of a run', earlier, config)
    for sentence in resuming.notices(found, config, mesh):
      say(f'{method.label}: {sentence}')
    best_step = found.position['best_step']
    names = ['params'] + (['best'] if best_step is not None else [])
    params = checkpoints.restore(found, dict.fromkeys(names, like))
    of_params = {
      name: jax.device_get(measure(tree, arrays))
      for name, tree in params.items()
    }
    measured[method.name] = {
      'label': method.label,
      'step': found.step,
      'best_step': best_step,
      'last': of_params['params'],
      'best': of_params.get('best'),
    }
  if not measured:
    raise FileNotFoundError(f'{workdir} holds no checkpoint that can be used')
  return measured


def table(measured: dict[str, Any], losses: bool = False) -> str:
  """What `evaluate` has measured, one line a method."""
  head = ['method', 'update', 'test accuracy, %', 'of the best by validation']
  if losses:
    head.append('test loss, nats')
  rows = [head]
  for of_method in measured.values():
    row = [of_method['label'], f'{of_method["step"]:,}']
    for which in ('last', 'best'):
      accuracy = of_method[which] and 100 * of_method[which]['test_accuracy']
      row.append('-' if accuracy is None else str(report.interval(accuracy)))
    if losses:
      row.append(str(report.interval(of_method['last']['test_loss'])))
    rows.append(row)
  return report.aligned(rows)
