"""asynchronous, delayed and synchronous against the oracle."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gsgd_jax
from tests import helpers, reference


@helpers.covering(
  11,
  problem=helpers.problems,
  inner=helpers.inner_names,
  workers=[1, 2, 3, 5, 7, 9],
  local_momentum=[None, 0.7],
  order_seed=[None, 0, 1, 2],
  mode=helpers.modes,
)
def test_asynchronous(
  problem, inner, workers, local_momentum, order_seed, mode
):
  calls = problem.batches[0].shape[1]
  arrivals, oracle_order = gsgd_jax.round_robin(), None
  if order_seed is not None:
    rng = np.random.default_rng(order_seed)
    oracle_order = rng.integers(workers, size=calls + 1).tolist()
    arrivals = gsgd_jax.recorded_arrivals(oracle_order)
  tx = gsgd_jax.asynchronous(
    helpers.INNERS[inner].library,
    workers,
    arrivals=arrivals,
    worker_transform=local_momentum and optax.trace(local_momentum),
    batch_like=problem.batch_like,
    keep_params=True,
  )
  outs = helpers.run(tx, problem, mode)
  for seed, (flat, state) in enumerate(outs):
    start, batches, _ = problem.of_seed(seed)
    if len(batches) < workers:
      np.testing.assert_array_equal(flat, np.tile(start, (calls, 1)))
      continue
    run = reference.asynchronous(
      start,
      helpers.INNERS[inner].oracle(),
      problem.loss,
      problem.gradient,
      workers,
      batches,
      oracle_order and reference.Recorded(oracle_order, range(1, calls + 2)),
      local_momentum,
    )
    np.testing.assert_array_equal(
      flat[: workers - 1], np.tile(start, (workers - 1, 1))
    )
    helpers.assert_trajectory(flat[workers - 1 :], run.trajectory)
    assert state.version[-1] == len(run.packets)


class Spy(optax.GradientTransformationExtraArgs):
  """SGD that records the extra arguments of the packets it is given."""

  def __new__(cls, learning_rate, names, like):
    def init(params):
      del params
      return {name: jnp.asarray(like[name]) * 0 - 1 for name in names}

    def update(updates, state, params=None, **extra):
      del params
      return optax.tree.scale(-learning_rate, updates), {
        name: jnp.asarray(extra[name], state[name].dtype) for name in names
      }

    return super().__new__(cls, init, update)


@pytest.mark.parametrize('make', ['asynchronous', 'delayed'])
def test_packets_and_the_staleness_sum(make):
  workers, calls = 4, 23
  problem = helpers.make_problem('quadratic', 4, 2, calls, seed=3)
  like = dict(
    staleness=jnp.int32(0), worker=jnp.int32(0), value=0.0, batch=np.zeros(2)
  )
  names = ['staleness', 'worker', 'value']
  if make == 'asynchronous':
    tx = gsgd_jax.asynchronous(Spy(0.1, names, like), workers)
  else:
    names.remove('worker')
    tx = gsgd_jax.delayed(Spy(0.1, names, like), workers - 1)
  ((_, state),) = helpers.run(tx, problem, 'scan')
  start, batches, _ = problem.of_seed(0)
  packets = reference.asynchronous(
    start,
    reference.Sgd(0.1),
    problem.loss,
    problem.gradient,
    workers,
    batches,
  ).packets
  seen = {k: v[workers - 1 :] for k, v in state.inner_state.items()}
  for name in names:
    np.testing.assert_allclose(
      seen[name], [getattr(p, name) for p in packets], rtol=1e-12
    )
  assert seen['staleness'][:6].tolist() == [0, 1, 2, 3, 3, 3]
  # Of T arrivals: their stalenesses and the ages in flight sum to T (N-1).
  arrivals = len(packets)
  ages = arrivals - state.read_at[-1]
  assert seen['staleness'].sum() + ages.sum() == arrivals * (workers - 1)


def test_staleness_sum_under_any_order():
  workers, calls = 5, 60
  order = np.random.default_rng(0).integers(workers, size=calls)
  problem = helpers.make_problem('quadratic', 2, 1, calls, seed=4)
  tx = gsgd_jax.asynchronous(
    Spy(0.1, ['staleness'], dict(staleness=jnp.int32(0))),
    workers,
    arrivals=gsgd_jax.recorded_arrivals(order),
  )
  ((_, state),) = helpers.run(tx, problem, 'scan')
  staleness = state.inner_state['staleness'][workers - 1 :]
  ages = len(staleness) - state.read_at[-1]
  assert staleness.sum() + ages.sum() == len(staleness) * (workers - 1)


@pytest.mark.usefixtures('as_users_compile_it')
@helpers.covering(
  8,
  problem=helpers.problems,
  inner=['sgd', 'adam', 'compensated', 'look ahead'],
  delay=[0, 1, 2, 3, 5, 7],
  keep_params=[False, True],
)
def test_constant_delay_is_round_robin(problem, inner, delay, keep_params):
  inner = helpers.INNERS[inner]
  options = dict(
    batch_like=problem.batch_like,
    keep_params=keep_params or 'stale_params' in inner.needs,
  )
  one = gsgd_jax.delayed(inner.library, delay, **options)
  other = gsgd_jax.asynchronous(inner.library, delay + 1, **options)
  for (flat, state), (other_flat, other_state) in zip(
    helpers.run(one, problem, 'scan'),
    helpers.run(other, problem, 'scan'),
    strict=True,
  ):
    np.testing.assert_array_equal(flat, other_flat)
    jax.tree.map(np.testing.assert_array_equal, state, other_state)


@helpers.covering(
  9,
  problem=helpers.problems,
  inner=['sgd', 'heavy ball', 'adam', 'compensated'],
  first=[0, 1, 2, 4, 6],
  rest=[0, 1, 3, 6],
  mode=helpers.modes,
)
def test_delayed_leaves(problem, inner, first, rest, mode):
  inner = helpers.INNERS[inner]
  seen = {}

  def spy(updates, state, params=None, **extra):
    seen.update(extra)
    inner_state, _ = state
    updates, inner_state = optax.with_extra_args_support(inner.library).update(
      updates, inner_state, params, **extra
    )
    return updates, (inner_state, extra['staleness'])

  spying = optax.GradientTransformationExtraArgs(
    lambda p: (
      inner.library.init(p),
      jax.tree.map(lambda _: jnp.zeros([], jnp.int32) - 1, p),
    ),
    spy,
  )
  # 'rest' is a subtree: the delays are a prefix of the parameters.
  tx = gsgd_jax.delayed(
    spying,
    {'first': first, 'rest': rest},
    keep_params='stale_params' in inner.needs,
  )
  outs = helpers.run(tx, problem, mode)
  assert 'value' not in seen and 'batch' not in seen and 'worker' not in seen
  for seed, (flat, state) in enumerate(outs):
    start, batches, _ = problem.of_seed(seed)
    half = len(start) // 2
    delays = [first] * half + [rest] * (len(start) - half)
    expected, stalenesses = reference.delayed_leaves(
      start, inner.oracle(), problem.gradient, delays, batches
    )
    helpers.assert_trajectory(flat, expected)
    _, staleness = state.inner_state
    for t, wanted in enumerate(stalenesses):
      got = [staleness['first'][t], staleness['rest'][0][t]]
      assert got == ([-1, -1] if wanted is None else [wanted[0], wanted[-1]])


def test_a_leaf_that_is_filling_stays_where_it_is():
  """Also where the optimizer moves without any gradient."""
  decaying = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0))
  tx = gsgd_jax.delayed(decaying, {'first': 2, 'rest': 0})
  params = helpers.to_tree(jnp.ones([2]))
  state = tx.init(params)
  for first, rest in ((1, 0.5), (1, 0.25), (0.5, 0.125)):
    grads = optax.tree.zeros_like(params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    assert helpers.to_flat(params).tolist() == [first, rest]


def test_uniform_tree_of_delays_moves_like_an_int():
  problem = helpers.make_problem('logistic', 4, 3, 20, seed=0)
  adam = helpers.INNERS['adam'].library
  tree = gsgd_jax.delayed(adam, {'first': 3, 'rest': (3,)})
  same = gsgd_jax.delayed(adam, 3)
  ((flat, _),) = helpers.run(tree, problem, 'scan')
  ((other, _),) = helpers.run(same, problem, 'scan')
  np.testing.assert_allclose(flat, other, rtol=1e-12)


@helpers.covering(
  11,
  problem=helpers.problems,
  inner=helpers.inner_names,
  workers=[1, 2, 3, 4, 6],
  combine=['sequential', 'mean'],
  mode=helpers.modes,
)
def test_synchronous(problem, inner, workers, combine, mode):
  inner = helpers.INNERS[inner]
  tx = gsgd_jax.synchronous(
    inner.library, workers, combine=combine, batch_like=problem.batch_like
  )
  for seed, (flat, _) in enumerate(helpers.run(tx, problem, mode)):
    start, batches, _ = problem.of_seed(seed)
    expected, _, _ = reference.synchronous(
      start,
      inner.oracle(),
      problem.loss,
      problem.gradient,
      workers,
      batches,
      combine,
    )
    helpers.assert_trajectory(flat[: len(expected)], expected)


def test_mean_hands_over_the_batches_as_one():
  tx = gsgd_jax.synchronous(
    Spy(1.0, ['batch', 'value'], dict(batch=jnp.zeros([6, 2]), value=0.0)),
    3,
    combine='mean',
    batch_like=jax.ShapeDtypeStruct((2, 2), jnp.float64),
  )
  params = jnp.zeros([1])
  state = tx.init(params)
  for i in range(3):
    _, state = tx.update(
      jnp.ones([1]),
      state,
      params,
      value=float(i),
      batch=jnp.full([2, 2], float(i)),
    )
  assert state.inner_state['value'] == 1.0
  np.testing.assert_array_equal(
    state.inner_state['batch'], np.repeat(np.arange(3.0), 4).reshape(6, 2)
  )


def test_mean_accumulates_in_float32():
  tx = gsgd_jax.synchronous(optax.sgd(1.0), 512, combine='mean')
  params = jnp.zeros([1], jnp.bfloat16)
  state = tx.init(params)
  step = jax.jit(tx.update)
  for _ in range(512):
    updates, state = step(jnp.ones([1], jnp.bfloat16), state, params)
  assert updates.dtype == jnp.bfloat16
  assert updates[0] == -1


NO_DELAY = {
  'asynchronous': lambda tx: gsgd_jax.asynchronous(tx, 1),
  'delayed': lambda tx: gsgd_jax.delayed(tx, 0),
  'delayed leaves': lambda tx: gsgd_jax.delayed(tx, {'first': 0, 'rest': 0}),
  'sequential': lambda tx: gsgd_jax.synchronous(tx, 1),
  'mean': lambda tx: gsgd_jax.synchronous(tx, 1, combine='mean'),
  'guided': lambda tx: gsgd_jax.guided(
    tx, helpers.quadratic_loss, replays=0, revisit=None
  ),
}


def trajectory(tx, compiled):
  """Where some steps of a transformation end."""
  problem = helpers.make_problem('quadratic', 4, 2, 15, seed=0)
  start, batches, _ = problem.of_seed(0)
  params = helpers.to_tree(jnp.array(start))
  state = tx.init(params)
  update = optax.with_extra_args_support(tx).update
  update = jax.jit(update) if compiled else update
  for batch in batches:
    value, grads = jax.value_and_grad(helpers.quadratic_loss)(params, batch)
    updates, state = update(grads, state, params, value=value)
    params = optax.apply_updates(params, updates)
  return helpers.to_flat(params)


@functools.cache
def trajectories(inner):
  """The optimizer alone: operation by operation, and compiled."""
  inner = helpers.INNERS[inner].library
  return trajectory(inner, False), trajectory(inner, True)


@pytest.mark.usefixtures('as_users_compile_it')
@pytest.mark.parametrize('name', NO_DELAY)
@pytest.mark.parametrize('inner', ['heavy ball', 'adam'])
def test_no_delay_no_change(name, inner):
  tx = NO_DELAY[name](helpers.INNERS[inner].library)
  alone, compiled = trajectories(inner)
  # Operation by operation, the same bits.
  np.testing.assert_array_equal(trajectory(tx, False), alone)
  np.testing.assert_array_max_ulp(trajectory(tx, True), compiled, maxulp=8)


@pytest.mark.parametrize('tau', [0, 1, 3, 7])
def test_stability_threshold(tau):
  """On w^2/2 SGD with staleness tau is stable below the closed form."""

  @jax.jit
  def grows(learning_rate):
    tx = gsgd_jax.delayed(optax.sgd(learning_rate), tau)

    def step(carry, _):
      w, state = carry
      updates, state = tx.update(w, state, w)
      return (optax.apply_updates(w, updates), state), w

    w = jnp.ones([])
    length = 6000 * (tau + 1)
    _, ws = jax.lax.scan(step, (w, tx.init(w)), length=length)
    size = jnp.abs(ws)
    late, early = length // 2, length // 4
    grew = jnp.max(size[late:]) > jnp.max(size[early:late])
    return grew | ~jnp.isfinite(size[-1])

  low, high = 0.0, 3.0
  for _ in range(16):
    middle = (low + high) / 2
    low, high = (low, middle) if grows(middle) else (middle, high)
  threshold = 2 * math.sin(math.pi / (2 * (2 * tau + 1)))
  assert abs(low / threshold - 1) < 1e-3


@pytest.mark.parametrize(
  'make',
  [
    functools.partial(gsgd_jax.asynchronous, workers=3, keep_params=True),
    functools.partial(
      gsgd_jax.asynchronous, workers=3, worker_transform=optax.trace(0.9)
    ),
    functools.partial(gsgd_jax.asynchronous, workers=1),
    functools.partial(gsgd_jax.delayed, delay={'first': 2, 'rest': 0}),
    functools.partial(gsgd_jax.synchronous, workers=3),
    functools.partial(gsgd_jax.synchronous, workers=3, combine='mean'),
  ],
)
def test_everything_can_be_donated(make):
  """No two leaves share a buffer, neither at the start nor later."""
  tx = make(optax.sgd(0.1, momentum=0.9))
  params = helpers.to_tree(jnp.ones([4]))
  state = tx.init(params)
  step = jax.jit(
    lambda params, state: tx.update(params, state, params), donate_argnums=(1,)
  )
  both = jax.jit(
    lambda params, state: (
      optax.apply_updates(params, params),
      tx.update(params, state, params)[1],
    ),
    donate_argnums=(0, 1),
  )
  for _ in range(3):
    _, state = step(params, state)
    # Also from a state that was made operation by operation.
    _, state = tx.update(params, state, params)
    params, state = both(params, state)


def test_worker_transform_may_hold_keys():
  tx = gsgd_jax.asynchronous(
    optax.sgd(0.1),
    2,
    worker_transform=helpers.lenient(
      optax.add_noise(0.1, 0.5, jax.random.key(0))
    ),
  )
  params = jnp.ones([3])
  state = tx.init(params)
  for _ in range(3):
    updates, state = jax.jit(tx.update)(params, state, params)
  assert np.all(np.isfinite(updates)) and np.any(updates != -0.1)


@pytest.mark.parametrize('explicit', [False, True])
def test_rings_follow_the_parameters_sharding(explicit):
  """A ring keeps each leaf's sharding; slots are not spread."""
  axis_type = (
    jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
  )
  mesh = jax.make_mesh((1,), ('x',), axis_types=(axis_type,))
  sharding = jax.NamedSharding(mesh, jax.P('x'))
  params = jax.device_put(jnp.ones([4]), sharding)
  tx = gsgd_jax.asynchronous(optax.sgd(0.1), 3, keep_params=True)
  with jax.set_mesh(mesh):
    for state in (tx.init(params), jax.jit(tx.init)(params)):
      for ring in (state.in_flight.updates, state.in_flight.stale_params):
        if explicit:
          assert jax.typeof(ring).sharding.spec == jax.P(None, 'x')
      updates, state = jax.jit(tx.update)(params, state, params)
  assert updates.sharding.spec == params.sharding.spec


@pytest.mark.parametrize(
  'tx, read',
  [
    (gsgd_jax.synchronous(optax.sgd(0.5), 3), 1.0),
    (helpers.look_ahead(0.5, 2.0), -0.5),
  ],
  ids=['point', 'offset'],
)
def test_worker_params_sees_through_masks(tx, read):
  tx = optax.masked(tx, {'first': True, 'rest': (False,)})
  params = helpers.to_tree(jnp.ones([4]))
  state = tx.init(params)
  updates, state = tx.update(params, state, params)
  params = optax.apply_updates(params, updates)
  seen = gsgd_jax.worker_params(params, state)
  assert seen['first'].tolist() == [read] * 2
  assert seen['rest'][0].tolist() == params['rest'][0].tolist() == [2, 2]


@pytest.mark.parametrize(
  'wrap',
  [
    lambda tx: gsgd_jax.asynchronous(tx, 1),
    lambda tx: gsgd_jax.asynchronous(tx, 3),
    lambda tx: gsgd_jax.delayed(tx, 2),
    lambda tx: gsgd_jax.delayed(tx, {'first': 2, 'rest': 1}),
    lambda tx: gsgd_jax.synchronous(tx, 2, combine='mean'),
    lambda tx: gsgd_jax.asynchronous(gsgd_jax.guided(tx, window=2), 3),
  ],
)
def test_the_extra_grad_is_the_packets_gradient(wrap):
  """optax's line searches are given the gradient once more, as `grad`."""

  def update(updates, state, params=None, *, grad, **extra):
    del params, extra
    off = jax.tree.map(lambda u, g: jnp.max(jnp.abs(u - g)), updates, grad)
    return updates, jnp.maximum(state, jnp.max(jnp.stack(jax.tree.leaves(off))))

  inner = optax.GradientTransformationExtraArgs(
    lambda params: jnp.zeros([]), update
  )
  tx = wrap(inner)
  params = helpers.to_tree(jnp.ones([4]))
  state = tx.init(params)
  for i in range(7):
    grads = jax.tree.map(lambda p, i=i: p * i, params)
    _, state = tx.update(grads, state, params, value=float(-i), grad=grads)
  (off,) = [x for x in jax.tree.leaves(state) if x.shape == ()][-1:]
  assert off.dtype == jnp.float64 and off == 0


def test_a_state_restored_as_numpy_goes_on():
  problem = helpers.make_problem('quadratic', 4, 2, 1, seed=0)
  tx = gsgd_jax.asynchronous(
    gsgd_jax.guided(
      optax.sgd(0.1),
      problem.loss_fn,
      window=2,
      revisit=None,
      batch_like=problem.batch_like,
    ),
    2,
    batch_like=problem.batch_like,
  )
  _, (batch,), _ = problem.of_seed(0)
  params = helpers.to_tree(jnp.ones([4]))
  kept = restored = tx.init(params)
  for _ in range(5):
    restored = jax.tree.map(np.asarray, restored)
    _, restored = tx.update(params, restored, params, value=1.0, batch=batch)
    _, kept = tx.update(params, kept, params, value=1.0, batch=batch)
  jax.tree.map(np.testing.assert_array_equal, kept, restored)
