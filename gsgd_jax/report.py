"""What a run says of itself: a table, sentences, `result.json`, a picture."""

import pathlib
import platform
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from gsgd_jax import __version__, events, settings, transformation
from gsgd_jax.parallel import make_mesh
from gsgd_jax.statistics import Interval as Interval
from gsgd_jax.statistics import interval as interval

_PACKAGES = ('jax', 'jaxlib', 'optax', 'flax', 'numpy', 'scikit-learn')
_FLOOR = 1e-4  # Of losses on a logarithmic axis, where zero has no place.
# Okabe and Ito's colours, told apart by everyone.
COLOURS = ('#000000', '#d55e00', '#0072b2', '#009e73', '#cc79a7', '#e69f00')
# The first round of colours, and those of later rounds.
_DASHES = ('-', '--', '-', '--', '-.', ':')
_MORE_DASHES = ((0, (3, 1, 1, 1, 1, 1)), (0, (10, 3)), (0, (1, 1)))
_MOST_INSIDE = 6  # Names in a legend that has a place in its axes.
_HIGHEST = 100  # Losses on a picture, over the first one.
# The height of a bar, %, that is cut where all others are lower by a factor.
_TOWER, _CUT_FROM = 75, 5

_GUIDING = {
  'consistent': 'Guided SGD changes',
  'random': 'Random replays, the control with as many gradients, change',
  'hardest': 'Replays of the hardest batches change',
  'inconsistent': 'Replays of the inconsistent batches change',
  'surprise': 'Replays of the surprising batches change',
}


class Chosen(NamedTuple):
  """Test accuracy at an evaluation chosen for each seed."""

  step: np.ndarray  # shape=(seeds,), int: when it was measured.
  test_accuracy: np.ndarray  # shape=(seeds,), in [0, 1].


def chosen(history: events.History, by: str) -> Chosen | None:
  """Test accuracy at the evaluation that a rule chooses, seed by seed.

  Args:
    history: Of one method.
    by: ``'validation'``: the highest validation accuracy, of equal ones that of
      lower validation loss, of equal ones the first. ``'last'``: the last.
      ``'best'``: the highest *test* accuracy, the author's protocol, which is
      optimistic: it picks by what it then reports.

  Returns:
    A ``Chosen``, or None where nothing was measured after the first update, or
    there is no validation split to choose by.
  """
  trained = history.step > 0
  if not trained.any():
    return None
  accuracy = history.test_accuracy[trained]
  if by == 'validation':
    validation = history.validation_accuracy[trained]
    if np.isnan(validation).any():
      return None
    loss = history.validation_loss[trained]
    # The last key is the first to decide.
    order = np.lexsort((np.nan_to_num(loss, nan=np.inf), -validation), axis=0)
    rows = order[0]
  elif by == 'best':
    rows = accuracy.argmax(axis=0)
  else:
    # A seed that stopped early takes no more gradients.
    spent = history.gradient_evaluations[trained]
    rows = (spent == spent[-1]).argmax(axis=0)
  seeds = np.arange(accuracy.shape[1])
  return Chosen(history.step[trained][rows], accuracy[rows, seeds])


def _accuracy(history, by):
  """Test accuracy, %, for every seed, or None."""
  found = chosen(history, by)
  return None if found is None else 100 * found.test_accuracy


def _comparable(history):
  """Whether a method ran to its end."""
  return history.status in ('completed', 'stopped_early')


def table(histories: dict[str, events.History], losses: bool = False) -> str:
  """The comparison, one line a method; with test losses, as text wants."""
  baseline = _baseline(histories)
  head = ['method', 'test accuracy, %', 'chosen by validation']
  if losses:
    head.append('test loss, nats')
  if baseline is not None:
    head.append(f'less {histories[baseline].method.label}, paired')
  head += ['updates', 'gradient evaluations', 'simulated time', 'status']
  rows = [head]
  for name, history in histories.items():
    row = [history.method.label]
    for by in ('last', 'validation'):
      accuracy = _accuracy(history, by)
      shown = accuracy is not None and history.status != 'diverged'
      row.append(str(interval(accuracy)) if shown else '-')
    if losses:
      row.append(str(interval(history.test_loss[-1])) if shown else '-')
    if baseline is not None:
      difference = _difference(histories, name, baseline)
      row.append('' if difference is None else signed(difference))
    if len(history.step):
      spent = history.gradient_evaluations[-1].mean()
      last = chosen(history, 'last')
      updates = 0 if last is None else last.step.mean()
      time = history.simulated_time[-1].mean()
      row += [f'{updates:,.0f}', f'{spent:,.0f}', f'{time:,.1f}']
    else:
      row += ['0', '0', '0']
    rows.append([*row, history.status.replace('_', ' ')])
  return aligned(rows)


def aligned(rows: list[list[str]]) -> str:
  """A table of text, its head underlined."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = [c.rjust(w) for c, w in zip(row, widths, strict=True)]
    cells[0] = row[0].ljust(widths[0])
    cells[-1] = row[-1].ljust(widths[-1])
    lines.append('  '.join(cells).rstrip())
  rule = '-' * max(map(len, lines))
  return '\n'.join([lines[0], rule, *lines[1:]])


def _baseline(histories):
  """The method that others are compared with: delayed, and not guided."""
  if len(histories) < 2:
    return None
  return next(
    (
      name
      for name, history in histories.items()
      if history.method.select is None
      and history.method.parallel not in ('sequential', 'data_parallel')
      and _comparable(history)
    ),
    None,
  )


def _difference(histories, name, other):
  """Points of test accuracy between two methods, paired by seed."""
  ours, theirs = (
    _accuracy(h, 'last') if h is not None and _comparable(h) else None
    for h in (histories.get(name), histories.get(other))
  )
  if name == other or ours is None or theirs is None:
    return None
  return interval(ours - theirs)


def signed(difference: Interval) -> str:
  """A difference, with its sign."""
  shown = str(difference)
  return shown if shown.startswith('-') else f'+{shown}'


def sentences(
  config: ml_collections.ConfigDict, histories: dict[str, events.History]
) -> list[str]:
  """What was measured, in words, whatever it is."""
  said = [h.message + '.' for h in histories.values() if h.message is not None]
  said += [s for h in histories.values() for s in _not_applied(h)]

  named = {h.method[1:]: name for name, h in histories.items()}

  def compare(method, other, text):
    difference = _difference(histories, named.get(method), named.get(other))
    if difference is not None:
      said.append(text.format(signed(difference)) + _verdict(difference) + '.')

  costs = _costs(config, histories)
  for parallel in events.PARALLEL:
    for compensation in (None, *settings.COMPENSATIONS):
      plain = (parallel, compensation, None)
      if compensation is None and parallel in costs:
        text = f'{costs[parallel]} test accuracy by {{}} points'
        compare(plain, ('sequential', None, None), text)
      training = f'{parallel} training'
      if compensation is not None:
        label = settings.COMPENSATIONS[compensation]
        who = f'{label[0].upper()}{label[1:]}'
        text = f'{who} changes the accuracy of {training} by {{}} points'
        compare(plain, (parallel, None, None), text)
        training += f' with {label}'
      for select, who in _GUIDING.items():
        text = f'{who} the accuracy of {training} by {{}} points'
        compare((parallel, compensation, select), plain, text)
      guided, random = (
        (parallel, compensation, select) for select in ('consistent', 'random')
      )
      compare(guided, random, 'Guided less random replays: {} points')
  return said


def _costs(config, histories):
  """What parallel training changes, in words."""
  rounds = f'Synchronous rounds of {config.workers} workers'
  if config.wait_for is not None:
    rounds += f', {config.wait_for} of them waited for,'
  costs = {
    'asynchronous': f'The delay of {config.workers} workers changes',
    'delayed': f'A delay of {config.delay} update'
    f'{"" if config.delay == 1 else "s"} changes'
    if config.delay != settings.BY_DEPTH
    else f'A delay {_depth(histories)} changes',
    'synchronous': f'{rounds} change',
  }
  if config.split_batch_size is not None:
    costs['data_parallel'] = (
      f'Batches of {config.split_batch_size}, split over {config.workers} '
      'workers, change'
    )
  return costs


def _depth(histories):
  """Of every layer its own delay, in words."""
  largest = [
    int(h.maximal_staleness.max())
    for h in histories.values()
    if h.method.parallel == 'delayed' and len(h.step)
  ]
  return 'by depth' + (f' (0 to {max(largest)} updates)' if largest else '')


def _not_applied(history):
  """Gradients that arrived for nothing."""
  if not len(history.step):
    return
  counts = {
    'were overwritten by others': history.overwritten[-1].sum(),
    'were lost with a worker that failed': history.lost[-1].sum(),
    'were refused as too stale': history.refused[-1].sum(),
  }
  arrived = history.applied[-1].sum() + sum(counts.values())
  last = chosen(history, 'last')
  if history.method.compensation == 'rennala' and last is not None:
    arrived = last.step.sum()  # Several are applied as one.
  for what, count in counts.items():
    if count:
      share = f'{100 * count / arrived:.2g} %'
      yield f'{history.method.label}: {share} of the gradients {what}.'


def _verdict(difference):
  if difference.half_width is None:
    return ' (one seed: no interval)'
  if abs(difference.mean) <= difference.half_width:
    return ' (no difference shown)'
  return ''


def result(
  config: ml_collections.ConfigDict,
  histories: dict[str, events.History],
  status: str,
) -> dict[str, Any]:
  """The content of `result.json`; arrays and NaN are still to be made plain."""
  device = jax.devices()[0]
  return {
    'status': status,
    'config': config.to_dict(),
    'versions': {
      'python': platform.python_version(),
      'gsgd_jax': __version__,
      **{name: metadata.version(name) for name in _PACKAGES},
    },
    'device': f'{device.platform} ({device.device_kind})',
    'devices': make_mesh(config.devices).size,
    'processes': jax.process_count(),
    'said': sentences(config, histories),
    'methods': {name: _of_method(h, config) for name, h in histories.items()},
  }


def _of_method(history, config):
  last = lambda values: values[-1] if len(values) else None
  return {
    'label': history.method.label,
    'parallel': history.method.parallel,
    'compensation': history.method.compensation,
    'guidance': history.method.select,
    'status': history.status,
    'message': history.message,
    'step': int(history.step[-1]) if len(history.step) else 0,
    'gradient_evaluations': last(history.gradient_evaluations),
    'simulated_time': last(history.simulated_time),
    'applied': last(history.applied),
    'overwritten': last(history.overwritten),
    'lost': last(history.lost),
    'refused': last(history.refused),
    'staleness': _of_staleness(history, config),
    'worker_shares': None
    if history.arrivals is None
    else history.arrivals.shares,
    'test_loss': last(history.test_loss),
    'test_accuracy': {
      'validation_chosen': _of_chosen(chosen(history, 'validation')),
      'last': _of_chosen(chosen(history, 'last')),
      'best_over_epochs': _of_chosen(chosen(history, 'best')),
    },
  }


def _of_staleness(history, config):
  if history.arrivals is None:
    return None
  return {
    'latest': history.latest_staleness[-1],
    'mean': history.arrivals.mean,
    'maximum': history.maximal_staleness[-1],
    'histogram': np.trim_zeros(history.arrivals.histogram, 'b'),
    'bin_width': transformation.bin_width(config),
  }


def _of_chosen(found):
  if found is None:
    return None
  measured = interval(found.test_accuracy)
  return {
    **measured._asdict(),
    'values': found.test_accuracy,
    'steps': found.step,
  }


def draw(
  path: pathlib.Path,
  config: ml_collections.ConfigDict,
  histories: dict[str, events.History],
) -> None:
  """Accuracy and loss, by updates and by simulated time; one line a method.

  Of text the test loss is what accuracy is of other data.
  """
  text = config.model == 'gpt'
  plt = pyplot()
  from matplotlib import ticker

  figure, axes = plt.subplots(
    2, 2, figsize=(11, 7.6), layout='constrained', sharey='row'
  )
  (by_updates, by_time), (loss_by_updates, loss_by_time) = axes
  by_updates.set(
    ylabel='test loss, nats a character' if text else 'test accuracy, %'
  )
  loss_by_updates.set(
    xlabel='updates',
    ylabel=f'training loss (geometric mean; floor {_FLOOR:g})',
    yscale='log',
  )
  loss_by_time.set(xlabel='simulated time, mean gradient computations')
  for axis in (by_time, loss_by_time):
    axis.set_xscale('log')  # Methods differ by factors.
    # 300 has a place between its neighbours, where 3 x 10^2 has none.
    axis.xaxis.set_major_formatter(ticker.LogFormatter())
    axis.xaxis.set_minor_formatter(ticker.LogFormatter())
  first = []
  for history, style in _styled(histories):
    tested = history.test_loss if text else 100 * history.test_accuracy
    loss = history.train_loss
    band(by_updates, history.step, tested, style)
    band(loss_by_updates, history.step, loss, style)
    time = history.simulated_time.mean(axis=1)
    begun = time > 0  # Zero has no place on a logarithmic axis.
    if begun.any():
      band(by_time, time[begun], tested[begun], style)
      band(loss_by_time, time[begun], loss[begun], style)
    first.append(loss[0].mean())
  if first:
    bottom, top = loss_by_updates.get_ylim()
    loss_by_updates.set_ylim(bottom, min(top, _HIGHEST * max(first)))
  _legend(figure, by_updates, 'upper right' if text else 'lower right')
  save(figure, axes.flat, _title(config, histories), path)


def has_workers(history: events.History) -> bool:
  """Whether there is anything to draw of who arrives."""
  arrivals = history.arrivals
  return arrivals is not None and len(arrivals.shares) > 1


def draw_staleness(
  path: pathlib.Path,
  config: ml_collections.ConfigDict,
  histories: dict[str, events.History],
) -> None:
  """How stale the applied gradients were, and which workers they were of."""
  plt = pyplot()
  figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained')
  left, right = axes
  left.set(xlabel='staleness, updates', ylabel='share of the gradients, %')
  right.set(
    xlabel='workers, from the slowest to the fastest, %',
    ylabel='share of the gradients over a fair share',
  )
  right.axhline(1, color='#999999', linewidth=1, linestyle=':')
  width = transformation.bin_width(config)
  most, highest = 1, []
  for arrivals, style in _arrivals(histories):
    counts = np.trim_zeros(arrivals.histogram, 'b')
    most = max(most, len(counts))
    edges = np.arange(len(counts) + 1) * width - 0.5
    share = 100 * counts / counts.sum()
    highest.append((share.max(), edges[share.argmax()], style['color']))
    left.stairs(share, edges, fill=True, color=style['color'], alpha=0.12)
    left.stairs(share, edges, **style)
    workers = len(arrivals.shares)
    edges = 100 * np.arange(workers + 1) / workers
    right.stairs(arrivals.shares, edges, baseline=None, **style)
  if most == transformation.BINS:
    left.set(xlabel='staleness, updates (the last bin: all above)')
  left.set_ylim(bottom=0)
  _cut(left, highest)
  right.set_ylim(0, max(2, right.get_ylim()[1]))
  _legend(figure, right, 'upper left')
  seeds = f'{config.seeds} seeds' if config.seeds > 1 else 'one seed'
  save(figure, axes, f'{_setting(config, histories)}: {seeds}', path)


def _cut(axes, highest):
  """Ends bars beside which all others would vanish; numbers tell their heights.

  Args:
    axes: Of bars in percent.
    highest: Of every line its highest bar, where that is, and its colour.
  """
  low = [height for height, _, _ in highest if height < _TOWER]
  cut = [bar for bar in highest if bar[0] >= _TOWER]
  if not low or max(low) * _CUT_FROM > _TOWER:
    return
  axes.set_ylim(0, 1.25 * max(low))
  for height, x, colour in cut:
    axes.annotate(
      f'to {height:.0f} %',
      (x, 1),
      xycoords=('data', 'axes fraction'),
      xytext=(8, -12),
      textcoords='offset points',
      color=colour,
    )


def _arrivals(histories):
  """What has arrived, and how its line looks; equal ones share theirs."""
  lines = []
  for history, style in _styled(histories):
    if not has_workers(history) or not history.arrivals.histogram.any():
      continue
    same = [
      (arrivals, drawn)
      for arrivals, drawn in lines
      if all(
        np.array_equal(getattr(arrivals, f), getattr(history.arrivals, f))
        for f in ('histogram', 'shares')
      )
    ]
    for _, drawn in same:
      drawn['label'] += f'\n{style["label"]}'
    if not same:
      lines.append((history.arrivals, style))
  return lines


def pyplot() -> Any:
  """Matplotlib, loaded where it is needed, without a screen.

  A notebook has no screen either, and shows its own pictures as before.
  """
  import matplotlib

  if not _in_notebook():
    matplotlib.use('agg')
  from matplotlib import pyplot as plt

  return plt


def _in_notebook():
  kernel = sys.modules.get('ipykernel.kernelapp')
  return kernel is not None and kernel.IPKernelApp.initialized()


def dashes(i: int) -> Any:
  """How the line of the i-th method is broken, as it comes with `COLOURS`."""
  rounds, position = divmod(i, len(COLOURS))
  if rounds == 0:
    return _DASHES[position]
  return _MORE_DASHES[(rounds - 1) % len(_MORE_DASHES)]


def _legend(figure, axes, loc):
  """Inside the axes, or beside all of them where it is long."""
  handles, labels = axes.get_legend_handles_labels()
  names = sum(label.count('\n') + 1 for label in labels)
  if names > _MOST_INSIDE:
    figure.set_figwidth(figure.get_figwidth() + 3.2)
    figure.legend(handles, labels, loc='outside right upper', frameon=False)
  elif labels:
    axes.legend(loc=loc, frameon=False)


def _styled(histories):
  """Every history that has begun, and how its line looks."""
  for i, history in enumerate(histories.values()):
    if len(history.step):
      yield (
        history,
        dict(
          color=COLOURS[i % len(COLOURS)],
          linestyle=dashes(i),
          label=_in_legend(history),
        ),
      )


def save(
  figure: Any, axes: Sequence[Any], title: str, path: pathlib.Path
) -> None:
  """Writes a figure, all axes of which look alike."""
  for axis in axes:
    axis.grid(alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)
    axis.margins(x=0)
  figure.suptitle(title)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # A character that the font lacks.
    figure.savefig(path, dpi=130)
  pyplot().close(figure)


def _in_legend(history):
  label = history.method.label
  return label if _comparable(history) else f'{label} ({history.status})'


def _parallelism(config, histories):
  parallel = {method.parallel for method in events.methods(config)}
  if parallel & {'asynchronous', 'synchronous', 'data_parallel'}:
    yield f'{config.workers} workers{_cluster(config)}'
  if 'delayed' in parallel:
    by_depth = config.delay == settings.BY_DEPTH
    yield f'delay {_depth(histories) if by_depth else config.delay}'


def _cluster(config):
  """What is to be known of the workers, in brackets."""
  words = []
  if config.arrivals != 'round_robin':
    words.append(config.arrivals)
  if config.machine_cv:
    words.append(f'machines vary by {config.machine_cv:g}')
  if config.straggler is not None:
    words.append(f'one {config.straggler:g} times as slow')
  if config.fails_at is not None:
    words.append(f'one fails at {config.fails_at:g}')
  return f' ({", ".join(words)})' if words else ''


def _setting(config, histories):
  rate = config.learning_rate
  words = [
    pathlib.Path(config.dataset).name,
    *_parallelism(config, histories),
    f'batch {config.batch_size}',
    config.optimizer + ('' if rate is None else f' at {rate:g}'),
  ]
  return ', '.join(words)


def _title(config, histories):
  setting = _setting(config, histories)
  if config.seeds == 1:
    return f'{setting}: one seed'
  return f'{setting}: mean of {config.seeds} seeds, 95 % interval'


def band(
  axes: Any,
  x: Sequence[float] | np.ndarray,
  values: Sequence[np.ndarray] | np.ndarray,
  style: dict[str, Any],
) -> None:
  """Mean and interval; on a logarithmic axis, of the logarithms."""
  logarithmic = axes.get_yscale() == 'log'
  if logarithmic:
    values = np.log(np.maximum(values, _FLOOR))
  intervals = [interval(v) for v in values]
  mean = np.array([i.mean for i in intervals])
  half = np.array([i.half_width or 0.0 for i in intervals])
  # What is not a loss is an accuracy, and ends at 0 and 100.
  shape = np.exp if logarithmic else lambda x: np.clip(x, 0, 100)
  axes.plot(x, shape(mean), **style)
  axes.fill_between(
    x,
    shape(mean - half),
    shape(mean + half),
    color=style['color'],
    alpha=0.15,
    linewidth=0,
  )
