"""The pictures of a study: rankings, workers, learning rates, curves."""

import itertools
import pathlib
from typing import Any

import numpy as np

from gsgd_jax import outcomes, report, statistics
from gsgd_jax.outcomes import BUDGETS, Context

MOST_LINES = 9
_COLOURS = report.COLOURS
# Of lines, none of them twice; the last ones are brown and grey.
_OF_LINES = (*_COLOURS, '#56b4e9', '#8a4b08', '#888888')
# Of budgets: those of methods after black, and Okabe and Ito's sky blue.
_OF_BUDGETS = (*_COLOURS[1:], '#56b4e9')
_MARKERS = ('o', 's', '^', 'v', 'D', 'P')
_BELOW: dict[str, Any] = dict(loc='outside lower center', frameon=False)
_ROW = 0.3  # Height of a row of a ranking, in inches.
# What lies further below the best than the median, times this, is cut off.
_REACH = 2.5
_FAR_REACH = 8.0  # Where the plain method is to be seen.
_LEAST = 2.0  # Points of accuracy on an axis.
_WIDE = 10.0  # Ratio of the times of two methods.
_BESIDE = 1.025  # Ratio of the workers of two lines, to see the bars of both.
_SHADES = 256  # Colours in a file, which is then a third as long.


def lines(context: Context) -> list[str]:
  """The methods that have lines: not all, or none could be told apart.

  Args:
    context: Where methods are compared.

  Returns:
    Labels, at most `MOST_LINES`: training without delay, the plain delayed
    method, then in turn the best of each kind by the mean test accuracy at the
    main budget: unguided, guided, synchronous, data-parallel, other replays.
  """
  first = [context.sequential(), context.plain()]
  labels = [label for label in first if label is not None]
  kinds = {}
  for label in ranked(context):
    if label not in labels:
      kinds.setdefault(_kind(context.method(label)), []).append(label)
  turns = itertools.zip_longest(*(kinds[kind] for kind in sorted(kinds)))
  labels += [label for turn in turns for label in turn if label is not None]
  return labels[:MOST_LINES]


def _kind(method):
  """What a method is compared as."""
  if method.parallel in ('synchronous', 'data_parallel'):
    return 2, method.parallel != 'synchronous'
  if method.select in (None, 'consistent'):
    return 0, method.select is not None
  return 3, 0


def ranked(context: Context) -> list[str]:
  """All methods, the best at the main budget first, unmeasured ones last."""
  main = outcomes.main_budget(context.budgets())

  def place(label):
    outcome = context.at(label, main)
    return 1 if outcome is None else -outcomes.measured(outcome)[1].mean()

  return sorted(context.table, key=place)


def draw_ranking(path: pathlib.Path, context: Context) -> None:
  """Test accuracy of every method at every budget, the best on top."""
  labels = ranked(context)
  budgets = context.budgets()
  plt = report.pyplot()
  height = 1.7 + _ROW * max(len(labels), 3)
  figure, axes = plt.subplots(figsize=(9, height), layout='constrained')
  found = {
    (row, budget): statistics.interval(outcomes.measured(outcome)[1])
    for row, label in enumerate(labels)
    for budget in budgets
    if (outcome := context.at(label, budget)) is not None
  }
  bottom, top = _limits([i.mean for i in found.values()])
  half_widths = [i.half_width or 0.0 for i in found.values()]
  half = float(np.median(half_widths)) if half_widths else 0.0
  axes.set_xlim(bottom - half, top + half)
  for row in range(0, len(labels), 2):
    axes.axhspan(row - 0.5, row + 0.5, color='#000000', alpha=0.04, linewidth=0)
  _mark_sequential(axes, context)
  offsets = np.linspace(-0.3, 0.3, len(budgets)) if len(budgets) > 1 else [0]
  for i, budget in enumerate(budgets):
    there = [(row, value) for (row, b), value in found.items() if b == budget]
    _dots(axes, there, offsets[i], i, BUDGETS.get(budget, budget))
  for row in range(len(labels)):
    _point_below(axes, row, [v.mean for (r, _), v in found.items() if r == row])
  axes.set(xlabel='test accuracy, %', ylim=(len(labels) - 0.5, -0.5))
  axes.set_yticks(range(len(labels)), [_text(label) for label in labels])
  figure.legend(**_BELOW, ncols=2)
  _save(figure, [axes], context.name, path)


def _dots(axes, there, offset, i, name):
  """Means and intervals of a budget."""
  axes.errorbar(
    [v.mean for _, v in there],
    [row + offset for row, _ in there],
    xerr=[v.half_width or 0.0 for _, v in there],
    fmt=_MARKERS[i % len(_MARKERS)],
    color=_OF_BUDGETS[i % len(_OF_BUDGETS)],
    markersize=4,
    linewidth=1,
    label=name,
  )


def _point_below(axes, row, means):
  """An arrow to the accuracies of a row that lie off the picture."""
  bottom = axes.get_xlim()[0]
  below = [f'{mean:.1f}' for mean in sorted(means) if mean < bottom]
  if below:
    ends = dict.fromkeys((below[0], below[-1]))
    said = f' ◂ {" to ".join(ends)}'
    axes.annotate(said, (bottom, row), fontsize=8, va='center')


def _mark_sequential(axes, context):
  main = outcomes.main_budget(context.budgets())
  outcome = context.at(context.sequential(), main)
  if outcome is None:
    return
  value = statistics.interval(outcomes.measured(outcome)[1])
  name = f'sequential, {BUDGETS.get(main, main)}'
  axes.axvline(value.mean, color=_COLOURS[0], linewidth=1, label=name)
  half = value.half_width or 0.0
  ends = value.mean - half, value.mean + half
  axes.axvspan(*ends, color=_COLOURS[0], alpha=0.1, linewidth=0)


def _limits(means, reach=_REACH):
  """From the lowest accuracy that is worth seeing to the highest."""
  if not len(means):
    return 0.0, 100.0
  best = max(means)
  reach = max(reach * (best - np.median(means)), _LEAST)
  bottom = max(min(means), best - reach)
  margin = 0.08 * max(best - bottom, 2 * _LEAST)
  return bottom - margin, best + margin


def has_workers(group: list[Context]) -> bool:
  """Whether there is anything to draw against the number of workers."""
  workers = [outcomes.number(c.values.get('workers', '')) for c in group]
  return len(group) > 1 and all(w is not None and w > 0 for w in workers)


def draw_workers(path: pathlib.Path, group: list[Context]) -> None:
  """Test accuracy against the number of workers; a panel a budget.

  Args:
    path: Where to.
    group: Contexts that are alike but for the number of workers.
  """
  budgets = list(dict.fromkeys(b for c in group for b in c.budgets()))
  figure, panels = _panels(len(budgets))
  drawn_everywhere = []
  styles = _styles(lines(group[-1]))
  for axes, budget in zip(panels, budgets, strict=True):
    drawn = []
    for label, style in styles.items():
      there = [(c, c.at(label, budget)) for c in group]
      there = [(c, outcome) for c, outcome in there if outcome is not None]
      if there:
        workers = [float(c.values['workers']) for c, _ in there]
        values = [outcomes.measured(outcome)[1] for _, outcome in there]
        beside = _BESIDE ** (list(styles).index(label) - len(styles) / 2)
        _bars(axes, np.array(workers) * beside, values, style)
        drawn += [v.mean() for v in values]
    drawn_everywhere += drawn
    axes.set_title(BUDGETS.get(budget, budget), fontsize=10)
    _workers_axis(axes, [c.values['workers'] for c in group])
  for axes in panels:
    axes.set_ylim(*_limits(drawn_everywhere, _FAR_REACH))
  title = outcomes.named(outcomes.without_workers(group[0]))
  _finish(figure, panels, 'test accuracy, %', title, path)


def _bars(axes, x, values, style):
  """Means with intervals, not one behind the other."""
  found = [statistics.interval(v) for v in values]
  half = [i.half_width or 0.0 for i in found]
  means = [i.mean for i in found]
  axes.errorbar(x, means, yerr=half, marker='o', elinewidth=0.8, **style)


def _workers_axis(axes, labels):
  numbers = [float(label) for label in labels]
  axes.set_xscale('log', base=2)
  axes.set_xlim(numbers[0] / 1.2, numbers[-1] * 1.2)
  axes.set_xticks(numbers, labels)
  axes.minorticks_off()
  axes.set_xlabel('workers')


def draw_rates(path: pathlib.Path, context: Context, budget: str) -> None:
  """Validation accuracy against learning rate, and which rates are good."""
  plt = report.pyplot()
  good = good_rates(context, budget)
  rates = [rate for q in good for rate in tried(context.known_at(q, budget))]
  ends = min(rates) / 1.5, max(rates) * 1.5
  size = (12, max(5, 2.2 + 0.22 * len(good)))
  figure, (left, right) = plt.subplots(1, 2, figsize=size, layout='constrained')
  means = []
  for label, style in _styles(q for q in lines(context) if q in good).items():
    of_rate = tried(context.known_at(label, budget))
    rates = sorted(of_rate)
    values = [100 * np.nan_to_num(of_rate[rate]) for rate in rates]
    report.band(left, rates, values, {**style, 'marker': '.'})
    level = max(v.mean() for v in values) - 1
    of_good = good[label].low, good[label].high
    left.plot(
      of_good, [level] * 2, color=style['color'], linewidth=5, alpha=0.4
    )
    means += [v.mean() for v in values]
  left.set(xscale='log', xlabel='learning rate', xlim=ends)
  left.set(ylabel='validation accuracy, %', ylim=_limits(means))
  for row, (label, found) in enumerate(good.items()):
    chosen = context.known_at(label, budget).learning_rate
    _span(right, row, found, chosen)
  right.set(xscale='log', xlabel='learning rates within a point of the best')
  right.set_xlim(*ends)
  right.set_ylim(len(good) - 0.5, -0.5)
  labels = [_text(label) for label in good]
  right.set_yticks(range(len(good)), labels, fontsize=8)
  figure.legend(*left.get_legend_handles_labels(), **_BELOW, ncols=3)
  title = f'{context.name}, {BUDGETS.get(budget, budget)}'
  _save(figure, (left, right), title, path)


def good_rates(
  context: Context, budget: str
) -> dict[str, statistics.GoodRates]:
  """The good learning rates of all methods that were tuned, widest first."""
  found = {}
  for label in context.table:
    outcome = context.at(label, budget)
    if outcome is not None and tried(outcome):
      found[label] = statistics.good_rates(tried(outcome))
  return dict(sorted(found.items(), key=lambda item: -item[1].factor))


def tried(outcome: outcomes.Outcome) -> dict[float, np.ndarray]:
  """Validation accuracy by learning rate, of rates that have any."""
  return {r: np.asarray(v) for r, v in outcome.tried.items() if np.size(v)}


def _span(axes, row, found, chosen):
  """A range of rates; an arrow where no rate beyond it was tried."""
  colour = _COLOURS[2]
  axes.plot((found.low, found.high), (row, row), color=colour, linewidth=3)
  for is_open, end, marker in (
    (found.open_below, found.low / (1.25 if found.open_below else 1), '<'),
    (found.open_above, found.high * (1.25 if found.open_above else 1), '>'),
  ):
    axes.plot(end, row, marker if is_open else '|', color=colour, markersize=7)
  axes.plot(chosen, row, 'o', color=_COLOURS[1], markersize=5, zorder=3)


def has_curves(context: Context) -> bool:
  """Whether the course of a run is known."""
  return any(_curve(context, label) is not None for label in context.table)


def draw_curves(path: pathlib.Path, context: Context) -> None:
  """Test accuracy as runs go, by gradient evaluations and by each clock."""
  curves = {label: _curve(context, label) for label in lines(context)}
  curves = {label: c for label, c in curves.items() if c is not None}
  clocks = _clocks(curves.values())
  figure, panels = _panels(1 + len(clocks))
  best = []
  for label, style in _styles(curves).items():
    curve = curves[label]
    values = 100 * np.asarray(curve.test_accuracy, float)
    spent = {None: curve.gradients} | {c: _time(curve, c) for c in clocks}
    for axes, x in zip(panels, spent.values(), strict=True):
      if x is not None:
        x = np.asarray(x, float).mean(axis=1)
        begun = x > 0  # Zero has no place on a logarithmic axis.
        report.band(axes, x[begun], values[begun], style)
    means = values.mean(axis=1)
    best += (
      [means[np.isfinite(means)].max()] if np.isfinite(means).any() else []
    )
  panels[0].set_xlabel('gradient evaluations')
  for axes, clock in zip(panels[1:], clocks, strict=True):
    axes.set_xlabel(
      'simulated time' + (f', {clock}' if len(clocks) > 1 else '')
    )
    _log_if_wide(axes)
  for axes in panels:
    axes.set_ylim(*_of_curves(best))
  _finish(figure, panels, 'test accuracy, %', context.name, path)


def _log_if_wide(axes):
  """Where methods differ by factors, a logarithmic axis."""
  ends = [max(line.get_xdata()) for line in axes.lines if len(line.get_xdata())]
  if ends and max(ends) > _WIDE * min(ends):
    axes.set_xscale('log')


def _curve(context, label):
  """The curve at the main budget; without one there, any."""
  main = outcomes.main_budget(context.budgets())
  found = [context.at(label, main), *context.table[label].values()]
  curves = [o.curve for o in found if o is not None and o.curve is not None]
  return next((c for c in curves if len(c.test_accuracy)), None)


def _clocks(curves):
  """All clocks, but for one that stands for each of the others."""
  names = dict.fromkeys(name for curve in curves for name in curve.time)
  several = {n for curve in curves if len(curve.time) > 1 for n in curve.time}
  return [n for n in names if n in several] if several else list(names)


def _time(curve, clock):
  """By a clock; a run that has but one has the same time by all."""
  if len(curve.time) == 1:
    return next(iter(curve.time.values()))
  return curve.time.get(clock)


def _of_curves(best):
  """The upper part, where curves that end high can be told apart."""
  if not best:
    return 0.0, 100.0
  bottom, top = _limits(best)
  return max(0.0, top - max(4 * (top - bottom), 30)), top


def _styles(labels):
  """How the line of each method looks; the same ones look the same."""
  return {
    label: dict(
      color=_OF_LINES[i],
      linestyle=report.dashes(i),
      label=_text(label),
      markersize=4,
    )
    for i, label in enumerate(labels)
  }


def _panels(n):
  """A figure of n axes, at most three a row."""
  plt = report.pyplot()
  columns = 2 if n == 4 else min(n, 3)
  rows = -(-n // columns)
  figure, axes = plt.subplots(
    rows,
    columns,
    figsize=(max(4.2 * columns, 6), 3.8 * rows + 0.4),
    layout='constrained',
    sharey=True,
    squeeze=False,
  )
  for spare in axes.flat[n:]:
    spare.remove()
  return figure, axes.flat[:n]


def _finish(figure, panels, ylabel, title, path):
  """One legend for all panels, below them."""
  panels[0].set_ylabel(ylabel)
  found = {}
  for axes in panels:
    handles, labels = axes.get_legend_handles_labels()
    found |= dict(zip(labels, handles, strict=True))
  columns = 2 if len(panels) in (1, 2, 4) else 3
  figure.legend(found.values(), found.keys(), **_BELOW, ncols=columns)
  _save(figure, panels, title, path)


def _save(figure, axes, title, path):
  report.save(figure, axes, _text(title), path)
  few_colours(path)


def few_colours(path: pathlib.Path) -> None:
  """Makes a picture a smaller file, for a page that holds many."""
  from PIL import Image

  with Image.open(path) as image:
    small = image.convert('RGB').quantize(_SHADES)
  small.save(path, optimize=True)


def _text(label):
  """Dollars are dollars, not formulas."""
  return label.replace('$', r'\$')
