"""What a study says of itself: tables, sentences and pictures in two files.

`report.md` is for reading beside its pictures, `report.html` holds them inside:
one file that can be sent.
"""

import functools
import pathlib
import re
from typing import NamedTuple

import numpy as np

from gsgd_jax import (
  documents,
  files,
  outcomes,
  report,
  statistics,
  study_map_report,
  study_pictures,
)
from gsgd_jax.documents import Block, Folded, Heading, Paragraph, Picture, Table
from gsgd_jax.outcomes import BUDGETS, Context, Outcome, measured
from gsgd_jax.outcomes import contexts as contexts_of

_GUIDED = 'consistent'
_COMPANIONS = {
  None: 'unguided',
  'random': 'random replays',
  'hardest': 'hardest replays',
  'inconsistent': 'inconsistent replays',
  'surprise': 'surprise replays',
}
_ALPHA = 0.05
_MOST_CONTEXTS = 12  # More of them have tables alone, folded.
_EDGE = '†'
_NO_UPDATE = 'no update fits'
_NOTHING = '-'

_INTERVALS = (
  'Numbers are means over n seeds and their 95 % Student t intervals; n is in '
  'brackets. Differences are of the same seeds, in points of test accuracy. A '
  'seed decides everything that is random; where data have no split of their '
  'own, also the split. So intervals and tests say how a result varies with '
  'seeds and splits of these data, not with other data.'
)
_CHOSEN = (
  'Each learning rate was chosen on validation data, with other seeds, unless '
  'it was given; test accuracy was measured at chosen rates only. (Other seeds '
  'split the same examples otherwise: what was chosen on all of them is one '
  'number a method and budget.)'
)
_BEST_EPOCH = (
  ' The best epoch is another protocol: it picks an epoch by the test accuracy '
  'that it then reports.'
)


class Comparison(NamedTuple):
  """Guided SGD against a companion at a budget, on the same seeds."""

  context: Context
  label: str  # Of the guided method.
  against: str  # Of its companion.
  select: str | None  # The companion's guidance.
  budget: str
  n: int
  found: statistics.Paired
  adjusted: float  # p, for all comparisons of the report.
  differences: dict[int, float]  # By seed, in points.

  @property
  def shown(self) -> bool:
    """Whether there is a difference."""
    return self.adjusted < _ALPHA  # NaN is not.


def write(
  workdir: pathlib.Path,
  title: str,
  description: str,
  outcomes: list[Outcome],
  progress: str,
) -> list[str]:
  """Writes the report of a study, finished or not.

  Args:
    workdir: A folder. Files of the same names are replaced, each at once.
    title: Of the study, plain text.
    description: What it asks, plain text; paragraphs have blank lines between.
    outcomes: What was measured so far, in any order.
    progress: ``'finished'``, or how far the study is, which is then told first.

  Returns:
    The names of the files: ``report.md``, ``report.html`` and the pictures.
  """
  blocks = _blocks(title, description, contexts_of(outcomes), progress)
  pictures = [b for b in blocks if isinstance(b, Picture)]
  for picture in pictures:
    files.write_whole(workdir / picture.name, picture.draw)
  texts = {
    'report.md': documents.markdown(blocks),
    'report.html': documents.page(title, blocks, workdir),
  }
  for name, content in texts.items():
    write_text = functools.partial(_write_text, content)
    files.write_whole(workdir / name, write_text)
  return [*texts, *(picture.name for picture in pictures)]


def _write_text(content, path):
  path.write_text(content, encoding='utf-8')


def text(outcomes: list[Outcome]) -> str:
  """A study as a terminal shows it: test accuracy, %, a table a context.

  Args:
    outcomes: What was measured so far.

  Returns:
    Lines; intervals are Student's, of 95 %, over n seeds.
  """
  parts = []
  for context in contexts_of(outcomes):
    budgets = context.budgets()
    rows = [['test accuracy, %', 'n', *budgets]]
    for label in study_pictures.ranked(context):
      there = [context.at(label, budget) for budget in budgets]
      numbers = [None if o is None else measured(o)[1] for o in there]
      counts = [len(v) for v in numbers if v is not None]
      shown = [
        _NOTHING if v is None else str(statistics.interval(v)) for v in numbers
      ]
      rows.append([label, _range(counts), *shown])
    parts.append(f'{context.name}\n\n{report.aligned(rows)}')
  return '\n\n'.join(parts) or 'Nothing was measured yet.'


def comparisons(contexts: list[Context]) -> list[Comparison]:
  """Guided SGD against each of its companions, wherever both were measured.

  Args:
    contexts: All of a study: its comparisons are one family.

  Returns:
    One for each pair of outcomes, with p values adjusted for all of them. What
    stands in several contexts is compared once, in the first.
  """
  out = {}
  for context in contexts:
    for label, against, select in _pairs(context):
      for budget in context.budgets():
        if select is None and budget == 'updates':
          continue  # Guided methods have more gradients there.
        pair = context.at(label, budget), context.at(against, budget)
        values = outcomes.aligned(*pair)
        key = (*map(id, pair), budget)
        if values is None or key in out:
          continue
        found = statistics.paired(*values)
        seeds = outcomes.common(*pair)
        by_seed = dict(zip(seeds, values[0] - values[1], strict=True))
        about = context, label, against, select, budget, len(by_seed)
        out[key] = Comparison(*about, found, float('nan'), by_seed)
  adjusted = statistics.holm([c.found.p for c in out.values()])
  return [
    c._replace(adjusted=float(p))
    for c, p in zip(out.values(), adjusted, strict=True)
  ]


def _pairs(context):
  """The guided methods of a context, and their companions."""
  for label in context.table:
    if context.method(label).select == _GUIDED:
      for select in _COMPANIONS:
        against = context.companion(label, select)
        if against is not None:
          yield label, against, select


def _blocks(title, description, contexts, progress):
  """The whole report."""
  blocks: list[Block] = [Heading(1, title)]
  if progress != 'finished':
    blocks.append(Paragraph(f'This study is not finished: {progress}.'))
  blocks += [
    Paragraph(p) for p in re.split(r'\n\s*\n', description) if p.strip()
  ]
  if not contexts:
    return [*blocks, Paragraph('Nothing was measured yet.')]
  blocks += study_map_report.blocks(contexts)
  compared = comparisons(contexts)
  blocks += _summary(contexts, compared)
  if len(contexts) > _MOST_CONTEXTS:
    return [*blocks, *_in_short(contexts, compared)]
  names = _Names()
  for group in outcomes.groups(contexts):
    blocks += _of_group(group, compared, names)
  return blocks


def _in_short(contexts, compared):
  """Contexts that are too many to be seen one by one."""
  yield Heading(2, 'Every context')
  for context in contexts:
    tables = [*_accuracies(context), *_companions(context, compared)]
    yield Folded(context.name, tables)


def _summary(contexts, compared):
  """What is to be known first."""
  yield Heading(2, 'Summary')
  optimistic = any('best epoch' in c.budgets() for c in contexts)
  said = f'{_INTERVALS} {_CHOSEN}{_BEST_EPOCH if optimistic else ""}'
  yield Paragraph(said)
  head = ['', 'sequential', 'plain', 'best unguided', 'best guided']
  rows = [head]
  for context in contexts:
    main = outcomes.main_budget(context.budgets())
    shown = [context.sequential(), context.plain(), *_best(context)]
    cells = [_named_accuracy(context, label, main) for label in shown]
    rows.append([context.name, *cells])
  budget = outcomes.main_budget(contexts[0].budgets())
  best = [
    Table(rows),
    Paragraph(
      f'Test accuracy, %, at {BUDGETS.get(budget, budget)}. Plain is the '
      'delayed method without compensation or guidance. The best are those of '
      'the highest test accuracy, which flatters them: of many equal methods '
      'one is always the luckiest.'
    ),
  ]
  if len(contexts) > _MOST_CONTEXTS:
    best = [Folded('The best of every context', best)]
  yield from best
  if compared:
    yield Heading(3, 'Does guidance help?')
    yield Paragraph(_verdict(compared))
    yield Table(_counts(compared))
    yield Paragraph(_MEAN_DIFFERENCE)
    main = outcomes.main_budget(contexts[0].budgets())
    chosen = [c for c in compared if (c.select, c.budget) == ('random', main)]
    if chosen:
      yield Heading(3, 'Does it matter which batches are replayed?')
      yield Paragraph(_of_choice(chosen, main))


def _best(context):
  """The best delayed method without and with guidance."""
  delayed = [
    label
    for label in study_pictures.ranked(context)
    if context.method(label).parallel not in outcomes.WITHOUT_DELAY
  ]
  guided = [q for q in delayed if context.method(q).select == _GUIDED]
  unguided = [q for q in delayed if context.method(q).select is None]
  return next(iter(unguided), None), next(iter(guided), None)


def _named_accuracy(context, label, budget):
  outcome = context.at(label, budget)
  if outcome is None:
    return _NOTHING
  return f'{label}\n{_accuracy(outcome)}'


def _verdict(compared):
  counted = [c for c in compared if not np.isnan(c.adjusted)]
  better, worse = _shown(counted)
  n = _range([c.n for c in compared])
  return (
    f'Guided SGD was compared with the same method without guidance and with '
    f'other replays, by two-sided paired t-tests over n = {n} seeds. Of '
    f'{len(counted)} comparisons {better + worse} show a difference after Holm '
    f"and Bonferroni's adjustment for all {len(counted)}: {better} for guided "
    f'SGD, {worse} against it.'
  )


_MEAN_DIFFERENCE = (
  'The mean difference is over all the comparisons of a row: for each seed the '
  'mean of its differences, and the interval over seeds. Small differences '
  'that no single comparison shows are seen there, if they have one sign.'
)


def _counts(compared):
  """How many comparisons show what, by companion and budget."""
  head = ['against', 'at', 'comparisons', 'guided better', 'guided worse']
  head.append('mean difference, points')
  rows = {}
  for c in compared:
    key = _COMPANIONS[c.select], BUDGETS.get(c.budget, c.budget)
    rows.setdefault(key, []).append(c)
  order = sorted(rows, key=lambda key: list(_COMPANIONS.values()).index(key[0]))
  table = [head]
  for key in order:
    better, worse = _shown(rows[key])
    counts = map(str, (len(rows[key]), better, worse))
    table.append([*key, *counts, _pooled(rows[key])])
  return table


def _shown(compared):
  """How many show guided SGD to be better, and worse."""
  signs = [c.found.difference.mean > 0 for c in compared if c.shown]
  return sum(signs), len(signs) - sum(signs)


def _pooled(compared):
  """The mean over comparisons of what differs, over the seeds of them all."""
  seeds = set.intersection(*(set(c.differences) for c in compared))
  if not seeds:
    return _NOTHING
  by_seed = [[c.differences[s] for c in compared] for s in sorted(seeds)]
  mean = statistics.interval(np.mean(by_seed, axis=1))
  return f'{report.signed(mean)} ({len(seeds)})'


def _of_choice(compared, budget):
  """Guided SGD against random replays, a question of its own."""
  alone = statistics.holm([c.found.p for c in compared])
  own = [
    c._replace(adjusted=float(p)) for c, p in zip(compared, alone, strict=True)
  ]
  better, worse = _shown(own)
  return (
    'Random replays take as many batches, at the same steps. Asked alone, at '
    f'{BUDGETS.get(budget, budget)}, with the adjustment for these '
    f'{len(own)} comparisons only, consistent batches are better in {better} '
    f'and worse in {worse}. The mean difference over all of them is '
    f'{_pooled(own)} points.'
  )


def _of_group(group, compared, names):
  """Contexts that are alike but for the number of workers."""
  level = 2
  if study_pictures.has_workers(group):
    name = outcomes.named(outcomes.without_workers(group[0])) or 'workers'
    yield Heading(2, name)
    yield Picture(
      names.fresh('workers', name),
      'Test accuracy against the number of workers. '
      f'{_lines(group[-1], "Bars")}',
      functools.partial(study_pictures.draw_workers, group=group),
    )
    level = 3
  for context in group:
    yield Heading(level, context.name)
    yield from _of_context(context, compared, names)
    # What most delay does is seen where there are most workers.
    if context is group[-1] and study_pictures.has_curves(context):
      yield Picture(
        names.fresh('curves', context.name),
        'Test accuracy against gradient evaluations and simulated time, at the '
        f'chosen learning rates. {_lines(context)}',
        functools.partial(study_pictures.draw_curves, context=context),
      )


def _lines(context, what='Bands'):
  """What a picture with lines shows."""
  bands = f'{what} are 95 % Student t intervals over seeds.'
  if len(context.table) <= study_pictures.MOST_LINES:
    return bands
  main = outcomes.main_budget(context.budgets())
  return (
    f'{bands} Of {len(context.table)} methods there are sequential training, '
    'the plain delayed method, and of every kind (unguided, guided, '
    'synchronous, data-parallel, other replays) those of the highest test '
    f'accuracy at {BUDGETS.get(main, main)}, {study_pictures.MOST_LINES} in '
    'all; the tables have every method.'
  )


def _of_context(context, compared, names):
  main = outcomes.main_budget(context.budgets())
  yield Picture(
    names.fresh('ranking', context.name),
    f'Test accuracy of every method, sorted by that at '
    f'{BUDGETS.get(main, main)}. Bars are 95 % Student t intervals over seeds; '
    'an arrow gives an accuracy that lies off the picture.',
    functools.partial(study_pictures.draw_ranking, context=context),
  )
  yield from _accuracies(context)
  for budget in sorted(context.budgets(), key=lambda b: b != main):
    yield from _differences(context, budget, unfolded=budget == main)
  yield from _companions(context, compared)
  yield from _good_rates(context, main, names)


def _accuracies(context):
  """The table of every method at every budget."""
  budgets = context.budgets()
  rows = [['method', *(BUDGETS.get(b, b) for b in budgets)]]
  for label in context.table:
    found = [context.at(label, budget) for budget in budgets]
    rows.append([label, *map(_cell, found)])
  yield Table(rows)
  said = 'Test accuracy, % (n), and the learning rate.'
  if any(_EDGE in cell for row in rows for cell in row):
    said += (
      f' {_EDGE} The rate is the smallest or the largest of those tried: a '
      'better one may lie beyond it.'
    )
  if any(_NO_UPDATE in cell for row in rows for cell in row):
    said += (
      ' Where no update fits into a budget, parameters are the first ones.'
    )
  if any('diverged' in cell for row in rows for cell in row):
    said += ' A seed that diverged counts with the accuracy of chance.'
  yield Paragraph(said)


def _cell(outcome):
  if outcome is None:
    return _NOTHING
  edge = f' {_EDGE}' if at_edge(outcome) else ''
  cell = f'{_accuracy(outcome)}\nrate {outcome.learning_rate:.3g}{edge}'
  if len(outcome.updates) and not np.any(outcome.updates):
    cell += f'\n{_NO_UPDATE}'
  diverged = int(np.sum(outcome.diverged))
  if diverged:
    cell += f'\n{diverged} of {len(outcome.seeds)} diverged'
  return cell


def _accuracy(outcome):
  values = measured(outcome)[1]
  return f'{statistics.interval(values)} ({len(values)})'


def at_edge(outcome: Outcome) -> bool:
  """Whether the chosen rate is the smallest or largest one that was tried."""
  if not outcome.tried:
    return False
  ends = min(outcome.tried), max(outcome.tried)
  return bool(np.isclose(outcome.learning_rate, ends, rtol=1e-9, atol=0).any())


def _differences(context, budget, unfolded):
  """What is lost and won back at a budget, and what it cost."""
  head = ['method', 'test accuracy, %', 'less sequential', 'less plain']
  head += ['share won back', 'updates', 'gradient evaluations']
  rows = [head]
  for label in context.table:
    outcome = context.at(label, budget)
    if outcome is not None:
      spent = [outcome.updates, outcome.gradients]
      means = [_spent(values) for values in spent]
      against = _against(context, label, budget)
      rows.append([label, _accuracy(outcome), *against, *means])
  summary = f'Differences at {BUDGETS.get(budget, budget)}'
  said = (
    'Plain is the delayed method without compensation or guidance. The share '
    'won back is that of the accuracy that plain loses to sequential, with '
    "Fieller's 95 % interval, where a loss is shown. Updates, gradient "
    'evaluations are means over seeds.'
  )
  yield Folded(summary, [Table(rows), Paragraph(said)], unfolded)


def _spent(values):
  return f'{np.mean(values):,.0f}' if len(values) else _NOTHING


def _against(context, label, budget):
  """Less sequential, less plain, the share won back."""
  sequential, plain = context.sequential(), context.plain(label)
  ours = context.at(label, budget)
  cells = []
  for other in (sequential, plain):
    theirs = None if other == label else context.at(other, budget)
    values = outcomes.aligned(ours, theirs)
    cells.append(_NOTHING if values is None else _difference(*values))
  share = None
  if label not in (sequential, plain):
    all_three = context.at(sequential, budget), context.at(plain, budget), ours
    values = outcomes.aligned(*all_three)
    share = None if values is None else statistics.recovered(*values)
  return [*cells, _NOTHING if share is None else str(share)]


def _difference(ours, theirs):
  shown = report.signed(statistics.interval(ours - theirs))
  return f'{shown} ({len(ours)})'


def _companions(context, compared):
  """Guided methods against the same without guidance, or with another."""
  here = [c for c in compared if c.context is context]
  if not here:
    return
  budgets = [b for b in context.budgets() if any(c.budget == b for c in here)]
  rows = {}
  for c in here:
    rows.setdefault((c.label, c.against), {})[c.budget] = c
  head = ['guided', 'less', *(BUDGETS.get(b, b) for b in budgets)]
  table = [
    [
      label,
      _told(label, against, row),
      *(_compared(row.get(b)) for b in budgets),
    ]
    for (label, against), row in rows.items()
  ]
  yield Table([head, *table])
  counted = sum(not np.isnan(c.adjusted) for c in compared)
  yield Paragraph(
    'Points of test accuracy (n) that guided SGD is better than the same '
    'method without guidance, or with other replays; p of the two-sided paired '
    "t-test, and p after Holm and Bonferroni's adjustment for all "
    f'{counted} such '
    f'comparisons of this report. * adjusted p < {_ALPHA}.'
  )


def _told(label, against, row):
  """A companion by its guidance, or by all of its name if that differs."""
  if outcomes.unguided(label) != outcomes.unguided(against):
    return against
  return _COMPANIONS[next(iter(row.values())).select]


def _compared(c):
  return study_map_report.told(c, '' if c is None else f' ({c.n})')


def _good_rates(context, budget, names):
  """How wide the range of good learning rates is."""
  good = study_pictures.good_rates(context, budget)
  if not good:
    return
  draw = functools.partial(
    study_pictures.draw_rates, context=context, budget=budget
  )
  seeds = _range(
    [
      len(values)
      for label in good
      for values in study_pictures.tried(context.at(label, budget)).values()
    ]
  )
  yield Picture(
    names.fresh('rates', context.name),
    f'Left: validation accuracy against learning rate, n = {seeds} seeds; a '
    'thick line marks the rates within one point of the best. '
    f'{_lines(context)} Right: these rates for every method; dots are the '
    'chosen ones, arrows say that no rate beyond was tried.',
    draw,
  )
  head = ['method', 'validation accuracy, %', 'best rate', 'from', 'to']
  rows = [[*head, 'width, a factor of']]
  for label, found in good.items():
    low = f'{"<= " if found.open_below else ""}{found.low:.3g}'
    high = f'{">= " if found.open_above else ""}{found.high:.3g}'
    is_open = found.open_below or found.open_above
    factor = f'{">= " if is_open else ""}{found.factor:.3g}'
    best = study_pictures.tried(context.at(label, budget))[found.best]
    accuracy = statistics.interval(100 * np.nan_to_num(best))
    rows.append([label, str(accuracy), f'{found.best:.3g}', low, high, factor])
  said = (
    f'Validation accuracy at {BUDGETS.get(budget, budget)}, n = {seeds} '
    'seeds, at the best rate, and the range of rates whose mean is within one '
    'point of it, the widest range first. The best of many rates flatters '
    'itself. <= and >=: no rate beyond was tried.'
  )
  yield Folded('Width of the good range', [Table(rows), Paragraph(said)])


def _range(counts):
  """The smallest and the largest of numbers."""
  if not counts:
    return '0'
  low, high = min(counts), max(counts)
  return str(low) if low == high else f'{low} to {high}'


class _Names:
  """File names of pictures, no two alike."""

  def __init__(self):
    self._taken = set()

  def fresh(self, kind: str, name: str) -> str:
    slug = re.sub('[^a-z0-9]+', '-', f'{kind} {name}'.lower()).strip('-')[:80]
    names = (slug + (f'-{i}' if i else '') for i in range(len(self._taken) + 1))
    free = next(n for n in names if n not in self._taken)
    self._taken.add(free)
    return f'{free}.png'
