"""Corrections, acceptance and predictors: the oracle, and every limit."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gsgd_jax
from gsgd_jax import _protocol
from tests import helpers, reference
from tests.test_arrivals import SEED as ARRIVAL_SEED
from tests.test_arrivals import cluster as bad_cluster
from tests.test_arrivals import table
from tests.test_guided import assert_no_ties, assert_same_guidance

SEED = 3


@functools.cache
def cluster(name, workers):
  """An arrival process for either side."""
  if name == 'round robin':
    return gsgd_jax.round_robin(), None
  process = gsgd_jax.gamma_arrivals(0.3, 0.6 if name == 'uneven' else 0.0)
  times = table(process, workers, 70, SEED)
  return process, reference.Table(times)


def run_both(
  problem, compensation, workers, arrivals, mode, wrap=(lambda x: x,) * 2
):
  """(library's output, oracle's server, oracle's run) for every seed."""
  process, oracle = cluster(arrivals, workers)
  tx = gsgd_jax.asynchronous(
    wrap[1](compensation.library(problem, workers)),
    workers,
    arrivals=process,
    batch_like=problem.batch_like,
    keep_params=True,
    worker_transform=compensation.slim
    and optax.trace(compensation.slim, nesterov=True),
    seed=SEED,
  )
  for seed, out in enumerate(helpers.run(tx, problem, mode)):
    start, batches, _ = problem.of_seed(seed)
    server = wrap[0](compensation.oracle(problem, workers))
    run = reference.asynchronous(
      start,
      server,
      problem.loss,
      problem.gradient,
      workers,
      batches,
      oracle,
      worker_momentum=compensation.slim,
      worker_nesterov=True,
    )
    yield out, server, run


long_problems = helpers.problems_of(40, 50, 60)
numbers_of_workers = [1, 2, 3, 7, 11, 16]


# Twice each.
@helpers.covering(
  2 * len(helpers.COMPENSATIONS),
  name=list(helpers.COMPENSATIONS),
  arrivals=['round robin', 'gamma', 'uneven'],
  workers=numbers_of_workers,
  problem=long_problems,
  mode=helpers.modes,
)
def test_against_the_oracle(name, arrivals, workers, problem, mode):
  compensation = helpers.COMPENSATIONS[name]
  for (flat, state), _, run in run_both(
    problem, compensation, workers, arrivals, mode
  ):
    helpers.assert_trajectory(flat[workers - 1 :], run.trajectory)
    fates = [fate for *_, fate in run.arrivals]
    counts = state.applied.by_worker[-1]
    for worker in range(workers):
      applied = [w for _, w, fate in run.arrivals if fate == 'applied']
      assert counts[worker] == applied.count(worker)
    for acceptance in _protocol.announced(state, _protocol.Acceptance):
      assert acceptance.refused[-1] == fates.count('refused')
      assert acceptance.applied[-1] == state.version[-1]


def guided_pair(problem, window):
  oracle = lambda server: reference.Guided(
    server, problem.loss, problem.gradient, window=window, revisit=2
  )
  library = lambda tx: gsgd_jax.guided(
    tx,
    problem.loss_fn,
    window=window,
    revisit=2,
    batch_like=problem.batch_like,
  )
  return oracle, library


@helpers.covering(
  len(helpers.COMPENSATIONS) - 2,
  name=[n for n in helpers.COMPENSATIONS if n not in ('Ringmaster', 'Rennala')],
  arrivals=['round robin', 'uneven'],
  workers=numbers_of_workers,
  problem=long_problems,
  window=[2, 4, 6],
)
def test_guided(name, arrivals, workers, problem, window):
  compensation = helpers.COMPENSATIONS[name]
  pair = guided_pair(problem, window)
  for (flat, state), oracle, run in run_both(
    problem, compensation, workers, arrivals, 'scan', pair
  ):
    assert_no_ties(oracle)
    helpers.assert_trajectory(flat[workers - 1 :], run.trajectory)
    assert_same_guidance(oracle, state.inner_state, len(run.packets))


@helpers.covering(
  6,
  size=[None, 1, 3],
  arrivals=['round robin', 'uneven'],
  workers=numbers_of_workers,
  problem=long_problems,
  mode=helpers.modes,
)
def test_acceptance_around_guided(size, arrivals, workers, problem, mode):
  """What is refused is not in the window; the mean has its batches as one."""
  batch_like = jax.tree.map(
    lambda x: np.concatenate([x] * (size or 1)), problem.batch_like
  )
  guided = gsgd_jax.guided(
    optax.sgd(0.05, momentum=0.5),
    problem.loss_fn,
    window=3,
    revisit=1,
    batch_like=batch_like,
  )

  def oracle(server):
    del server
    inner = reference.Guided(
      reference.Sgd(0.05, 0.5),
      problem.loss,
      problem.gradient,
      window=3,
      revisit=1,
    )
    if size is None:
      return reference.DropStale(inner, workers // 3)
    return reference.Rennala(inner, size)

  def library(tx):
    del tx
    if size is None:
      return gsgd_jax.drop_stale(guided, workers // 3)
    return gsgd_jax.rennala(guided, size, batch_like=problem.batch_like)

  for (flat, _), server, run in run_both(
    problem,
    helpers.COMPENSATIONS['staleness-aware'],
    workers,
    arrivals,
    mode,
    (oracle, library),
  ):
    assert_no_ties(server.inner)
    helpers.assert_trajectory(flat[workers - 1 :], run.trajectory)


def nobody_waits_for_ever(case):
  stops = case['outage'] is not None and case['outage'][2] is None
  return not stops or case['max_ahead'] is None


@helpers.covering(
  7,
  nobody_waits_for_ever,
  name=['Ringmaster', 'Rennala'],
  max_ahead=[None, 0, 2],
  overwrite_within=[None, 0.05],
  outage=[None, (1, 0.5, 1.75), (0, 1.25, None)],
  workers=[2, 5, 8],
  problem=helpers.problems_of(30, 45),
)
def test_acceptance_in_a_bad_cluster(
  name, max_ahead, overwrite_within, outage, workers, problem
):
  """What is lost, overwritten or waits is neither applied nor refused."""
  compensation = helpers.COMPENSATIONS[name]
  outages = [] if outage is None else [outage]
  process, oracle = bad_cluster('uneven gamma', workers, None, outages)
  tx = gsgd_jax.asynchronous(
    compensation.library(problem, workers),
    workers,
    arrivals=process,
    max_ahead=max_ahead,
    overwrite_within=overwrite_within,
    batch_like=problem.batch_like,
    seed=ARRIVAL_SEED,
  )
  for seed, (flat, state) in enumerate(helpers.run(tx, problem, 'scan')):
    start, batches, _ = problem.of_seed(seed)
    run = reference.asynchronous(
      start,
      compensation.oracle(problem, workers),
      problem.loss,
      problem.gradient,
      workers,
      batches,
      oracle,
      max_ahead=max_ahead,
      overwrite_within=overwrite_within and reference.ticks(overwrite_within),
    )
    helpers.assert_trajectory(flat[workers - 1 :], run.trajectory)
    fates = [fate for *_, fate in run.arrivals]
    acceptance = state.inner_state
    assert acceptance.refused[-1] == fates.count('refused')
    assert acceptance.applied[-1] == state.version[-1]
    applied = state.applied.by_worker[-1].sum()
    assert applied == fates.count('applied')


@helpers.covering(
  len(helpers.COMPENSATIONS) - 1,
  # Workers with a state of their own cannot be in rounds.
  name=[n for n, c in helpers.COMPENSATIONS.items() if not c.slim],
  workers=[1, 2, 3, 4, 6],
  problem=helpers.problems_of(10, 17, 25),
)
def test_in_rounds(name, workers, problem):
  compensation = helpers.COMPENSATIONS[name]
  tx = gsgd_jax.synchronous(compensation.library(problem, workers), workers)
  for seed, (flat, state) in enumerate(helpers.run(tx, problem, 'scan')):
    start, batches, _ = problem.of_seed(seed)
    trajectory, _, _ = reference.synchronous(
      start,
      compensation.oracle(problem, workers),
      problem.loss,
      problem.gradient,
      workers,
      batches,
    )
    helpers.assert_trajectory(flat[: len(trajectory)], trajectory)
    for acceptance in _protocol.announced(state, _protocol.Acceptance):
      kept = state.round.applied.by_worker[-1].sum()
      assert kept + acceptance.refused[-1] == len(batches)


def test_rounds_of_fresh_gradients():
  """Within a round all are fresh until something is applied."""
  problem = helpers.make_problem('quadratic', 4, 2, 12, seed=0)
  tx = gsgd_jax.synchronous(gsgd_jax.rennala(optax.sgd(0.1), 4), 4)
  mean = gsgd_jax.synchronous(optax.sgd(0.1), 4, combine='mean')
  ((flat, _),) = helpers.run(tx, problem, 'scan')
  ((expected, _),) = helpers.run(mean, problem, 'scan')
  helpers.assert_trajectory(flat, list(expected))


# Limits.


@functools.cache
def trajectory_of(inner, workers):
  """Of an optimizer, or of a function that makes it for a problem."""
  problem = helpers.make_problem('logistic', 4, 3, 40, seed=5)
  server = gsgd_jax.asynchronous(
    inner(problem) if callable(inner) else inner,
    workers,
    batch_like=problem.batch_like,
    keep_params=True,
  )
  ((flat, _),) = helpers.run(server, problem, 'scan')
  return flat


def assert_same_run(tx, other, workers=1):
  """Two transformations under the same workers."""
  flat, expected = trajectory_of(tx, workers), trajectory_of(other, workers)
  np.testing.assert_allclose(flat, expected, rtol=1e-11, atol=1e-13)


HEAVY_BALL = optax.sgd(0.1, momentum=0.9)
NESTEROV = optax.sgd(0.1, momentum=0.9, nesterov=True)


def correct(correction, inner=HEAVY_BALL):
  return optax.chain(correction, inner)


SAME_ALONE = {
  'nothing has moved': (
    correct(gsgd_jax.delay_compensation(5.0)),
    HEAVY_BALL,
  ),
  'nothing has moved, adaptive': (
    correct(gsgd_jax.delay_compensation(adaptive=True)),
    HEAVY_BALL,
  ),
  'nothing has moved, exact': (
    lambda problem: correct(gsgd_jax.exact_delay_compensation(problem.loss_fn)),
    HEAVY_BALL,
  ),
  'fresh is not scaled': (
    correct(gsgd_jax.scale_by_staleness('polynomial', exponent=3.0)),
    HEAVY_BALL,
  ),
  'fresh is not refused': (gsgd_jax.drop_stale(HEAVY_BALL, 0), HEAVY_BALL),
  'a mean of one': (gsgd_jax.rennala(HEAVY_BALL, 1), HEAVY_BALL),
  'SMEGA2 is DANA': (gsgd_jax.smega2(0.1, 1), gsgd_jax.dana(0.1, 1)),
  'delayed Nesterov is Nesterov': (gsgd_jax.delayed_nesterov(0.1, 1), NESTEROV),
}
SAME_DELAYED = {
  'lambda 0': (correct(gsgd_jax.delay_compensation(0.0)), HEAVY_BALL),
  'no trust': (
    lambda problem: correct(
      gsgd_jax.exact_delay_compensation(problem.loss_fn, trust=0.0)
    ),
    HEAVY_BALL,
  ),
  'exponent 0': (
    correct(gsgd_jax.scale_by_staleness('polynomial', exponent=0.0)),
    HEAVY_BALL,
  ),
  'delay-adaptive at most N old': (
    correct(gsgd_jax.scale_by_staleness('adaptive', workers=6)),
    HEAVY_BALL,
  ),
  'spike D = 0': (gsgd_jax.spike_compensation(0.1, 0), HEAVY_BALL),
  'spike D = 1': (gsgd_jax.spike_compensation(0.1, 1), NESTEROV),
  'braking 0': (gsgd_jax.adaptive_braking(0.1, strength=0.0), HEAVY_BALL),
  'horizon 0': (gsgd_jax.predict(HEAVY_BALL, 0), HEAVY_BALL),
  'nothing is so old': (gsgd_jax.drop_stale(HEAVY_BALL, 5), HEAVY_BALL),
  'Rennala of one is Ringmaster at 0': (
    gsgd_jax.rennala(HEAVY_BALL, 1),
    gsgd_jax.drop_stale(HEAVY_BALL, 0),
  ),
  'DANA without momentum': (gsgd_jax.dana(0.1, 6, 0.0), optax.sgd(0.1)),
  'SMEGA2 without momentum': (gsgd_jax.smega2(0.1, 6, 0.0), optax.sgd(0.1)),
  'batch-scaled': (
    correct(gsgd_jax.delay_compensation(batch_size=8)),
    correct(gsgd_jax.delay_compensation(8.0)),
  ),
  'default lambda': (
    correct(gsgd_jax.delay_compensation()),
    correct(gsgd_jax.delay_compensation(0.04)),
  ),
  'default adaptive lambda': (
    correct(gsgd_jax.delay_compensation(adaptive=True)),
    correct(gsgd_jax.delay_compensation(2.0, adaptive=True, decay=0.95)),
  ),
}


@pytest.mark.parametrize('name', SAME_ALONE)
def test_limits_of_one_worker(name):
  assert_same_run(*SAME_ALONE[name])


@pytest.mark.parametrize('name', SAME_DELAYED)
def test_limits_of_many_workers(name):
  assert_same_run(*SAME_DELAYED[name], workers=6)


def run_reads(tx, workers, arrivals, calls=80, transform=None):
  """What every call reads, and the server's parameters after it."""
  problem = helpers.make_problem('logistic', 4, 3, calls, seed=5)
  server = gsgd_jax.asynchronous(
    tx,
    workers,
    arrivals=arrivals,
    worker_transform=transform,
    keep_params=True,
    seed=SEED,
  )
  ((flat, state),) = helpers.run(server, problem, 'scan')
  reads = jax.vmap(gsgd_jax.worker_params)(helpers.to_tree(flat), state)
  return np.asarray(helpers.to_flat(reads)), flat


PROCESSES = [gsgd_jax.round_robin(), gsgd_jax.gamma_arrivals(0.3, 0.6)]
near = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('make', [gsgd_jax.dana, gsgd_jax.smega2])
def test_one_worker_reads_where_nesterov_is(make):
  reads, flat = run_reads(make(0.1, 1), 1, PROCESSES[0])
  nesterov, _ = run_reads(NESTEROV, 1, PROCESSES[0])
  near(reads, nesterov)
  assert np.abs(reads - flat).max() > 0.01


workers_and_arrivals = pytest.mark.parametrize(
  'workers, arrivals',
  [(1, PROCESSES[0]), (4, PROCESSES[1]), (9, PROCESSES[0]), (9, PROCESSES[1])],
)


@workers_and_arrivals
def test_slim_workers_read_what_danas_do(workers, arrivals):
  reads, flat = run_reads(gsgd_jax.dana(0.05, workers), workers, arrivals)
  slim, server = run_reads(
    optax.sgd(0.05), workers, arrivals, transform=optax.trace(0.9, True)
  )
  near(slim, reads)
  near(server, reads)  # They read the server's own parameters.
  assert np.abs(reads - flat).max() > 0.01


@workers_and_arrivals
def test_asynchronous_nesterov_is_where_the_published_one_reads(
  workers, arrivals
):
  problem = helpers.make_problem('logistic', 4, 3, 80, seed=5)
  reads, flat = run_reads(
    gsgd_jax.asynchronous_nesterov(0.5, 0.95), workers, arrivals
  )
  np.testing.assert_array_equal(reads, flat)
  start, batches, _ = problem.of_seed(0)
  published = reference.AsynchronousNesterov(0.5, 0.95)
  seen = []
  read = published.read
  published.read = lambda params: seen.append(read(params)) or seen[-1]
  oracle = None
  if arrivals is not PROCESSES[0]:
    oracle = reference.Table(table(arrivals, workers, 90, SEED))
  reference.asynchronous(
    start,
    published,
    problem.loss,
    problem.gradient,
    workers,
    batches,
    oracle,
  )
  # The call after one that brought a gradient reads what it led to.
  near(reads[workers - 1 : -1], seen[workers:])


def test_smega2_reads_a_round_ahead():
  """Exactly where N updates with zero gradients lead, by the library."""
  workers = 5
  tx = gsgd_jax.smega2(0.1, workers)
  params = jnp.array([1.0, -2.0])
  state = tx.init(params)
  rng = np.random.default_rng(0)
  for _ in range(13):
    updates, state = tx.update(jnp.asarray(rng.normal(size=2)), state, params)
    params = optax.apply_updates(params, updates)
    ahead, later = params, state
    for _ in range(workers):
      updates, later = tx.update(jnp.zeros(2), later, ahead)
      ahead = optax.apply_updates(ahead, updates)
    near(gsgd_jax.worker_params(params, state), ahead)


@pytest.mark.parametrize(
  'inner, delay', [('sgd', 1), ('nesterov', 4), ('adam', 20), ('sgd', 63)]
)
def test_exact_compensation_undoes_the_delay_on_a_quadratic(inner, delay):
  steps = 60
  problem = helpers.make_problem('quadratic', 6, 2, delay + steps, seed=delay)
  inner = optax.with_extra_args_support(helpers.INNERS[inner].library)
  exact = gsgd_jax.exact_delay_compensation(problem.loss_fn, trust=None)
  tx = gsgd_jax.delayed(
    optax.chain(exact, inner),
    delay,
    batch_like=problem.batch_like,
    keep_params=True,
  )
  ((flat, state),) = helpers.run(tx, problem, 'scan')
  ((undelayed, _),) = helpers.run(inner, problem, 'scan')
  # The batches in the order of arrival; the last ones stay unused.
  near(flat[delay:], undelayed[:steps])
  products = state.inner_state[0].server_gradients.count[-1] / 2
  assert products == steps - 1  # But for the first, nothing was fresh.
  time = gsgd_jax.simulated_time(state)[-1]
  np.testing.assert_allclose(time, steps / (delay + 1) + 2 * products)


def test_the_correction_is_clipped():
  loss_fn = lambda params, batch: 10 * jnp.sum(params['w'] ** 2) + batch
  tx = gsgd_jax.exact_delay_compensation(loss_fn, trust=0.5)
  params, read = {'w': jnp.array([3.0, 4.0])}, {'w': jnp.array([0.0, 0.1])}
  gradient = {'w': jnp.array([0.6, 0.8])}
  updates, _ = tx.update(
    gradient, tx.init(params), params, stale_params=read, batch=0.0
  )
  correction = updates['w'] - gradient['w']
  np.testing.assert_allclose(jnp.linalg.norm(correction), 0.5, rtol=1e-12)
  np.testing.assert_allclose(correction[0] / correction[1], 3 / 3.9)


@pytest.mark.parametrize(
  'workers, threshold',
  [(1, 1), (1, 8), (4, 3), (4, 4), (4, 20), (8, 1), (8, 3), (8, 8)],
)
def test_ringmaster_applies_its_share_and_never_freezes(workers, threshold):
  rounds = 30
  calls = workers - 1 + rounds * workers
  problem = helpers.make_problem('quadratic', 2, 1, calls, seed=1)
  tx = gsgd_jax.drop_stale(optax.sgd(0.01), threshold - 1)
  server = gsgd_jax.asynchronous(tx, workers)
  ((_, state),) = helpers.run(server, problem, 'scan')
  share = min(1, threshold / workers)
  assert state.version[-1] == rounds * workers * share
  assert state.version[-1] == state.inner_state.applied[-1]
  refused = rounds * workers * (1 - share)
  assert state.inner_state.refused[-1] == refused
  # In every round.
  by_round = np.diff(state.version[workers - 1 :: workers])
  assert set(by_round.tolist()) == {workers * share}


@pytest.mark.parametrize('workers, size', [(1, 4), (4, 1), (4, 3), (8, 8)])
def test_rennala_keeps_its_share(workers, size):
  cycles = 12
  arrivals = cycles * (size + workers - 1)
  calls = workers - 1 + arrivals
  problem = helpers.make_problem('quadratic', 2, 1, calls, seed=1)
  server = gsgd_jax.asynchronous(
    gsgd_jax.rennala(optax.sgd(0.01), size), workers
  )
  ((_, state),) = helpers.run(server, problem, 'scan')
  kept = state.applied.by_worker[-1].sum()
  assert kept == cycles * size
  assert state.inner_state.refused[-1] == arrivals - kept
  assert state.version[-1] == cycles


def test_rennala_alone_takes_large_batches():
  problem = helpers.make_problem('logistic', 4, 3, 24, seed=0)
  tx = gsgd_jax.rennala(HEAVY_BALL, 4)
  ((flat, _),) = helpers.run(gsgd_jax.asynchronous(tx, 1), problem, 'scan')
  joined = jax.tree.map(
    lambda x: x.reshape(1, 6, 12, *x.shape[3:]), problem.batches
  )
  large = helpers.Problem('logistic', problem.start, joined, joined)
  ((expected, _),) = helpers.run(HEAVY_BALL, large, 'scan')
  near(flat[3::4], expected)


def test_what_is_refused_touches_nothing():
  inner = gsgd_jax.guided(HEAVY_BALL, window=3)
  for tx in (gsgd_jax.drop_stale(inner, 1), gsgd_jax.rennala(inner, 2)):
    params = jnp.array([1.0, 2.0], jnp.float32)
    state = tx.init(params)
    updates, after = tx.update(
      params, state, params, value=1.0, staleness=jnp.int32(2)
    )
    np.testing.assert_array_equal(updates, 0)
    assert (after.refused, after.applied) == (1, 0)
    jax.tree.map(
      np.testing.assert_array_equal, after.inner_state, state.inner_state
    )


def test_acceptance_inside_acceptance():
  inner = gsgd_jax.rennala(optax.sgd(1.0), 2)
  tx = gsgd_jax.drop_stale(inner, 1)
  params = jnp.array([0.0])
  state = tx.init(params)
  counts = []
  for staleness in (0, 1, 2, 0):
    _, state = tx.update(params, state, params, staleness=staleness)
    counts.append((int(state.applied), int(state.refused)))
  # Kept; refused inside; refused outside; applied.
  assert counts == [(0, 0), (0, 1), (0, 2), (1, 2)]


def test_a_sum_that_follows_its_momenta():
  """DANA's sum is never taken anew: in float32 it stays the momenta's."""
  workers = 16
  tx = gsgd_jax.dana(0.1, workers)

  def step(state, key):
    worker, noise = jax.random.split(key)
    worker = jax.random.randint(worker, [], 0, workers, jnp.int32)
    gradient = jax.random.normal(noise, [4], jnp.float32)
    return tx.update(gradient, state, worker=worker)[1], None

  keys = jax.random.split(jax.random.key(0), 50_000)
  state = tx.init(jnp.zeros([4], jnp.float32))
  state, _ = jax.jit(lambda s: jax.lax.scan(step, s, keys))(state)
  total = state.momenta.tree.sum(axis=0)
  assert jnp.abs(state.offset.tree - total).max() < 1e-3 * workers**0.5


# Schedules, masks, dtypes, injected hyperparameters.

MOMENTA = {
  'dana': lambda rate: gsgd_jax.dana(rate, 2),
  'smega2': lambda rate: gsgd_jax.smega2(rate, 2),
  'spike': lambda rate: gsgd_jax.spike_compensation(rate, 2),
  'braking': gsgd_jax.adaptive_braking,
  'delayed Nesterov': lambda rate: gsgd_jax.delayed_nesterov(rate, 2),
  'asynchronous Nesterov': gsgd_jax.asynchronous_nesterov,
}


def drive(tx, params, steps=3, **extra):
  """Reads after some updates by gradients that differ."""
  state, reads = tx.init(params), []
  extra.setdefault('stale_params', jax.tree.map(lambda p: p * 0.5, params))
  extra.setdefault('batch', jnp.zeros([]))
  for i in range(steps):
    gradient = jax.tree.map(
      lambda p, i=i: jnp.full_like(p, 0.25 * (i + 1)), params
    )
    updates, state = tx.update(
      gradient,
      state,
      params,
      worker=jnp.int32(i % 2),
      staleness=jnp.int32(i),
      value=jnp.zeros([]),
      **extra,
    )
    jax.tree.map(lambda u, p: _same_dtype(u, p), updates, params)
    params = optax.apply_updates(params, updates)
    reads.append(gsgd_jax.worker_params(params, state))
  return reads


def _same_dtype(x, y):
  assert x.dtype == y.dtype and x.shape == y.shape


def distance(params, batch):
  total = [
    jnp.sum((p - batch.astype(p.dtype)) ** 2) for p in jax.tree.leaves(params)
  ]
  return sum(total).astype(jnp.float32)


EVERYTHING = {
  **{name: make(0.1) for name, make in MOMENTA.items()},
  'DC-ASGD-c': correct(gsgd_jax.delay_compensation()),
  'DC-ASGD-a': correct(gsgd_jax.delay_compensation(adaptive=True)),
  'exact': correct(gsgd_jax.exact_delay_compensation(distance)),
  'inverse': correct(gsgd_jax.scale_by_staleness()),
  'adaptive': correct(gsgd_jax.scale_by_staleness('adaptive', workers=2)),
  'polynomial': correct(gsgd_jax.scale_by_staleness('polynomial')),
  'predict': gsgd_jax.predict(HEAVY_BALL, 3),
  'drop_stale': gsgd_jax.drop_stale(HEAVY_BALL, 1),
  'rennala': gsgd_jax.rennala(HEAVY_BALL, 2),
}


@pytest.mark.parametrize('name', MOMENTA)
def test_schedules(name, as_users_run_it):
  """A schedule is evaluated at the gradients so far."""
  rates = [0.1, 0.05, 0.2]
  schedule = lambda count: jnp.asarray(rates, jnp.float32)[count]
  params = jnp.array([1.0, 2.0])
  reads = drive(MOMENTA[name](schedule), params)
  state, expected = None, params
  for i, rate in enumerate(rates):
    tx = MOMENTA[name](rate)
    state = tx.init(params) if state is None else state
    gradient = jnp.full_like(params, 0.25 * (i + 1))
    updates, state = tx.update(
      gradient, state, expected, worker=jnp.int32(i % 2)
    )
    expected = optax.apply_updates(expected, updates)
    np.testing.assert_allclose(
      reads[i], gsgd_jax.worker_params(expected, state), rtol=1e-6
    )


@pytest.mark.parametrize('name', EVERYTHING)
def test_half_precision(name, as_users_run_it):
  full = {'a': jnp.array([1.0, -2.0]), 'b': jnp.array([[0.5]])}
  half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), full)
  expected = drive(EVERYTHING[name], full)
  for read, other in zip(drive(EVERYTHING[name], half), expected, strict=True):
    for x, y in zip(*map(jax.tree.leaves, (read, other)), strict=True):
      assert x.dtype == jnp.bfloat16
      np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=0.02, atol=0.01)


PARTIAL = sorted({*EVERYTHING} - {'exact'})


@functools.cache
def reads_alone(name):
  """Where there is nothing but `a`."""
  return drive(EVERYTHING[name], {'a': jnp.array([1.0, -2.0])})


@pytest.mark.parametrize(
  'name, whole_extras',
  [
    *((name, bool(i % 2)) for i, name in enumerate(PARTIAL)),
    # They read what the mask may hide or not.
    *((name, not PARTIAL.index(name) % 2) for name in PARTIAL if 'DC' in name),
  ],
)
def test_masked(name, whole_extras, as_users_run_it):
  """A mask may hide parameters, with or without those that were read."""
  params = {'a': jnp.array([1.0, -2.0]), 'b': jnp.array([3.0])}
  tx = optax.masked(
    EVERYTHING[name],
    {'a': True, 'b': False},
    mask_compatible_extra_args=not whole_extras,
  )
  reads = drive(tx, params)
  for read, expected in zip(reads, reads_alone(name), strict=True):
    np.testing.assert_allclose(read['a'], expected['a'], rtol=1e-6)
  # What is hidden passes through, as optax has it.
  np.testing.assert_allclose(reads[0]['b'], 3.25)


@pytest.mark.parametrize('name', PARTIAL)
def test_multi_transform(name, as_users_run_it):
  params = {'a': jnp.array([1.0, -2.0]), 'b': jnp.array([3.0])}
  tx = optax.multi_transform(
    {'ours': EVERYTHING[name], 'theirs': optax.sgd(0.1)},
    {'a': 'ours', 'b': 'theirs'},
  )
  for i, (read, expected) in enumerate(
    zip(drive(tx, params), reads_alone(name), strict=True)
  ):
    np.testing.assert_allclose(read['a'], expected['a'], rtol=1e-6)
    gone = 0.1 * 0.25 * sum(range(1, i + 2))
    np.testing.assert_allclose(read['b'], 3 - gone, rtol=1e-6)


INJECTABLE = {
  'delay_compensation': dict(lam=0.5, decay=0.9),
  'exact_delay_compensation': dict(loss_fn=distance, trust=0.7),
  'scale_by_staleness': dict(rule='polynomial', workers=2, exponent=0.3),
  'spike_compensation': dict(learning_rate=0.1, delay=2, momentum=0.8),
  'adaptive_braking': dict(learning_rate=0.1, momentum=0.8, strength=0.5),
  'dana': dict(learning_rate=0.1, workers=2, momentum=0.8),
  'smega2': dict(learning_rate=0.1, workers=2, momentum=0.8),
  'delayed_nesterov': dict(learning_rate=0.1, workers=2, momentum=0.8),
  'asynchronous_nesterov': dict(learning_rate=0.1, momentum=0.8),
  'predict': dict(inner=HEAVY_BALL, horizon=3.0),
  'drop_stale': dict(inner=HEAVY_BALL, max_staleness=1),
  'rennala': dict(inner=HEAVY_BALL, size=2),
}
STATIC = {
  'delay_compensation': ('adaptive', 'batch_size'),
  'exact_delay_compensation': ('loss_fn',),
  'dana': ('workers',),
  'predict': ('inner',),
  'drop_stale': ('inner',),
  'rennala': ('inner', 'size', 'batch_like'),
}


@pytest.mark.parametrize('jitted', [False, True])
@pytest.mark.parametrize('name', INJECTABLE)
def test_injected_hyperparameters(name, jitted, as_users_run_it):
  make = getattr(gsgd_jax, name)
  static = STATIC.get(name, ())
  tx = optax.inject_hyperparams(make, static_args=static)(**INJECTABLE[name])
  params = {'a': jnp.array([1.0, -2.0])}
  if jitted:
    tx = optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))
  reads = drive(tx, params)
  for read, expected in zip(
    reads, drive(make(**INJECTABLE[name]), params), strict=True
  ):
    np.testing.assert_allclose(read['a'], expected['a'], rtol=1e-6)
  injected = {
    n
    for n, value in INJECTABLE[name].items()
    if n not in static and isinstance(value, int | float)
  }
  assert injected <= {*tx.init(params).hyperparams}


def test_an_injected_horizon_may_begin_at_nothing(as_users_run_it):
  schedule = lambda count: 2.0 * count
  tx = optax.inject_hyperparams(gsgd_jax.predict, static_args=('inner',))(
    optax.sgd(1.0), schedule
  )
  params = jnp.array([0.0])
  state, ahead = tx.init(params), []
  for _ in range(3):
    _, state = tx.update(jnp.array([1.0]), state, params)
    ahead.append(float(gsgd_jax.worker_params(params, state)[0]))
  assert ahead == [0.0, -2.0, -4.0]


def test_small_squares_in_half_precision(as_users_run_it):
  tx = gsgd_jax.delay_compensation(adaptive=True)
  params = jnp.array([1.0], jnp.float16)
  gradient = jnp.array([1e-3], jnp.float16)
  updates, state = tx.update(
    gradient, tx.init(params), params, stale_params=params * 0
  )
  assert updates.dtype == jnp.float16 and state.mean_square[0] > 0
  strength = 2 / np.sqrt(0.05 * 1e-6 + 1e-7)
  np.testing.assert_allclose(updates, 1e-3 + strength * 1e-6, rtol=2e-3)


def test_stale_params_of_a_real_server_in_another_dtype(as_users_run_it):
  tx = gsgd_jax.exact_delay_compensation(distance, trust=None)
  params = {'w': jnp.array([3.0], jnp.bfloat16)}
  read = {'w': jnp.array([1.0], jnp.float32)}
  updates, _ = tx.update(
    {'w': params['w'] * 0 + 2},
    tx.init(params),
    params,
    stale_params=read,
    batch=jnp.zeros([]),
  )
  assert updates['w'].dtype == jnp.bfloat16 and updates['w'][0] == 6


def test_replays_of_joined_batches_cost_them_all():
  problem = helpers.make_problem('quadratic', 4, 2, 40, seed=0)
  like = jax.tree.map(lambda x: np.concatenate([x] * 4), problem.batch_like)
  costs = []
  for model in ('serial', 'parallel', 'shared'):
    guided = gsgd_jax.guided(
      optax.sgd(0.1),
      problem.loss_fn,
      window=2,
      replays=1,
      replay_model=model,
      batch_like=like,
    )
    tx = gsgd_jax.asynchronous(
      gsgd_jax.rennala(guided, 4, batch_like=problem.batch_like),
      1,
      sync_cost=0.0,
    )
    ((_, state),) = helpers.run(tx, problem, 'scan')
    costs.append(gsgd_jax.simulated_time(state)[-1] - 40)
    taken = state.inner_state.inner_state.gradient_evaluations[-1] - 10
  assert taken > 0
  assert costs == [4 * taken] * 3


# Mistakes.


def complain(call, *args, **kwargs):
  with pytest.raises(ValueError) as e:
    call(*args, **kwargs)
  (line,) = str(e.value).splitlines()
  return line


@pytest.mark.parametrize(
  'name, extra, giver',
  [
    ('DC-ASGD-c', 'stale_params', 'keep_params=True'),
    ('DC-ASGD-a', 'stale_params', 'keep_params=True'),
    ('exact', 'stale_params', 'keep_params=True'),
    ('exact', 'batch', 'batch_like'),
    ('inverse', 'staleness', 'inside asynchronous'),
    ('dana', 'worker', 'inside asynchronous'),
    ('drop_stale', 'staleness', 'inside asynchronous'),
    ('rennala', 'staleness', 'inside asynchronous'),
  ],
)
def test_missing_extras(name, extra, giver):
  params = jnp.array([1.0])
  extras = dict(
    stale_params=params,
    batch=params,
    staleness=jnp.int32(0),
    worker=jnp.int32(0),
  )
  del extras[extra]
  tx = EVERYTHING[name]
  line = complain(tx.update, params, tx.init(params), params, **extras)
  assert f'needs the extra argument `{extra}`' in line and giver in line
  if extra == 'stale_params':
    extras[extra] = params
    line = complain(tx.update, params, tx.init(params), **extras)
    assert 'needs the parameters' in line


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: gsgd_jax.delay_compensation(-1.0), 'lam must be finite and'),
    (lambda: gsgd_jax.delay_compensation(decay=1.0), 'decay must be at least'),
    (
      lambda: gsgd_jax.delay_compensation(adaptive=True, batch_size=2),
      'batch-scaled or adaptive, not both',
    ),
    (lambda: gsgd_jax.delay_compensation(batch_size=0), 'batch_size must be'),
    (lambda: gsgd_jax.exact_delay_compensation(3), 'loss_fn must be'),
    (
      lambda: gsgd_jax.exact_delay_compensation(distance, trust=-1),
      'trust must be finite',
    ),
    (lambda: gsgd_jax.scale_by_staleness('linear'), 'rule must be one of'),
    (lambda: gsgd_jax.scale_by_staleness('adaptive'), 'needs workers=N'),
    (
      lambda: gsgd_jax.scale_by_staleness('adaptive', workers=0),
      'workers must be at least 1',
    ),
    (
      lambda: gsgd_jax.scale_by_staleness('polynomial', exponent=math.nan),
      'exponent must be finite',
    ),
    (lambda: gsgd_jax.spike_compensation(0.1, -1), 'delay must be finite'),
    (lambda: gsgd_jax.spike_compensation(0.1, 1, 1.0), 'momentum must be'),
    (lambda: gsgd_jax.spike_compensation(0.1, None), 'delay must be a number'),
    (lambda: gsgd_jax.delay_compensation(adaptive=1), 'adaptive must be True'),
    (lambda: gsgd_jax.drop_stale(HEAVY_BALL, 2**31), 'must be below 2'),
    (lambda: gsgd_jax.adaptive_braking(0.1, 1.5), 'momentum must be'),
    (
      lambda: gsgd_jax.adaptive_braking(0.1, strength=-1.0),
      'strength must be finite',
    ),
    (lambda: gsgd_jax.dana(0.1, 0), 'workers must be at least 1'),
    (lambda: gsgd_jax.dana(0.1, 2.5), 'workers must be an int'),
    (lambda: gsgd_jax.dana(0.1, 2, -0.1), 'momentum must be'),
    (lambda: gsgd_jax.smega2(0.1, 0), 'workers must be at least 1'),
    (lambda: gsgd_jax.smega2(0.1, 2.5), 'workers must be an int'),
    (lambda: gsgd_jax.delayed_nesterov(0.1, 0), 'workers must be at least 1'),
    (lambda: gsgd_jax.asynchronous_nesterov(0.1, 1.0), 'momentum must be'),
    (lambda: gsgd_jax.predict(HEAVY_BALL, -1), 'horizon must be finite'),
    (lambda: gsgd_jax.predict(HEAVY_BALL, 'far'), 'horizon must be a number'),
    (lambda: gsgd_jax.drop_stale(HEAVY_BALL, -1), 'max_staleness must be'),
    (lambda: gsgd_jax.drop_stale(HEAVY_BALL, 1.5), 'max_staleness must be'),
    (lambda: gsgd_jax.rennala(HEAVY_BALL, 0), 'size must be at least 1'),
  ],
)
def test_arguments(make, message):
  assert message in complain(make)


def test_dana_for_fewer_workers_than_there_are():
  params = jnp.array([1.0])
  for make in (gsgd_jax.asynchronous, gsgd_jax.synchronous):
    tx = make(optax.chain(optax.identity(), gsgd_jax.dana(0.1, 3)), 4)
    line = complain(tx.init, params)
    assert 'has 4 workers' in line and 'workers=4' in line
  gsgd_jax.asynchronous(gsgd_jax.dana(0.1, 4), 3).init(params)


@pytest.mark.parametrize('name', ['drop_stale', 'rennala'])
def test_acceptance_stands_around_guided(name):
  tx = gsgd_jax.guided(EVERYTHING[name], window=4)
  line = complain(tx.init, jnp.array([1.0]))
  assert 'drop_stale(guided(...), ...)' in line


@pytest.mark.parametrize('name', ['drop_stale', 'rennala'])
def test_acceptance_of_a_pipeline(name):
  params = {'a': jnp.array([1.0]), 'b': jnp.array([1.0])}
  tx = gsgd_jax.delayed(EVERYTHING[name], {'a': 0, 'b': 1})
  line = complain(tx.update, params, tx.init(params), params)
  assert f'{name} needs one staleness' in line


def test_exact_compensation_of_hidden_parameters():
  params = {'a': jnp.array([1.0]), 'b': jnp.array([1.0])}
  tx = optax.masked(EVERYTHING['exact'], {'a': True, 'b': False})
  line = complain(
    tx.update,
    params,
    tx.init(params),
    params,
    stale_params=params,
    batch=jnp.zeros([]),
  )
  assert 'mask the optimizer after it' in line


def test_a_pipelines_leaves_are_weighed_each_by_its_own():
  params = {'a': jnp.array([1.0]), 'b': jnp.array([1.0])}
  tx = gsgd_jax.delayed(gsgd_jax.scale_by_staleness(), {'a': 0, 'b': 2})
  state = tx.init(params)
  for _ in range(4):
    updates, state = tx.update(params, state, params)
  assert (updates['a'][0], updates['b'][0]) == (1.0, 0.5)
  tx = gsgd_jax.spike_compensation(1.0, {'a': 0, 'b': 2}, momentum=0.5)
  updates, _ = tx.update(params, tx.init(params), params)
  assert (updates['a'][0], updates['b'][0]) == (-1.0, -1.75)
  tx = gsgd_jax.spike_compensation(1.0, {'c': 0})
  assert 'delay must have the structure' in complain(
    tx.update, params, tx.init(params), params
  )


def test_replays_of_stored_gradients_cannot_be_corrected():
  params = jnp.array([1.0, 2.0])
  tx = gsgd_jax.guided(EVERYTHING['DC-ASGD-c'], window=2)
  line = complain(
    tx.update,
    params,
    tx.init(params),
    params,
    value=1.0,
    stale_params=params,
  )
  assert 'stale_params' in line and 'stored' in line
