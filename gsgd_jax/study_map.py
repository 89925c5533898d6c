"""The map of a study: when is asynchrony worth it, and when is guidance?

Whether to wait for one another is decided by what a synchronisation costs, by
how much machines differ, and by how many there are. A *map* has a square for
each combination of these, its context, and in each square *families* of methods
compete within the same simulated time:

1. of each family one method stands for it, that of the highest validation
   accuracy, so that a family of many is not flattered by its luckiest one;
2. families are compared by their methods' test accuracy, paired by seed. The
   first one wins, and its margin is its lead over the second.

Controls take no part: replays of other batches than the consistent ones would
win what is not guidance's. They are compared with guidance on their own.

The winner is compared with the second on the data that made it the first. For
independent normal means the common two-sided test is valid even so, however
many there are (Hung & Fithian, arXiv:1610.03944); of 20,000 simulated squares
of 2 to 5 families on 10 common seeds, the best two alike, it erred in 5.2 % at
most.
"""

from typing import NamedTuple

import numpy as np

from gsgd_jax import events, outcomes, report, statistics
from gsgd_jax.outcomes import Context, Outcome

TITLE = 'When is asynchrony worth it, and when is guidance?'
SYNC_COST: str = 'sync cost'
VARIES: str = 'machines vary by'
WORKERS: str = 'workers'
ALPHA = 0.05
_GUIDED = 'consistent'
# Equal simulated time, whatever the name of its clock.
_BUDGETS = ('time, shared', 'time, parallel', 'time')


class Family(NamedTuple):
  """How a family is told and drawn."""

  code: str  # What it is in a square, for those who see no colours.
  colour: str  # Warm is asynchronous, cool is not.
  words: str
  asynchronous: bool
  guided: bool


_BLACK, _, _BLUE, _GREEN, _PINK, _ORANGE = report.COLOURS
# The simpler first: a tie is theirs.
FAMILIES = {
  'data parallel': Family('D', _BLACK, 'Data-parallel training', False, False),
  'synchronous': Family('S', _BLUE, 'Synchronous training', False, False),
  'asynchronous': Family(
    'A', _ORANGE, 'Asynchronous training without guidance', True, False
  ),
  'guided rounds': Family(
    'SG', _GREEN, 'Guided synchronous training', False, True
  ),
  'asynchronous, guided': Family(
    'AG', _PINK, 'Guided asynchronous training', True, True
  ),
}


def family(method: events.Method) -> str | None:
  """The family that a method competes for.

  Args:
    method: Any.

  Returns:
    ``'asynchronous'`` (delayed, too; compensated or not), ``'asynchronous,
    guided'``, ``'synchronous'``, ``'data parallel'`` or ``'guided rounds'``
    (either of the last two with guidance). None for what takes no part:
    training without other workers, and replays that are controls of guidance.

  Examples:
    >>> from gsgd_jax import events, study_map
    >>> study_map.family(events.method_named('delayed+dana+consistent'))
    'asynchronous, guided'
    >>> study_map.family(events.method_named('data_parallel+random'))
  """
  if method.parallel == 'sequential' or method.select not in (None, _GUIDED):
    return None
  guided = method.select is not None
  if method.parallel in ('asynchronous', 'delayed'):
    return 'asynchronous, guided' if guided else 'asynchronous'
  return 'guided rounds' if guided else method.parallel.replace('_', ' ')


class Entry(NamedTuple):
  """A family in a square: the method that stands for it."""

  family: str
  outcome: Outcome
  test_accuracy: np.ndarray  # In %, on the seeds that all entries have.

  @property
  def asynchronous(self) -> bool:
    return FAMILIES[self.family].asynchronous

  @property
  def guided(self) -> bool:
    return FAMILIES[self.family].guided


class Compared(NamedTuple):
  """A paired difference in a square, in points of test accuracy."""

  found: statistics.Paired
  adjusted: float  # p, for all squares of the map.

  @property
  def shown(self) -> bool:
    """Whether there is a difference."""
    return self.adjusted < ALPHA  # NaN is not.


class Square(NamedTuple):
  """A context, and how families compare in it."""

  context: Context
  entries: tuple[Entry, ...]  # The winner first; two at least.
  margin: Compared  # The first less the second.
  # Guidance, in the better one of its families, less the same method with
  # random replays; None where one of them is missing.
  against_random: Compared | None

  @property
  def winner(self) -> Entry:
    return self.entries[0]

  def value(self, axis: str) -> str:
    """The label of its place on an axis."""
    return self.context.values.get(axis, '')


def maps(contexts: list[Context]) -> list[list[Context]]:
  """The contexts of each map of a study.

  Args:
    contexts: All of a study.

  Returns:
    Contexts that are alike but for the axes of a map, sync cost, machines vary
    by and workers, if they have several sync costs and two families that
    competed; none where there is nothing to see.
  """
  found = {}
  for context in contexts:
    if SYNC_COST in context.values:
      found.setdefault(tuple(elsewhere(context).items()), []).append(context)
  return [
    group
    for group in found.values()
    if len(labels(group, SYNC_COST)) > 1 and squares(group)
  ]


def elsewhere(context: Context) -> dict[str, str]:
  """Its values on other axes than those of a map."""
  of_map = (SYNC_COST, VARIES, WORKERS)
  return {a: v for a, v in context.values.items() if a not in of_map}


def labels(contexts: list[Context], axis: str) -> list[str]:
  """The labels of an axis: numbers by size, others as they appear."""
  found = list(dict.fromkeys(c.values.get(axis, '') for c in contexts))
  numbers = all(outcomes.number(label) is not None for label in found)
  return sorted(found, key=float) if numbers else found


def squares(contexts: list[Context]) -> list[Square]:
  """Who wins where.

  Args:
    contexts: Of one map.

  Returns:
    A square for each context where two families were measured on common seeds,
    in the order of the contexts. p values are adjusted for all of them.
  """
  found = {}
  for i, context in enumerate(contexts):
    entries = _entries(context)
    if len(entries) > 1:
      found[i] = entries
  margins = adjusted([lead(*entries[:2]) for entries in found.values()])
  controls = [_less_random(contexts[i], e) for i, e in found.items()]
  of_controls = iter(adjusted([c for c in controls if c is not None]))
  return [
    Square(
      contexts[i], entries, margin, None if c is None else next(of_controls)
    )
    for (i, entries), margin, c in zip(
      found.items(), margins, controls, strict=True
    )
  ]


def _entries(context):
  """One of each family, the best test accuracy first."""
  best = {}
  for label in context.table:
    outcome = _at_equal_time(context, label)
    kind = family(context.method(label))
    if outcome is None or kind is None:
      continue
    if kind not in best or _validated(outcome) > _validated(best[kind]):
      best[kind] = outcome
  best = {kind: best[kind] for kind in FAMILIES if kind in best}
  accuracy = outcomes.aligned(*best.values()) if best else None
  if accuracy is None:
    return ()
  entries = map(Entry, best, best.values(), accuracy)
  return tuple(sorted(entries, key=lambda e: -round(e.test_accuracy.mean(), 9)))


def _at_equal_time(context, label):
  """What a method came to, and guided ones by the clock of what they cost."""
  found = (context.at(label, budget) for budget in _BUDGETS)
  return next((outcome for outcome in found if outcome is not None), None)


def _validated(outcome):
  """Validation accuracy at the chosen rate, below zero if it was given."""
  if not outcome.tried:
    return -1.0
  rate = min(outcome.tried, key=lambda r: abs(r - outcome.learning_rate))
  values = np.nan_to_num(np.asarray(outcome.tried[rate], float))
  return round(float(values.mean()), 9) if len(values) else -1.0


def lead(first: Entry, second: Entry) -> statistics.Paired:
  """What an entry is better by, in points."""
  return statistics.paired(first.test_accuracy, second.test_accuracy)


def adjusted(found: list[statistics.Paired]) -> list[Compared]:
  """Differences of one family of comparisons, in order."""
  p = statistics.holm([paired.p for paired in found])
  return [Compared(f, float(q)) for f, q in zip(found, p, strict=True)]


def _less_random(context, entries):
  """Guidance less the control that spends as much; None without one."""
  guided = [e for e in entries if e.guided]
  if not guided:
    return None
  ours = guided[0].outcome
  control = context.companion(ours.label, 'random')
  if control is None:
    return None
  values = outcomes.aligned(ours, _at_equal_time(context, control))
  return None if values is None else statistics.paired(*values)
