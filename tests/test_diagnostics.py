"""Staleness and shares, beside what a list of packets says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gsgd_jax
from tests import helpers
from tests.test_arrivals import drive, ledger

SGD = optax.sgd(0.1)


CLUSTERS = {
  'uneven': lambda tx: gsgd_jax.asynchronous(
    tx, 5, arrivals=gsgd_jax.gamma_arrivals(machine_cv=0.6)
  ),
  'overwritten': lambda tx: gsgd_jax.asynchronous(
    tx, 5, arrivals=gsgd_jax.exponential_arrivals(), overwrite_within=0.1
  ),
  'bounded': lambda tx: gsgd_jax.asynchronous(
    tx, 5, arrivals=gsgd_jax.exponential_arrivals(), max_ahead=1
  ),
  'round robin': lambda tx: gsgd_jax.asynchronous(tx, 5),
  'the fastest': lambda tx: gsgd_jax.synchronous(
    tx, 5, wait_for=3, arrivals=gsgd_jax.gamma_arrivals(machine_cv=0.6)
  ),
}


@pytest.mark.parametrize('name', CLUSTERS)
def test_what_was_seen(name):
  tx = gsgd_jax.record_staleness(ledger(SGD, 42), bins=4, bin_width=3)
  state, _ = drive(CLUSTERS[name](tx), 42)
  seen = state.inner_state.inner_state
  staleness, workers = (
    seen.notes[name][: seen.count] for name in ('staleness', 'worker')
  )
  assert len(set(workers.tolist())) > 2 and seen.count > 15
  summary = gsgd_jax.staleness_summary(state)
  assert summary.count == seen.count
  assert summary.latest == staleness[-1]
  assert summary.maximum == max(staleness)
  assert summary.mean == np.mean(staleness)
  bins = np.minimum(staleness // 3, 3)
  assert summary.histogram.tolist() == np.bincount(bins, minlength=4).tolist()
  shares = np.bincount(workers, minlength=5) / seen.count
  np.testing.assert_allclose(gsgd_jax.worker_shares(state), shares, rtol=1e-12)


def test_the_fastest_of_a_mean_are_counted():
  tx = gsgd_jax.synchronous(
    SGD,
    3,
    combine='mean',
    wait_for=2,
    arrivals=gsgd_jax.fixed_speeds([1.0, 3.0, 2.0]),
  )
  state, _ = drive(tx, 8)
  assert gsgd_jax.worker_shares(state).tolist() == [0, 0.5, 0.5]


def test_sums_beyond_int32():
  tx = gsgd_jax.record_staleness(SGD)
  state = tx.init(jnp.ones([1]))
  update = jax.jit(
    lambda state: tx.update(jnp.ones([1]), state, staleness=2**30)[1]
  )
  for _ in range(9):
    state = update(state)
  assert gsgd_jax.staleness_summary(state).mean == 2**30


def test_seeds_are_kept_apart():
  def run(seed):
    tx = gsgd_jax.asynchronous(
      gsgd_jax.record_staleness(SGD),
      4,
      arrivals=gsgd_jax.gamma_arrivals(machine_cv=0.6),
      seed=seed,
    )
    params = jnp.ones([2])
    body = lambda state, _: (tx.update(params, state, params)[1], None)
    return jax.lax.scan(body, tx.init(params), length=30)[0]

  states = jax.jit(jax.vmap(run))(jnp.arange(3))
  summary = gsgd_jax.staleness_summary(states)
  assert summary.mean.shape == summary.latest.shape == (3,)
  assert summary.histogram.shape == (3, 128)
  assert (summary.histogram.sum(axis=1) == 27).all()
  shares = gsgd_jax.worker_shares(states)
  np.testing.assert_allclose(shares.sum(axis=1), 1)
  alone = gsgd_jax.worker_shares(run(1))
  np.testing.assert_array_equal(shares[1], alone)


def test_before_the_first_gradient():
  state = gsgd_jax.asynchronous(gsgd_jax.record_staleness(SGD), 3).init(1.0)
  assert np.isnan(gsgd_jax.staleness_summary(state).mean)
  assert np.isnan(gsgd_jax.worker_shares(state)).all()


def test_of_a_tree_it_is_the_largest():
  tx = gsgd_jax.record_staleness(SGD, bins=4)
  tx = gsgd_jax.delayed(tx, {'first': 2, 'rest': (0,)})
  params = helpers.to_tree(jnp.ones([4]))
  state = tx.init(params)
  for _ in range(5):
    _, state = tx.update(params, state, params)
  histogram = gsgd_jax.staleness_summary(state).histogram
  assert histogram.tolist() == [1, 1, 3, 0]


def test_errors():
  with pytest.raises(ValueError, match='found no record'):
    gsgd_jax.staleness_summary(SGD.init(1.0))
  with pytest.raises(ValueError, match='found no workers'):
    gsgd_jax.worker_shares(SGD.init(1.0))
  tx = gsgd_jax.record_staleness(SGD)
  state = tx.init(1.0)
  with pytest.raises(ValueError, match='needs the extra argument `staleness`'):
    tx.update(1.0, state)
  tree = gsgd_jax.delayed(
    gsgd_jax.drop_stale(SGD, 1), {'first': 1, 'rest': (0,)}
  )
  params = helpers.to_tree(jnp.ones([4]))
  with pytest.raises(ValueError, match='got a tree of them'):
    tree.update(params, tree.init(params), params)
  for name in ('bins', 'bin_width'):
    with pytest.raises(ValueError, match=f'^{name} must be at least 1, got 0'):
      gsgd_jax.record_staleness(SGD, **{name: 0})
