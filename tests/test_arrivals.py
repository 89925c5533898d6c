"""Who arrives when: against the oracle, by its invariants and statistics."""

import functools
import heapq
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import gsgd_jax
from gsgd_jax import clock
from tests import helpers, reference

SGD = optax.sgd(0.1)
SEED = 3


# Clusters for either side: a process, and the oracle's table of its times.


def user_duration(machines, worker, task, now):
  """Quarters of a unit, so that many workers arrive at once."""
  del machines, now
  return ((worker * 7 + task * 3) % 5 + 1).astype(jnp.float32) / 4


USER = gsgd_jax.ArrivalProcess(lambda workers, key: (), user_duration)


PROCESSES = {
  'round robin': lambda workers: gsgd_jax.round_robin(),
  'fixed speeds': lambda workers: gsgd_jax.fixed_speeds(
    np.linspace(0.4, 2.1, workers)
  ),
  'ties': lambda workers: gsgd_jax.fixed_speeds(
    [(1.0, 2.0, 0.5)[i % 3] for i in range(workers)]
  ),
  'gamma': lambda workers: gsgd_jax.gamma_arrivals(),
  'uneven gamma': lambda workers: gsgd_jax.gamma_arrivals(0.3, 0.6),
  'uniform': lambda workers: gsgd_jax.uniform_arrivals(0.8, 0.3),
  'exponential': lambda workers: gsgd_jax.exponential_arrivals(),
  'user': lambda workers: USER,
}
RANDOM = ['gamma', 'uneven gamma', 'uniform', 'exponential']


def table(process, workers, tasks, seed=SEED):
  """What every task takes, in ticks: shape (workers, tasks)."""
  init = jax.jit(process.init, static_argnums=0)
  machines = init(workers, jax.random.PRNGKey(seed))

  def one(worker, task):
    return clock.of(process.duration(machines, worker, task, clock.zero()))

  # Of small tables every operation is compiled once, as they have one shape.
  small = workers <= 16 and tasks <= 96
  rows, columns = (16, 96) if small else (workers, tasks)
  of_worker = jax.vmap(one, (None, 0))
  times = jax.vmap(of_worker, (0, None))(
    jnp.minimum(jnp.arange(rows, dtype=jnp.int32), workers - 1),
    jnp.arange(columns, dtype=jnp.int32),
  )
  whole, ticks = (np.asarray(x, np.int64)[:workers, :tasks] for x in times)
  return whole * reference.UNIT + ticks


@functools.cache
def known(name, workers, slowdown=None):
  """A process and the table of its first tasks."""
  process = PROCESSES[name](workers)
  if slowdown is not None:
    process = gsgd_jax.straggler(process, slowdown, workers // 2)
  return process, table(process, workers, 64)


def cluster(name, workers, slowdown=None, outages=()):
  """The library's and the oracle's, with outages of (worker, at, back)."""
  process, times = known(name, workers, slowdown)
  oracle = reference.Table(times)
  for worker, at, back in outages:
    process = gsgd_jax.failing(process, at, worker, back)
    returns = None if back is None else reference.ticks(back)
    oracle = reference.Failing(oracle, worker, reference.ticks(at), returns)
  return process, oracle


class Ledger(NamedTuple):
  count: jax.Array
  notes: dict[str, jax.Array]  # What each packet carried, in order.
  inner: optax.OptState


def ledger(inner, size, names=('worker', 'staleness')):
  """`inner` that keeps a list of what it is given."""
  inner = optax.with_extra_args_support(inner)

  def init(params):
    notes = {
      name: jnp.full(
        [size], -1, jnp.float64 if name == 'stale_params' else jnp.int32
      )
      for name in names
    }
    return Ledger(jnp.zeros([], jnp.int32), notes, inner.init(params))

  def update(updates, state, params=None, **extra):
    new_updates, inner_state = inner.update(
      updates, state.inner, params, **extra
    )
    notes = {
      name: kept.at[state.count].set(extra[name])
      for name, kept in state.notes.items()
    }
    return new_updates, Ledger(state.count + 1, notes, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


# Against the oracle.


def assert_agrees(problem, inner, workers, process, oracle, mode, **options):
  calls = problem.batches[0].shape[1]
  inner = helpers.INNERS[inner]
  tx = gsgd_jax.asynchronous(
    ledger(inner.library, calls),
    workers,
    arrivals=process,
    batch_like=problem.batch_like,
    keep_params=True,
    seed=SEED,
    **options,
  )
  span = options.get('overwrite_within')
  options |= dict(overwrite_within=span and reference.ticks(span))
  for seed, (flat, state) in enumerate(helpers.run(tx, problem, mode)):
    start, batches, _ = problem.of_seed(seed)
    run = reference.asynchronous(
      start,
      inner.oracle(),
      problem.loss,
      problem.gradient,
      workers,
      batches,
      oracle,
      **options,
    )
    filled = min(workers - 1, calls)
    end = filled + len(run.trajectory)  # Of a trace that may be over.
    now = gsgd_jax.simulated_time(state)
    np.testing.assert_array_equal(flat[:filled], np.tile(start, (filled, 1)))
    np.testing.assert_array_equal(now[:filled], 0)
    helpers.assert_trajectory(flat[filled:end], run.trajectory)
    np.testing.assert_array_equal(
      now[filled:end], np.array(run.clock) / reference.UNIT
    )
    assert end == calls or len(run.arrivals) == process.length
    for after in (flat, now):
      np.testing.assert_array_equal(after[end:], after[end - 1 : -1])
    assert_packets(jax.tree.map(lambda x: x[-1], state), run)
    if options.get('max_ahead') is None:  # Then there is one every call.
      order = [worker for _, worker, _ in run.arrivals]
      assert state.worker[filled:end].tolist() == order


def assert_packets(state, run):
  fates = [fate for *_, fate in run.arrivals]
  counts = dict(
    applied=state.version, overwritten=state.overwritten, lost=state.lost
  )
  for fate, count in counts.items():
    assert fates.count(fate) == (0 if count is None else count)
  assert state.inner_state.count == len(run.packets)
  for name, notes in state.inner_state.notes.items():
    expected = [getattr(packet, name) for packet in run.packets]
    assert notes[: len(expected)].tolist() == expected


# Workers, when they fail, and for how long.
OUTAGES = [
  [],
  [],
  [(0, 0.5, 1.0)],
  [(3, 1.3, None)],
  [(1, 0.0, 2.2), (6, 2.75, 0.25)],
  [(7, 0.5, 0.25), (7, 1.3, 1.0)],
  [(2, 2.75, None), (5, 0.0, 0.25)],
]


@helpers.covering(
  11,
  kind=['quadratic', 'logistic'],
  calls=[1, 7, 20, 30, 40],
  inner=helpers.inner_names,
  workers=[1, 2, 5, 8],
  name=sorted(PROCESSES),
  slowdown=[None, None, 0.3, 3.0],
  outages=OUTAGES,
  overwrite_within=[None, None, 0.0, 0.05, 0.3],
  max_ahead=[None, 0, 1, 3],
  mode=helpers.modes,
)
def test_asynchronous(
  kind,
  calls,
  inner,
  workers,
  name,
  slowdown,
  outages,
  overwrite_within,
  max_ahead,
  mode,
):
  outages = possible(outages, workers, stopping=max_ahead is None)
  process, oracle = cluster(name, workers, slowdown, outages)
  assert_agrees(
    helpers.make_problem(kind, 4, 2, calls, seed=calls, seeds=seeds_of(mode)),
    inner,
    workers,
    process,
    oracle,
    mode,
    overwrite_within=overwrite_within,
    max_ahead=max_ahead,
  )


def seeds_of(mode):
  return 2 if mode == 'vmap' else 1


def possible(outages, workers, stopping):
  """(worker, at, back), where somebody stays and nobody has to be awaited."""
  allowed, stopped = [], set()
  for worker, at, away in outages:
    worker %= workers
    if away is None and (not stopping or len(stopped | {worker}) == workers):
      away = 1.0
    if any(
      worker == other
      and at < (back or np.inf)
      and since < at + (away or np.inf)
      for other, since, back in allowed
    ):
      continue  # It is away already.
    if away is None:
      stopped.add(worker)
    allowed.append((worker, at, None if away is None else at + away))
  return allowed


@pytest.mark.parametrize(
  'workers, name, inner, mode, outages, options',
  [
    (64, 'gamma', 'adam', 'scan', [], {}),
    (64, 'ties', 'look ahead', 'jit', [], dict(overwrite_within=0.0)),
    (64, 'exponential', 'scaled', 'vmap', [(9, 0.4, None)], {}),
    (64, 'uneven gamma', 'sgd', 'scan', [], dict(overwrite_within=0.002)),
    (
      64,
      'uniform',
      'compensated',
      'scan',
      [(5, 0.5, 1.25)],
      dict(max_ahead=1, overwrite_within=0.001),
    ),
    (16, 'exponential', 'heavy ball', 'vmap', [], dict(max_ahead=0)),
  ],
)
def test_many_workers(workers, name, inner, mode, outages, options):
  problem = helpers.make_problem(
    'quadratic', 4, 1, 3 * workers, seed=0, seeds=seeds_of(mode)
  )
  process, oracle = cluster(name, workers, None, outages)
  assert_agrees(problem, inner, workers, process, oracle, mode, **options)


@pytest.mark.parametrize('max_ahead', [None, 1])
def test_losing_and_overwriting(max_ahead):
  process, oracle = cluster('user', 5, None, [(2, 1.0, 1.75), (0, 1.5, 3.25)])
  assert_agrees(
    helpers.make_problem('quadratic', 4, 2, 40, seed=0),
    'scaled',
    5,
    process,
    oracle,
    'scan',
    overwrite_within=0.25,
    max_ahead=max_ahead,
  )


@helpers.covering(
  10,
  calls=[1, 8, 19, 30],
  inner=helpers.inner_names,
  workers=[1, 2, 5, 8],
  left_out=[0, 1, 3, 7],
  combine=['sequential', 'mean'],
  name=sorted(PROCESSES),
  sync_cost=[0.0, 0.1, 0.37],
  mode=helpers.modes,
)
def test_synchronous(
  calls, inner, workers, left_out, combine, name, sync_cost, mode
):
  wait_for = max(1, workers - left_out)
  process, times = known(name, workers)
  problem = helpers.make_problem(
    'quadratic', 4, 2, calls, seed=calls, seeds=seeds_of(mode)
  )
  inner = helpers.INNERS[inner]
  tx = gsgd_jax.synchronous(
    inner.library,
    workers,
    combine=combine,
    wait_for=wait_for,
    arrivals=process,
    batch_like=problem.batch_like,
    sync_cost=sync_cost,
    seed=SEED,
  )
  for seed, (flat, state) in enumerate(helpers.run(tx, problem, mode)):
    start, batches, _ = problem.of_seed(seed)
    expected, _, ends = reference.synchronous(
      start,
      inner.oracle(),
      problem.loss,
      problem.gradient,
      workers,
      batches,
      combine,
      wait_for,
      times[:, 1:],  # Rounds number tasks from 1.
      reference.ticks(sync_cost),
    )
    helpers.assert_trajectory(flat[: len(expected)], expected)
    ended = (np.arange(calls) + 1) // wait_for
    np.testing.assert_array_equal(
      gsgd_jax.simulated_time(state),
      np.array([0, *ends])[ended] / reference.UNIT,
    )
    if ends:
      fastest = np.argsort(times[:, 1 : len(ends) + 1], axis=0, kind='stable')
      np.testing.assert_array_equal(
        state.round.applied.by_worker[len(expected) - 1],
        np.bincount(fastest[:wait_for].ravel(), minlength=workers),
      )


@pytest.mark.usefixtures('as_users_compile_it')
@pytest.mark.parametrize(
  'name, workers, batch_size, worker_batch_size, inner',
  [
    ('round robin', 1, 4, None, 'adam'),
    ('uneven gamma', 1, 4, None, 'adam'),
    ('ties', 5, 3, None, 'sgd'),
    ('uneven gamma', 5, 3, None, 'sgd'),
    ('uneven gamma', 5, 10, 5, 'heavy ball'),
    ('round robin', 5, 10, 5, 'heavy ball'),
    ('ties', 5, 64, 4, 'nesterov'),
  ],
)
def test_data_parallel(name, workers, batch_size, worker_batch_size, inner):
  process, times = known(name, workers)
  inner = helpers.INNERS[inner].library
  tx = gsgd_jax.data_parallel(
    inner,
    workers,
    batch_size,
    worker_batch_size=worker_batch_size,
    arrivals=process,
    sync_cost=0.25,
    seed=SEED,
  )
  problem = helpers.make_problem('quadratic', 4, 2, 20, seed=0)
  ((flat, state),) = helpers.run(tx, problem, 'scan')
  plain = optax.with_extra_args_support(inner)
  ((expected, _),) = helpers.run(plain, problem, 'scan')
  np.testing.assert_array_equal(flat, expected)
  slowest = times[: min(workers, batch_size), 1:21].max(axis=0) / reference.UNIT
  share = max(batch_size / workers, 1) / (worker_batch_size or batch_size)
  sync = 0.25 if workers > 1 else 0.0
  np.testing.assert_allclose(
    gsgd_jax.simulated_time(state), np.cumsum(slowest * share + sync), 1e-6
  )


@pytest.mark.parametrize('inner', ['compensated', 'scaled', 'look ahead'])
def test_data_parallel_is_never_stale(inner):
  problem = helpers.make_problem('quadratic', 4, 2, 20, seed=0)
  inner = helpers.INNERS[inner]
  tx = gsgd_jax.data_parallel(inner.library, 3, 2)
  ((flat, _),) = helpers.run(tx, problem, 'scan')
  start, batches, _ = problem.of_seed(0)
  expected, _, _ = reference.synchronous(
    start, inner.oracle(), problem.loss, problem.gradient, 1, batches
  )
  helpers.assert_trajectory(flat, expected)


# Runs without a problem: every gradient is 1, and the batch its number.


def drive(tx, calls, seed=None):
  """The last state, and every call's, after calls of gradients of 1.

  With a learning rate of 1 the parameters are minus the version.
  """
  make = tx if callable(tx) else lambda _: tx

  def run(seed):
    tx = make(seed)

    def step(carry, number):
      params, state = carry
      updates, state = tx.update(
        jnp.ones([]), state, params, batch=number, value=1.0
      )
      carry = optax.apply_updates(params, updates), state
      return carry, (carry[0], lean(state))

    start = jnp.zeros([])
    numbers = jnp.arange(calls, dtype=jnp.int32)
    (_, last), out = jax.lax.scan(step, (start, tx.init(start)), numbers)
    return last, out

  last, (params, states) = jax.jit(run)(seed)
  del params
  return jax.tree.map(np.asarray, (last, states))


def lean(state):
  """Without what is large."""
  if hasattr(state, 'in_flight'):
    state = state._replace(in_flight=None)
  return state._replace(inner_state=None)


def asynchronous(process, workers, size=1, names=None, **options):
  """Around a ledger of so many packets."""
  names = ('worker', 'staleness', 'batch') if names is None else names
  return gsgd_jax.asynchronous(
    ledger(optax.sgd(1.0), size, names),
    workers,
    arrivals=process,
    batch_like=jnp.int32(0),
    keep_params='stale_params' in names,
    **dict(seed=SEED) | options,
  )


# Bounded staleness.


@pytest.mark.parametrize(
  'name, inner',
  [
    ('round robin', 'heavy ball'),
    ('round robin', 'scaled'),
    ('gamma', 'sgd'),
    ('exponential', 'sgd'),
    ('user', 'sgd'),
  ],
)
def test_nobody_ahead_is_in_rounds(name, inner):
  """The N-th call of every round applies all N gradients of it at once."""
  workers, calls = 5, 37
  process, times = known(name, workers)
  inner = helpers.INNERS[inner].library
  problem = helpers.make_problem('quadratic', 4, 2, calls, seed=1)
  bounded = gsgd_jax.asynchronous(
    inner, workers, arrivals=process, max_ahead=0, seed=SEED
  )
  ((flat, state),) = helpers.run(bounded, problem, 'scan')
  ((each, rounds),) = helpers.run(
    gsgd_jax.synchronous(inner, workers, sync_cost=0.0), problem, 'scan'
  )
  ended = (np.arange(calls) + 1) // workers
  start = problem.start
  np.testing.assert_allclose(
    flat, np.concatenate([start, each[workers - 1 :: workers]])[ended], 1e-13
  )
  np.testing.assert_array_equal(state.version, ended * workers)
  ends = np.cumsum([0, *times.max(axis=0)])[ended] / reference.UNIT
  now = gsgd_jax.simulated_time(state)
  np.testing.assert_array_equal(now, ends)
  if name == 'round robin':
    np.testing.assert_array_equal(now, gsgd_jax.simulated_time(rounds))


@pytest.mark.parametrize('max_ahead', [0, 1, 3, None])
def test_nobody_is_further_ahead(max_ahead):
  workers, calls = 6, 200
  tx = asynchronous(
    gsgd_jax.exponential_arrivals(), workers, calls, max_ahead=max_ahead
  )
  last, _ = drive(tx, calls)
  order = last.inner_state.notes['worker'][: last.version]
  delivered = np.cumsum(order[:, None] == np.arange(workers)[None], axis=0)
  spread = np.ptp(delivered, axis=1).max()
  if max_ahead is None:
    assert spread > 4 + 1
  else:
    assert spread == max_ahead + 1  # It gets there, and no further.


@pytest.mark.usefixtures('as_users_compile_it')
@pytest.mark.parametrize(
  'process, overwrite_within',
  [
    (gsgd_jax.failing(gsgd_jax.gamma_arrivals(0.5), 1.0, 1, back=2.5), None),
    (gsgd_jax.failing(gsgd_jax.gamma_arrivals(0.5), 1.0, 1, back=2.5), 0.2),
    # The first one's own next gradient comes within 0.1.
    (gsgd_jax.fixed_speeds([10.0, 1.3, 1.1, 0.9]), 0.12),
  ],
)
def test_a_bound_far_away_is_none(process, overwrite_within):
  options = dict(overwrite_within=overwrite_within)
  (free, states), (bound, others) = (
    drive(asynchronous(process, 4, 60, max_ahead=max_ahead, **options), 60)
    for max_ahead in (None, 1000)
  )
  np.testing.assert_array_equal(states.worker, others.worker)
  for a, b in (
    (free.inner_state, bound.inner_state),
    (free.clock, bound.clock),
  ):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('never', [0, 1, 2])
def test_who_never_arrives_stops_those_who_wait(never):
  process = gsgd_jax.ArrivalProcess(
    lambda workers, key: (),
    lambda machines, worker, task, now: jnp.where(
      worker == never, jnp.inf, 1 + worker.astype(jnp.float32) / 8
    ),
  )
  last, states = drive(asynchronous(process, 3, 30, max_ahead=1), 30)
  by_worker = [0 if worker == never else 2 for worker in range(3)]
  assert last.applied.by_worker.tolist() == by_worker
  assert np.isfinite(gsgd_jax.simulated_time(last))
  np.testing.assert_array_equal(states.version[-20:], 4)


# Invariants.


@helpers.covering(
  10,
  name=sorted(PROCESSES),
  workers=[1, 2, 5, 8],
  slowdown=[None, 4.0],
  outage=[None, (1, 1.2, None), (0, 0.5, 0.75)],
  overwrite_within=[None, None, 0.0, 0.1],
  max_ahead=[None, None, 1],
)
def test_invariants(
  name, workers, slowdown, outage, overwrite_within, max_ahead
):
  calls = 60
  outages = possible(
    [outage] if outage else [], workers, stopping=max_ahead is None
  )
  process, _ = cluster(name, workers, slowdown, outages)
  options = dict(overwrite_within=overwrite_within, max_ahead=max_ahead)
  tx = asynchronous(process, workers, calls, **options)
  last, states = drive(tx, calls)
  notes = {k: v[: last.version] for k, v in last.inner_state.notes.items()}
  lost = 0 if states.lost is None else states.lost
  overwritten = 0 if states.overwritten is None else states.overwritten
  arrivals = states.version + overwritten + lost
  assert_every_arrival_counts(arrivals, states, workers, max_ahead)
  assert_each_gradient_once(notes, states, workers)


def assert_every_arrival_counts(arrivals, states, workers, max_ahead):
  finished = states.cluster.tasks.sum(axis=1)
  np.testing.assert_array_equal(arrivals, finished)
  assert np.all(np.diff(gsgd_jax.simulated_time(states)) >= 0)
  if max_ahead is None:  # Nobody waits: there is one every call.
    calls = np.arange(1, len(arrivals) + 1)
    np.testing.assert_array_equal(arrivals, np.maximum(calls - workers + 1, 0))


def assert_each_gradient_once(notes, states, workers):
  batches = notes['batch']
  assert len(set(batches.tolist())) == len(batches)
  # The batch of a call is its reader's: the one that the call before named.
  readers = np.concatenate([[0], states.worker[:-1]])
  np.testing.assert_array_equal(notes['worker'], readers[batches])
  for worker in range(workers):
    assert np.all(np.diff(batches[notes['worker'] == worker]) > 0)


@pytest.mark.parametrize(
  'name', ['round robin', 'ties', 'uneven gamma', 'exponential', 'user']
)
def test_the_staleness_sum(name):
  """With the ages in flight, to T (N-1): after each of T arrivals."""
  workers, calls = 7, 80
  tx = asynchronous(PROCESSES[name](workers), workers, calls)
  last, states = drive(tx, calls)
  staleness = last.inner_state.notes['staleness'][: last.version]
  applied = states.version[workers - 1 :]
  ages = applied[:, None] - states.read_at[workers - 1 :]
  np.testing.assert_array_equal(
    np.cumsum(staleness) + ages.sum(axis=1), applied * (workers - 1)
  )


# Seeds, and states that are carried elsewhere.

SEEDED = {
  'uneven gamma': lambda seed: asynchronous(
    gsgd_jax.gamma_arrivals(0.1, 0.6), 5, 40, seed=seed
  ),
  'exponential': lambda seed: asynchronous(
    gsgd_jax.straggler(gsgd_jax.exponential_arrivals(0.4), 3.0),
    5,
    40,
    seed=seed,
    overwrite_within=0.05,
  ),
  'bounded': lambda seed: asynchronous(
    gsgd_jax.failing(gsgd_jax.gamma_arrivals(), at=1.2, back=2.6),
    5,
    40,
    seed=seed,
    max_ahead=1,
  ),
  'alone': lambda seed: asynchronous(
    gsgd_jax.uniform_arrivals(0.5, 0.4), 1, 40, seed=seed
  ),
  'fastest': lambda seed: gsgd_jax.synchronous(
    SGD, 5, wait_for=3, arrivals=gsgd_jax.gamma_arrivals(0.1, 0.6), seed=seed
  ),
  'data-parallel': lambda seed: gsgd_jax.data_parallel(
    SGD, 5, 8, arrivals=gsgd_jax.gamma_arrivals(0.1, 0.6), seed=seed
  ),
}


@pytest.mark.usefixtures('as_users_compile_it')
@pytest.mark.parametrize('name', SEEDED)
def test_seeds_are_clusters_of_their_own(name):
  """And under vmap, to the last bit, what they are alone."""
  make = SEEDED[name]

  def run(seed):
    tx = make(seed)

    def step(state, number):
      _, state = tx.update(
        jnp.ones([]), state, jnp.zeros([]), batch=number, value=1.0
      )
      return state, (lean(state), gsgd_jax.simulated_time(state))

    return jax.lax.scan(
      step, tx.init(jnp.zeros([])), jnp.arange(30, dtype=jnp.int32)
    )

  together = jax.jit(jax.vmap(run))(jnp.arange(3))
  of_two = jax.tree.map(lambda x: x[2], together)
  jax.tree.map(np.testing.assert_array_equal, of_two, run(2))
  times = gsgd_jax.simulated_time(together[1][0])
  assert len(set(times[:, -1].tolist())) == 3


@pytest.mark.parametrize('name', SEEDED)
def test_a_state_that_was_saved_goes_on(name):
  tx = SEEDED[name](7)
  step = jax.jit(
    lambda state, number: tx.update(
      jnp.ones([]), state, jnp.zeros([]), batch=number, value=1.0
    )
  )
  kept = restored = tx.init(jnp.zeros([]))
  for number in jnp.arange(24, dtype=jnp.int32):
    (_, kept), (_, restored) = step(kept, number), step(restored, number)
    if number % 5 == 2:
      restored = jax.tree.map(lambda x: np.asarray(x).copy(), restored)
  jax.tree.map(np.testing.assert_array_equal, kept, restored)
  assert gsgd_jax.simulated_time(kept) > 1


@pytest.mark.parametrize('name', SEEDED)
def test_clusters_can_be_donated(name):
  """No two leaves share a buffer, neither at the start nor later."""
  tx = SEEDED[name](7)
  step = jax.jit(
    lambda state: tx.update(
      jnp.ones([]), state, jnp.zeros([]), batch=jnp.int32(0), value=1.0
    ),
    donate_argnums=0,
  )
  state = tx.init(jnp.zeros([]))
  for _ in range(8):
    _, state = step(state)
  assert gsgd_jax.simulated_time(state) > 0


@pytest.mark.usefixtures('as_users_compile_it')
@pytest.mark.parametrize('name', sorted(PROCESSES))
def test_compiled_or_not_a_cluster_is_the_same(name):
  process = PROCESSES[name](32)
  tx = gsgd_jax.asynchronous(SGD, 32, arrivals=process, seed=1)
  one, other = tx.init(jnp.zeros([])), jax.jit(tx.init)(jnp.zeros([]))
  jax.tree.map(np.testing.assert_array_equal, one, other)


# Statistics.


def simulated(process, workers, calls, seeds):
  """Stalenesses (-1 while filling) and the clock, by seed and call."""
  spy = optax.GradientTransformationExtraArgs(
    lambda params: jnp.int32(-1),
    lambda updates, state, params=None, **extra: (updates, extra['staleness']),
  )

  def run(seed):
    tx = gsgd_jax.asynchronous(spy, workers, arrivals=process, seed=seed)

    def step(state, _):
      _, state = tx.update(jnp.zeros([]), state)
      return state, (state.inner_state, state.clock)

    return jax.lax.scan(step, tx.init(jnp.zeros([])), length=calls)[1]

  staleness, now = jax.jit(jax.vmap(run))(jnp.arange(seeds))
  return np.asarray(staleness), gsgd_jax.simulated_time([now])


@pytest.mark.parametrize('workers, seeds', [(8, 48), (64, 6)])
def test_staleness_of_even_machines(workers, seeds):
  """Its standard deviation, after 20 rounds: 0.137 N and 0.106 N."""
  cv = 0.1
  staleness, _ = simulated(
    gsgd_jax.gamma_arrivals(cv), workers, 100 * workers, seeds
  )
  deviation = staleness[:, 20 * workers :] - (workers - 1)
  variance = np.mean(deviation**2, axis=1)
  gaps = cv * np.sqrt(2 / np.pi) * (workers - 1) / workers**2
  expected = workers**2 * (cv**2 + gaps)
  # Four standard errors of a mean over seeds, and half a percent because the
  # formula is an approximation (it is 0.3 % off in 400 runs of plain NumPy).
  error = 4 * np.std(variance, ddof=1) / np.sqrt(seeds) + 0.01 * expected
  assert error < 0.15 * expected
  assert abs(variance.mean() - expected) < error


def draws(process, machines, tasks, seed=SEED):
  return table(process, machines, tasks, seed) / reference.UNIT


@pytest.mark.parametrize(
  'process, expected',
  [
    (gsgd_jax.gamma_arrivals(), scipy.stats.gamma(100, scale=0.01)),
    (gsgd_jax.gamma_arrivals(0.5), scipy.stats.gamma(4, scale=0.25)),
    (gsgd_jax.gamma_arrivals(0.0, 0.5), scipy.stats.gamma(4, scale=0.25)),
    (gsgd_jax.uniform_arrivals(0.2), scipy.stats.uniform(0.8, 0.4)),
    (gsgd_jax.exponential_arrivals(), scipy.stats.expon()),
  ],
)
def test_short_and_long_tasks_are_as_rare_as_they_should(process, expected):
  times = draws(process, 4, 100_000)
  if times[0, 0] == times[0, 1]:  # A machine's own time.
    times = draws(process, 400_000, 1)
  for p in (1e-4, 0.01, 0.3, 0.9, 0.999, 1 - 1e-4):
    error = np.sqrt(p * (1 - p) / times.size)  # Draws are independent.
    assert abs(np.mean(times <= expected.ppf(p)) - p) < 4 * error


def test_long_tasks_of_even_machines():
  times = draws(gsgd_jax.gamma_arrivals(), 64, 10_000)
  expected = 0.00938
  error = np.sqrt(expected * (1 - expected) / times.size)  # Independent.
  assert abs(np.mean(times > 1.25) - expected) < 4 * error + 5e-6


def test_long_tasks_of_uneven_machines():
  times = draws(gsgd_jax.gamma_arrivals(machine_cv=0.6), 50_000, 8)
  by_machine = np.mean(times > 1.25, axis=1)  # These are independent.
  error = np.std(by_machine) / np.sqrt(len(by_machine))
  assert error < 0.002
  assert abs(by_machine.mean() - 0.2788) < 4 * error + 5e-5


@pytest.mark.parametrize(
  'process, cv, machine_cv',
  [
    (gsgd_jax.gamma_arrivals(), 0.1, 0.0),
    (gsgd_jax.gamma_arrivals(1e-3), 1e-3, 0.0),
    (gsgd_jax.gamma_arrivals(1.5), 1.5, 0.0),
    (gsgd_jax.gamma_arrivals(0.0, 0.6), 0.0, 0.6),
    (gsgd_jax.gamma_arrivals(0.2, 0.6), 0.2, 0.6),
    (gsgd_jax.uniform_arrivals(), 0.5 / np.sqrt(3), 0.0),
    (gsgd_jax.uniform_arrivals(1.0, 0.3), 1 / np.sqrt(3), 0.3),
    (gsgd_jax.exponential_arrivals(), 1.0, 0.0),
    (gsgd_jax.exponential_arrivals(0.5), 1.0, 0.5),
  ],
)
def test_a_mean_task_takes_a_unit(process, cv, machine_cv):
  """And varies as it was told to, machine by machine and altogether."""
  times = draws(process, 10_000, 20)
  means = times.mean(axis=1)

  def within_four_errors(sample, expected):
    error = np.std(sample) / np.sqrt(len(sample))
    assert abs(np.mean(sample) - expected) < 4 * error + 1e-6

  # Of X = machine times task: E X^2 = (1 + v^2) (1 + c^2).
  within_four_errors(means, 1)
  second = (1 + machine_cv**2) * (1 + cv**2)
  within_four_errors(np.mean(times**2, axis=1) - 1, second - 1)
  # Of two tasks of a machine: E X X' = 1 + v^2.
  within_four_errors(times[:, 0] * times[:, 1], 1 + machine_cv**2)


def test_fixed_speeds_and_round_robin_take_what_they_say():
  speeds = [0.25, 1.0, 3.0]
  times = draws(gsgd_jax.fixed_speeds(speeds), 3, 4)
  np.testing.assert_allclose(times, np.tile([[4], [1], [1 / 3]], 4), 1e-8)
  times = draws(gsgd_jax.round_robin(), 4, 3)
  assert times.tolist() == [[(i + 1) / 4, 1, 1] for i in range(4)]


@pytest.mark.parametrize('slowdown', [0.25, 10.0])
def test_a_straggler_is_slower_and_others_are_not(slowdown):
  plain, _ = known('uneven gamma', 4)[1] / reference.UNIT, None
  process = gsgd_jax.straggler(PROCESSES['uneven gamma'](4), slowdown, 2)
  factors = np.array([[1.0], [1.0], [slowdown], [1.0]])
  np.testing.assert_allclose(draws(process, 4, 64), plain * factors, 1e-6)


def test_throughput_of_uneven_machines():
  """1.56 N a unit: the mean of 1 / mu, for mu of variation 0.6."""
  workers, calls, seeds = 64, 1600, 40
  _, now = simulated(
    gsgd_jax.gamma_arrivals(machine_cv=0.6), workers, calls, seeds
  )
  # After a while: all begin together, so that the first arrivals are late.
  half = calls // 2
  rate = (calls - half) / (now[:, -1] - now[:, half - 1]) / workers
  # The variance of 1 / mu: E 1 / mu^2 = a^2 / ((a - 1) (a - 2)), a = 1 / 0.36.
  a = 1 / 0.36
  variance = a**2 / ((a - 1) * (a - 2)) - (a / (a - 1)) ** 2
  error = np.sqrt(variance / workers / seeds)
  assert abs(rate.mean() - 1 / (1 - 0.6**2)) < 4 * error


# The order of arrivals, however long it takes.


def heap_order(times, updates):
  """Finish times summed absolutely, in the precision of `times`."""
  heap = [(row[0], worker) for worker, row in enumerate(times)]
  heapq.heapify(heap)
  tasks, order = [0] * len(times), []
  for _ in range(updates):
    now, worker = heap[0]
    order.append(worker)
    tasks[worker] += 1
    finish = now + times[worker][tasks[worker]]
    heapq.heapreplace(heap, (finish, worker))
  return np.array(order)


@pytest.mark.parametrize('name', ['gamma', 'exponential'])
def test_order_in_float32(name):
  """It is that of a heap in float64, which a heap in float32 loses."""
  workers, updates = 64, 40_000
  process = PROCESSES[name](workers)
  with jax.enable_x64(False):
    times = draws(process, workers, 900)
    tx = gsgd_jax.asynchronous(SGD, workers, arrivals=process, seed=SEED)

    def step(state, _):
      _, state = tx.update(jnp.zeros([]), state)
      return state, state.worker

    @jax.jit
    def run():
      state = tx.init(jnp.zeros([]))
      return jax.lax.scan(step, state, length=workers - 1 + updates)[1]

    order = np.asarray(run())[workers - 1 :]
  np.testing.assert_array_equal(order, heap_order(times.tolist(), updates))
  rounded = heap_order(times.astype(np.float32), updates)
  assert np.flatnonzero(rounded != order)[0] < 10_000


# Workers that stop.


def test_nobody_waits_for_one_that_never_comes_back():
  workers, calls = 4, 80
  process = gsgd_jax.failing(gsgd_jax.gamma_arrivals(), at=2.5, worker=1)
  last, states = drive(asynchronous(process, workers, calls), calls)
  assert last.version == calls - (workers - 1) and states.lost is None
  now = gsgd_jax.simulated_time(states)
  notes = {k: v[: last.version] for k, v in last.inner_state.notes.items()}
  applied_at = now[workers - 1 :]
  of_failed = notes['worker'] == 1
  assert of_failed.sum() == 2 and applied_at[of_failed].max() < 2.5
  readers = np.concatenate(
    [np.arange(workers), states.worker[workers - 1 : -1]]
  )
  (taken,) = np.flatnonzero(readers == 1)[2:]  # Its third, which is lost.
  assert taken not in notes['batch']
  # The three that remain go on as fast as they did.
  np.testing.assert_allclose(
    (now[-1] - now[-31]) / 30, 1 / (workers - 1), rtol=0.1
  )


def test_one_that_comes_back_reads_anew():
  """Worker 0 of three is away from 2.5 to 6: all of them take a unit."""
  process = gsgd_jax.failing(gsgd_jax.fixed_speeds([1.0] * 3), 2.5, back=6.0)
  names = ('worker', 'staleness', 'stale_params')
  last, states = drive(asynchronous(process, 3, 40, names), 40)
  notes = last.inner_state.notes
  order = [0, 1, 2] * 2 + [1, 2] * 4 + [0, 1, 2] * 3
  staleness = [0, 1, 2] + [2] * 3 + [1] * 8 + [2] * 9
  assert notes['worker'][: len(order)].tolist() == order
  assert notes['staleness'][: len(order)].tolist() == staleness
  # What it read is the server as it was, which is minus the version.
  version = np.arange(last.version)
  np.testing.assert_array_equal(
    -notes['stale_params'][: last.version],
    version - notes['staleness'][: last.version],
  )
  assert last.lost == 1
  at = np.flatnonzero(np.diff(states.lost))[0] + 1
  assert states.worker[at] == 0
  assert gsgd_jax.simulated_time(states)[at] == 6.0


@pytest.mark.parametrize('first, then', [(0, 1), (1, 0)])
def test_one_that_fails_twice_in_a_task(first, then):
  """The task takes 2 units: it is lost at 0.75, again at 1.5, and then not."""
  outages = [(0.5, 0.75), (1.25, 1.5)]
  process = gsgd_jax.fixed_speeds([0.5, 1.0])
  for at, back in (outages[first], outages[then]):
    process = gsgd_jax.failing(process, at, back=back)
  _, states = drive(asynchronous(process, 2, 8), 7)
  times = gsgd_jax.simulated_time(states)[1:]
  assert times.tolist() == [0.75, 1, 1.5, 2, 3, 3.5]
  assert states.worker[1:].tolist() == [0, 1, 0, 1, 1, 0]
  assert states.lost[1:].tolist() == [1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize('max_ahead', [None, 1])
def test_what_is_lost_overwrites_nothing(max_ahead):
  """Worker 0 comes back at 1.125: afterwards worker 1 comes shortly before."""
  process = gsgd_jax.failing(gsgd_jax.fixed_speeds([1.0, 1.0]), 0.5, back=1.125)
  options = dict(overwrite_within=0.25, max_ahead=max_ahead)
  _, states = drive(asynchronous(process, 2, 8, **options), 7)
  times = gsgd_jax.simulated_time(states)[1:]
  assert times.tolist() == [1, 1.125, 2, 2.125, 3, 3.125]
  assert states.lost[1:].tolist() == [0, 1, 1, 1, 1, 1]
  assert states.overwritten[1:].tolist() == [0, 0, 1, 1, 2, 2]
  assert states.version[1:].tolist() == [1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize('max_ahead', [None, 3])
def test_what_will_be_lost_overwrites_nothing(max_ahead):
  """Worker 0 arrives at 1, and at 1.125 it is back with nothing."""
  process = gsgd_jax.failing(
    gsgd_jax.fixed_speeds([1.0, 0.8]), 1.0625, back=1.125
  )
  options = dict(overwrite_within=0.2, max_ahead=max_ahead)
  _, states = drive(asynchronous(process, 2, 8, **options), 5)
  times = gsgd_jax.simulated_time(states)[1:]
  assert times.tolist() == [1, 1.125, 1.25, 2.125]
  assert states.lost[1:].tolist() == [0, 1, 1, 1]
  assert states.version[1:].tolist() == [1, 1, 2, 3]


@pytest.mark.parametrize(
  'combine, wait_for, ends',
  [
    # Worker 0 fails at 1.5, is back at 2.25, and has to take its task again.
    ('sequential', 3, [1.0, 3.25, 4.25]),
    ('mean', 3, [1.0, 3.25, 4.25]),
    ('sequential', 2, [1.0, 2.0, 3.0]),
  ],
)
def test_a_round_waits_for_who_comes_back(combine, wait_for, ends):
  tx = gsgd_jax.synchronous(
    SGD,
    3,
    combine=combine,
    wait_for=wait_for,
    sync_cost=0.0,
    arrivals=gsgd_jax.failing(
      gsgd_jax.fixed_speeds([1.0] * 3), at=1.5, back=2.25
    ),
  )
  _, states = drive(tx, 3 * wait_for)
  now = gsgd_jax.simulated_time(states)
  assert now[wait_for - 1 :: wait_for].tolist() == ends


@pytest.mark.parametrize('combine', ['sequential', 'mean'])
def test_rounds_of_the_fastest_go_on_without_who_stops(combine):
  tx = gsgd_jax.synchronous(
    SGD,
    3,
    combine=combine,
    wait_for=2,
    sync_cost=0.5,
    arrivals=gsgd_jax.failing(gsgd_jax.fixed_speeds([4.0, 2.0, 1.0]), at=1.5),
  )
  _, states = drive(tx, 6)
  now = gsgd_jax.simulated_time(states)
  # Workers 0 and 1 are the fastest until 0 has failed.
  assert now[1::2].tolist() == [1.0, 2.0, 3.5]
  assert states.round.order[1::2].tolist() == [[0, 1], [0, 1], [1, 2]]


@pytest.mark.parametrize('at, back', [(1.0, 3.0), (2.5, None), (0.0, 2.1)])
def test_a_worker_is_away_once_at_a_time(at, back):
  process = gsgd_jax.failing(gsgd_jax.round_robin(), 2.0, 1, 3.0)
  gsgd_jax.failing(process, at, 0, back)
  gsgd_jax.failing(process, 3.0, 1)
  with pytest.raises(
    ValueError, match=r'^worker 1 is away from 2 to 3 already'
  ):
    gsgd_jax.failing(process, at, 1, back)


def test_a_round_waits_through_two_outages():
  process = gsgd_jax.fixed_speeds([1.0, 1.0])
  for at, back in ((0.5, 1.0), (1.5, 4.0)):
    process = gsgd_jax.failing(process, at=at, back=back)
  tx = gsgd_jax.synchronous(SGD, 2, sync_cost=0.0, arrivals=process)
  last, _ = drive(tx, 2)
  assert gsgd_jax.simulated_time(last) == 5.0


@pytest.mark.parametrize(
  'workers, batch_size, at, back, ends',
  [
    # Shares of 1 / 4 of a unit, the fifth of which is interrupted.
    (4, 4, 1.1, 5.0, [0.25, 0.5, 0.75, 1.0, 5.25]),
    # A batch four times a worker's, interrupted half-way.
    (1, 4, 2.0, 3.0, [7.0, 11.0]),
  ],
)
def test_a_share_is_interrupted_like_a_task(
  workers, batch_size, at, back, ends
):
  tx = gsgd_jax.data_parallel(
    SGD,
    workers,
    batch_size,
    worker_batch_size=batch_size if workers > 1 else 1,
    sync_cost=0.0,
    arrivals=gsgd_jax.failing(
      gsgd_jax.fixed_speeds([1.0] * workers), at=at, back=back
    ),
  )
  _, states = drive(tx, len(ends))
  assert gsgd_jax.simulated_time(states).tolist() == ends


# Options as hyperparameters.


@pytest.mark.parametrize(
  'make, static, options',
  [
    (
      gsgd_jax.asynchronous,
      ('workers',),
      dict(workers=3, overwrite_within=0.1, sync_cost=0.3, seed=4),
    ),
    (
      gsgd_jax.asynchronous,
      ('workers', 'max_ahead'),
      dict(workers=3, max_ahead=1, overwrite_within=0.1, seed=4),
    ),
    (
      gsgd_jax.synchronous,
      ('workers', 'wait_for'),
      dict(workers=3, wait_for=2, sync_cost=0.3, seed=4),
    ),
    (
      gsgd_jax.data_parallel,
      ('workers', 'batch_size'),
      dict(workers=3, batch_size=2, sync_cost=0.3, seed=4),
    ),
  ],
)
def test_injected_hyperparameters(make, static, options):
  options |= dict(arrivals=gsgd_jax.gamma_arrivals(0.3))
  injected = optax.inject_hyperparams(make, static_args=static)(SGD, **options)
  plain = make(SGD, **options)
  params = jnp.ones([2])
  state, other = injected.init(params), plain.init(params)
  for _ in range(12):
    updates, state = jax.jit(injected.update)(params, state, params)
    expected, other = jax.jit(plain.update)(params, other, params)
    np.testing.assert_array_equal(updates, expected)
  jax.tree.map(np.testing.assert_array_equal, state.inner_state, other)
  assert gsgd_jax.simulated_time(state) == gsgd_jax.simulated_time(other) > 1


def test_an_injected_span_may_be_changed():
  tx = optax.inject_hyperparams(
    gsgd_jax.asynchronous, static_args=('workers',)
  )(SGD, workers=2, overwrite_within=10.0)
  params = jnp.ones([2])
  state = tx.init(params)
  for span, version in ((10.0, 0), (0.0, 5)):
    state = state._replace(
      hyperparams=state.hyperparams | dict(overwrite_within=jnp.float64(span))
    )
    for _ in range(5):
      _, state = jax.jit(tx.update)(params, state, params)
    assert state.inner_state.version == version


@pytest.mark.parametrize(
  'name, make, options',
  [
    ('workers', gsgd_jax.asynchronous, dict(workers=2)),
    ('workers', gsgd_jax.synchronous, dict(workers=2)),
    ('batch_size', gsgd_jax.data_parallel, dict(workers=2, batch_size=2)),
    ('max_ahead', gsgd_jax.asynchronous, dict(workers=2, max_ahead=1)),
    ('wait_for', gsgd_jax.synchronous, dict(workers=2, wait_for=1)),
  ],
)
def test_what_decides_shapes_is_static(name, make, options):
  static = tuple(set(options) - {name})
  tx = optax.inject_hyperparams(make, static_args=static)(SGD, **options)
  params = jnp.ones([2])
  complaint = complaint_of(jax.jit(tx.init), params)
  assert re.match(f'^{name} .* must be a Python int.* static_args', complaint)


# Mistakes.


def complaint_of(call, *args, **kwargs):
  """What a ValueError says, in one line."""
  with pytest.raises(ValueError) as error:
    call(*args, **kwargs)
  assert '\n' not in str(error.value)
  return str(error.value)


GAMMA = gsgd_jax.gamma_arrivals()
TRACE = gsgd_jax.recorded_arrivals([0, 1, 0])
NOT_REALS = [
  (-0.1, 'must be finite and at least 0, got -0.1'),
  (np.nan, 'must be finite and at least 0, got nan'),
  (np.inf, 'must be finite and at least 0, got inf'),
  ('1', "must be a number, got '1'"),
  (True, 'must be a number, got True'),
  (1j, 'must be a number, got 1j'),
]
REALS = {
  'cv': lambda x: gsgd_jax.gamma_arrivals(x),
  'machine_cv': lambda x: gsgd_jax.gamma_arrivals(machine_cv=x),
  'machine_cv of uniform': lambda x: gsgd_jax.uniform_arrivals(machine_cv=x),
  'machine_cv of exponential': lambda x: gsgd_jax.exponential_arrivals(x),
  'spread': lambda x: gsgd_jax.uniform_arrivals(x),
  'slowdown': lambda x: gsgd_jax.straggler(GAMMA, x),
  'at': lambda x: gsgd_jax.failing(GAMMA, x),
  'back': lambda x: gsgd_jax.failing(GAMMA, 0.5, back=x),
  'unit': lambda x: gsgd_jax.recorded_arrivals([0], [1.0], unit=x),
  'overwrite_within': lambda x: gsgd_jax.asynchronous(
    SGD, 2, overwrite_within=x
  ),
  'sync_cost': lambda x: gsgd_jax.asynchronous(SGD, 2, sync_cost=x),
  'sync_cost of delayed': lambda x: gsgd_jax.delayed(SGD, 2, sync_cost=x),
  'sync_cost of rounds': lambda x: gsgd_jax.synchronous(SGD, 2, sync_cost=x),
  'sync_cost of steps': lambda x: gsgd_jax.data_parallel(
    SGD, 2, 2, sync_cost=x
  ),
}


@pytest.mark.parametrize('given, problem', NOT_REALS)
@pytest.mark.parametrize('name', REALS)
def test_numbers(name, given, problem):
  argument = name.split()[0]
  assert complaint_of(REALS[name], given) == f'{argument} {problem}'


INTS = {
  'worker': (lambda x: gsgd_jax.straggler(GAMMA, 2.0, x), 0),
  'worker that fails': (lambda x: gsgd_jax.failing(GAMMA, 2.0, x), 0),
  'max_ahead': (lambda x: gsgd_jax.asynchronous(SGD, 2, max_ahead=x), 0),
  'wait_for': (lambda x: gsgd_jax.synchronous(SGD, 2, wait_for=x), 1),
  'workers': (lambda x: gsgd_jax.data_parallel(SGD, x, 2), 1),
  'batch_size': (lambda x: gsgd_jax.data_parallel(SGD, 2, x), 1),
  'worker_batch_size': (
    lambda x: gsgd_jax.data_parallel(SGD, 2, 2, worker_batch_size=x),
    1,
  ),
}


@pytest.mark.parametrize('given', [1.0, True, '1'])
@pytest.mark.parametrize('name', INTS)
def test_integers(name, given):
  call, least = INTS[name]
  argument = name.split()[0]
  assert (
    complaint_of(call, given) == f'{argument} must be an int, got {given!r}'
  )
  assert complaint_of(call, least - 1) == (
    f'{argument} must be at least {least}, got {least - 1}'
  )
  call(least)


def init(process, workers=2):
  """Where a process learns how many workers there are."""
  return gsgd_jax.asynchronous(SGD, workers, arrivals=process).init(jnp.ones(1))


ALL_STOP = gsgd_jax.failing(gsgd_jax.failing(GAMMA, 1.0, 0), 2.0, 1)
ARGUMENTS = {
  'cv': (
    lambda: gsgd_jax.gamma_arrivals(2.5),
    r'^cv must be from 0 to 2, got 2\.5',
  ),
  'machine_cv': (
    lambda: gsgd_jax.exponential_arrivals(3.0),
    '^machine_cv must be from 0 to 2, got 3',
  ),
  'spread': (
    lambda: gsgd_jax.uniform_arrivals(1.5),
    r'^spread must be from 0 to 1, got 1\.5$',
  ),
  'slowdown': (
    lambda: gsgd_jax.straggler(GAMMA, 0.0),
    '^slowdown must be positive, got 0$',
  ),
  'back': (
    lambda: gsgd_jax.failing(GAMMA, 2.0, back=2.0),
    '^back must be after at=2, got 2$',
  ),
  'wait_for': (
    lambda: gsgd_jax.synchronous(SGD, 2, wait_for=3),
    '^wait_for must be at most workers=2, got 3$',
  ),
  'zero speed': (
    lambda: gsgd_jax.fixed_speeds([1.0, 0.0]),
    r'^speeds must be positive numbers, got .*0\.',
  ),
  'negative speed': (
    lambda: gsgd_jax.fixed_speeds([-1.0]),
    '^speeds must be positive numbers, got .*-1',
  ),
  'infinite speed': (
    lambda: gsgd_jax.fixed_speeds([np.inf]),
    '^speeds must be positive numbers, got .*inf',
  ),
  'no speed': (
    lambda: gsgd_jax.fixed_speeds([np.nan]),
    '^speeds must be positive numbers, got .*nan',
  ),
  'speeds that are words': (
    lambda: gsgd_jax.fixed_speeds(['fast', 'slow']),
    "^speeds must be positive numbers, got .*'fast', 'slow'",
  ),
  'a table of speeds': (
    lambda: gsgd_jax.fixed_speeds([[1.0]]),
    r'^speeds must be positive numbers, got .*\[\[',
  ),
  'one speed': (
    lambda: gsgd_jax.fixed_speeds(1.0),
    '^speeds must be positive numbers, got ',
  ),
  'too few speeds': (
    lambda: init(gsgd_jax.fixed_speeds([1.0]), 2),
    '^speeds must be as many as the workers, got 1 for 2 workers$',
  ),
  'straggler of another cluster': (
    lambda: init(gsgd_jax.straggler(GAMMA, 2.0, 2)),
    '^worker must be below the number of workers, 2, got 2$',
  ),
  'failing of another cluster': (
    lambda: init(gsgd_jax.failing(GAMMA, 2.0, 5, back=3.0)),
    '^worker must be below the number of workers, 2, got 5$',
  ),
  'all stop': (lambda: init(ALL_STOP), '^every worker stops for good'),
  'the only one stops': (
    lambda: init(gsgd_jax.failing(GAMMA, 1.0), 1),
    '^every worker stops for good',
  ),
  'max_ahead of one that stops': (
    lambda: gsgd_jax.asynchronous(
      SGD, 2, max_ahead=1, arrivals=gsgd_jax.failing(GAMMA, 1.0)
    ),
    '^max_ahead waits for the slowest worker, but .* some stop for good',
  ),
  'a round with one that stops': (
    lambda: gsgd_jax.synchronous(SGD, 4, arrivals=gsgd_jax.failing(GAMMA, 1.0)),
    '^synchronous would wait for ever: every round needs 4 of 4 workers, and 1 '
    'of them may stop for good; wait_for=3 would not$',
  ),
  'a round with two that stop': (
    lambda: gsgd_jax.synchronous(SGD, 4, wait_for=3, arrivals=ALL_STOP),
    'every round needs 3 of 4 workers, and 2 of them .*; wait_for=2 would not$',
  ),
  'rounds after which all have stopped': (
    lambda: gsgd_jax.synchronous(SGD, 2, wait_for=1, arrivals=ALL_STOP),
    'every round needs 1 of 2 workers, and 2 of them may stop for good$',
  ),
  'a share of one that stops': (
    lambda: gsgd_jax.data_parallel(
      SGD, 4, 3, arrivals=gsgd_jax.failing(GAMMA, 1.0, 2)
    ),
    '^data_parallel would wait for ever: every round needs 3 of 3 workers, and '
    '1 of them may stop for good; let them come back$',
  ),
  'straggler of a trace': (
    lambda: gsgd_jax.straggler(TRACE, 2.0),
    '^straggler changes task times, but a trace .*: change the trace$',
  ),
  'failing of a trace': (
    lambda: gsgd_jax.failing(TRACE, 2.0),
    '^failing changes task times, but a trace .*: change the trace$',
  ),
  'max_ahead of a trace': (
    lambda: gsgd_jax.asynchronous(SGD, 2, max_ahead=1, arrivals=TRACE),
    '^max_ahead waits for the slowest worker',
  ),
  'rounds of a trace': (
    lambda: gsgd_jax.synchronous(SGD, 2, arrivals=TRACE),
    '^synchronous needs to know how long tasks take, but a trace says when ',
  ),
  'steps of a trace': (
    lambda: gsgd_jax.data_parallel(SGD, 2, 2, arrivals=TRACE),
    '^data_parallel needs to know how long tasks take, but a trace says when ',
  ),
}


@pytest.mark.parametrize('call, message', ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(call, message):
  assert re.search(message, complaint_of(call))


def test_who_has_no_share_may_stop():
  process = gsgd_jax.failing(gsgd_jax.fixed_speeds([1.0] * 4), 1.0, 3)
  tx = gsgd_jax.data_parallel(SGD, 4, 3, arrivals=process, sync_cost=0.0)
  last, _ = drive(tx, 3)
  np.testing.assert_allclose(gsgd_jax.simulated_time(last), 3 / 3, 1e-6)


def test_a_complaint_of_many_speeds_is_one_line():
  complaint_of(gsgd_jax.fixed_speeds, [1.0] * 63 + [0.0])
