"""The map of a study, against plain loops and by its sentences."""

import itertools
import re

import numpy as np
import pytest

from gsgd_jax import (
  documents,
  events,
  outcomes,
  settings,
  statistics,
  study_map,
  study_map_pictures,
  study_map_report,
  study_report,
)

SEEDS = 6
COSTS, VARIES, WORKERS = ('0', '0.5', '2'), ('0', '0.6'), ('8', '16')
NAMES = (
  'sequential',
  'synchronous',
  'synchronous+consistent',
  'data_parallel',
  'asynchronous',
  'asynchronous+random',
  'asynchronous+consistent',
  'asynchronous+dana',
  'asynchronous+dana+consistent',
  'delayed',
)


def outcome_of(name, accuracy, validation=0.5, cost=None, **values):
  """Of equal simulated time; accuracy is one number a seed, or one for all."""
  method = events.method_named(name)
  values = {'method': method.label} | {
    axis.replace('_', ' '): value for axis, value in values.items()
  }
  if cost is not None:
    values['sync cost'] = cost
  budget = 'time' if method.select is None else 'time, shared'
  tried = {} if validation is None else {0.1: np.full(2, validation)}
  n = np.size(accuracy) if np.ndim(accuracy) else SEEDS
  zeros = np.zeros(n)
  return outcomes.Outcome(
    values=values,
    method=method,
    budget=budget,
    learning_rate=0.1,
    tried=tried | {1.0: np.full(2, 0.99)} if tried else {},
    seeds=np.arange(n),
    test_accuracy=np.broadcast_to(accuracy, n).astype(float),
    diverged=zeros.astype(bool),
    updates=zeros,
    gradients=zeros,
    time=zeros,
    curve=None,
  )


def waits(name):
  """Whether its time depends on what a synchronisation costs."""
  return name.startswith(('synchronous', 'data')) or name.count('+c')


def study(seed=0, names=NAMES):
  """A grid of made-up numbers."""
  rng = np.random.default_rng(seed)
  out = []
  for workers, varies in itertools.product(WORKERS, VARIES):
    for name in names:
      for cost in COSTS if waits(name) else (None,):
        accuracy = 0.8 + rng.normal(0, 0.02) + rng.normal(0, 0.01, SEEDS)
        where = dict(workers=workers, machines_vary_by=varies)
        validation = rng.uniform(0.5, 0.6)
        out.append(outcome_of(name, accuracy, validation, cost, **where))
  return out


def squares_of(found):
  (group,) = study_map.maps(outcomes.contexts(found))
  return study_map.squares(group)


METHODS = [
  '+'.join(filter(None, parts))
  for parts in itertools.product(
    events.PARALLEL,
    (None, *settings.COMPENSATIONS),
    (None, *events.GUIDANCE),
  )
]


@pytest.mark.parametrize('parallel', events.PARALLEL)
def test_family(parallel):
  for name in (m for m in METHODS if m.split('+')[0] == parallel):
    expected = family_of(*name.split('+'))
    assert study_map.family(events.method_named(name)) == expected


def family_of(parallel, *rest):
  guided = 'consistent' in rest
  if {'random', 'hardest', 'inconsistent', 'surprise'} & {*rest}:
    return None
  alone = 'asynchronous, guided' if guided else 'asynchronous'
  return {
    'sequential': None,
    'asynchronous': alone,
    'delayed': alone,
    'synchronous': 'guided rounds' if guided else 'synchronous',
    'data_parallel': 'guided rounds' if guided else 'data parallel',
  }[parallel]


@pytest.mark.parametrize('seed', range(3))
def test_against_plain_loops(seed):
  found = study(seed)
  squares = squares_of(found)
  assert len(squares) == len(WORKERS) * len(VARIES) * len(COSTS)
  p_values = []
  for square, (workers, varies, cost) in zip(
    squares, itertools.product(WORKERS, VARIES, COSTS), strict=True
  ):
    assert square.context.values == {
      'workers': workers,
      'machines vary by': varies,
      'sync cost': cost,
    }
    best = {}
    for outcome in found:
      v = outcome.values
      here = v['workers'] == workers and v['machines vary by'] == varies
      here = here and v.get('sync cost', cost) == cost
      kind = study_map.family(outcome.method)
      if here and kind is not None:
        validation = outcome.tried[0.1].mean()
        if kind not in best or validation > best[kind].tried[0.1].mean():
          best[kind] = outcome
    assert len(best) == 5
    order = sorted(best, key=lambda k: -best[k].test_accuracy.mean())
    assert [e.family for e in square.entries] == order
    assert all(e.outcome is best[e.family] for e in square.entries)
    first, second = (100 * best[k].test_accuracy for k in order[:2])
    assert square.margin.found == statistics.paired(first, second)
    p_values.append(square.margin.found.p)
  adjusted = statistics.holm(p_values)
  np.testing.assert_array_equal([s.margin.adjusted for s in squares], adjusted)
  assert [s.margin.shown for s in squares] == [p < 0.05 for p in adjusted]


def grid(accuracy, **axes):
  """Outcomes of an accuracy by name, cost and values of axes."""
  names = ('synchronous', 'asynchronous', 'asynchronous+consistent')
  rng = np.random.default_rng(1)
  noise = rng.normal(0, 1e-4, (len(names), SEEDS))
  return [
    outcome_of(
      name,
      accuracy(name, float(cost), *where) + noise[i],
      cost=cost,
      **dict(zip(axes, where, strict=True)),
    )
    for where in itertools.product(*axes.values())
    for cost in COSTS
    for i, name in enumerate(names)
  ]


def test_validation_chooses_and_test_compares():
  where = dict(workers='8')
  found = [
    outcome_of('asynchronous', 0.9, 0.5, **where),
    outcome_of('asynchronous+dana', 0.7, 0.6, **where),
    *(outcome_of('synchronous', 0.8, 0.1, c, **where) for c in COSTS),
  ]
  for square in squares_of(found):
    assert [e.family for e in square.entries] == ['synchronous', 'asynchronous']
    assert square.entries[1].outcome is found[1]
    assert square.margin.found.difference.mean == pytest.approx(10)


@pytest.mark.parametrize('validation', [None, 0.5])
def test_the_first_stands_for_equals(validation):
  found = [
    outcome_of('asynchronous+dana', 0.7, validation),
    outcome_of('asynchronous', 0.9, validation),
    *(outcome_of('synchronous', 0.6, None, c) for c in COSTS),
  ]
  assert all(s.winner.outcome is found[0] for s in squares_of(found))


def test_a_tie_is_the_simpler_ones(tmp_path):
  found = grid(lambda *_: 0.8)
  found = [o._replace(test_accuracy=np.full(SEEDS, 0.8)) for o in found]
  for square in squares_of(found[::-1]):
    kinds = ['synchronous', 'asynchronous', 'asynchronous, guided']
    assert [e.family for e in square.entries] == kinds
    assert square.margin.found.p == square.margin.adjusted == 1
    assert not square.margin.shown
  (group,) = study_map.maps(outcomes.contexts(found))
  study_map_pictures.draw_map(tmp_path / 'map.png', group)
  assert (tmp_path / 'map.png').stat().st_size > 1000


def test_seeds_are_paired():
  found = grid(lambda name, *_: 0.8 + 0.01 * len(name), workers=('8',))
  fewer = found[0]._replace(
    seeds=np.arange(SEEDS) + 2, test_accuracy=np.linspace(0.1, 0.2, SEEDS)
  )
  apart = found[3]._replace(seeds=np.arange(SEEDS) + 99)
  squares = squares_of([fewer, *found[1:3], apart, *found[4:]])
  assert [s.value('sync cost') for s in squares] == ['0', '2']
  first = squares[0]
  assert first.entries[-1].family == 'synchronous'
  for entry in first.entries:
    assert len(entry.test_accuracy) == SEEDS - 2
  np.testing.assert_allclose(
    first.entries[-1].test_accuracy, 100 * fewer.test_accuracy[:-2]
  )


@pytest.mark.parametrize('seed', range(4))
def test_a_part_of_a_grid(tmp_path, seed):
  rng = np.random.default_rng(seed)
  found = [o for o in study() if rng.random() < 0.4]
  contexts = outcomes.contexts(found)
  for group in study_map.maps(contexts):
    squares = study_map.squares(group)
    assert all(len(s.entries) > 1 for s in squares)
    study_map_pictures.draw_map(tmp_path / 'map.png', group)
    said = study_map_report.answers(squares) + study_map_report.wins(squares)
    assert f'of {len(squares)} squares' in ' '.join(said)


def test_columns_and_rows_are_in_order_whatever_is_missing():
  found = [
    outcome_of('synchronous', 0.8, cost=cost, workers=workers)
    for workers, cost in (('8', '0'), ('8', '2'), ('64', '10'), ('64', '0.5'))
  ]
  contexts = outcomes.contexts(found)
  assert study_map.labels(contexts, 'sync cost') == ['0', '0.5', '2', '10']
  assert study_map.labels(contexts, 'workers') == ['8', '64']


@pytest.mark.parametrize(
  'found',
  [
    [],
    study(names=('asynchronous', 'asynchronous+random', 'sequential')),
    study(names=('synchronous', 'sequential')),
    [o for o in study() if o.values.get('sync cost', '0') == '0'],
    [outcome_of('asynchronous', 0.8), outcome_of('synchronous', 0.8)],
    [o._replace(budget='updates') for o in study()],
  ],
)
def test_no_map(found):
  contexts = outcomes.contexts(found)
  assert study_map.maps(contexts) == study_map_report.blocks(contexts) == []


def test_sentences_say_where():
  def accuracy(name, cost, varies, workers):
    if name == 'synchronous':
      return 0.9 if cost < 0.5 else 0.7
    return 0.8 if name == 'asynchronous' else 0.6

  axes = dict(machines_vary_by=VARIES, workers=WORKERS)
  squares = squares_of(grid(accuracy, **axes))
  assert study_map_report.wins(squares) == [
    'Asynchronous training without guidance wins in 8 of 12 squares, 8 of them '
    'shown; at a synchronisation cost of at least 0.5 in 8 of 8.',
    'Synchronous training wins in 4 of 12 squares, 4 of them shown; at a '
    'synchronisation cost of 0 in 4 of 4.',
    'Guided asynchronous training wins nowhere.',
  ]
  assert study_map_report.answers(squares) == [
    'Asynchrony, guided or not, is ahead of whatever waits in 8 of 12 squares, '
    'shown in 8, and shown to be behind in 4; at a synchronisation cost of at '
    'least 0.5 in 8 of 8.',
    'Guidance, in rounds or not, is ahead of whatever has none in 0 of 12 '
    'squares, shown in none, and shown to be behind in 12.',
  ]


def test_sentences_say_where_on_two_axes():
  def accuracy(name, cost, varies, workers):
    if name == 'asynchronous+consistent':
      return 0.9 if float(varies) > 0.5 and int(workers) < 16 else 0.7
    return 0.8 if name == 'asynchronous' else 0.6

  axes = dict(machines_vary_by=VARIES, workers=WORKERS)
  squares = squares_of(grid(accuracy, **axes))
  assert (
    'Guided asynchronous training wins in 3 of 12 squares, 3 of them shown; '
    'where machines vary by 0.6 and with 8 workers in 3 of 3.'
  ) in study_map_report.wins(squares)


def test_all_squares_are_nowhere_in_particular():
  squares = squares_of(grid(lambda name, *_: len(name) / 100))
  assert study_map_report.wins(squares) == [
    'Guided asynchronous training wins in all 3 squares, 3 of them shown.',
    'Synchronous training and asynchronous training without guidance win '
    'nowhere.',
  ]


def test_guidance_is_held_against_random_replays():
  found = study(names=NAMES[1:7])
  squares = squares_of(found)
  p_values = []
  for square in squares:
    # Guided rounds have no control here.
    guided = [e for e in square.entries if e.guided]
    if guided[0].family == 'guided rounds':
      assert square.against_random is None
      continue
    at = lambda label, s=square: s.context.table[label]['time, shared']
    ours = at('asynchronous, guided')
    control = at('asynchronous, random replays')
    expected = statistics.paired(
      100 * ours.test_accuracy, 100 * control.test_accuracy
    )
    assert square.against_random.found == expected
    p_values.append(expected.p)
  there = [s.against_random for s in squares if s.against_random is not None]
  adjusted = statistics.holm(p_values)
  np.testing.assert_array_equal([c.adjusted for c in there], adjusted)
  ahead = sum(c.found.difference.mean > 0 for c in there)
  said = study_map_report.answers(squares)[-1]
  assert f'random replays in {ahead} of {len(there)} squares' in said


def written(workdir, found):
  names = study_report.write(workdir, 'A study', 'Why.', found, 'finished')
  assert sorted(names) == sorted(p.name for p in workdir.iterdir())
  read = lambda name: (workdir / name).read_text(encoding='utf-8')
  return read('report.md'), read('report.html'), names[2:]


def test_the_report_begins_with_the_map(tmp_path):
  found = [
    o
    for o in study()
    if (o.values['workers'], o.values['machines vary by']) == ('8', '0')
  ]
  markdown, html, pictures = written(tmp_path, found)
  assert pictures[0] == 'map.png' and len(pictures) > len(COSTS)
  squares = squares_of(found)
  said = study_map_report.answers(squares) + study_map_report.wins(squares)
  for text, summary in ((markdown, '## Summary'), (html, 'Summary</h2>')):
    assert text.index('worth it') < text.index(summary)
    assert all(sentence in text for sentence in said)
  for square in squares:
    margin = f'+{square.margin.found.difference}'
    assert margin in markdown and margin in html
  rows = markdown.split('Every square of the map')[1].split('</details>')[0]
  assert len(re.findall(r'^\| 8 \|', rows, re.M)) == len(squares)
  assert 'nan' not in markdown


def test_many_contexts_are_tables(tmp_path):
  found = study()
  more = [
    o._replace(values=o.values | {'workers': '32'})
    for o in found
    if o.values['workers'] == '8'
  ]
  markdown, html, pictures = written(tmp_path, found + more)
  assert pictures == ['map.png']
  for context in outcomes.contexts(found + more):
    for text in (markdown, html):
      assert text.count(f'<summary>{context.name}</summary>') == 1


def test_a_map_for_each_value_of_other_axes():
  found = [
    o._replace(values={'data': data} | o.values)
    for data in ('digits', 'wine')
    for o in study(names=('synchronous', 'asynchronous'))
    if o.values['workers'] == '8' and o.values['machines vary by'] == '0'
  ]
  blocks = study_map_report.blocks(outcomes.contexts(found))
  pictures = [b.name for b in blocks if isinstance(b, documents.Picture)]
  assert pictures == ['map.png', 'map-2.png']
  headings = [b.text for b in blocks if isinstance(b, documents.Heading)]
  assert headings == [study_map.TITLE, 'digits', 'wine']


def test_names_that_are_too_long_or_special(tmp_path):
  long = '$x_1$ & <b> a method of a very long name indeed'
  found = grid(lambda name, *_: len(name) / 100)
  found = [
    o._replace(values=o.values | {'method': long})
    if o.method.select is not None
    else o
    for o in found
  ]
  (group,) = study_map.maps(outcomes.contexts(found))
  study_map_pictures.draw_map(tmp_path / 'map.png', group)


def test_one_seed():
  found = [
    o._replace(seeds=o.seeds[:1], test_accuracy=o.test_accuracy[:1])
    for o in study()
  ]
  for square in squares_of(found):
    assert not square.margin.shown and np.isnan(square.margin.adjusted)
  text = str(study_map_report.blocks(outcomes.contexts(found)))
  assert 'shown in none' in text and ' nan' not in text
