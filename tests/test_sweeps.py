"""Lanes against ordinary runs, and what budgets keep against plain Python."""

import functools

import numpy as np
import pytest

from gsgd_jax import batches, data, events, experiment, sweeps
from tests import runs

pytestmark = pytest.mark.usefixtures('as_users_run_it')
UPDATES, PRICE = 24, 0.5
FREE = dict(verification=False, revisit=0, replays=2)
CASES = {
  'sequential': {},
  'asynchronous+dana': dict(learning_rate=0.01),
  'asynchronous+rennala': {},
  'asynchronous+consistent': dict(
    replay_model='shared', arrivals='gamma', machine_cv=0.6
  ),
  'asynchronous+consistent, free': dict(replay_model='parallel', **FREE),
  'asynchronous+random, stored': dict(stored_gradients=True, revisit=0),
  'synchronous': dict(arrivals='gamma', combine='mean', wait_for=3),
  'data_parallel': dict(arrivals='gamma', split_batch_size=32),
  'delayed': {},
}


def config_of(case, **changes):
  common = dict(updates=UPDATES, evaluate_every=12, sync_cost=PRICE)
  method = case.partition(',')[0]
  return runs.config_of(method, **common | CASES[case] | changes)


def method_of(config):
  (method,) = events.methods(config)
  return method


# The same object for all: seeds that share arrays have another program.
load = functools.cache(data.load)


def lanes_of(config, *rates):
  return [
    sweeps.Lane(load(config.dataset, seed), seed, rate)
    for rate in rates or (config.learning_rate,)
    for seed in range(config.seeds)
  ]


def budgets_of(config):
  """The first is what an ordinary run spends, by the prices of its config."""
  shared = config.replay_model == 'shared'
  joined = 2 if config.split_batch_size else 1
  return (
    sweeps.Budget('all', 'updates', UPDATES * joined, PRICE, shared),
    sweeps.Budget('gradients', 'gradients', 21.0),
    sweeps.Budget('time', 'time', 4.0),
    sweeps.Budget('dear time', 'time', 4.5, PRICE),
    sweeps.Budget('shared time', 'time', 5.0, PRICE, shared=True),
  )


def swept(config, lanes, number, every):
  """A sweep whose own settings of rate and price are none of the lanes'."""
  config = config.copy_and_resolve_references()
  config.update(learning_rate=1000.0, sync_cost=7.0)
  datasets = [lane.dataset for lane in lanes if lane.seed == 0]
  budgets = budgets_of(config)
  method = method_of(config)
  sweep = sweeps.Sweep(config, method, datasets, budgets, number, every)
  return sweep.run(lanes, budgets, every)


@functools.cache
def swept_call_by_call(case):
  config = config_of(case)
  return swept(config, lanes_of(config), number=3, every=1)


@functools.cache
def ordinary(case, **changes):
  """The history of an ordinary run."""
  (history,) = experiment.run(config_of(case, **changes)).values()
  return history


def assert_ordinary(result, history, lanes=slice(None), seeds=slice(None)):
  """Lanes at the first budget are an ordinary run at its end."""
  close = functools.partial(np.testing.assert_allclose, rtol=2e-6)
  at_end = lambda name: getattr(history, name)[-1, seeds]
  for name in ('validation_accuracy', 'test_accuracy'):
    close(getattr(result, name)[0, lanes], at_end(name))
  close(result.spent.time[0, lanes], at_end('simulated_time'))
  # Those that are in flight at the end were not taken for any update.
  parallel = history.method.parallel
  flying = 3 if parallel in ('asynchronous', 'delayed') else 0
  taken = at_end('gradient_evaluations') - flying
  close(result.spent.gradients[0, lanes], taken)


@pytest.mark.parametrize('case', CASES)
def test_a_lane_is_an_ordinary_run(case):
  result = swept_call_by_call(case)
  assert_ordinary(result, ordinary(case))
  assert result.test_accuracy.shape == (5, 2)  # The third is no lane.
  assert not result.diverged.any()


@pytest.mark.parametrize('case', CASES)
def test_a_budget_keeps_the_last_moment_within_it(case):
  result = swept_call_by_call(case)
  spent, accuracy = result.curve
  for i, budget in enumerate(budgets_of(config_of(case))):
    column = getattr(spent, budget.kind)
    if budget.kind == 'time':
      column = column[..., i]
    assert (np.diff(column, axis=0) >= 0).all()
    assert (column[-1] > budget.amount).all()
    for lane in range(2):
      last = np.flatnonzero(column[:, lane] <= budget.amount * (1 + 1e-6))[-1]
      assert result.test_accuracy[i, lane] == accuracy[last, lane]
      assert result.spent.updates[i, lane] == spent.updates[last, lane]
      assert result.spent.gradients[i, lane] == spent.gradients[last, lane]
      assert result.spent.time[i, lane] == spent.time[last, lane, i]


@pytest.mark.parametrize(
  'case, updates, gradients, time',
  [
    ('sequential', 1, 1, 1),
    ('asynchronous+dana', 1, 1, 1 / 4),
    ('asynchronous+rennala', 1, 1, 1 / 4),
    ('delayed', 1, 1, 1 / 4),
  ],
)
def test_what_a_call_spends(case, updates, gradients, time):
  spent, _ = swept_call_by_call(case).curve
  # Calls that only fill come before the first point.
  arrived = np.arange(1, len(spent.updates) + 1)[:, None] + np.zeros([1, 2])
  np.testing.assert_array_equal(spent.updates, updates * arrived)
  np.testing.assert_array_equal(spent.gradients, gradients * arrived)
  np.testing.assert_allclose(spent.time[..., 2], time * arrived)


@pytest.mark.parametrize(
  'case, waited, taken, updates',
  [('synchronous', 3, 4, 1), ('data_parallel', 1, 2, 2)],
)
def test_who_waits_pays_for_it(case, waited, taken, updates):
  """Rounds cost a synchronisation, and gradients that are thrown away count."""
  spent, _ = swept_call_by_call(case).curve
  rounds = (np.arange(1, len(spent.updates) + 1) // waited)[:, None]
  paid = spent.time[..., 3] - spent.time[..., 2]
  np.testing.assert_allclose(paid, PRICE * rounds + 0 * paid, rtol=1e-5)
  np.testing.assert_array_equal(
    spent.updates, updates * np.arange(1, len(paid) + 1)[:, None] + 0 * paid
  )
  ends = slice(waited - 1, None, waited)
  np.testing.assert_array_equal(
    spent.gradients[ends], (taken * rounds + 0 * paid)[ends]
  )


def test_replays_count_and_cost():
  """Against counts: all gradients beside those that arrived are replays."""
  spent, _ = swept_call_by_call('asynchronous+consistent').curve
  replays = spent.gradients - spent.updates
  assert (replays[-1] > 0).all()
  paid = spent.time[..., 4] - spent.time[..., 2]
  # One is split over 4 workers, with a synchronisation; or is the server's.
  np.testing.assert_allclose(
    paid, replays * (1 / 4 + PRICE - 1), rtol=1e-5, atol=1e-5
  )


def test_rates_side_by_side_and_one_that_diverges():
  config = config_of('sequential')
  lanes = lanes_of(config, config.learning_rate, 3e38, 0.3)
  result = swept(config, lanes, number=6, every=7)
  assert_ordinary(result, ordinary('sequential'), lanes=slice(0, 2))
  other = ordinary('sequential', learning_rate=0.3)
  assert_ordinary(result, other, lanes=slice(4, 6))
  np.testing.assert_array_equal(
    result.diverged, [[False, False, True, True, False, False]] * 5
  )
  for accuracy in (result.validation_accuracy, result.test_accuracy):
    np.testing.assert_allclose(accuracy[:, 2:4], 1 / 3)


@pytest.mark.parametrize('case', ['asynchronous+consistent'])
def test_data_sets_side_by_side_are_as_alone(case):
  """Of 4 and 13 features, 90 and 106 examples, samples of 9 and of 10."""
  config = config_of(case)
  lanes = [
    sweeps.Lane(load(name, 0), 0, config.learning_rate)
    for name in ('wine', 'iris')
  ]
  result = swept(config, lanes, number=2, every=13)
  wine = ordinary(case, dataset='wine', seeds=1)
  assert_ordinary(result, wine, lanes=[0])
  assert_ordinary(result, ordinary(case), lanes=[1], seeds=[0])


def test_filled():
  iris, wine = load('iris', 0), load('wine', 0)
  shape = sweeps.shape_of([iris, wine])
  assert shape == (13, 106, 35, 37)
  filled = sweeps.filled(iris, shape)
  assert filled.shape == (13,)
  for split, rows in (('train', 106), ('validation', 35), ('test', 37)):
    before, after = getattr(iris, split), getattr(filled, split)
    there = len(before.labels)
    assert after.inputs.shape == (rows, 13)
    np.testing.assert_array_equal(after.inputs[:there, :4], before.inputs)
    np.testing.assert_array_equal(after.labels[:there], before.labels)
    assert not after.inputs[there:].any() and not after.inputs[:, 4:].any()


def test_what_is_no_table_is_as_it_is(tmp_path):
  text = text_of(tmp_path)
  assert sweeps.shape_of([text]) is None
  assert sweeps.filled(text, None) is text


def test_without_a_validation_split():
  config = config_of('sequential', validation_share=0.0)
  dataset = data.load('iris', 0, validation_share=0.0)
  lanes = [sweeps.Lane(dataset, 0, rate) for rate in (0.05, 3e38)]
  result = swept(config, lanes, number=2, every=12)
  assert np.isnan(result.validation_accuracy).all()
  assert result.test_accuracy[0, 0] > 0.4


def text_of(folder):
  path = folder / 'text.txt'
  path.write_text('to be, or not to be: that is the question. ' * 9)
  return data.load(str(path), 0, context=8)


@pytest.mark.parametrize('name', ['iris', 'wine', 'text'])
@pytest.mark.parametrize('steps', [1, 3, 70, 130])
def test_rows_of_all_steps(name, steps, tmp_path):
  dataset = text_of(tmp_path) if name == 'text' else load(name, 1)
  found = dataset.all_batch_rows(16, 5, steps)
  wanted = [dataset.batch_rows(16, 5, step) for step in range(steps)]
  np.testing.assert_array_equal(found, wanted)
  assert found.dtype == np.int32
  found = dataset.all_verification_rows(5, steps)
  wanted = [dataset.verification_rows(5, step) for step in range(steps)]
  np.testing.assert_array_equal(found, wanted)
  assert found.dtype == np.int32


@pytest.mark.parametrize('examples, size', [(10, 3), (16, 16), (65, 1)])
def test_rows_of_batches(examples, size):
  found = batches.all_batch_rows(examples, size, 2, 40)
  wanted = [batches.batch_rows(examples, size, 2, step) for step in range(40)]
  np.testing.assert_array_equal(found, wanted)
