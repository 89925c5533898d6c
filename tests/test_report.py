"""What is said of measurements, and the picture of them."""

import itertools
import sys
import types

import matplotlib
import numpy as np
import pytest

from gsgd_jax import events, report, settings


def config_of(*methods, **changes):
  config = settings.default_config()
  config.methods = methods
  config.update(changes)
  return config


def histories_of(accuracies, **fields):
  """Histories with made-up test accuracies, (evaluations, seeds) each."""
  out = {}
  for method in events.methods(config_of(*accuracies)):
    accuracy = np.array(accuracies[method.name], np.float64)
    step = np.arange(len(accuracy)) * 10
    measured = {f: np.full(accuracy.shape, 0.5) for f in events.MEASURED}
    measured['test_accuracy'] = accuracy
    for field in ('overwritten', 'lost', 'refused'):
      measured[field] = np.zeros(accuracy.shape)
    spent = 1234 + step - step[-1]
    measured['gradient_evaluations'] = spent[:, None] + 0 * accuracy
    measured.update({k: np.array(v) for k, v in fields.items()})
    arrivals = events.Arrivals(
      np.full(accuracy.shape[1], 1.5), np.array([2, 4, 0]), np.array([0.5, 1.5])
    )
    out[method.name] = events.History(
      method, 'completed', None, step, step / 5, arrivals, **measured
    )
  return out


def test_interval_is_students():
  # t with 2 degrees of freedom: 4.303; deviation 1; n = 3.
  measured = report.interval(np.array([1.0, 2.0, 3.0]))
  assert measured.mean == 2
  np.testing.assert_allclose(measured.half_width, 4.30265 / 3**0.5, rtol=1e-5)
  assert report.interval(np.array([5.0])) == (5.0, None)
  assert str(report.Interval(-1e-3, 0.5)) == '0.00 ± 0.50'
  assert report.signed(report.Interval(-1e-3, None)) == '+0.00'
  assert report.signed(report.Interval(-0.01, None)) == '-0.01'


FOUR = {
  'sequential': [[0.1] * 3, [0.9, 0.9, 0.92]],
  'asynchronous': [[0.1] * 3, [0.8, 0.81, 0.82]],
  'asynchronous+consistent': [[0.1] * 3, [0.9, 0.90, 0.91]],
  'asynchronous+random': [[0.1] * 3, [0.89, 0.92, 0.90]],
}


def test_table_and_sentences_say_what_was_measured():
  histories = histories_of(FOUR)
  lines = report.table(histories).splitlines()
  assert [line.split('  ')[0] for line in lines] == [
    'method',
    lines[1],
    'sequential',
    'asynchronous',
    'asynchronous, guided',
    'asynchronous, random replays',
  ]
  assert 'less asynchronous, paired' in lines[0]
  assert '81.00 ± 2.48' in lines[3] and '1,234' in lines[3]
  # Paired by seed: 10, 9, 10 points.
  assert '+9.67 ± 1.43' in lines[2]
  said = report.sentences(config_of(*FOUR), histories)
  assert said[0] == (
    'The delay of 16 workers changes test accuracy by -9.67 ± 1.43 points.'
  )
  assert said[1].startswith(
    'Guided SGD changes the accuracy of asynchronous training by +9.33'
  )
  assert said[2].startswith('Random replays, the control with as many')
  assert said[3].startswith('Guided less random replays')
  assert said[3].endswith('(no difference shown).')


def test_methods_that_did_not_end_are_not_compared():
  histories = histories_of(FOUR)
  gone = histories['asynchronous']._replace(
    status='diverged', message='asynchronous diverged: ...'
  )
  histories['asynchronous'] = gone
  table = report.table(histories)
  assert 'less' not in table.splitlines()[0]
  (row,) = [r for r in table.splitlines() if r.startswith('asynchronous  ')]
  assert row.split()[1:] == ['-', '-', '10', '1,234', '0.5', 'diverged']
  said = report.sentences(config_of(*FOUR), histories)
  assert said[0] == 'asynchronous diverged: ....'
  assert len(said) == 2 and said[1].startswith('Guided less random')


def test_gradients_that_arrived_for_nothing_are_told():
  zeros = [[0] * 3] * 2
  histories = histories_of(
    {'asynchronous': FOUR['asynchronous']},
    applied=[[0] * 3, [8, 8, 9]],
    overwritten=[[0] * 3, [2, 1, 1]],
    lost=zeros,
  )
  said = report.sentences(config_of('asynchronous'), histories)
  assert said == [
    'asynchronous: 14 % of the gradients were overwritten by others.'
  ]


def test_one_seed_has_no_interval():
  histories = histories_of({'sequential': [[0.9]] * 2, 'delayed': [[0.8]] * 2})
  said = report.sentences(config_of('sequential', 'delayed'), histories)
  assert said == [
    'A delay of 15 updates changes test accuracy by -10.00 points '
    '(one seed: no interval).'
  ]


def test_chosen_evaluations():
  """By hand: three seeds, four evaluations after step 0."""
  (history,) = histories_of(
    {
      'sequential': [
        [1.0, 1.0, 1.0],  # Before the first update: never chosen.
        [0.1, 0.5, 0.3],
        [0.2, 0.4, 0.3],
        [0.3, 0.3, 0.9],
        [0.4, 0.2, 0.3],
      ]
    },
    validation_accuracy=[
      [1.0, 1.0, 1.0],
      [0.7, 0.6, 0.5],
      [0.9, 0.6, 0.5],
      [0.9, 0.6, 0.5],
      [0.8, 0.5, 0.5],
    ],
    validation_loss=[
      [0.0, 0.0, 0.0],
      [0.0, 0.3, 0.2],
      [0.5, 0.2, 0.2],
      [0.4, 0.2, 0.2],
      [0.0, 0.0, np.nan],
    ],
  ).values()
  by_validation = report.chosen(history, 'validation')
  # Highest accuracy and lowest loss; of equals the first.
  assert by_validation.step.tolist() == [30, 20, 10]
  assert by_validation.test_accuracy.tolist() == [0.3, 0.4, 0.3]
  last = report.chosen(history, 'last')
  assert last.step.tolist() == [40] * 3
  assert last.test_accuracy.tolist() == [0.4, 0.2, 0.3]
  # The first seed stopped at 20, the others at 40.
  spent = np.array([[0, 0, 0], [1, 1, 1], [2, 2, 2], [2, 3, 3], [2, 4, 4]])
  stopped = history._replace(gradient_evaluations=spent)
  assert report.chosen(stopped, 'last').step.tolist() == [20, 40, 40]
  best = report.chosen(history, 'best')
  assert best.step.tolist() == [40, 10, 30]
  assert best.test_accuracy.tolist() == [0.4, 0.5, 0.9]


def test_nothing_to_choose():
  (history,) = histories_of({'sequential': [[0.5, 0.5]]}).values()
  for by in ('validation', 'last', 'best'):
    assert report.chosen(history, by) is None  # Only step 0.
  (history,) = histories_of(
    {'sequential': [[0.5], [0.6]]}, validation_accuracy=[[np.nan]] * 2
  ).values()
  assert report.chosen(history, 'validation') is None
  assert report.chosen(history, 'last').test_accuracy.tolist() == [0.6]


@pytest.mark.parametrize('seeds', [1, 3])
def test_a_picture_of_whatever_there_is(tmp_path, seeds):
  """Losses that are not finite, a method that never began."""
  histories = histories_of(
    {
      'sequential': [[0.5] * seeds, [0.6] * seeds],
      'asynchronous': [[0.5] * seeds, [0.6] * seeds],
    },
    train_loss=[[1.0] * seeds, [np.inf] * seeds],
  )
  empty = histories['asynchronous']
  histories['asynchronous'] = empty._replace(
    status='not_started',
    **{f: getattr(empty, f)[:0] for f in ('step', *events.MEASURED)},
  )
  path = tmp_path / 'curves.png'
  config = config_of(*histories, seeds=seeds, learning_rate=None)
  for draw in (report.draw, report.draw_staleness):
    with np.errstate(invalid='ignore'):
      draw(path, config, histories)
    assert path.read_bytes().startswith(b'\x89PNG')
    path.unlink()


@pytest.mark.parametrize(
  'highest, top, texts',
  [
    ([(100.0, -0.5, 'r'), (2.0, 3.5, 'k')], 2.5, ['to 100 %']),
    (
      [(90.0, -0.5, 'r'), (100.0, 7.5, 'b'), (8.0, 3.5, 'k')],
      10,
      ['90', '100'],
    ),
    ([(100.0, -0.5, 'r')], 110, []),
    ([(100.0, -0.5, 'r'), (20.0, 3.5, 'k')], 110, []),
    ([(30.0, -0.5, 'r'), (2.0, 3.5, 'k')], 110, []),
    ([], 110, []),
  ],
)
def test_a_bar_is_cut_where_others_would_vanish(highest, top, texts):
  plt = report.pyplot()
  figure, axes = plt.subplots()
  axes.set_ylim(0, 110)
  report._cut(axes, highest)
  assert axes.get_ylim() == (0, top)
  shown = [text.get_text() for text in axes.texts]
  assert len(shown) == len(texts)
  assert all(text in said for text, said in zip(texts, shown, strict=True))
  plt.close(figure)


def test_numbers_on_the_clock_do_not_overlap(tmp_path, monkeypatch):
  histories = histories_of(FOUR)
  figures = []
  save = report.save
  keep = lambda figure, *rest: (figures.append(figure), save(figure, *rest))
  monkeypatch.setattr(report, 'save', keep)
  config = config_of(*FOUR, seeds=3, learning_rate=0.1)
  report.draw(tmp_path / 'curves.png', config, histories)
  axes = figures[0].axes[1]
  for limits in ((22, 700), (1.6, 470), (0.3, 2), (8, 1700)):
    axes.set_xlim(limits)
    figures[0].canvas.draw()
    labels = [*axes.get_xticklabels(), *axes.get_xticklabels(minor=True)]
    boxes = [t.get_window_extent() for t in labels if t.get_text()]
    boxes = sorted((b.x0, b.x1) for b in boxes if b.x0 < figures[0].bbox.x1)
    assert len(boxes) > 1
    for (_, end), (start, _) in itertools.pairwise(boxes):
      assert end < start


@pytest.mark.parametrize('notebook', [False, True])
def test_a_notebook_shows_its_own_pictures_as_before(monkeypatch, notebook):
  chosen = []
  monkeypatch.setattr(matplotlib, 'use', chosen.append)
  app = types.SimpleNamespace(initialized=lambda: notebook)
  kernel = types.SimpleNamespace(IPKernelApp=app)
  monkeypatch.setitem(sys.modules, 'ipykernel.kernelapp', kernel)
  report.pyplot()
  assert chosen == ([] if notebook else ['agg'])


def test_methods_with_equal_arrivals_share_a_line():
  histories = histories_of(FOUR)
  alone = histories['sequential']
  alone = alone._replace(arrivals=alone.arrivals._replace(shares=np.ones(1)))
  assert not report.has_workers(alone)
  histories['sequential'] = alone
  random = histories['asynchronous+random']
  other = random.arrivals._replace(histogram=np.array([1, 2, 3]))
  histories['asynchronous+random'] = random._replace(arrivals=other)
  lines = report._arrivals(histories)
  assert [style['label'] for _, style in lines] == [
    'asynchronous\nasynchronous, guided',
    'asynchronous, random replays',
  ]


def test_the_cluster_is_in_the_title():
  config = config_of('asynchronous', workers=64)
  assert '64 workers, batch' in report._title(config, {})
  config.update(arrivals='gamma', machine_cv=0.6, straggler=9.0, fails_at=3.0)
  assert (
    '64 workers (gamma, machines vary by 0.6, one 9 times as slow, one fails '
    'at 3)' in report._title(config, {})
  )
