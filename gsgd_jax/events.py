"""What happens in a run, event by event, and what is kept of it."""

from typing import Any, NamedTuple

import ml_collections
import numpy as np

from gsgd_jax import settings

PARALLEL = (
  'sequential',
  'synchronous',
  'asynchronous',
  'delayed',
  'data_parallel',
)
# Guidance, and how it is said.
GUIDANCE = {
  'consistent': 'guided',
  'random': 'random replays',
  'hardest': 'hardest replays',
  'inconsistent': 'inconsistent replays',
  'surprise': 'surprise replays',
}


class Method(NamedTuple):
  """A row of the comparison: where gradients come from, and what is done."""

  name: str
  parallel: str
  compensation: str | None  # By its name in `compensations`.
  select: str | None  # Guided SGD's selection; None is no guidance.

  @property
  def label(self) -> str:
    """What it is called in tables and pictures."""
    words = [self.parallel.replace('_', ' ')]
    if self.compensation is not None:
      words.append(settings.COMPENSATIONS[self.compensation])
    if self.select is not None:
      words.append(GUIDANCE[self.select])
    return ', '.join(words)


def methods(config: ml_collections.ConfigDict) -> list[Method]:
  """The methods of a config, in order.

  Raises:
    ValueError: One is unknown, or named twice.
  """
  names = [n.strip() for m in config.methods for n in m.split(',')]
  if config.parallel is not None:
    guidance = '' if config.guidance is None else f'+{config.guidance}'
    names = [f'{config.parallel}{guidance}']
  if not names:
    raise ValueError(f'methods must name at least one of {", ".join(PARALLEL)}')
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f'methods must differ, got {name} twice')
  found = [m for name in names for m in _compensated(config, name)]
  return list(dict.fromkeys(found))


def _compensated(config, name):
  """What a name of a config stands for: itself, or compensated methods."""
  method = method_named(name)
  compensation = config.compensation
  if compensation is not None:
    settings.one_of('compensation', compensation, settings.COMPENSATIONS)
  mean = method.parallel == 'synchronous' and config.combine == 'mean'
  stale = method.parallel not in ('sequential', 'data_parallel') and not mean
  if compensation is None or method.compensation is not None or not stale:
    return [method]
  guidance = '' if method.select is None else f'+{method.select}'
  changed = method_named(f'{method.parallel}+{compensation}{guidance}')
  # What it wins shows beside the plain method.
  alone = method.select is None and config.parallel is None
  return [method, changed] if alone else [changed]


def method_named(name: str) -> Method:
  """The method of a name, PARALLEL[+COMPENSATION][+GUIDANCE]."""
  parallel, *rest = name.split('+')
  settings.one_of('a method', parallel, PARALLEL)
  compensation = select = None
  known = {**settings.COMPENSATIONS, **GUIDANCE}
  if rest and rest[0] in settings.COMPENSATIONS:
    compensation, known = rest.pop(0), GUIDANCE
  if rest:
    settings.one_of(f'what follows + in {name}', rest[0], known)
    select = rest.pop(0)
  if rest:
    raise ValueError(
      f'a method is PARALLEL[+COMPENSATION][+GUIDANCE], got {name}'
    )
  return Method(name, parallel, compensation, select)


class Started(NamedTuple):
  """A method is about to be compiled."""

  method: Method


class Progress(NamedTuple):
  """A chunk of calls has finished."""

  method: Method
  step: int  # Arriving gradients so far.
  loss: float  # Mean over the chunk's batches and the seeds, as workers saw it.
  staleness: float  # Mean over the chunk's arrivals; NaN if there was none.


class Arrivals(NamedTuple):
  """Whose gradients were applied, and how stale they were; since the start."""

  mean: np.ndarray  # shape=(seeds,): mean staleness; NaN before the first.
  histogram: np.ndarray  # shape=(bins,), int: of staleness, over all seeds.
  # shape=(workers,): each worker's share of the applied gradients over a fair
  # share, from the slowest to the fastest of each seed, their mean over seeds.
  shares: np.ndarray


class Evaluation(NamedTuple):
  """Measurements at a step, for every seed: shape=(seeds,) each."""

  method: Method
  step: int
  epoch: float
  arrivals: Arrivals
  simulated_time: np.ndarray  # In mean gradient computations.
  gradient_evaluations: np.ndarray  # Those in flight and replays included.
  train_loss: np.ndarray  # Over the whole split; NaN where there is no split.
  validation_loss: np.ndarray
  test_loss: np.ndarray
  train_accuracy: np.ndarray  # In [0, 1].
  validation_accuracy: np.ndarray
  test_accuracy: np.ndarray
  staleness: np.ndarray  # Mean since the last evaluation; NaN at the first.
  latest_staleness: np.ndarray  # Of the last gradient.
  maximal_staleness: np.ndarray  # Since the start.
  applied: np.ndarray  # Updates of the server so far, replays aside.
  overwritten: np.ndarray  # Gradients so far.
  lost: np.ndarray  # Likewise, by failures.
  refused: np.ndarray  # Likewise, by a compensation.


MEASURED = Evaluation._fields[4:]


def evaluation_of(
  line: dict[str, Any], method: Method, arrivals: dict[str, Any] | None
) -> Evaluation:
  """The evaluation that a line of `metrics.jsonl` tells of.

  Args:
    line: What JSON says.
    method: The method.
    arrivals: The fields of its `Arrivals`; None where nobody asks for them.
  """
  numbers = lambda values: np.array(
    [np.nan if v is None else v for v in values]
  )
  arrivals = arrivals or dict.fromkeys(Arrivals._fields, ())
  return Evaluation(
    method,
    line['step'],
    line['epoch'],
    Arrivals(**{k: numbers(v) for k, v in arrivals.items()}),
    **{field: numbers(line[field]) for field in MEASURED},
  )


class Finished(NamedTuple):
  """A method has ended."""

  method: Method
  status: str  # 'completed', 'stopped_early' or 'diverged'.
  message: str | None  # What happened to a method that diverged.


Event = Started | Progress | Evaluation | Finished


class History(NamedTuple):
  """All evaluations of a method.

  Measurements (`MEASURED`) have shape=(evaluations, seeds).
  """

  method: Method
  status: str  # Of `Finished`; 'not_started', 'interrupted', 'failed'.
  message: str | None
  step: np.ndarray  # shape=(evaluations,), int.
  epoch: np.ndarray  # shape=(evaluations,).
  arrivals: Arrivals | None  # At the last evaluation.
  simulated_time: np.ndarray
  gradient_evaluations: np.ndarray
  train_loss: np.ndarray
  validation_loss: np.ndarray
  test_loss: np.ndarray
  train_accuracy: np.ndarray
  validation_accuracy: np.ndarray
  test_accuracy: np.ndarray
  staleness: np.ndarray
  latest_staleness: np.ndarray
  maximal_staleness: np.ndarray
  applied: np.ndarray
  overwritten: np.ndarray
  lost: np.ndarray
  refused: np.ndarray


class Results:
  """Collects events into a history for each method."""

  def __init__(self, config: ml_collections.ConfigDict) -> None:
    self._seeds = config.seeds
    self._evaluations: dict[Method, list[Evaluation]] = {
      m: [] for m in methods(config)
    }
    self._ends: dict[Method, tuple[str, str | None]] = {
      m: ('not_started', None) for m in self._evaluations
    }

  def add(self, event: Event) -> None:
    """Takes the next event."""
    if isinstance(event, Started):
      self._ends[event.method] = ('interrupted', None)  # Until it finishes.
    elif isinstance(event, Evaluation):
      self._evaluations[event.method].append(event)
    elif isinstance(event, Finished):
      self._ends[event.method] = (event.status, event.message)

  @property
  def complete(self) -> bool:
    """Whether every method has come to its end."""
    ends = ('completed', 'stopped_early', 'diverged')
    return all(status in ends for status, _ in self._ends.values())

  @property
  def all_diverged(self) -> bool:
    """Whether no method came to an end that means something."""
    return all(status == 'diverged' for status, _ in self._ends.values())

  def fail(self, message: str) -> None:
    """The method that runs, if one does, has failed."""
    for method, (status, _) in self._ends.items():
      if status == 'interrupted':
        self._ends[method] = ('failed', f'{method.label} failed: {message}')

  def histories(self) -> dict[str, History]:
    """What was measured so far, by the method's name."""
    return {m.name: self._history(m) for m in self._evaluations}

  def _history(self, method):
    events = self._evaluations[method]

    def stack(field):
      """Of float64, as what is read from a file."""
      values = np.array([getattr(e, field) for e in events])
      return values if values.dtype.kind in 'iu' else values.astype(float)

    return History(
      method,
      *self._ends[method],
      stack('step').astype(int),
      stack('epoch').astype(float),
      events[-1].arrivals if events else None,
      *(stack(field).reshape(-1, self._seeds) for field in MEASURED),
    )
