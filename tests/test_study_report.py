"""The report of a study says what was measured, whatever there is of it."""

import re

import numpy as np
import pytest

from gsgd_jax import (
  events,
  outcomes,
  settings,
  statistics,
  study_pictures,
  study_report,
)

SEEDS = 6
NAMES = (
  'sequential',
  'asynchronous',
  'asynchronous+consistent',
  'asynchronous+random',
  'asynchronous+dana',
  'asynchronous+dana+consistent',
)


def outcome_of(name, budget='gradients', accuracy=0.9, **changes):
  """A made-up outcome; numbers follow from what it is of."""
  method = events.method_named(name)
  values = {'task': 'digits', 'workers': '4', 'method': method.label}
  values |= changes.pop('values', {})
  n = changes.pop('n', SEEDS)
  told = f'{sorted(values.items())} {budget}'
  rng = np.random.default_rng(list(told.encode()))
  points = np.arange(4.0)[:, None] * np.full((4, n), 10.0)
  curve = outcomes.Curve(
    points, 2 * points, {'serial': points, 'shared': points / 2}, points / 40
  )
  fields = dict(
    learning_rate=0.1,
    tried={
      r: accuracy - (np.log10(r) + 1) ** 2 / 50 + np.zeros(3)
      for r in (0.01, 0.1, 1.0)
    },
    seeds=np.arange(n),
    test_accuracy=accuracy + rng.normal(0, 0.01, n),
    diverged=np.zeros(n, bool),
    updates=np.full(n, 400.0),
    gradients=np.full(n, 512.0),
    time=np.full(n, 123.0),
    curve=curve,
  )
  return outcomes.Outcome(values, method, budget, **fields | changes)


def study():
  """Two numbers of workers, six methods, all of their budgets."""
  out = []
  for workers in ('4', '16'):
    for i, name in enumerate(NAMES):
      guided = events.method_named(name).select is not None
      times = ['time, serial', 'time, shared'] if guided else ['time']
      for budget in ('updates', 'gradients', *times):
        accuracy = 0.9 if i == 0 else 0.8 + 0.01 * i
        values = {'workers': workers}
        out.append(outcome_of(name, budget, accuracy, values=values))
  return out


def written(workdir, found, progress='finished', description='Why.'):
  names = study_report.write(workdir, 'A study', description, found, progress)
  assert sorted(names) == sorted(p.name for p in workdir.iterdir())
  read = lambda name: (workdir / name).read_text(encoding='utf-8')
  return read('report.md'), read('report.html'), names[2:]


def percent(outcome):
  return 100 * outcome.test_accuracy


def told(difference):
  """As tables tell a difference and its n."""
  measured = statistics.interval(difference)
  return f'{measured.mean:+.2f} ± {measured.half_width:.2f} ({SEEDS})'


def test_numbers_are_those_of_the_outcomes(tmp_path):
  found = study()
  markdown, html, pictures = written(tmp_path, found)
  by = {
    (o.values['workers'], o.method.name, o.budget): percent(o) for o in found
  }
  expected = [
    f'{v.mean():.2f} ± {statistics.interval(v).half_width:.2f} ({SEEDS})'
    for v in by.values()
  ]
  for workers in ('4', '16'):
    at = lambda name, w=workers: by[w, name, 'gradients']
    plain, guided = at('asynchronous'), at('asynchronous+consistent')
    dana = at('asynchronous+dana')
    expected += [
      told(plain - at('sequential')),
      told(dana - plain),
      told(guided - at('asynchronous+random')),
      str(statistics.recovered(at('sequential'), plain, dana)),
    ]
  for text in expected:
    assert text in markdown and text in html
  assert 'not finished' not in markdown
  for kind in ('workers', 'ranking', 'rates', 'curves'):
    assert any(name.startswith(kind) for name in pictures)


def test_p_values_are_adjusted_for_all_comparisons():
  found = study()
  compared = study_report.comparisons(outcomes.contexts(found))
  # Guided: plain against two, DANA against one; 2 workers, 4 budgets; but not
  # against unguided ones at equal updates.
  assert len(compared) == 3 * 2 * 4 - 2 * 2
  p = [c.found.p for c in compared]
  np.testing.assert_array_equal(
    [c.adjusted for c in compared], statistics.holm(p)
  )
  first = compared[0]
  ours, theirs = (
    next(o for o in found if o.label == q and o.budget == 'gradients')
    for q in (first.label, first.against)
  )
  assert first[1:6] == (
    'asynchronous, guided',
    'asynchronous',
    None,
    'gradients',
    SEEDS,
  )
  assert first.found == statistics.paired(percent(ours), percent(theirs))


def test_all_comparisons_of_a_kind_are_pooled_by_seed(tmp_path):
  found = study()
  markdown, *_ = written(tmp_path, found)
  at = lambda name, workers: percent(
    next(
      o
      for o in found
      if (o.method.name, o.values['workers'], o.budget)
      == (name, workers, 'gradients')
    )
  )
  guided, random = 'asynchronous+consistent', 'asynchronous+random'
  by_seed = np.mean(
    [at(guided, w) - at(random, w) for w in ('4', '16')], axis=0
  )
  row = '| random replays | equal gradient evaluations | 2 | 0 | 0 |'
  assert f'{row} {told(by_seed)} |' in markdown
  said = next(q for q in markdown.splitlines() if 'Asked alone' in q)
  assert 'for these 2 comparisons only' in said and told(by_seed) in said


@pytest.mark.parametrize('sign', [1, -1])
def test_a_question_asked_alone_has_an_adjustment_of_its_own(tmp_path, sign):
  # p is 0.02 to 0.04: shown among one or two comparisons, not among many.
  noise = np.array([3.0, -2.0, 1.0, -1.0, 2.0, -3.0]) / 100
  base = outcome_of('asynchronous+random', accuracy=0.8)
  ours = base.test_accuracy + sign * 0.025 + noise
  found = [
    outcome_of('asynchronous+consistent', test_accuracy=ours),
    base,
    outcome_of('asynchronous', test_accuracy=ours),
    outcome_of('asynchronous+hardest', test_accuracy=ours),
    outcome_of('asynchronous+surprise', test_accuracy=ours),
  ]
  p = statistics.paired(100 * ours, percent(base)).p
  assert 0.05 / 4 < p < 0.05
  markdown, *_ = written(tmp_path, found)
  assert '4 comparisons 0 show' in markdown
  better, worse = (1, 0) if sign > 0 else (0, 1)
  assert f'better in {better} and worse in {worse}.' in markdown


def test_validation_accuracy_is_told_at_the_best_rate(tmp_path):
  tried = {0.01: np.array([0.5, 0.6]), 0.1: np.array([0.8, 0.84])}
  markdown, *_ = written(tmp_path, [outcome_of('asynchronous', tried=tried)])
  assert f'| {statistics.interval(np.array([80, 84.0]))} | 0.1 |' in markdown


def test_a_budget_that_no_update_fits_into_is_told(tmp_path):
  found = [
    outcome_of('asynchronous', updates=np.zeros(SEEDS)),
    outcome_of('sequential', updates=np.arange(SEEDS)),
  ]
  markdown, *_ = written(tmp_path, found)
  rows = [q for q in markdown.splitlines() if '<br>no update fits' in q]
  assert len(rows) == 1 and rows[0].startswith('| asynchronous')
  assert 'parameters are the first ones' in markdown


def test_one_time_stands_for_all_where_nothing_is_replayed():
  (few, _) = outcomes.contexts(study())
  assert few.budgets() == [
    'updates',
    'gradients',
    'time, serial',
    'time, shared',
  ]
  assert few.at('asynchronous', 'time, serial').budget == 'time'
  guided = 'asynchronous, guided'
  assert few.at(guided, 'time, serial').budget == 'time, serial'
  assert few.at(guided, 'time, parallel') is None
  unguided = outcomes.contexts([outcome_of('asynchronous', 'time')])
  assert unguided[0].budgets() == ['time']


def test_what_lacks_an_axis_stands_everywhere():
  alone = outcome_of('sequential')
  del alone.values['workers']
  many = [
    outcome_of('asynchronous', values={'workers': w}) for w in ('16', '4')
  ]
  found = outcomes.contexts([many[0], alone, many[1]])
  assert [c.name for c in found] == ['digits, 4 workers', 'digits, 16 workers']
  assert all(c.at('sequential', 'gradients') is alone for c in found)
  # Alone it has a place of its own.
  assert [c.name for c in outcomes.contexts([alone])] == ['digits']


def test_companions_are_of_the_same_variant():
  names = {
    'asynchronous+dana': ['DANA, fast', 'DANA, slow'],
    'asynchronous+dana+consistent': ['DANA, guided, fast', 'guided DANA, slow'],
    'asynchronous+dana+random': ['DANA, random replays'],
  }
  found = [
    outcome_of(name, values={'method': label})
    for name, labels in names.items()
    for label in labels
  ]
  (context,) = outcomes.contexts(found)
  assert context.companion('guided DANA, slow', None) == 'DANA, slow'
  assert context.companion('DANA, guided, fast', None) == 'DANA, fast'
  # Without one of the variant, the method's.
  other = context.companion('DANA, guided, fast', 'random')
  assert other == 'DANA, random replays'
  assert context.companion('DANA, guided, fast', 'hardest') is None


def test_rates_at_the_edge_and_divergence_are_told(tmp_path):
  diverged = np.arange(SEEDS) < 2
  found = [
    outcome_of('sequential', learning_rate=1.0),
    outcome_of('asynchronous', diverged=diverged),
    outcome_of('asynchronous+dana', learning_rate=0.5, tried={}),
  ]
  markdown, html, _ = written(tmp_path, found)
  for text in (markdown, html):
    assert 'rate 1 †' in text and '† The rate is the smallest' in text
    assert 'rate 0.1 †' not in text and 'rate 0.5 †' not in text
    assert f'2 of {SEEDS} diverged' in text
  (tmp_path / 'other').mkdir()
  markdown, *_ = written(tmp_path / 'other', found[2:])
  assert '†' not in markdown and 'diverged' not in markdown


def test_open_ranges_are_told(tmp_path):
  flat = {0.01: np.array([0.9]), 0.1: np.array([0.9])}
  found = [outcome_of('sequential'), outcome_of('asynchronous', tried=flat)]
  markdown, html, _ = written(tmp_path, found)
  row = ['asynchronous', '90.00', '0.01', '&lt;= 0.01', '&gt;= 0.1']
  row.append('&gt;= 10')
  assert f'| {" | ".join(row)} |' in markdown
  assert ''.join(f'<td>{cell}</td>' for cell in row[1:]) in html


def test_nothing_yet(tmp_path):
  markdown, html, pictures = written(tmp_path, [], '0 of 340 cells')
  for text in (markdown, html):
    assert 'not finished: 0 of 340 cells' in text
    assert 'Nothing was measured yet.' in text
  assert not pictures
  assert study_report.text([]) == 'Nothing was measured yet.'


NO_SEED = dict(n=0, tried={}, curve=None)


@pytest.mark.parametrize(
  'found',
  [
    [outcome_of('asynchronous+consistent')],
    [outcome_of('asynchronous', n=1)],
    [outcome_of('asynchronous', **NO_SEED)],
    [outcome_of('asynchronous', **NO_SEED), outcome_of('sequential', n=2)],
    [outcome_of('asynchronous', tried={0.1: np.zeros(0)}, curve=None)],
    [outcome_of('asynchronous', tried={0.1: np.array([np.nan])})],
    [outcome_of('asynchronous', test_accuracy=np.full(SEEDS, np.nan))],
    [outcome_of('asynchronous', budget='best epoch')],
    [outcome_of('asynchronous', seeds=np.arange(SEEDS) + 99), *study()[:8]],
    study()[:-9],
  ],
)
def test_a_part_of_a_study(tmp_path, found):
  markdown, html, _ = written(tmp_path, found, 'a part')
  assert 'nan' not in markdown.lower() and 'asynchronous' in html
  assert 'asynchronous' in study_report.text(found)


def test_other_seeds_are_no_pairs():
  ours = outcome_of('asynchronous', n=4)
  theirs = outcome_of('sequential', n=4, seeds=np.array([5, 3, 2, 9]))
  mine, other = outcomes.aligned(ours, theirs)
  np.testing.assert_array_equal(mine, percent(ours)[[2, 3]])
  np.testing.assert_array_equal(other, percent(theirs)[[2, 1]])
  assert outcomes.aligned(ours, None) is None
  assert (
    outcomes.aligned(ours, theirs._replace(seeds=theirs.seeds + 99)) is None
  )


def test_special_characters_mean_themselves(tmp_path):
  label = 'a|b <i>*c*</i> `d` & "e" $f$ [g](h) _i_'
  found = [
    outcome_of('asynchronous', values={'method': label, 'task': '<b>|$x'}),
    outcome_of('sequential', values={'task': '<b>|$x'}),
  ]
  markdown, html, _ = written(tmp_path, found, description='1 < 2 & *so*')
  for tag in ('<i>', '<b>', '1 < 2', '"e"'):
    assert tag not in html
  assert '&lt;i&gt;*c*&lt;/i&gt;' in html and '1 &lt; 2 &amp; *so*' in html
  assert r'a\|b &lt;i&gt;\*c\*&lt;/i&gt; \`d\` &amp;' in markdown
  rows = [line for line in markdown.splitlines() if line.startswith('| a')]
  heads = [
    line for line in markdown.splitlines() if line.startswith('| method')
  ]
  bars = lambda line: len(re.findall(r'(?<!\\)\|', line))
  assert rows and set(map(bars, rows)) <= set(map(bars, heads))


def test_the_page_needs_nothing_else(tmp_path):
  _, html, pictures = written(tmp_path, study())
  sources = re.findall(r'(?:src|href)="([^"]*)"', html)
  assert all(s.startswith(('#', 'data:image/png;base64,')) for s in sources)
  assert sum(s.startswith('data:') for s in sources) == len(pictures)
  assert not re.search(r'https?:|url\(|@import|<script|<link', html)
  places = [s[1:] for s in sources if s.startswith('#')]
  assert places == re.findall(r'id="([^"]*)"', html)


def test_lines_are_few_enough_to_be_told_apart(tmp_path):
  names = [
    'asynchronous',
    *(f'asynchronous+{c}' for c in settings.COMPENSATIONS),
  ]
  found = [
    outcome_of(name, test_accuracy=np.full(SEEDS, 0.7 + 0.01 * i))
    for i, name in enumerate(names)
  ]
  found.append(outcome_of('sequential', accuracy=0.6))
  (context,) = outcomes.contexts(found)
  best = [o.label for o in found[-2:0:-1]]
  few = study_pictures.lines(context)
  assert few == ['sequential', 'asynchronous', *best[:7]]
  markdown, *_ = written(tmp_path, found)
  assert f'Of {len(found)} methods there are sequential' in markdown
  assert '9 in all' in markdown
  assert all(f'| {label} |' in markdown for label in best)


def test_text_is_a_table_a_context():
  found = study()
  text = study_report.text(found)
  assert text.startswith('digits, 4 workers\n\ntest accuracy, %')
  assert text.count('asynchronous, DANA, guided') == 2
  assert str(statistics.interval(percent(found[0]))) in text
  # The best is first.
  assert text.splitlines()[4].startswith('sequential')
