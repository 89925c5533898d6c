"""Simulated time: exact, whatever its size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gsgd_jax
from gsgd_jax import clock

TICKS = 2**30
times = st.tuples(st.integers(0, 2**20), st.integers(0, TICKS - 1))


def as_time(pair):
  return clock.Time(*map(jnp.int32, pair))


def as_ticks(time):
  return int(time.whole) * TICKS + int(time.ticks)


@given(times, times)
def test_arithmetic_is_that_of_integers(first, second):
  a, b = as_time(first), as_time(second)
  assert as_ticks(clock.add(a, b)) == as_ticks(a) + as_ticks(b)
  early, late = sorted((a, b), key=as_ticks)
  assert as_ticks(clock.subtract(late, early)) == as_ticks(late) - as_ticks(
    early
  )
  assert bool(clock.at_most(a, b)) == (as_ticks(a) <= as_ticks(b))
  for total in (clock.add(a, b), clock.subtract(late, early)):
    assert 0 <= total.ticks < TICKS and total.whole >= 0


@given(st.lists(times, min_size=1, max_size=9))
def test_order(pairs):
  array = clock.Time(
    jnp.array([p[0] for p in pairs], jnp.int32),
    jnp.array([p[1] for p in pairs], jnp.int32),
  )
  expected = sorted(range(len(pairs)), key=lambda i: pairs[i])
  assert clock.order(array).tolist() == expected
  assert clock.first(array) == expected[0]
  assert tuple(map(int, clock.latest(array))) == max(pairs)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
@given(units=st.floats(0, 2**22, width=32))
def test_units_are_rounded_to_a_tick(dtype, units):
  time = clock.of(jnp.asarray(units, dtype))
  assert as_ticks(time) == round(units * TICKS)
  assert as_ticks(clock.of(float(units))) == as_ticks(time)
  assert clock.in_units(time) == round(units * TICKS) / TICKS
  traced = jax.jit(clock.in_units)(time)
  np.testing.assert_allclose(traced, units, rtol=1e-12, atol=2**-31)


@pytest.mark.parametrize('units', [jnp.inf, jnp.nan, 2.0**31, 1e30])
def test_never(units):
  for given_as in (units, jnp.float32(units), jnp.float64(units)):
    time = clock.of(given_as)
    assert clock.is_never(time) and clock.in_units(time) == np.inf
    assert jax.jit(clock.in_units)(time) == np.inf
    one = clock.of(1.0)
    assert clock.is_never(clock.add(time, one))
    assert clock.is_never(clock.add(one, time))
    assert clock.is_never(clock.subtract(time, one))
    assert clock.is_never(clock.scale(time, 0.5))
    assert clock.at_most(one, time) and not clock.at_most(time, one)


@pytest.mark.parametrize('number', [1, 2, 3, 10, 64, 4097])
def test_fractions(number):
  fractions = clock.fractions(number)
  expected = [round((i + 1) / number * TICKS) for i in range(number)]
  whole, ticks = (np.asarray(x, np.int64) for x in fractions)
  assert (whole * TICKS + ticks).tolist() == expected


def test_negative_durations_are_none():
  assert as_ticks(clock.of(-1.0)) == as_ticks(clock.of(jnp.float32(-1))) == 0


def test_time_beyond_int32_never_comes():
  late = clock.of(2.0**31 - 512)
  assert not clock.is_never(late)
  assert clock.is_never(clock.add(late, late))


def test_a_clock_after_ten_million_updates():
  """Where a float32's step is a whole unit, the clock still is exact."""
  tx = gsgd_jax.asynchronous(optax.sgd(0.1), workers=8)
  params = jnp.ones([1], jnp.float32)
  state = tx.init(params)
  late = clock.of(2.0**24)
  cluster = state.cluster._replace(
    finish=clock.add(
      state.cluster.finish, jax.tree.map(lambda x: jnp.tile(x, 8), late)
    )
  )
  state = state._replace(
    count=jnp.int32(10**7),
    cluster=cluster,
    clock=state.clock._replace(time=late),
  )
  step = jax.jit(lambda state: tx.update(params, state, params)[1])
  for i in range(20):
    state = step(state)
    assert gsgd_jax.simulated_time(state) == 2**24 + (i + 1) / 8


def test_seeds_have_clocks_of_their_own():
  def run(seed):
    tx = gsgd_jax.asynchronous(
      optax.sgd(0.1), 3, arrivals=gsgd_jax.gamma_arrivals(), seed=seed
    )
    params = jnp.ones([1])
    state = tx.init(params)
    for _ in range(5):
      _, state = tx.update(params, state, params)
    return state, gsgd_jax.simulated_time(state)

  states, traced = jax.jit(jax.vmap(run))(jnp.arange(4))
  times = gsgd_jax.simulated_time(states)
  assert times.dtype == np.float64 and len(set(times)) == 4
  np.testing.assert_allclose(traced, times, rtol=1e-12)
  _, alone = run(2)
  np.testing.assert_allclose(alone, times[2], rtol=1e-12)


@pytest.mark.parametrize(
  'tx', [optax.sgd(0.1), gsgd_jax.delayed(optax.sgd(0.1), [1, 2])]
)
def test_no_clock(tx):
  state = tx.init([jnp.ones([1]), jnp.ones([1])])
  with pytest.raises(ValueError, match=r'found no clock .* workers=1'):
    gsgd_jax.simulated_time(state)


def loss_fn(params, batch):
  return jnp.mean((params - batch) ** 2)


WINDOW, REPLAYS, BATCH = 4, 2, 8


def guided(model):
  like = jax.ShapeDtypeStruct((BATCH,), jnp.float64)
  return gsgd_jax.guided(
    optax.sgd(0.01),
    loss_fn,
    window=WINDOW,
    replays=REPLAYS,
    replay_model=model,
    batch_like=like,
  ), like


def replays_and_units(state, number, workers):
  """How many replays were taken, and in how many units by so many workers."""
  replays = units = 0
  for replayed in state:
    taken = int(np.sum(replayed >= 0))
    replays += taken
    units += -(-taken // workers)
  assert number == len(state) and replays
  return replays, units


def run_guided(tx, calls):
  params = jnp.float64(3.0)
  state = tx.init(params)
  replayed = []
  rng = np.random.default_rng(0)

  @jax.jit
  def step(params, state, batch):
    value, grads = jax.value_and_grad(loss_fn)(
      gsgd_jax.worker_params(params, state), batch
    )
    updates, state = tx.update(grads, state, params, value=value, batch=batch)
    return optax.apply_updates(params, updates), state

  for _ in range(calls):
    batch = jnp.asarray(rng.normal(size=BATCH))
    before = state.inner_state.count
    params, state = step(params, state, batch)
    count = int(state.inner_state.count)
    if count > before and count % WINDOW == 0:
      replayed.append(np.asarray(state.inner_state.replayed))
  return state, replayed


@pytest.mark.parametrize('workers', [1, 3, 20])
@pytest.mark.parametrize('model', ['serial', 'parallel', 'shared'])
def test_what_replays_cost(model, workers):
  tx, like = guided(model)
  tx = gsgd_jax.asynchronous(tx, workers, batch_like=like, sync_cost=0.25)
  arrivals = 5 * WINDOW
  state, replayed = run_guided(tx, workers - 1 + arrivals)
  replays, units = replays_and_units(replayed, 5, workers)
  sync = 0.25 if workers > 1 else 0.0
  cost = {
    'serial': replays,
    'parallel': units,
    'shared': replays * (1 / min(workers, BATCH) + sync),
  }[model]
  np.testing.assert_allclose(
    gsgd_jax.simulated_time(state), arrivals / workers + cost, rtol=1e-9
  )
  # The same inside jit.
  np.testing.assert_allclose(
    jax.jit(gsgd_jax.simulated_time)(state),
    gsgd_jax.simulated_time(state),
    rtol=1e-12,
  )


@pytest.mark.parametrize('model', ['serial', 'shared'])
def test_a_replay_of_a_split_batch_costs_what_the_batch_does(model):
  """Twice a worker's batch is two units for the server."""
  tx, _ = guided(model)
  tx = gsgd_jax.data_parallel(
    tx, 4, batch_size=BATCH, worker_batch_size=BATCH // 2, sync_cost=0.5
  )
  state, replayed = run_guided(tx, 3 * WINDOW)
  replays, _ = replays_and_units(replayed, 3, 4)
  step = (BATCH / 4) / (BATCH // 2) + 0.5
  each = 2.0 if model == 'serial' else 2 / 4 + 0.5
  assert gsgd_jax.simulated_time(state) == 3 * WINDOW * step + replays * each


def test_stored_gradients_cost_no_time():
  tx = gsgd_jax.asynchronous(gsgd_jax.guided(optax.sgd(0.1), window=2), 2)
  params = jnp.ones([1])
  state = tx.init(params)
  update = jax.jit(tx.update)
  for value in (3.0, 2.5, 2.0, 1.5, 1.0, 0.9, 0.5):
    _, state = update(params, state, params, value=value)
  assert np.any(state.inner_state.replayed >= 0)
  assert gsgd_jax.simulated_time(state) == 3.0
