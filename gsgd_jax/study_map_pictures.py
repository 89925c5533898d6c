"""The picture of a map: a square a context, in the colour of who wins."""

import itertools
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from gsgd_jax import outcomes, report, study_map, study_pictures
from gsgd_jax.outcomes import Context
from gsgd_jax.study_map import (
  ALPHA,
  FAMILIES,
  SYNC_COST,
  TITLE,
  VARIES,
  WORKERS,
  Entry,
)

# Of the picture, in inches.
_WIDTH, _HEIGHT = 0.93, 0.5  # Of a square.
_LEFT, _RIGHT, _BELOW, _HEAD, _BETWEEN = 0.85, 0.15, 0.52, 1.72, 0.36
_LEAST_WIDTH = 8.4
_PALE = 0.3  # Of the colour in a square whose margin is not shown.
_CHARACTERS = 20  # Of a method's name in an inch.
_NAMED_FROM = 0.75  # Width of a square with room for a method's name.


def draw_map(path: pathlib.Path, contexts: list[Context]) -> None:
  """Draws who wins where; a panel a number of workers.

  Args:
    path: Where to.
    contexts: Of one map. Columns are sync costs, rows how much machines vary.
  """
  found = study_map.squares(contexts)
  panels, columns, rows = (
    study_map.labels(contexts, axis) for axis in (WORKERS, SYNC_COST, VARIES)
  )
  wide = max(_LEAST_WIDTH, _LEFT + _RIGHT + _WIDTH * min(len(columns), 10))
  panel = _HEIGHT * len(rows)
  high = _HEAD + _BELOW + len(panels) * (panel + _BETWEEN) - _BETWEEN
  figure = report.pyplot().figure(figsize=(wide, high))
  across = wide - _LEFT - _RIGHT

  def add_axes(bottom, height, left=_LEFT, width=across):
    place = left / wide, bottom / high, width / wide, height / high
    return figure.add_axes(place)

  _head(add_axes(high - _HEAD, _HEAD, 0.15, wide - 0.3), found)
  for i, workers in enumerate(panels):
    bottom = high - _HEAD - (i + 1) * panel - i * _BETWEEN
    axes = add_axes(bottom, panel)
    here = [s for s in found if s.value(WORKERS) == workers]
    _panel(axes, here, columns, rows, across / len(columns))
    if workers:
      title = outcomes.named({WORKERS: workers})
      axes.set_title(title, loc='left', fontsize=10, weight='bold', pad=4)
  # pyrefly: ignore[unbound-name]  (There is a panel.)
  axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
  label = 'cost of a synchronisation, mean gradient computations'
  axes.set_xlabel(label, fontsize=10)
  if any(rows):
    middle = (high - _HEAD + _BELOW) / 2
    said = 'machines vary by (coefficient of variation)'
    style = dict(fontsize=10, rotation=90, va='center')
    figure.text(0.12 / wide, middle / high, said, **style)
  figure.savefig(path, dpi=130)
  report.pyplot().close(figure)
  study_pictures.few_colours(path)


def _head(axes, found):
  """The title, and what colours and numbers mean."""
  wide, high = axes.figure.get_size_inches() * axes.get_position().size
  axes.set(xlim=(0, wide), ylim=(0, high))
  axes.axis('off')
  axes.text(0, high - 0.34, TITLE, fontsize=14, weight='bold')
  said = (
    'The most accurate family of methods within equal simulated time, its lead '
    'over the second in points, and its method'
  )
  axes.text(0, high - 0.62, said, fontsize=9, color='#333333')
  there = {e.family for s in found for e in s.entries}
  x = 0.0
  for kind in filter(there.__contains__, FAMILIES):
    code = FAMILIES[kind].code
    x = _explained(axes, x, high - 1.02, (kind, True), code, kind)
  some = next((k for k in reversed(FAMILIES) if k in there), 'asynchronous')
  shown = f'the lead is shown (adjusted p < {ALPHA})'
  x = _explained(axes, 0.0, high - 1.36, (some, True), '+1.2', shown)
  chance = 'it may be chance'
  x = _explained(axes, x, high - 1.36, (some, False), '+1.2', chance)
  if len({s.winner.asynchronous for s in found}) > 1:
    axes.plot((x, x + 0.36), [high - 1.24] * 2, **_BORDER)
    _beside(axes, x, high - 1.36, 'between asynchronous and synchronous')


_BORDER = dict(color='#1b1b1b', linewidth=2.2, solid_capstyle='round')


def _explained(axes, x, y, look: tuple[str, bool], inside, words):
  """A small square and what it means; where the next one begins."""
  _square(axes, (x, y, 0.36, 0.24), *look)
  _label(axes, (x + 0.18, y + 0.115), inside, *look, 8)
  return _beside(axes, x, y, words)


def _beside(axes, x, y, words):
  place = x + 0.43, y + 0.115
  text = axes.text(*place, words, fontsize=9, va='center')
  end = text.get_window_extent().x1
  return axes.transData.inverted().transform((end, 0))[0] + 0.22


def _panel(axes, found, columns, rows, width):
  """The squares of a number of workers."""
  axes.set(xlim=(0, len(columns)), ylim=(0, len(rows)))
  axes.set_facecolor('#f0f0f0')
  axes.set_xticks([])
  axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
  axes.tick_params(length=0, labelsize=9.5)
  axes.spines[:].set_visible(False)
  for x, y in itertools.product(range(len(columns)), range(len(rows))):
    _outline(axes, (x, y, 1, 1))
  winners = {}
  for square in found:
    x = columns.index(square.value(SYNC_COST))
    y = rows.index(square.value(VARIES))
    winners[x, y] = square.winner
    _of_square(axes, x, y, square, width)
  for line in _borders(winners):
    axes.plot(*line, **_BORDER)


def _of_square(axes, x, y, square, width):
  kind, shown = square.winner.family, square.margin.shown
  _square(axes, (x, y, 1, 1), kind, shown)
  lead = f'{square.margin.found.difference.mean:+.1f}'.replace('-0.0', '+0.0')
  most = int(_CHARACTERS * width) if width >= _NAMED_FROM else 0
  name = _short(square.winner.outcome.label, most)
  middle = (x + 0.5, y + (0.64 if name else 0.5))
  code = FAMILIES[kind].code
  _label(axes, middle, f'{code} {lead}', kind, shown, 9.5)
  _label(axes, (x + 0.5, y + 0.27), name, kind, shown, 6.5, weight='normal')


def _square(axes, place, kind, shown):
  colour = _mixed(FAMILIES[kind].colour, 1 if shown else _PALE)
  _outline(axes, place, facecolor=colour)


def _outline(axes, place, facecolor='none'):
  from matplotlib import patches

  x, y, width, height = place
  style = dict(facecolor=facecolor, edgecolor='#ffffff', linewidth=2)
  axes.add_patch(patches.Rectangle((x, y), width, height, **style))


def _label(axes, place, said, kind, shown, size, weight=None):
  colour = _mixed(FAMILIES[kind].colour, 1 if shown else _PALE)
  light = np.dot(colour, (0.299, 0.587, 0.114)) > 0.55
  axes.text(
    *place,
    said.replace('$', r'\$'),
    color='#1b1b1b' if light else '#ffffff',
    fontsize=size,
    weight=weight or ('bold' if shown else 'normal'),
    ha='center',
    va='center',
  )


def _mixed(colour, strength):
  from matplotlib import colors

  return tuple(1 - strength * (1 - np.array(colors.to_rgb(colour))))


def _short(label, most):
  """A method's name without what its family tells."""
  words = outcomes.unguided(label) or label
  words = re.sub('^(asynchronous|delayed), ', '', words)
  if len(words) > most:
    words = words.removeprefix('synchronous, ')
  if len(words) <= most or not most:
    return words[:most]
  return f'{words[: most - 1].rstrip(" ,")}…'


def _borders(winners: dict[tuple[int, int], Entry]) -> Iterator[tuple]:
  """Lines between squares where one winner waits and the other does not."""
  for (x, y), entry in winners.items():
    for beside, line in (
      ((x + 1, y), ((x + 1, x + 1), (y, y + 1))),
      ((x, y + 1), ((x, x + 1), (y + 1, y + 1))),
    ):
      other = winners.get(beside, entry)
      if other.asynchronous != entry.asynchronous:
        yield line
