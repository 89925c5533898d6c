"""Studies: the product of some axes, each cell tuned, then measured.

A study's config is that of an experiment, with `axes`: each has values by name,
and each value changes some settings. The product of all axes are the *cells*,
one method each. A cell's learning rate is chosen on validation data, with seeds
of the tuning alone; then test accuracy is measured at the chosen rates, with
other seeds (and so other splits of the same data). Cells that are alike but for
a learning rate, a seed or the rows of a table share a compiled program; see
`sweeps`.

| file          | holds                                                       |
|---------------|-------------------------------------------------------------|
| `config.json` | every setting of the study                                  |
| `cells.jsonl` | a line for each finished cell, written when it is finished  |
| `report.md`, `report.html` | the report, of whatever is finished            |

A study that was stopped goes on with the cells that are missing.
"""

import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeGuard

import jax
import ml_collections
import numpy as np
from ml_collections import config_dict

from gsgd_jax import (
  data,
  events,
  experiment,
  files,
  outcomes,
  settings,
  sweeps,
  transformation,
  tuning,
)

KINDS = ('updates', 'gradients', 'time')
_AT = ' @ '  # Between a budget's name and what a synchronisation costs.
BEST_EPOCH = 'best epoch'
# Settings that change no compiled program: they are the rows of a table, or
# are said in each call.
_OF_DATA = (
  'dataset',
  'target',
  'preprocessing',
  'train_share',
  'validation_share',
  'label_noise',
)
_OF_CALLS = ('learning_rate', 'seeds', 'evaluate_every')
_LENGTHS = ('updates', 'epochs', 'evaluate_epochs', 'time')
# Settings that mean nothing to a worker alone.
_OF_CLUSTERS = (
  'workers',
  'arrivals',
  'cv',
  'spread',
  'machine_cv',
  'speeds',
  'trace',
  'trace_unit',
  'straggler',
  'fails_at',
  'back_at',
  'overwrite_within',
  'max_ahead',
  'combine',
  'wait_for',
  'split_batch_size',
  'delay',
  'round_size',
  'sync_cost',
  'sync_costs',
  'time',
)
# Of the study, not of its runs.
_OF_STUDY = (
  'title',
  'description',
  'axes',
  'datasets',
  'only',
  'resume',
  'jobs',
)
_INERT = (  # Of runs, but not here.
  'methods',
  'parallel',
  'guidance',
  'devices',
  'distributed',
  'coordinator',
  'processes',
  'process_id',
  'checkpoints',
  'checkpoint_minutes',
  'checkpoint_every',
  'tensorboard',
  'profile',
  'compilation_cache',
  'patience',
)


def default_config() -> ml_collections.ConfigDict:
  """The settings of a study: those of an experiment, and its own.

  Returns:
    An unlocked ``ConfigDict``.

  Examples:
    >>> from gsgd_jax import study
    >>> config = study.default_config()
    >>> config.axes.workers = {'8': {'workers': 8}, '64': {'workers': 64}}
    >>> config.axes.method = {
    ...   'ASGD': {'method': 'asynchronous'},
    ...   'DANA': {'method': 'asynchronous+dana', 'learning_rate': 0.02},
    ... }
    >>> print(*(study.shown(c) for c in study.cells(config)), sep='; ')
    8, ASGD; 8, DANA; 64, ASGD; 64, DANA
  """
  config = settings.default_config()
  config.title = 'A study'
  config.description = ''
  # Axis -> value's name -> its settings. Each value of the axis `method` has a
  # `method`, PARALLEL[+COMPENSATION][+GUIDANCE], among them. A number may be
  # given as 'workers / 4' or 'workers * 2'.
  # (As they are written: a ConfigDict would sort them, and refuse dots.)
  config.axes = ml_collections.ConfigDict(convert_dict=False, sort_keys=False)
  # Data sets side by side, an axis of their own, with commas between them; none
  # is `dataset`.
  config.datasets = ''
  # Whether learning rates are tuned, from learning_rate on; else it is that.
  config.tune = True
  config.first_seed = 0  # Others make a study anew, as a confirmation does.
  config.tuning_seeds = 8  # From the first on;
  config.seeds = 32  # the following ones are for measuring.
  # What a run may spend: as many updates as `updates`; as many gradients, all
  # that are thrown away and replays included; simulated time.
  config.budgets = KINDS
  # Units; None is updates / workers, what mean workers take for them.
  config.time = config_dict.placeholder(float)
  # Costs of a synchronisation side by side; none is sync_cost.
  config.sync_costs = ()
  # Whether the best test accuracy over the evaluations is reported as well, the
  # author's protocol.
  config.best_epoch = False
  # Only some cells: AXIS=VALUE|VALUE,AXIS=VALUE.
  config.only = ''
  config.resume = True  # False: finished cells are computed once more.
  # Processes that compute; None is one a CPU core; 0 is this one, as it is
  # where there is an accelerator.
  config.jobs = config_dict.placeholder(int)
  config.lanes = 32  # Runs at once in each.
  return config


class Cell(NamedTuple):
  """A place in a study.

  Attributes:
    values: Axis -> the value's name. Axes that mean nothing to the method, as
      workers to one worker alone, are left out.
    config: Its settings, with one method, lengths in updates.
    method: The method.
    budgets: What its runs may spend.
    key: What decides its outcome, digested.
  """

  values: dict[str, str]
  config: ml_collections.ConfigDict
  method: events.Method
  budgets: tuple[sweeps.Budget, ...]
  key: str


def shown(cell: Cell) -> str:
  """A cell in words.

  Args:
    cell: One of :func:`cells`.

  Returns:
    Its values on every axis, by commas: ``'digits, 64, ASGD'``.
  """
  return ', '.join(cell.values.values())


def cells(config: ml_collections.ConfigDict) -> list[Cell]:
  """The cells of a study, in order; those that ``only`` names.

  Args:
    config: The study's settings; see :func:`default_config`.

  Returns:
    A list of them, :class:`Cell`.

  Raises:
    ValueError: An axis, a value or a setting is wrong.
    OSError: Data cannot be read.
  """
  axes = _axes(config)
  _check_axes(axes)
  wanted = _only(config.only, axes)
  found = {}
  for values in itertools.product(*axes.values()):
    values = dict(zip(axes, values, strict=True))
    if all(values[axis] in some for axis, some in wanted.items()):
      cell = _cell(config, axes, values)
      found.setdefault((cell.key, *cell.values.values()), cell)
  return list(found.values())


def _axes(config):
  """Axis -> value's name -> its settings."""
  axes = dict(config.axes)
  given = [d.strip() for d in config.datasets.split(',') if d.strip()]
  if given:
    names = [pathlib.PurePath(d).stem for d in given]
    if len(set(names)) < len(names):
      names = given
    named = zip(names, given, strict=True)
    axes = {'data': {n: {'dataset': d} for n, d in named}} | axes
  return axes


def _check_axes(axes):
  """Raises a ValueError unless axes hold values, and these settings."""
  if not axes:
    raise ValueError('the study has no axes; one of them names methods')
  if 'method' not in axes:
    raise ValueError(
      "one axis of a study is called 'method', and its values have a method, "
      "such as {'ASGD': {'method': 'asynchronous'}}; got axes "
      + ', '.join(axes)
    )
  kinds = (dict, ml_collections.ConfigDict)
  for axis, values in axes.items():
    if not isinstance(values, kinds):
      raise ValueError(
        f'axis {axis!r} must hold values by name, such as '
        f"{{'8': {{'workers': 8}}}}, got {values!r}"
      )
    for value, changes in values.items():
      if not isinstance(changes, kinds):
        raise ValueError(
          f'{value!r} of axis {axis!r} must hold settings by name, such as '
          f"{{'workers': 8}}, got {changes!r}"
        )


def _only(only, axes):
  """Axis -> the values that are wanted."""
  wanted = {}
  for part in filter(None, re.split(r',\s*(?=[^,=]+=)', only)):
    axis, _, values = part.partition('=')
    axis = axis.strip()
    settings.one_of('an axis of only', axis, axes)
    for value in map(str.strip, values.split('|')):
      if value not in axes[axis]:
        raise ValueError(
          f'only: the axis {axis} has no value {value!r}'
          + settings.nearest(value, axes[axis])
        )
      wanted.setdefault(axis, set()).add(value)
  return wanted


def _cell(study, axes, values):
  """The cell of some values."""
  config = ml_collections.ConfigDict(
    {k: v for k, v in study.items() if k not in _OF_STUDY},
    convert_dict=True,
  )
  config = config.copy_and_resolve_references()
  changes = {}
  for axis, value in values.items():
    where = f'{value!r} of axis {axis!r}'
    for setting, given in axes[axis][value].items():
      if setting in changes:
        raise ValueError(
          f'{where} changes {setting!r}, and so does {changes[setting][1]}'
        )
      changes[setting] = given, where
  name, _ = changes.pop('method', (None, None))
  if 'workers' in changes:
    _set(config, 'workers', *changes.pop('workers'))
  for setting, (given, where) in changes.items():
    _set(config, setting, _of_workers(given, config.workers), where)
  if name is None:
    raise ValueError(
      f'{", ".join(values.values())} has no method; say it as in '
      "{'ASGD': {'method': 'asynchronous'}}"
    )
  config.methods, config.parallel, config.guidance = (name,), None, None
  (method,) = _method_of(config, name)
  if method.parallel == 'sequential':
    _alone(config)
    values = {
      axis: value for axis, value in values.items() if not _inert(axes[axis])
    }
  plain = settings.default_config()
  run = ml_collections.ConfigDict({k: config[k] for k in plain})
  settings.check(run)
  resolved = experiment.resolved(run)
  with config.unlocked():
    for setting in ('updates', 'evaluate_every', 'warmup', 'drops'):
      config[setting] = resolved[setting]
    config.epochs = config.evaluate_epochs = None
  budgets = _budgets(config, method)
  return Cell(values, config, method, budgets, _key(config, method, budgets))


def _of_workers(given, workers):
  """A setting that follows from the workers: 'workers / 4', 'workers * 2'."""
  found = re.fullmatch(r'workers ([*/]) (\d+(?:\.\d+)?)', str(given))
  if not found:
    return given
  by = float(found[2])
  number = workers * by if found[1] == '*' else workers / by
  return int(number) if number == int(number) else number


def _alone(config):
  """Takes away what means nothing to a worker alone."""
  plain = default_config()
  with config.ignore_type():
    for setting in _OF_CLUSTERS:
      config[setting] = plain[setting]
  config.workers = 1


def _method_of(config, name):
  method = events.methods(config)
  if len(method) != 1:
    raise ValueError(f'a cell of a study has one method, got {name}')
  return method


def _inert(axis):
  """Whether an axis changes only what means nothing to a worker alone."""
  changed = {s for value in axis.values() for s in value}
  return changed <= set(_OF_CLUSTERS)


def _set(config, setting, given, where):
  """Changes a setting, which may be within another."""
  *path, last = setting.split('.')
  inside: Any = config
  for part in path:
    inside = inside.get(part) if _holds(inside) else None
  if not _holds(inside) or (not path and last not in config):
    raise ValueError(
      f'{where} changes {setting!r}, and there is no such setting'
      + settings.nearest(setting, config)
    )
  with config.ignore_type(), config.unlocked():
    inside[last] = given


def _holds(inside) -> TypeGuard[ml_collections.ConfigDict]:
  return isinstance(inside, ml_collections.ConfigDict)


def _budgets(config, method):
  """What runs may spend, with its names."""
  found = []
  time = config.time
  if time is None:
    time = config.updates / config.workers
  guided = method.select is not None and not config.stored_gradients
  for kind in config.budgets:
    settings.one_of('a budget', kind, KINDS)
    if kind != 'time':
      found.append(sweeps.Budget(kind, kind, float(config.updates)))
    elif method.parallel != 'sequential':
      found += _of_time(config, method, guided, float(time))
  return tuple(found)


def _of_time(config, method, guided, time):
  """Budgets of simulated time: by what a replay and a synchronisation cost."""
  waits = method.parallel in ('synchronous', 'data_parallel')
  models = {'time': False}
  if guided and config.replay_model == 'parallel':
    models = {'time, parallel': False}
  elif guided:
    models = {'time, serial': False, 'time, shared': True}
  for name, shared in models.items():
    if not config.sync_costs or not (waits or shared):
      price = float(config.sync_cost)
      yield sweeps.Budget(name, 'time', time, price, shared)
      continue
    for price in config.sync_costs:
      at = f'{name}{_AT}{price:g}'
      yield sweeps.Budget(at, 'time', time, float(price), shared)


def _key(config, method, budgets):
  left_out = {*_INERT, *_OF_STUDY, *_LENGTHS, 'budgets', 'best_epoch', 'lanes'}
  plain = _plain(config, left_out)
  whole = [plain, method.name, config.updates, [list(b) for b in budgets]]
  whole += _contents(config)
  text = json.dumps(whole, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:20]


def _contents(config):
  """What files hold, as far as a study is of files."""
  read = []
  if os.path.exists(config.dataset):
    dataset = load(config, 0)
    digest = hashlib.sha256()
    for x in jax.tree.leaves((dataset.train, dataset.validation, dataset.test)):
      digest.update(np.ascontiguousarray(x).data)
    read.append(digest.hexdigest())
  if config.trace is not None:
    text = pathlib.Path(config.trace).read_bytes()
    read.append(hashlib.sha256(text).hexdigest())
  return read


def _plain(config, left_out):
  return files.plain(
    {k: v for k, v in config.to_dict().items() if k not in left_out}
  )


class Group(NamedTuple):
  """Cells that share a compiled program."""

  cells: list[Cell]


def groups(cells: Iterable[Cell]) -> list[Group]:
  """Cells by the program that they share, in order."""
  found = {}
  for cell in cells:
    found.setdefault(_program(cell), []).append(cell)
  return [Group(some) for some in found.values()]


def _program(cell):
  """What decides the program of a cell."""
  config = cell.config
  left_out = {*_INERT, *_OF_STUDY, *_OF_CALLS, 'budgets', 'best_epoch'}
  left_out |= {'tune', 'tuning_seeds', 'first_seed'}
  if config.schedule == 'constant' and not (config.warmup or config.drops):
    left_out |= set(_LENGTHS)
  dataset = load(config, 0)
  like = []
  if sweeps.shape_of([dataset]) is not None and config.model in (
    'mlp',
    'softmax_regression',
  ):
    left_out |= set(_OF_DATA)
    like = [len(dataset.classes)]
  prices = [(b.name, b.kind, b.sync_cost, b.shared) for b in cell.budgets]
  whole = [_plain(config, left_out), cell.method.name, prices, like]
  return json.dumps(whole, sort_keys=True)


def load(config: ml_collections.ConfigDict, seed: int) -> data.Dataset:
  """The data of a seed; those of a few thousand are kept."""
  given = tuple(
    config[name] if name != 'context' or config.model == 'gpt' else None
    for name in _LOADED
  )
  return _load(seed, *given)


_LOADED = (*_OF_DATA, 'context', 'data_dir', 'image_size', 'stream')


@functools.lru_cache(maxsize=4096)
def _load(seed, name, *given):
  return data.load(name, seed, **dict(zip(_LOADED[1:], given, strict=True)))


def compute(group: Group) -> Iterator[tuple[Cell, dict[str, Any]]]:
  """Computes the cells of a group, one after another.

  Yields:
    A cell, and the line about it for `cells.jsonl`; of one that cannot be
    computed, with an ``error`` that says why.
  """
  sweep = None
  for cell in group.cells:
    try:
      sweep = sweep or _sweep(group)
      line = _computed(sweep, cell)
    except (ValueError, MemoryError, jax.errors.JaxRuntimeError) as e:
      said = str(e).strip().splitlines()
      reason = said[0] if said else type(e).__name__
      line = {'cell': cell.key, 'values': cell.values, 'error': reason}
    yield cell, line


def _sweep(group):
  """The program of a group."""
  first = group.cells[0]
  return sweeps.Sweep(
    first.config,
    first.method,
    [load(c.config, 0) for c in group.cells],
    first.budgets,
    first.config.lanes,
    max(_every(c) for c in group.cells),
  )


def _every(cell):
  return min(cell.config.evaluate_every, cell.config.updates)


def _computed(sweep, cell):
  """A cell: its rate is chosen, then it is measured."""
  config = cell.config
  start = transformation.learning_rate(config, cell.method)
  if callable(start) or start is None:
    start = config.learning_rate
  tried = _tried(sweep, cell, start) if config.tune else {}
  chosen = [
    tuning.best(tried, b) if config.tune else 0
    for b in range(len(cell.budgets))
  ]
  first = config.first_seed + config.tuning_seeds
  seeds = range(first, first + config.seeds)
  rate = lambda step: tuning.grid(start, step) if config.tune else float(start)
  measured = {
    step: _run(sweep, cell, rate(step), seeds) for step in sorted(set(chosen))
  }
  return {
    'cell': cell.key,
    'values': cell.values,
    'method': cell.method.name,
    'seeds': list(seeds),
    'tried': {
      tuning.grid(start, step): {
        b.name: of[i] for i, b in enumerate(cell.budgets)
      }
      for step, of in tried.items()
    },
    'budgets': {
      b.name: {'learning_rate': rate(chosen[i])}
      | _at_budget(measured[chosen[i]], i)
      for i, b in enumerate(cell.budgets)
    },
    'curves': {
      rate(step): _curve(results, cell.budgets)
      for step, results in measured.items()
    },
  }


def _tried(sweep, cell, start):
  """What the search for a cell's rate has measured."""

  def measure(steps):
    return _validated(sweep, cell, start, steps)

  config = cell.config
  return tuning.search(measure, max(1, config.lanes // config.tuning_seeds))


def _validated(sweep, cell, start, steps):
  """Validation accuracy of several rates, over the seeds of the tuning."""
  first = cell.config.first_seed
  seeds = range(first, first + cell.config.tuning_seeds)
  lanes = [
    sweeps.Lane(load(cell.config, seed), seed, tuning.grid(start, step))
    for step in steps
    for seed in seeds
  ]
  results = list(_in_parts(sweep, cell, lanes, tested=False))
  accuracy = np.concatenate([r.validation_accuracy for r in results], axis=1)
  accuracy = accuracy.reshape(len(cell.budgets), len(steps), len(seeds))
  return {step: accuracy[:, i] for i, step in enumerate(steps)}


def _run(sweep, cell, rate, seeds):
  lanes = [sweeps.Lane(load(cell.config, s), s, rate) for s in seeds]
  return list(_in_parts(sweep, cell, lanes, tested=True))


def _in_parts(sweep, cell, lanes, tested):
  for first in range(0, len(lanes), cell.config.lanes):
    part = lanes[first : first + cell.config.lanes]
    yield sweep.run(part, cell.budgets, _every(cell), tested)


def _at_budget(results, i):
  """What is told of a budget, for each seed."""

  def joined(of):
    return np.concatenate([np.asarray(of(r)) for r in results])

  return {
    'validation_accuracy': joined(lambda r: r.validation_accuracy[i].round(6)),
    'test_accuracy': joined(lambda r: r.test_accuracy[i].round(6)),
    'diverged': joined(lambda r: r.diverged[i]),
    'updates': joined(lambda r: r.spent.updates[i]),
    'gradients': joined(lambda r: r.spent.gradients[i]),
    'time': joined(lambda r: r.spent.time[i]),
  }


def _curve(results, budgets):
  """How runs went: what they spent, in the mean, and accuracy of each seed."""
  points = min(len(r.curve[1]) for r in results)
  curves = [(r.curve[0], r.curve[1][:points]) for r in results]

  def mean(of):
    values = [of(spent)[:points] for spent, _ in curves]
    return np.round(np.concatenate(values, axis=1).mean(axis=1), 3)

  accuracies = np.concatenate([accuracy for _, accuracy in curves], axis=1)
  return {
    'updates': mean(lambda s: s.updates),
    'gradients': mean(lambda s: s.gradients),
    'time': {
      b.name: mean(lambda s, i=i: s.time[..., i])
      for i, b in enumerate(budgets)
      if b.kind == 'time'
    },
    'test_accuracy': np.round(accuracies.astype(float), 5),
  }


def outcomes_of(
  found: Iterable[Cell], lines: dict[str, dict[str, Any]]
) -> list[outcomes.Outcome]:
  """What cells came to.

  Args:
    found: Cells.
    lines: By a cell's key, the line about it in `cells.jsonl`, as JSON has it.

  Returns:
    An outcome for each budget of each cell that is finished.
  """
  return [
    outcome
    for cell in found
    if cell.key in lines
    for outcome in _outcomes(cell, lines[cell.key])
  ]


def _outcomes(cell, line):
  for budget in cell.budgets:
    of = line['budgets'][budget.name]
    curve = line['curves'][str(of['learning_rate'])]
    name, _, price = budget.name.partition(_AT)
    values = cell.values | ({'sync cost': price} if price else {})
    outcome = outcomes.Outcome(
      values=values,
      method=cell.method,
      budget=name,
      learning_rate=of['learning_rate'],
      tried={
        float(rate): np.array(by_budget[budget.name])
        for rate, by_budget in line['tried'].items()
      },
      seeds=np.array(line['seeds']),
      curve=_curve_of(curve),
      settings=_alike(cell.config),
      guidance=json.dumps(files.plain([cell.config[n] for n in _GUIDANCE])),
      **{field: np.array(of[field]) for field in _MEASURED},
    )
    yield outcome
    if cell.config.best_epoch and budget.kind == 'updates':
      yield _best_epoch(outcome, budget.amount)


_GUIDANCE = (
  'window',
  'replays',
  'revisit',
  'verification',
  'average_scores',
  'stored_gradients',
  'replay_model',
  'replay_step',
)


def _alike(config):
  """What methods that are compared as companions have in common."""
  apart = {*_INERT, *_OF_STUDY, *_OF_CALLS, *_GUIDANCE, 'compensation_kwargs'}
  return json.dumps(_plain(config, apart), sort_keys=True)


_MEASURED = ('test_accuracy', 'diverged', 'updates', 'gradients', 'time')


def _curve_of(curve):
  accuracy = np.array(curve['test_accuracy'])
  whole = lambda values: np.repeat(
    np.array(values)[:, None], accuracy.shape[1], axis=1
  )
  return outcomes.Curve(
    whole(curve['updates']),
    whole(curve['gradients']),
    {name: whole(values) for name, values in curve['time'].items()},
    accuracy,
  )


def _best_epoch(outcome, updates):
  """The author's protocol: the best test accuracy over the evaluations."""
  curve = outcome.curve
  within = curve.updates[:, 0] <= updates
  best = curve.test_accuracy[within].max(axis=0)
  return outcome._replace(budget=BEST_EPOCH, test_accuracy=best)
