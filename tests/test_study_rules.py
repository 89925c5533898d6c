"""Studies: when accuracy is looked at, when runs end, what is compared."""

import numpy as np
import pytest

from gsgd_jax import (
  application,
  data,
  events,
  experiment,
  outcomes,
  report,
  settings,
  sources,
  study,
  studying,
  sweeps,
)

pytestmark = pytest.mark.usefixtures('as_users_run_it')
EPOCH = 90 // 4  # Updates, of iris in batches of 4.


def study_of(methods, **changes):
  config = study.default_config()
  config.update(
    dict(dataset='iris', model='softmax_regression', workers=4, jobs=0)
  )
  config.update(dict(updates=24, evaluate_every=12, seeds=2, lanes=2))
  config.update(dict(tune=False, tuning_seeds=0))
  config.axes.method = methods
  with config.ignore_type():
    for name, value in changes.items():
      config[name] = value
  return config


def alone(cell, seeds):
  """The same run as an experiment of its own."""
  config = settings.default_config()
  with config.ignore_type():
    for name in config:
      config[name] = cell.config[name]
    config.methods, config.seeds = (cell.method.name,), seeds
  return experiment.run(config)[cell.method.name]


def lines_of(config):
  return {
    cell.key: line
    for group in study.groups(study.cells(config))
    for cell, line in study.compute(group)
  }


@pytest.mark.parametrize('method', ['sequential', 'asynchronous'])
def test_the_best_epoch_is_that_of_the_run_alone(method):
  config = study_of(
    {method: {'method': method}},
    batch_size=4,
    updates=4 * EPOCH,
    evaluate_every=EPOCH,
    learning_rate=0.3,
    validation_share=0.0,
    best_epoch=True,
    budgets=('updates',),
  )
  (cell,) = study.cells(config)
  line = lines_of(config)
  found = {o.budget: o for o in study.outcomes_of([cell], _read(line))}
  points = found['updates'].curve.updates[:, 0]
  np.testing.assert_array_equal(points[:4], EPOCH * np.arange(1, 5))
  best = report.chosen(alone(cell, 2), 'best').test_accuracy
  np.testing.assert_allclose(found['best epoch'].test_accuracy, best, atol=1e-5)


def _read(lines):
  from gsgd_jax import crew

  return {key: crew._as_json(line) for key, line in lines.items()}


def test_bounded_staleness():
  """What differs between seeds only after some calls."""
  config = study_of(
    {'ASGD': {'method': 'asynchronous'}}, arrivals='gamma', max_ahead=1
  )
  (cell,) = study.cells(config)
  (line,) = lines_of(config).values()
  history = alone(cell, 2)
  np.testing.assert_allclose(
    line['budgets']['updates']['test_accuracy'],
    history.test_accuracy[-1],
    atol=1e-6,
  )


def test_a_run_ends_whatever_its_budgets_hold(monkeypatch):
  monkeypatch.setattr(sweeps, '_MOST', 0.5)
  config = study_of({'sequential': {'method': 'sequential'}}, evaluate_every=4)
  config.updates, config.budgets = 24, ('updates',)
  (cell,) = study.cells(config)
  (line,) = lines_of(config).values()
  short = alone(cell, 2)
  ended = np.asarray(line['budgets']['updates']['updates'])
  assert (ended == 16).all()  # The first point beyond half of them.
  at = list(short.step).index(16)
  np.testing.assert_allclose(
    line['budgets']['updates']['test_accuracy'],
    short.test_accuracy[at],
    atol=1e-6,
  )


def test_seeds_from_another_one_on():
  methods = {'ASGD': {'method': 'asynchronous'}}
  whole = study_of(methods, seeds=4)
  later = study_of(methods, first_seed=1, tuning_seeds=1)
  (all_four,), (last_two,) = (lines_of(c).values() for c in (whole, later))
  assert last_two['seeds'] == all_four['seeds'][2:]
  np.testing.assert_allclose(
    last_two['budgets']['updates']['test_accuracy'],
    all_four['budgets']['updates']['test_accuracy'][2:],
    atol=1e-6,
  )
  assert study.cells(whole)[0].key != study.cells(later)[0].key


def test_tuning_begins_at_the_first_seed(monkeypatch):
  config = study_of(
    {'ASGD': {'method': 'asynchronous'}},
    first_seed=5,
    tune=True,
    tuning_seeds=2,
  )
  seen = {}
  run = sweeps.Sweep.run

  def seeing(self, lanes, budgets, every, tested=True):
    seen.setdefault(tested, set()).update(lane.seed for lane in lanes)
    return run(self, lanes, budgets, every, tested)

  monkeypatch.setattr(sweeps.Sweep, 'run', seeing)
  lines_of(config)
  assert seen == {False: {5, 6}, True: {7, 8}}


def test_axes_of_data_and_of_what_follows_from_workers():
  config = study_of(
    {'rounds': {'method': 'synchronous', 'wait_for': 'workers / 2'}},
    datasets='iris, wine',
    combine='mean',
  )
  config.axes.workers = {'4': {'workers': 4}, '6': {'workers': 6}}
  cells = study.cells(config)
  assert [tuple(c.values.values()) for c in cells] == [
    (data, 'rounds', workers) for data in ('iris', 'wine') for workers in '46'
  ]
  assert [c.config.wait_for for c in cells] == [2, 3, 2, 3]


def test_a_file_that_has_changed_makes_other_cells(tmp_path):
  mine = tmp_path / 'mine.csv'
  rows = [f'{x},{x % 3},{"ab"[x % 2]}' for x in range(40)]
  mine.write_text('x,y,target\n' + '\n'.join(rows))
  config = study_of(
    {'ASGD': {'method': 'asynchronous'}}, dataset=str(mine), target='target'
  )
  (before,) = study.cells(config)
  mine.write_text('x,y,target\n' + '\n'.join(rows[::-1]))
  study._load.cache_clear()
  sources.read.cache_clear()
  (after,) = study.cells(config)
  assert before.key != after.key


@pytest.mark.parametrize(
  'changes, sentence',
  [
    (dict(axes=dict(how={'a': {'method': 'sequential'}})), "called 'method'"),
    (
      dict(axes=dict(rate={'hot': {'learning_rate': 1.0}})),
      "changes 'learning_rate', and so does",
    ),
    (dict(only='method=ASDG'), "no value 'ASDG'; did you mean ASGD"),
    (dict(dropout=0.5), 'studies have no dropout'),
    (dict(tune=True, tuning_seeds=1, learning_rate=None), 'must be positive'),
  ],
)
def test_bad_studies(changes, sentence):
  methods = {'ASGD': {'method': 'asynchronous', 'learning_rate': 0.1}}
  if changes.get('learning_rate', 0) is None:
    methods['ASGD'].pop('learning_rate')
  axes = changes.pop('axes', {})
  config = study_of(methods, **changes)
  if 'how' in axes:
    del config.axes['method']
  for name, values in axes.items():
    config.axes[name] = values
  with pytest.raises(ValueError, match=sentence):
    studying.check(config)


def test_one_bad_cell_stops_no_other(tmp_path, monkeypatch, capsys):
  config = study_of(
    {
      'ASGD': {'method': 'asynchronous'},
      'sequential': {'method': 'sequential'},
    }
  )
  cells = studying.check(config)
  computed = study._computed

  def fails(sweep, cell):
    if cell.method.name == 'asynchronous':
      raise ValueError('it cannot be')
    return computed(sweep, cell)

  monkeypatch.setattr(study, '_computed', fails)
  assert studying.run(config, cells, tmp_path) == application.FAILED
  assert 'train.py: ASGD: it cannot be' in capsys.readouterr().err
  assert '1 of 2 cells' in (tmp_path / 'report.md').read_text()
  monkeypatch.setattr(study, '_computed', computed)
  assert studying.run(config, cells, tmp_path) == application.DONE
  assert len(studying.finished(tmp_path)) == 2


def outcome(label, name, settings='', guidance=''):
  zeros = np.zeros(2)
  return outcomes.Outcome(
    {'method': label},
    events.method_named(name),
    'gradients',
    0.1,
    {},
    np.arange(2),
    zeros,
    zeros > 0,
    zeros,
    zeros,
    zeros,
    None,
    settings,
    guidance,
  )


def test_companions_have_the_same_settings():
  """Whatever they are called."""
  (context,) = outcomes.contexts(
    [
      outcome('rounds', 'synchronous', 'sgd'),
      outcome('ASGD', 'asynchronous', 'sgd'),
      outcome('mom', 'asynchronous', 'momentum'),
      outcome('rand A', 'asynchronous+random', 'momentum', 'w4'),
      outcome('rand B', 'asynchronous+random', 'momentum', 'w2'),
      outcome('gSGD B', 'asynchronous+consistent', 'momentum', 'w2'),
      outcome('gSGD C', 'asynchronous+consistent', 'momentum', 'w8'),
    ]
  )
  assert context.companion('gSGD B', None) == 'mom'
  assert context.companion('gSGD B', 'random') == 'rand B'
  assert context.companion('gSGD C', 'random') is None
  assert context.companion('gSGD B', 'inconsistent') is None
  assert context.plain('gSGD B') == 'mom'
  assert context.plain() == 'ASGD'


def test_the_settings_that_companions_share():
  guided = {'method': 'asynchronous+consistent', 'window': 3, 'revisit': 0}
  random = guided | {'method': 'asynchronous+random', 'learning_rate': 0.7}
  methods = {
    'a': {'method': 'asynchronous'},
    'b': guided,
    'c': random,
    'd': {'method': 'asynchronous', 'optimizer': 'adam'},
  }
  cells = study.cells(study_of(methods))
  settings_of = [study._alike(c.config) for c in cells]
  assert settings_of[0] == settings_of[1] == settings_of[2] != settings_of[3]


def test_a_sweep_has_no_dropout():
  config = study_of({'ASGD': {'method': 'asynchronous'}})
  config.model, config.dropout, config.dataset = 'cnn_small', 0.5, 'digits'
  (cell,) = study.cells(config)
  with pytest.raises(ValueError, match='no dropout'):
    sweeps.Sweep(
      cell.config, cell.method, [study.load(cell.config, 0)], cell.budgets, 2, 4
    )


def test_large_images_are_measured_as_elsewhere():
  """Some of them, in blocks; only tables are filled up."""
  config = study_of({'sequential': {'method': 'sequential'}}, dataset='digits')
  config.model, config.measured, config.evaluate_every = 'cnn_small', 10, 4
  config.updates, config.budgets = 4, ('updates',)
  (cell,) = study.cells(config)
  digits = study.load(cell.config, 0)

  def image(split):
    pixels = np.clip(32 * split.inputs + 128, 0, 255).astype(np.uint8)
    return data.Examples(pixels.reshape(-1, 8, 8, 1), split.labels)

  images = digits._replace(
    train=image(digits.train),
    validation=image(digits.validation),
    test=image(digits.test),
    scale=(np.float32([0.5]), np.float32([0.2])),
  )
  sweep = sweeps.Sweep(cell.config, cell.method, [images], cell.budgets, 1, 4)
  lane = sweeps.Lane(images, 0, 0.1)
  found = sweep.run([lane], cell.budgets, 4).test_accuracy
  np.testing.assert_allclose(10 * found, np.round(10 * found), atol=1e-5)
