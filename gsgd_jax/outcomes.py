"""What a study has measured, and which of it is to be compared.

A *context* is a value for every axis of a study but the method: methods are
compared within it. An outcome that lacks an axis holds whatever its value is:
training without delay, say, knows no number of workers, and stands in the
contexts of all of them.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from gsgd_jax import events

# Budgets, in the order of columns, and how they are said.
BUDGETS = {
  'updates': 'equal updates',
  'gradients': 'equal gradient evaluations',
  'time': 'equal simulated time',
  'time, serial': 'equal simulated time, serial replays',
  'time, parallel': 'equal simulated time, parallel replays',
  'time, shared': 'equal simulated time, shared replays',
  'best epoch': 'best epoch (optimistic)',
}
_MAIN = 'gradients'  # Replays cost what any gradient costs.
WITHOUT_DELAY = ('sequential', 'data_parallel')
_DELAYED = ('asynchronous', 'delayed', 'synchronous')
_GUIDED = re.compile(
  '|'.join(rf'\b{re.escape(words)}\b' for words in events.GUIDANCE.values())
)


class Curve(NamedTuple):
  """A run as it went: arrays of shape=(points, seeds)."""

  updates: np.ndarray
  gradients: np.ndarray
  time: dict[str, np.ndarray]  # By the name of the clock.
  test_accuracy: np.ndarray  # In [0, 1].


class Outcome(NamedTuple):
  """What a method came to in a context, at a budget."""

  values: dict[str, str]  # Axis -> the value's label; 'method' is always there.
  method: events.Method
  budget: str  # Of `BUDGETS`.
  learning_rate: float  # Chosen on validation data, or given.
  # Learning rate -> validation accuracy in [0, 1], one a seed of the tuning;
  # empty where the rate was given.
  tried: dict[float, np.ndarray]
  seeds: np.ndarray  # shape=(n,).
  test_accuracy: np.ndarray  # shape=(n,), in [0, 1].
  diverged: np.ndarray  # shape=(n,), bool; their accuracy counts as chance.
  updates: np.ndarray  # shape=(n,): what was spent, like the next two.
  gradients: np.ndarray
  time: np.ndarray
  curve: Curve | None  # At the learning rate.
  # What companions must have in common, where that is known: everything but
  # guidance and the learning rate; and how guidance is done.
  settings: str = ''
  guidance: str = ''

  @property
  def label(self) -> str:
    """The method's."""
    return self.values['method']


class Context(NamedTuple):
  """What is compared with one another: outcomes by method and budget."""

  values: dict[str, str]  # Axis -> the value's label, without 'method'.
  table: dict[str, dict[str, Outcome]]  # Label of a method -> budget -> it.

  @property
  def name(self) -> str:
    """Its values, in words."""
    return named(self.values) or 'all'

  def at(self, label: str | None, budget: str) -> Outcome | None:
    """A method's outcome at a budget, if it was measured.

    Without replays every model of what they cost tells the same time: a plain
    'time' then stands for each of them.
    """
    row = {} if label is None else self.table.get(label, {})
    found = row.get(budget)
    if found is None and budget.startswith('time, ') and 'time' in row:
      found = row['time'] if row['time'].method.select is None else None
    return found if found is not None and len(measured(found)[0]) else None

  def known_at(self, label: str, budget: str) -> Outcome:
    """The same of what was measured, as is known."""
    found = self.at(label, budget)
    assert found is not None
    return found

  def budgets(self) -> list[str]:
    """The budgets that something was measured at, in the order of columns."""
    there = {b: None for row in self.table.values() for b in row}
    guided = {
      budget
      for row in self.table.values()
      for budget, outcome in row.items()
      if outcome.method.select is not None
    }
    if 'time' not in guided and any(b.startswith('time, ') for b in there):
      there.pop('time', None)  # It shows in each of the others.
    known = [b for b in BUDGETS if b in there]
    return known + [b for b in there if b not in BUDGETS]

  def method(self, label: str) -> events.Method:
    """The method of a label."""
    return next(iter(self.table[label].values())).method

  def sequential(self) -> str | None:
    """The label of training without delay, if it is there."""
    return next(self._with('sequential', None, None), None)

  def plain(self, label: str | None = None) -> str | None:
    """The label of the delayed method without anything.

    Args:
      label: Of a method, to have the one that is delayed as it is; without it
        the first that is there.
    """
    if label is None:
      return next(
        (q for p in _DELAYED for q in self._with(p, None, None)), None
      )
    parallel = self.method(label).parallel
    if parallel in WITHOUT_DELAY:
      return None
    return self._nearest(label, self._with(parallel, None, None), False)

  def companion(self, label: str, select: str | None) -> str | None:
    """The label of the same method with another guidance, if it is there."""
    method = self.method(label)
    same = self._with(method.parallel, method.compensation, select)
    return self._nearest(label, same, select is not None)

  def _with(self, *method):
    """The labels of the methods that are (parallel, compensation, select)."""
    return (q for q in self.table if self.method(q)[1:] == method)

  def _outcome(self, label):
    return next(iter(self.table[label].values()))

  def _nearest(self, label, labels, guided):
    """Of labels one of equal settings; where none are known, of a like name."""
    labels, own = list(labels), self._outcome(label)
    if own.settings:
      labels = [
        q
        for q in labels
        if self._outcome(q).settings == own.settings
        and (not guided or self._outcome(q).guidance == own.guidance)
      ]
    same = [q for q in labels if unguided(q) == unguided(label)]
    return next(iter(same + labels), None)


def named(values: dict[str, str]) -> str:
  """Values of axes in words.

  Examples:
    >>> from gsgd_jax import outcomes
    >>> outcomes.named({'task': 'digits', 'workers': '64', 'momentum': '0.9'})
    'digits, 64 workers, momentum 0.9'
  """
  words = []
  for axis, value in values.items():
    if axis == 'workers':
      words.append(f'{value} worker{"" if value == "1" else "s"}')
    else:
      words.append(value if number(value) is None else f'{axis} {value}')
  return ', '.join(words)


def number(text: str) -> float | None:
  """What a label says if it is a number."""
  try:
    return float(text)
  except ValueError:
    return None


def unguided(label: str) -> str:
  """A label without the words for guidance.

  Examples:
    >>> from gsgd_jax import outcomes
    >>> outcomes.unguided('DANA, random replays')
    'DANA'
  """
  parts = [part.strip() for part in _GUIDED.sub('', label).split(',')]
  return ', '.join(' '.join(p.split()) for p in parts if p and p != '()')


def contexts(outcomes: Iterable[Outcome]) -> list[Context]:
  """The contexts of outcomes, and what stands in them.

  Args:
    outcomes: Any, in any order; of two for one place the later one counts.

  Returns:
    One for each combination of values, sorted axis by axis: values in order of
    appearance, numbers by size. Methods are in order of appearance.
  """
  outcomes = list(outcomes)
  axes = {a: {} for o in outcomes for a in o.values if a != 'method'}
  for outcome in outcomes:
    for axis in axes.keys() & outcome.values.keys():
      axes[axis].setdefault(outcome.values[axis], len(axes[axis]))
  combinations = []
  for outcome in outcomes:
    values = _without_method(outcome)
    if values not in combinations:
      combinations.append(values)
  complete = [
    values
    for values in combinations
    if not any(values.items() < other.items() for other in combinations)
  ]
  complete.sort(key=lambda values: _position(values, axes))
  return [
    Context(
      {a: values[a] for a in axes if a in values}, _table(outcomes, values)
    )
    for values in complete
  ]


def _without_method(outcome):
  return {a: v for a, v in outcome.values.items() if a != 'method'}


def _position(values, axes):
  """Where a combination stands; a value that is missing comes first."""
  out: list[float | None] = []
  for axis, places in axes.items():
    numbers = all(number(v) is not None for v in places)
    value = values.get(axis)
    if value is None:
      out.append(float('-inf'))
    else:
      out.append(number(value) if numbers else places[value])
  return out


def _table(outcomes, values):
  table = {}
  for outcome in outcomes:
    if _without_method(outcome).items() <= values.items():
      table.setdefault(outcome.label, {})[outcome.budget] = outcome
  return table


def groups(found: list[Context]) -> list[list[Context]]:
  """Contexts that are alike but for the number of workers, in order."""
  out = {}
  for context in found:
    out.setdefault(tuple(without_workers(context).items()), []).append(context)
  return list(out.values())


def without_workers(context: Context) -> dict[str, str]:
  """The values of a context but for the number of workers."""
  return {a: v for a, v in context.values.items() if a != 'workers'}


def main_budget(budgets: list[str]) -> str:
  """The budget that methods are sorted by: equal gradient evaluations."""
  return budgets[0] if budgets and _MAIN not in budgets else _MAIN


def measured(outcome: Outcome) -> tuple[np.ndarray, np.ndarray]:
  """The seeds that have a number, and their test accuracy in %."""
  accuracy = 100 * np.asarray(outcome.test_accuracy, float)
  there = ~np.isnan(accuracy)
  return np.asarray(outcome.seeds)[there], accuracy[there]


def aligned(*found: Outcome | None) -> list[np.ndarray] | None:
  """Test accuracy in % on the seeds that all outcomes have, in one order.

  Args:
    found: Outcomes, or None for what was not measured.

  Returns:
    An array for each, or None where one is missing or no seed is common.
  """
  seeds = common(*found)
  if not seeds:
    return None
  by_seed = [
    dict(zip(*measured(o), strict=True)) for o in found if o is not None
  ]
  return [np.array([values[seed] for seed in seeds]) for values in by_seed]


def common(*found: Outcome | None) -> list[int]:
  """The seeds that all outcomes have a number for, in order.

  Args:
    found: Outcomes, or None for what was not measured.

  Returns:
    Seeds; none where an outcome is missing.
  """
  there = [set(measured(o)[0].tolist()) for o in found if o is not None]
  return sorted(set.intersection(*there)) if len(there) == len(found) else []
