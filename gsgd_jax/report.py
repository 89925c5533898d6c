"""What a run prints and leaves behind: a table, sentences, files, a picture."""

import json
import os
import pathlib
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import scipy.stats

from gsgd_jax import __version__, experiment

_PACKAGES = ('jax', 'jaxlib', 'optax', 'flax', 'numpy')
_LEVEL = 0.95
_FLOOR = 1e-4  # Of losses on a logarithmic axis, where zero has no place.
# Okabe and Ito's colours, told apart by everyone.
_COLOURS = ('#000000', '#d55e00', '#0072b2', '#009e73', '#cc79a7', '#e69f00')
_DASHES = ('-', '-', '-', '--', '-.', ':')


class Interval(NamedTuple):
  """A mean over seeds and the half-width of its 95 % confidence interval."""

  mean: float
  half_width: float | None  # None with one seed.

  def __str__(self) -> str:
    if self.half_width is None:
      return f'{self.mean:.2f}'
    return f'{self.mean:.2f} ± {self.half_width:.2f}'


def interval(values: np.ndarray) -> Interval:
  """Student's t interval of the mean of independent values.

  Args:
    values: One number a seed.

  Returns:
    An ``Interval``.

  Examples:
    >>> import numpy as np
    >>> from gsgd_jax import report
    >>> print(report.interval(np.array([1.0, 2.0, 3.0])))
    2.00 ± 2.48
  """
  values = np.asarray(values, np.float64)
  n = len(values)
  if n < 2:
    return Interval(float(values.mean()), None)
  quantile = scipy.stats.t.ppf((1 + _LEVEL) / 2, n - 1)
  half_width = quantile * values.std(ddof=1) / n**0.5
  return Interval(float(values.mean()), float(half_width))


def table(histories: dict[str, experiment.History]) -> str:
  """The comparison after the last update, one line a method."""
  head = (
    'method',
    'test accuracy, %',
    'less ASGD, paired',
    'updates',
    'gradient evaluations',
    'diverged',
  )
  rows = [head]
  for name, history in histories.items():
    against = ''
    if 'asynchronous' in histories and name != 'asynchronous':
      against = _signed(_difference(histories, name, 'asynchronous'))
    diverged = int(np.sum(~np.isfinite(history.train_loss[-1])))
    rows.append(
      (
        experiment.METHODS[name].label,
        str(interval(_final_accuracy(history))),
        against,
        f'{history.updates[-1]:,}',
        f'{history.gradient_evaluations[-1].mean():,.0f}',
        f'{diverged} of {history.train_loss.shape[1]}',
      )
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    row[0].ljust(widths[0])
    + ''.join(
      '  ' + c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)
    )
    for row in rows
  ]
  rule = '-' * len(lines[0])
  return '\n'.join([lines[0], rule, *lines[1:]])


def _final_accuracy(history):
  return 100 * history.test_accuracy[-1]


def _difference(histories, name, other):
  """Points of test accuracy between two methods, paired by seed."""
  return interval(
    _final_accuracy(histories[name]) - _final_accuracy(histories[other])
  )


def _signed(difference):
  return ('+' if difference.mean >= 0 else '') + str(difference)


def sentences(
  config: ml_collections.ConfigDict, histories: dict[str, experiment.History]
) -> list[str]:
  """What was measured, in words, whatever it is."""
  said = []

  def compare(name, other, text):
    if name in histories and other in histories:
      difference = _difference(histories, name, other)
      said.append(text.format(_signed(difference)) + _verdict(difference) + '.')

  compare(
    'asynchronous',
    'sequential',
    f'The delay of {config.workers} workers changes test accuracy by {{}} '
    'points',
  )
  compare('guided', 'asynchronous', 'Guided SGD changes that by {} points')
  compare(
    'random',
    'asynchronous',
    'Random replays, the control with as many gradients, by {} points',
  )
  compare('guided', 'random', 'Guided less random replays: {} points')
  return said


def _verdict(difference):
  if difference.half_width is None:
    return ' (one seed: no interval)'
  if abs(difference.mean) <= difference.half_width:
    return ' (no difference shown)'
  return ''


def new_workdir(parent: pathlib.Path, name: str, now: str) -> pathlib.Path:
  """Makes a fresh folder that sorts by time; never one that exists."""
  for attempt in range(1000):
    suffix = f'-{attempt + 1}' if attempt else ''
    workdir = parent / f'{now}{suffix}-{name}'
    try:
      workdir.mkdir(parents=True)
    except FileExistsError:
      continue
    return workdir
  raise FileExistsError(f'no fresh folder for {now} in {parent}')


def write(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  histories: dict[str, experiment.History],
) -> None:
  """Writes `result.json` and `curves.png`, each aside and then renamed."""
  text = json.dumps(_result(config, histories), indent=2, allow_nan=False)
  _whole(workdir / 'curves.png', lambda path: draw(path, config, histories))
  _whole(workdir / 'result.json', lambda path: path.write_text(text + '\n'))


def _whole(path: pathlib.Path, make: Callable[[pathlib.Path], Any]) -> None:
  aside = path.with_name(f'.{path.stem}.partial{path.suffix}')
  try:
    make(aside)
    os.replace(aside, path)
  finally:
    aside.unlink(missing_ok=True)


def _result(config, histories):
  device = jax.devices()[0]
  return {
    'config': config.to_dict(),
    'versions': {
      'python': platform.python_version(),
      'gsgd_jax': __version__,
      **{name: metadata.version(name) for name in _PACKAGES},
    },
    'device': f'{device.platform} ({device.device_kind})',
    'said': sentences(config, histories),
    'methods': {
      name: {
        'label': experiment.METHODS[name].label,
        'test_accuracy_percent': interval(_final_accuracy(history))._asdict(),
        'gradient_evaluations': float(history.gradient_evaluations[-1].mean()),
        'history': {
          key: _plain(value) for key, value in history._asdict().items()
        },
      }
      for name, history in histories.items()
    },
  }


def _plain(array):
  """Nested lists; what is not finite is null, as JSON has no word for it."""
  if array.ndim:
    return [_plain(a) for a in array]
  number = array.item()
  return number if np.isfinite(number) else None


def draw(
  path: pathlib.Path,
  config: ml_collections.ConfigDict,
  histories: dict[str, experiment.History],
) -> None:
  """Accuracy and loss against updates, one line a method."""
  import matplotlib

  matplotlib.use('agg')
  from matplotlib import pyplot as plt

  figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4.2), layout='constrained'
  )
  left.set(xlabel='updates', ylabel='test accuracy, %')
  right.set(xlabel='updates', yscale='log')
  right.set(ylabel=f'training loss (geometric mean; floor {_FLOOR:g})')
  for i, (name, history) in enumerate(histories.items()):
    style = dict(
      color=_COLOURS[i % len(_COLOURS)],
      linestyle=_DASHES[i % len(_DASHES)],
      label=experiment.METHODS[name].label,
    )
    _band(left, history.updates, 100 * history.test_accuracy, style)
    _band(right, history.updates, history.train_loss, style)
  left.legend(loc='lower right', frameon=False)
  for axes in (left, right):
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)
    axes.margins(x=0)
  figure.suptitle(
    f'{config.dataset}, {config.workers} workers, batch {config.batch_size}, '
    f'learning rate {config.learning_rate:g}: mean of {config.seeds} seeds, '
    '95 % interval'
  )
  figure.savefig(path, dpi=130)
  plt.close(figure)


def _band(axes, updates, values, style):
  """Mean and interval; on a logarithmic axis, of the logarithms."""
  logarithmic = axes.get_yscale() == 'log'
  if logarithmic:
    values = np.log(np.maximum(values, _FLOOR))
  intervals = [interval(v) for v in values]
  mean = np.array([i.mean for i in intervals])
  half = np.array([i.half_width or 0.0 for i in intervals])
  shape = np.exp if logarithmic else lambda x: x
  axes.plot(updates, shape(mean), **style)
  axes.fill_between(
    updates,
    shape(mean - half),
    shape(mean + half),
    color=style['color'],
    alpha=0.15,
    linewidth=0,
  )
