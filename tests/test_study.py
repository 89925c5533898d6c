"""Studies: their cells, what decides them, and what they come to."""

import functools

import ml_collections
import numpy as np
import pytest

from gsgd_jax import crew, outcomes, study, studying, sweeps

pytestmark = pytest.mark.usefixtures('as_users_run_it')
ASGD = {'method': 'asynchronous'}
ORDERED = dict(convert_dict=False, sort_keys=False)
WORKERS = {str(n): {'workers': n} for n in (4, 8)}
METHODS = {
  'sequential': {'method': 'sequential'},
  'ASGD': ASGD,
  'guided': {'method': 'asynchronous+consistent', 'window': 3, 'revisit': 0},
}


def study_of(axes=None, **changes):
  config = study.default_config()
  config.update(
    dict(
      dataset='iris',
      model='softmax_regression',
      workers=4,
      updates=24,
      evaluate_every=12,
      seeds=2,
      tuning_seeds=2,
      lanes=4,
      jobs=0,
    )
  )
  config.axes.update(axes or {'method': METHODS})
  with config.ignore_type():
    for name, value in changes.items():
      config[name] = value
  return config


def cell_of(**changes):
  (cell,) = study.cells(study_of({'method': {'ASGD': ASGD}}, **changes))
  return cell


def places(config):
  return {tuple(sorted(c.values.items())) for c in study.cells(config)}


def place(**values):
  return tuple(sorted(values.items()))


def test_cells_are_the_product_of_the_axes():
  noise = {'clean': {}, 'noisy': {'label_noise': 0.2}}
  axes = dict(noise=noise, workers=WORKERS, method=METHODS)
  cells = study.cells(study_of(axes))
  wanted = {
    place(noise=n, workers=w, method=m)
    for n in noise
    for w in WORKERS
    for m in ('ASGD', 'guided')
  }
  # One worker alone knows no number of workers.
  wanted |= {place(noise=n, method='sequential') for n in noise}
  assert {tuple(sorted(c.values.items())) for c in cells} == wanted
  assert len({c.key for c in cells}) == len(cells) == 10
  for cell in cells:
    assert cell.config.label_noise == noise[cell.values['noise']].get(
      'label_noise', 0
    )
    if 'workers' in cell.values:
      assert cell.config.workers == int(cell.values['workers'])
    assert cell.method.name == METHODS[cell.values['method']]['method']


def test_cells_are_in_the_order_of_the_config():
  axes = dict(workers=dict(reversed(WORKERS.items())), method=METHODS)
  found = [study.shown(c) for c in study.cells(study_of(axes))]
  assert found == ['sequential', '8, ASGD', '8, guided', '4, ASGD', '4, guided']


def test_a_setting_may_be_within_another():
  axes = {
    'method': {'ASGD': ASGD},
    'momentum': {str(m): {'optimizer_kwargs.momentum': m} for m in (0.5, 0.9)},
  }
  cells = study.cells(study_of(axes))
  found = {c.values['momentum']: c.config.optimizer_kwargs for c in cells}
  assert {k: v.momentum for k, v in found.items()} == {'0.5': 0.5, '0.9': 0.9}


@pytest.mark.parametrize(
  'only, number',
  [
    ('', 5),
    ('method=ASGD', 2),
    ('method=ASGD|guided, workers=8', 2),
    ('workers=4', 3),
    ('method=sequential,workers=8', 1),
  ],
)
def test_only(only, number):
  axes = dict(workers=WORKERS, method=METHODS)
  assert len(study.cells(study_of(axes, only=only))) == number


def test_only_of_a_name_with_commas():
  axes = {'method': {'ASGD, plain': ASGD, 'sequential': METHODS['sequential']}}
  (cell,) = study.cells(study_of(axes, only='method=ASGD, plain'))
  assert study.shown(cell) == 'ASGD, plain'


@pytest.mark.parametrize(
  'settings',
  [
    dict(arrivals='gamma', machine_cv=0.5),
    dict(arrivals='speeds', speeds=(1.0, 2.0, 3.0, 4.0)),
    dict(wait_for=2),
    dict(straggler=3.0, fails_at=20.0, back_at=30.0),
    dict(max_ahead=5, overwrite_within=0.1, sync_cost=0.7),
  ],
)
def test_a_cluster_is_nothing_to_one_worker(settings):
  axes = {'method': {'sequential': METHODS['sequential']}}
  (plain,) = study.cells(study_of(axes))
  (same,) = study.cells(study_of(axes, **settings))
  assert plain.key == same.key
  assert [b.name for b in plain.budgets] == ['updates', 'gradients']


@pytest.mark.parametrize(
  'method, changes, names',
  [
    ('asynchronous', {}, ['updates', 'gradients', 'time']),
    ('asynchronous', dict(budgets=('time',)), ['time']),
    ('synchronous', dict(budgets=('time',), sync_costs=(0.0, 0.5)), [
      'time @ 0', 'time @ 0.5',
    ]),
    ('asynchronous+random', dict(budgets=('time',), sync_costs=(0.5,)), [
      'time, serial', 'time, shared @ 0.5',
    ]),
    ('asynchronous+random', dict(
      budgets=('time',), replay_model='parallel'
    ), ['time, parallel']),
    ('asynchronous+random', dict(
      budgets=('time',), stored_gradients=True, revisit=0
    ), ['time']),
  ],
)  # fmt: skip
def test_budgets(method, changes, names):
  config = study_of({'method': {'it': {'method': method}}}, **changes)
  (cell,) = study.cells(config)
  assert [b.name for b in cell.budgets] == names
  for budget in cell.budgets:
    assert budget.amount == (6 if budget.kind == 'time' else 24)


@pytest.mark.parametrize(
  'changes, sentence',
  [
    (dict(only='methods=ASGD'), 'an axis of only must be one of'),
    (dict(only='ASGD'), 'an axis of only must be one of'),
    (dict(only='method=DANA'), 'only: the axis method has no value'),
    (dict(budgets=('energy',)), 'a budget must be one of'),
    (dict(axes={'method': {'ASGD': {'workers': 4}}}), 'has no method'),
    (dict(axes={}), 'the study has no axes'),
    (
      dict(axes={'method': {'two': {'method': 'sequential,asynchronous'}}}),
      'has one method, got sequential,asynchronous',
    ),
    (dict(axes={'method': {'it': {'method': 'quantum'}}}), 'a method must be'),
    (
      dict(axes={'method': {'it': ASGD | {'wokers': 4}}}),
      "'it' of axis 'method' changes 'wokers'.*did you mean workers",
    ),
    (
      dict(axes={'method': {'it': ASGD | {'optimizer_kwarg.momentum': 1}}}),
      "'it' of axis 'method' changes 'optimizer_kwarg.momentum'",
    ),
    (
      dict(axes={'method': {'it': ASGD | {'workers.number': 1}}}),
      "'it' of axis 'method' changes 'workers.number'",
    ),
    (dict(axes={'method': {'it': 'asynchronous'}}), "'it' of axis 'method'"),
    (dict(axes={'method': 'asynchronous'}), "axis 'method'"),
    (dict(updates='many'), 'updates must be an integer'),
  ],
)
def test_bad_cells(changes, sentence):
  changes = dict(changes)
  axes = changes.pop('axes', {'method': METHODS})
  config = study_of({'method': METHODS}, **changes)
  config.axes = ml_collections.ConfigDict(axes, **ORDERED)
  with pytest.raises(ValueError, match=sentence) as e:
    study.cells(config)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  'changes, sentence',
  [
    ({'dataset': 'iris', 'batch_size': 91}, 'at most the 90 training examples'),
    ({'validation_share': 0.0}, 'tuned on validation data'),
    ({'learning_rate': 0.0}, 'tuning begins at learning_rate'),
    ({'learning_rate': None}, 'tuning begins at learning_rate'),
    (
      {'tune': False, 'learning_rate': None},
      'second, it needs a learning_rate',
    ),
    ({'window': 25}, 'window must be at most'),
    ({'replays': 0}, 'would replay nothing'),
  ],
)
def test_every_cell_is_looked_at(changes, sentence):
  """Also those that share a program with another."""
  axes = {
    'which': {'first': {}, 'second': changes},
    'method': {'it': {'method': 'asynchronous+random'}},
  }
  config = study_of(axes, dataset='wine', window=3)
  with pytest.raises(ValueError, match=sentence):
    studying.check(config)


@pytest.mark.parametrize(
  'changes',
  [
    dict(title='Another', description='of it'),
    dict(jobs=3, resume=False, lanes=7),
    dict(best_epoch=True),
    dict(only='method=ASGD'),
    dict(compilation_cache='there'),
  ],
)
def test_what_changes_no_key(changes):
  assert cell_of(**changes).key == cell_of().key


def test_the_order_of_axes_changes_no_key():
  keys = lambda axes: {c.key for c in study.cells(study_of(axes))}
  axes = dict(workers=WORKERS, method=METHODS)
  turned = {a: dict(reversed(axes[a].items())) for a in reversed(axes)}
  assert keys(axes) == keys(turned)


@pytest.mark.parametrize(
  'changes',
  [
    dict(seeds=3),
    dict(tuning_seeds=3),
    dict(tune=False),
    dict(updates=25),
    dict(time=7.0),
    dict(learning_rate=0.1),
    dict(workers=5),
    dict(dataset='wine'),
    dict(validation_share=0.1),
    dict(evaluate_every=8),
    dict(budgets=('updates',)),
    dict(sync_cost=0.3),
    dict(batch_size=8),
    dict(window=4),
  ],
)
def test_what_changes_a_key(changes):
  assert cell_of(**changes).key != cell_of().key


def test_lengths_in_epochs_are_those_in_updates():
  # 90 examples are 5 whole batches of 16.
  found = cell_of(epochs=4.8, evaluate_epochs=2.4)
  assert found.key == cell_of().key
  assert (found.config.updates, found.config.evaluate_every) == (24, 12)


def grouped(config):
  """Which cells share a program, by their values."""
  return {
    frozenset(study.shown(c) for c in group.cells)
    for group in study.groups(study.cells(config))
  }


@pytest.mark.parametrize(
  'axis, changes, share',
  [
    ({'a': {'dataset': 'iris'}, 'b': {'dataset': 'wine'}}, {}, True),
    # Ten classes are not three.
    ({'a': {'dataset': 'iris'}, 'b': {'dataset': 'digits'}}, {}, False),
    ({'a': {'learning_rate': 0.1}, 'b': {'learning_rate': 0.2}}, {}, True),
    ({'a': {'label_noise': 0.1}, 'b': {'label_noise': 0.0}}, {}, True),
    ({'a': {'updates': 24}, 'b': {'updates': 48}}, {}, True),
    # Then the program knows how long it is.
    (
      {'a': {'updates': 24}, 'b': {'updates': 48}},
      dict(schedule='cosine_decay_schedule'),
      False,
    ),
    ({'a': {'workers': 4}, 'b': {'workers': 5}}, {}, False),
    ({'a': {'window': 4}, 'b': {'window': 5}}, {}, False),
    ({'a': {'optimizer': 'sgd'}, 'b': {'optimizer': 'adam'}}, {}, False),
  ],
)
def test_groups(axis, changes, share):
  config = study_of({'a': axis, 'method': {'ASGD': ASGD}}, **changes)
  assert len(grouped(config)) == (1 if share else 2)


# Ended to end: two data sets that share a program, and a worker alone.


def whole(**changes):
  axes = {
    'data': {d: {'dataset': d} for d in ('iris', 'wine')},
    'method': {'ASGD': ASGD},
  }
  config = study_of(axes, best_epoch=True, learning_rate=0.05, **changes)
  cells = studying.check(config)
  groups = study.groups(cells)
  assert len(groups) == 1
  lines = dict(crew.computed(groups, 0))
  return config, cells, lines


@pytest.fixture(scope='module')
def computed():
  """Studies by whether rates are tuned; computed once."""
  return functools.cache(lambda tune: whole(tune=tune))


_ALONE = {}  # By data set: the program of one serves the other cells of it.


def direct(cell, rate, seeds):
  """The same by a sweep of its own, of this data set alone."""
  lanes = [
    sweeps.Lane(study.load(cell.config, seed), seed, rate) for seed in seeds
  ]
  name = cell.config.dataset
  if name not in _ALONE:
    _ALONE[name] = sweeps.Sweep(
      cell.config, cell.method, [lanes[0].dataset], cell.budgets, 2, 12
    )
  return _ALONE[name].run(lanes, cell.budgets, 12)


@pytest.mark.parametrize('tune', [False, True])
def test_a_study_is_its_sweeps(tune, computed):
  _, cells, lines = computed(tune)
  found = study.outcomes_of(cells, lines)
  assert len(found) == 2 * 4
  for cell in cells:
    own = {o.budget: o for o in found if o.values == cell.values}
    assert list(own) == ['updates', study.BEST_EPOCH, 'gradients', 'time']
    rate = own['updates'].learning_rate
    result = direct(cell, rate, own['updates'].seeds)
    for i, budget in enumerate(cell.budgets):
      outcome = own[budget.name]
      assert outcome.seeds.tolist() == [2, 3]
      assert bool(outcome.tried) == tune
      if outcome.learning_rate != rate:
        continue
      close = np.testing.assert_allclose
      close(outcome.test_accuracy, result.test_accuracy[i], rtol=1e-6)
      for name in ('updates', 'gradients', 'time'):
        close(getattr(outcome, name), getattr(result.spent, name)[i])
      close(outcome.curve.test_accuracy, result.curve[1], atol=1e-5)
      assert not outcome.diverged.any()
    best = own[study.BEST_EPOCH]
    within = result.curve[0].updates[:, 0] <= 24
    close(best.test_accuracy, result.curve[1][within].max(axis=0), atol=1e-5)


def test_rates_are_given_where_they_are_not_tuned(computed):
  _, cells, lines = computed(False)
  for outcome in study.outcomes_of(cells, lines):
    assert outcome.learning_rate == 0.05 and outcome.tried == {}


def test_rates_are_tuned_on_validation_data(computed):
  _, cells, lines = computed(True)
  for cell in cells:
    for outcome in study.outcomes_of([cell], lines):
      if outcome.budget == study.BEST_EPOCH:
        continue
      (i,) = [i for i, b in enumerate(cell.budgets) if b.name == outcome.budget]
      means = {rate: x.mean() for rate, x in outcome.tried.items()}
      best = min(r for r in means if means[r] == max(means.values()))
      assert outcome.learning_rate == best
      rates = sorted(means)
      for direction in (-1, 1):
        near = rates[rates.index(best) + direction]
        assert abs(abs(np.log2(near / best)) - 0.5) < 1e-4
      result = direct(cell, best, range(2))
      np.testing.assert_allclose(
        outcome.tried[best], result.validation_accuracy[i], rtol=1e-6
      )


def test_outcomes_of_what_is_finished(computed):
  _, cells, lines = computed(False)
  some = {cells[0].key: lines[cells[0].key]}
  found = study.outcomes_of(cells, some)
  assert {o.values['data'] for o in found} == {cells[0].values['data']}
  assert len(outcomes.contexts(found)) == 1
