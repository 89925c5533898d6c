"""What the map of a study says: where who wins, in sentences and a table."""

import functools
import itertools
from typing import Any

import numpy as np

from gsgd_jax import (
  outcomes,
  report,
  statistics,
  study_map,
  study_map_pictures,
)
from gsgd_jax.documents import Block, Folded, Heading, Paragraph, Picture, Table
from gsgd_jax.outcomes import Context
from gsgd_jax.study_map import (
  ALPHA,
  FAMILIES,
  SYNC_COST,
  TITLE,
  VARIES,
  WORKERS,
  Square,
)

_NOTHING = '-'
_ROUNDING = 1e-9  # What is no difference.


def blocks(contexts: list[Context]) -> list[Block]:
  """What the maps of a study say: pictures, sentences, tables.

  Args:
    contexts: All of a study.

  Returns:
    Blocks with a heading of level 2; none if there is no map.
  """
  found = study_map.maps(contexts)
  out: list[Block] = [Heading(2, TITLE)] if found else []
  for i, group in enumerate(found):
    elsewhere = outcomes.named(study_map.elsewhere(group[0]))
    if len(found) > 1:
      out.append(Heading(3, elsewhere))
    out.append(
      Picture(
        f'map-{i + 1}.png' if i else 'map.png',
        f'{TITLE} {_CAPTION}',
        functools.partial(study_map_pictures.draw_map, contexts=group),
      )
    )
    here = study_map.squares(group)
    out += [Paragraph(' '.join(part)) for part in (answers(here), wins(here))]
    out.append(Folded('Every square of the map', list(_table(here))))
  return out


_CAPTION = (
  'In every square families of methods have the same simulated time; replays '
  'are split over all workers, the cheapest way to take them, and scoring '
  'batches costs nothing. A method '
  'stands for each family, chosen on validation data; the colour is that of '
  'the family whose test accuracy is the highest, the number its lead over the '
  'second in points. Colours are strong where the lead is shown: by a paired '
  "t-test over seeds, adjusted for all squares by Holm and Bonferroni's "
  'method, p < 0.05. The line parts asynchronous from synchronous winners.'
)


def answers(found: list[Square]) -> list[str]:
  """Where asynchrony is worth it, and where guidance is, in sentences.

  Args:
    found: The squares of a map.

  Returns:
    Sentences, the counts of which follow from the squares alone.
  """
  out = []
  kinds = (
    ('Asynchrony, guided or not,', 'whatever waits', 'asynchronous'),
    ('Guidance, in rounds or not,', 'whatever has none', 'guided'),
  )
  for ours, theirs, side in kinds:
    contest = _contest(found, side)
    ahead = [s for s, c in contest if c.found.difference.mean > _ROUNDING]
    if contest:
      out.append(
        f'{ours} is ahead of {theirs} in {_of(ahead, contest)}, '
        f'{_shown_of([c for _, c in contest])}'
        f'{_where([s for s, _ in contest], ahead)}.'
      )
  return out + _of_controls(found)


def _contest(found, side):
  """The best entry on a side less the best on the other, where both are."""
  pairs = []
  for square in found:
    ours = [e for e in square.entries if getattr(e, side)]
    theirs = [e for e in square.entries if not getattr(e, side)]
    if ours and theirs:
      pairs.append((square, study_map.lead(ours[0], theirs[0])))
  compared = study_map.adjusted([paired for _, paired in pairs])
  return [(s, c) for (s, _), c in zip(pairs, compared, strict=True)]


def _shown_of(compared):
  """How many differences are real, for and against."""
  shown = [c.found.difference.mean > 0 for c in compared if c.shown]
  ahead, behind = sum(shown), len(shown) - sum(shown)
  return f'shown in {_count(ahead)}, and shown to be behind in {_count(behind)}'


def _count(n):
  return str(n or 'none')


def _of_controls(found):
  """Whether guidance is more than its replays."""
  there = [s for s in found if s.against_random is not None]
  if not there:
    return []
  lead = lambda s: s.against_random.found.difference.mean
  ahead = [s for s in there if lead(s) > _ROUNDING]
  return [
    'Guidance is ahead of the same method with as many random replays in '
    f'{_of(ahead, there)}, {_shown_of([s.against_random for s in there])}.'
  ]


def wins(found: list[Square]) -> list[str]:
  """Where each family wins, in sentences.

  Args:
    found: The squares of a map.

  Returns:
    A sentence for each family that wins, most squares first, and one for all
    that never do.
  """
  won = {
    kind: [s for s in found if s.winner.family == kind]
    for kind in FAMILIES
    if any(e.family == kind for s in found for e in s.entries)
  }
  out = []
  for kind, ours in sorted(won.items(), key=lambda item: -len(item[1])):
    if ours:
      shown = sum(s.margin.shown for s in ours)
      out.append(
        f'{FAMILIES[kind].words} wins in {_of(ours, found)}, '
        f'{_count(shown)} of them shown{_where(found, ours)}.'
      )
  never = [FAMILIES[kind].words for kind, ours in won.items() if not ours]
  if never:
    first, *rest = never
    listed = [first, *(words[0].lower() + words[1:] for words in rest)]
    last = f' and {listed[-1]}' if rest else ''
    verb = 'win' if rest else 'wins'
    out.append(f'{", ".join(listed[:-1] or listed)}{last} {verb} nowhere.')
  return out


def _of(some, everything):
  n = len(everything)
  if len(some) == n:
    return f'all {n} squares' if n > 1 else 'the only square'
  return f'{len(some)} of {n} squares'


_LEAST_CLEAR = 0.25  # A region that is worth telling.
_LEAST_SHARE = 1 / 3  # Of its squares.
_PER_CONDITION = 0.05  # How much clearer one more condition has to make it.


def _where(found, ours):
  """The plain region of a map that tells some of its squares best.

  Of all regions by a bound on one axis, or on two, it is the one of the largest
  share of these squares less its share of the others (Youden's index).
  """
  ours = {id(square) for square in ours}
  others = len(found) - len(ours)
  if not ours or not others:
    return ''
  best, said = _LEAST_CLEAR, ''
  for words, inside in _regions(found):
    hits = sum(id(s) in ours for s in inside)
    clear = hits / len(ours) - (len(inside) - hits) / others
    clear -= _PER_CONDITION * len(words)
    if clear > best + _ROUNDING and hits >= _LEAST_SHARE * len(inside):
      best = clear
      said = f'; {" and ".join(words)} in {hits} of {len(inside)}'
  return said


def _regions(found):
  """The parts of a map that a bound or two cut off."""
  bounds = {axis: list(_bounds(found, axis)) for axis in _PHRASES}
  chosen = [[b] for of in bounds.values() for b in of]
  for one, other in itertools.combinations(bounds.values(), 2):
    chosen += map(list, itertools.product(one, other))
  for bound in chosen:
    inside = [
      s for s in found if all(s.value(axis) in some for _, axis, some in bound)
    ]
    yield [words for words, _, _ in bound], inside


_PHRASES = {
  SYNC_COST: 'at a synchronisation cost of {}',
  VARIES: 'where machines vary by {}',
  WORKERS: 'with {} workers',
}


def _bounds(found, axis):
  """All bounds on an axis: in words, and the labels that lie within."""
  labels = {s.value(axis) for s in found}
  if any(outcomes.number(label) is None for label in labels):
    return
  labels = sorted(labels, key=float)
  for i in range(1, len(labels)):
    for few, words in (
      (labels[:i], f'at most {labels[i - 1]}'),
      (labels[i:], f'at least {labels[i]}'),
    ):
      said = few[0] if len(few) == 1 else words
      yield _PHRASES[axis].format(said), axis, few


def _table(found):
  """All squares in numbers."""
  axes = [a for a in (WORKERS, VARIES, SYNC_COST) if any(map(_has(a), found))]
  head = [*axes, 'winner', 'test accuracy, %', 'second', 'margin']
  controls = any(s.against_random is not None for s in found)
  head += ['guided less random replays'] if controls else []
  rows = [head]
  for square in found:
    first, second = square.entries[:2]
    accuracy = statistics.interval(first.test_accuracy)
    cells = [_named(first), f'{accuracy} ({len(first.test_accuracy)})']
    cells += [_named(second), told(square.margin)]
    cells += [told(square.against_random)] if controls else []
    rows.append([*map(square.value, axes), *cells])
  yield Table(rows)
  said = (
    'Means over n seeds with 95 % Student t intervals; n is in brackets. The '
    'margin is the lead of the winner over the second, in points, on the same '
    f'seeds. Adjusted p are for all {len(found)} squares; * below {ALPHA}. '
    'A tie goes to the simpler family.'
  )
  if controls:
    said += (
      ' The last column is of the better guided family: its method less the '
      'same with as many random replays.'
    )
  yield Paragraph(said)


def _has(axis):
  return lambda square: axis in square.context.values


def _named(entry):
  rate = f'rate {entry.outcome.learning_rate:.3g}'
  return f'{entry.family}\n{entry.outcome.label}, {rate}'


def told(compared: Any, number: str = '') -> str:
  """What a comparison has shown, for a table; nothing where there is none.

  Args:
    compared: With ``found``, ``adjusted`` and ``shown``; or None.
    number: Of what it was over, in brackets.
  """
  if compared is None:
    return _NOTHING
  star = ' *' if compared.shown else ''
  first = f'{report.signed(compared.found.difference)}{number}{star}'
  if np.isnan(compared.found.p):
    return first
  p, adjusted = map(statistics.shown_p, (compared.found.p, compared.adjusted))
  return f'{first}\np {p}, adjusted {adjusted}'
