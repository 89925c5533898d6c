"""Going on with a run: what was done, where to go on, and what may differ.

A run is what its checkpoints and `metrics.jsonl` say it is. Of every method
that goes on from a checkpoint the lines that were written after it are dropped:
they are measured again, the same.
"""

import collections
import contextlib
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jaxlib
import ml_collections
import numpy as np

from gsgd_jax import (
  __version__,
  checkpoints,
  data,
  events,
  files,
  programs,
  settings,
  transformation,
)
from gsgd_jax.checkpoints import Found

# Settings that change where and how a run is computed and watched, not what.
ELSEWHERE = (
  'checkpoint_every',
  'checkpoint_minutes',
  'checkpoints',
  'compilation_cache',
  'coordinator',
  'data_dir',
  'devices',
  'distributed',
  'process_id',
  'processes',
  'profile',
  'round_size',
  'stream',
  'tensorboard',
)
# What `experiment.resolved` has put into other settings.
_IN_EPOCHS = ('epochs', 'evaluate_epochs', 'warmup_epochs', 'drop_epochs')
_COMPLETE = ('completed', 'diverged')  # What a result can say.
_MOST_NAMED = 3  # Differences in a sentence.
_MOST_RATES = 10_000  # Of a schedule that are compared.


class Plan(NamedTuple):
  """What there is of a run, and where to go on.

  Attributes:
    ended: How methods have ended, by name: ``status``, ``message``, ``step``.
    starts: Checkpoints that methods go on from, by name.
    evaluations: What was measured, and stays.
    kept: How many lines of each method in `metrics.jsonl` that is.
    serial: Of the last checkpoint.
    complete: Whether nothing is left to do.
  """

  ended: dict[str, dict[str, Any]]
  starts: dict[str, Found]
  evaluations: list[events.Evaluation]
  kept: dict[str, int]
  serial: int
  complete: bool


def nothing() -> Plan:
  """The plan of a run that has not begun."""
  return Plan({}, {}, [], {}, 0, False)


def check(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Raises a ValueError unless a folder's run may go on with a config.

  Args:
    config: A config that ``experiment.resolved`` has resolved.
    workdir: The folder of a run.

  Raises:
    ValueError: Its run has another config that this one does not extend.
    OSError: The config cannot be read.
  """
  path = workdir / 'config.json'
  if not path.exists():
    found = files.of_a_run(workdir)
    raise ValueError(
      f'{workdir} holds {found} but no config.json, so that no run can go on '
      'there; give another --workdir'
    )
  refuse_another(f'{workdir} holds a run', _config_at(path), config)


def config_in(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """The config of the run that a folder holds.

  Raises:
    ValueError: It holds none.
    OSError: It cannot be read.
  """
  path = workdir / 'config.json'
  if not path.exists():
    raise ValueError(f'{workdir} holds no run: there is no config.json')
  return _config_at(path)


def _config_at(path):
  """The config in a file."""
  try:
    config = checkpoints.from_plain(_read_json(path))
    settings.check(config)
    events.methods(config)
  except (AttributeError, LookupError, TypeError, ValueError) as e:
    said = str(e).removeprefix(f'{path} is damaged: ')
    raise ValueError(f'{path} is damaged: {said}') from e
  return config


def _read_json(path):
  try:
    read = json.loads(path.read_text())
  except ValueError as e:
    raise ValueError(f'{path} is damaged: it holds no JSON') from e
  if not isinstance(read, dict):
    raise ValueError(f'{path} is damaged: it holds no object')
  return read


def refuse_another(
  what: str,
  earlier: ml_collections.ConfigDict,
  config: ml_collections.ConfigDict,
) -> None:
  """Raises a ValueError unless a config is an earlier one, or extends it.

  Args:
    what: Of what the earlier one is, the begin of a sentence.
    earlier: The earlier one.
    config: The other.
  """
  now, before = _plain(config), _plain(earlier)
  differ = _differences(before, now)
  if not differ:
    return
  reason = ''
  if not set(differ) - {'updates', 'methods'}:
    reason = _not_only_longer(earlier, config)
    if not reason:
      return
  first = differ[:_MOST_NAMED]
  shown = lambda settings: ', '.join(
    f'{name}={_shown(settings.get(name))}' for name in first
  )
  more = len(differ) - len(first)
  also = f' ({more} more differ)' if more else ''
  raise ValueError(
    f'{what} with {shown(before)}, and this one has {shown(now)}{also}{reason}'
    '; give another --workdir'
  )


def _plain(config):
  """The settings of a run; the methods by their names, however given."""
  plain = files.plain(config.to_dict())
  plain['methods'] = [method.name for method in events.methods(config)]
  return plain | {'parallel': None, 'guidance': None}


def _differences(before, now):
  """The settings that make another run, by name."""
  names = [n for n in (now | before) if n not in (*ELSEWHERE, *_IN_EPOCHS)]
  absent = object()
  return [n for n in names if before.get(n, absent) != now.get(n, absent)]


def _shown(value):
  text = json.dumps(value)
  return text if len(text) <= 60 else text[:57] + '...'


def _not_only_longer(before, config):
  """What a run with more updates or methods changes of the one before."""
  if config.updates < before.updates:
    return ' (a run can become longer, not shorter)'
  old, new = events.methods(before), events.methods(config)
  if new[: len(old)] != old:
    return ' (methods can be added at the end alone)'
  for method in old:
    if not _same_rates(before, config, method):
      return (
        ' (with more updates the learning rate would have been another from '
        'the start)'
      )
  return ''


def _same_rates(before, config, method):
  old, new = (transformation.learning_rate(c, method) for c in (before, config))
  if not callable(old) or not callable(new):
    return old == new
  steps = np.linspace(0, before.updates - 1, _MOST_RATES).astype(np.int32)
  return bool(np.array_equal(*(jax.vmap(f)(steps) for f in (old, new))))


def plan(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  say: Callable[[str], Any],
  dataset: data.Dataset | None = None,
) -> Plan:
  """What there is of a run in a folder that `check` has passed.

  Args:
    config: As in `check`.
    workdir: Likewise.
    say: Called with sentences: which checkpoints cannot be used, and why.
    dataset: What seed 0 learns from; None is not compared.

  Raises:
    ValueError: A checkpoint is of another config, or of other data; or there is
      none, and a run that begins again would lose what is there.
    OSError: A file cannot be read.
  """
  named = {m.name: m for m in events.methods(config)}
  lines = _lines(workdir / 'metrics.jsonl', named)
  finished = _finished(config, workdir, lines, named)
  if finished is not None:
    return finished
  recorded = collections.Counter(line['method'] for line in lines)
  root = workdir / checkpoints.FOLDER

  say = functools.cache(say)  # Once.
  lacking = []  # Checkpoints that are whole, where metrics are not.

  def first_usable(method=None):
    for found in checkpoints.usable(root, say, method):
      earlier = checkpoints.config_of(found.position)
      refuse_another(f'{found.folder} is of a run', earlier, config)
      if dataset is not None and found.position['learned'] != learned(dataset):
        raise ValueError(
          f'{found.folder} is of a run on other data than {config.dataset} '
          'holds now; give another --workdir'
        )
      lacks = [
        name
        for name, number in found.position['lines'].items()
        if recorded[name] < number
      ]
      if not lacks:
        return found
      lacking.append(found)
      say(
        f'{found.folder} cannot be used: metrics.jsonl lacks lines of '
        f'{lacks[0]} that were measured before it'
      )
    return None

  found = first_usable()
  if found is None:
    _check_nothing_is_lost(workdir, lacking)
    return nothing()
  ended = dict(found.position['ended'])
  starts = {}
  for name in named:
    if name in ended and not _goes_on(ended[name], config):
      continue
    # Also of one that waits, to become longer, for the method that is first.
    start = found if name == found.method else first_usable(name)
    if start is None:
      ended.pop(name, None)
    elif name in ended or _is_unfinished(start, config):
      ended.pop(name, None)
      starts[name] = start
    else:
      ended[name] = start.position['ended'][name]
  kept = {name: recorded[name] for name in ended}
  for name, start in starts.items():
    kept[name] = start.position['lines'][name]
  arrivals = found.position['arrivals'] | {
    name: start.position['arrivals'].get(name) for name, start in starts.items()
  }
  return Plan(
    ended,
    starts,
    _evaluations(lines, named, kept, arrivals),
    kept,
    found.serial,
    complete=False,
  )


def _goes_on(end, config):
  return end['status'] == 'completed' and end['step'] < config.updates


def _is_unfinished(start, config):
  end = start.position['ended'].get(start.method)
  return end is None or _goes_on(end, config)


def _check_nothing_is_lost(workdir, lacking):
  """Raises where a run that begins again would lose what is there."""
  if lacking:
    raise ValueError(
      f'{workdir} holds checkpoints, and metrics.jsonl lacks what was measured '
      'before them; put it back, or give another --workdir'
    )
  result = _result(workdir)
  if result is not None and result.get('status') in _COMPLETE:
    raise ValueError(
      f'{workdir} holds a run that was complete, and no checkpoint to go on '
      'from; give another --workdir'
    )


def _result(workdir):
  """What `result.json` says, or None where it is not there or says nothing."""
  path = workdir / 'result.json'
  with contextlib.suppress(OSError, ValueError):
    return _read_json(path)
  return None


def _finished(config, workdir, lines, named):
  """The plan of a run that is complete: its result says so."""
  result = _result(workdir)
  # The picture is the last thing that a run writes.
  if result is None or not (workdir / 'curves.png').exists():
    return None
  last = {line['method']: line['step'] for line in lines}
  try:
    before = checkpoints.from_plain(result['config'])
    differ = _differences(_plain(before), _plain(config))
    told = {name: m['step'] for name, m in result['methods'].items()}
    ended = {
      name: {'status': m['status'], 'message': m['message'], 'step': None}
      for name, m in result['methods'].items()
    }
  except (AttributeError, LookupError, TypeError, ValueError):
    return None
  if differ or result.get('status') not in _COMPLETE or told != last:
    return None
  kept = dict(collections.Counter(line['method'] for line in lines))
  evaluations = _evaluations(lines, named, kept, {})
  return Plan(ended, {}, evaluations, kept, 0, complete=True)


def _lines(path, named):
  """The lines of a file of metrics that are of the run's methods."""
  if not path.exists():
    return []
  lines = (line for _, line in files.whole_lines(path))
  return [line for line in lines if line['method'] in named]


def _evaluations(lines, named, kept, arrivals):
  """The evaluations that stay."""
  seen = collections.Counter()
  evaluations = []
  for line in lines:
    name = line['method']
    seen[name] += 1
    if seen[name] <= kept.get(name, 0):
      last = seen[name] == kept[name]
      evaluations.append(
        events.evaluation_of(
          line, named[name], arrivals.get(name) if last else None
        )
      )
  return evaluations


def said(done: Plan) -> str:
  """What other processes have to know of a plan, in words for `read`."""
  starts = {name: [str(s.folder), s.serial] for name, s in done.starts.items()}
  return json.dumps([done.ended, starts, done.serial, done.complete])


def read(words: str) -> Plan:
  """The plan that the first process has told of."""
  ended, starts, serial, complete = json.loads(words)
  starts = {
    name: checkpoints.found_at(pathlib.Path(folder), number)
    for name, (folder, number) in starts.items()
  }
  return Plan(ended, starts, [], {}, serial, complete)


def notices(
  found: Found, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> list[str]:
  """Why the last bits may differ from those of a run that was never stopped."""
  before, now = found.position['computed'], computed(config, mesh)
  differ = [
    f'{name} {before.get(name)} before, {now[name]} now'
    for name in now
    if before.get(name) != now[name]
  ]
  if not differ:
    return []
  return [f'numbers may differ in their last bits: {"; ".join(differ)}']


def computed(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """What the last bits of a run depend on."""
  device = mesh.devices.flat[0]
  return {
    'gsgd_jax': __version__,
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
    'platform': device.platform,
    'device': device.device_kind,
    'devices': mesh.size,
    'processes': jax.process_count(),
    'dispatch': 'loop',  # Calls in a loop of a compiled program.
    'round_size': config.round_size,
  }


def learned(dataset: data.Dataset) -> dict[str, Any]:
  """What a run learns from: what a model must know, and what shows a change.

  Of inputs that are not integers the last bits depend on the machine.
  """
  digest = hashlib.sha256()
  for x in jax.tree.leaves((dataset.train, dataset.validation, dataset.test)):
    x = np.asarray(x)
    if x.dtype.kind in 'iu':
      digest.update(np.ascontiguousarray(x).data)
  return {
    'shape': list(dataset.shape),
    'classes': [str(c) for c in dataset.classes],
    'examples': dataset.examples,
    'digest': digest.hexdigest(),
  }


class Journal:
  """What a run has done so far: what its checkpoints say beside the arrays.

  Args:
    config: The run's settings.
    dataset: What is learned from.
    mesh: The devices.
    done: What was done before.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    dataset: data.Dataset,
    mesh: jax.sharding.Mesh,
    done: Plan,
  ) -> None:
    self._same = {
      'config': files.plain(config.to_dict()),
      'learned': learned(dataset),
      'computed': computed(config, mesh),
    }
    self.devices: int = mesh.size
    self._ended = dict(done.ended)
    self._lines = collections.Counter()
    self._arrivals = {}
    self._step = {}
    for evaluation in done.evaluations:
      self.add(evaluation)

  def add(self, event: events.Event) -> None:
    """Takes note of an event."""
    name = event.method.name
    if isinstance(event, events.Evaluation):
      self._lines[name] += 1
      self._step[name] = event.step
      self._arrivals[name] = event.arrivals
    elif isinstance(event, events.Finished):
      self._end(name, event.status, event.message)

  def _end(self, name, status, message):
    step = self._step.get(name, 0)
    self._ended[name] = {'status': status, 'message': message, 'step': step}

  def position(
    self,
    method: str,
    step: int,
    calls: int,
    status: str,
    reports: dict[str, Any],
  ) -> dict[str, Any]:
    """What a checkpoint says."""
    if status != 'running':
      self._end(method, status, None)
    best = reports['seeds']['best_step']
    return self._same | {
      'method': method,
      'step': step,
      'calls': calls,
      'status': status,
      'ended': self._ended,
      'lines': dict(self._lines),
      'arrivals': {
        name: {k: v.tolist() for k, v in arrivals._asdict().items()}
        for name, arrivals in self._arrivals.items()
      },
      'best_step': best if all(best) else None,
      'reports': reports,
    }


class Saving:
  """A method's checkpoints, as training sees them.

  Args:
    writer: Writes them.
    journal: Says where the run is.
    method: The method.
    start: The checkpoint to go on from, if any.
  """

  def __init__(
    self,
    writer: checkpoints.Writer,
    journal: Journal,
    method: events.Method,
    start: Found | None,
  ) -> None:
    self.start: Found | None = start
    self.must = writer.must
    self.wants = writer.wants
    self.next_stop = writer.next_stop
    self._writer = writer
    self._journal = journal
    self._method = method
    self._devices = journal.devices
    writer.begin(method.name, start)

  @property
  def leaving(self) -> bool:
    """Whether training is to end here."""
    return self._writer.leaving

  def save(
    self,
    step: int,
    calls: int,
    status: str,
    reports: dict[str, Any],
    items: dict[str, Any],
  ) -> None:
    """Writes a checkpoint.

    Args:
      step: Arriving gradients so far.
      calls: Calls so far.
      status: 'running', or how the method has ended.
      reports: What JSON can say of what is reported.
      items: 'state', 'params' and 'best', None where there is none.
    """
    name = self._method.name
    position = self._journal.position(name, step, calls, status, reports)
    items = {k: v for k, v in items.items() if v is not None}
    items['state'] = checkpoints.named(items['state'])
    self._writer.save(name, step, position, items)

  def restored(
    self, of_method: programs.Programs, carry: Any, params: Any
  ) -> tuple[Any, Any, Any]:
    """The carry, and parameters, each seed's best and last, of the start.

    Args:
      of_method: The method's programs.
      carry: One like it, on its devices; it is deleted.
      params: Parameters of all seeds, likewise; they stay.

    Returns:
      The carry; the best ones, None where there are none; the last ones, None
      where no seed has stopped.
    """
    start = self.start
    assert start is not None  # There is something to restore.
    like = _placed_like(carry)
    for x in jax.tree.leaves(carry):
      x.delete()  # Both may not fit.
    items = {}
    if start.position['best_step'] is not None:
      items['best'] = _placed_like(params)
    if any(start.position['reports']['seeds']['stopped']):
      items['params'] = _placed_like(params)
    before = start.position['computed']['devices']
    if before == self._devices:
      items['state'] = checkpoints.named(like)
    found = checkpoints.restore(start, items)
    if before == self._devices:
      carry = checkpoints.unnamed(like, found['state'])
    else:
      leaves = checkpoints.arrays(start, 'state')
      carry = checkpoints.unnamed(of_method.like(before), leaves)
      carry = of_method.moved(carry, before)
    return carry, found.get('best'), found.get('params')


def _placed_like(tree):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )
