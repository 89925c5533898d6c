"""Every way to use devices against its namesake on one, and the oracle."""

import functools
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

import gsgd_jax
from benchmarks import hlo
from gsgd_jax import parallel, worker_params
from tests import helpers, reference
from tests.test_arrivals import table

WORKERS = 8
CALLS = 96
SEED = 3
# Devices, and the type of the mesh's axis.
MESHES = [
  (1, AxisType.Auto),
  (2, AxisType.Auto),
  (4, AxisType.Explicit),
  (8, AxisType.Auto),
  (8, AxisType.Explicit),
]


def mesh_of(number, kind=AxisType.Auto):
  devices = np.array(jax.devices()[:number])
  return Mesh(devices, ('devices',), axis_types=(kind,))


def problem_of(seed=0, examples=8):
  return helpers.make_problem('logistic', 4, examples, CALLS, seed)


# What is at the server, for either side.


def of_name(name):
  """(oracle, library): functions of a problem's functions and of workers."""
  if name in helpers.INNERS:
    inner = helpers.INNERS[name]
    return (lambda problem, n: inner.oracle()), (
      lambda problem, n: inner.library
    )
  compensation = helpers.COMPENSATIONS[name]
  return compensation.oracle, compensation.library


def oracle_server(problem, name, guided, workers):
  server = of_name(name)[0](problem, workers)
  if not guided:
    return server
  _, _, verification = problem.of_seed(0)
  return reference.Guided(
    server,
    problem.loss,
    problem.gradient,
    window=6,
    revisit=None,
    verification=lambda t: verification[t % CALLS],
  )


def library_server(name, guided, workers):
  """A function that makes it, as programs want it."""

  def make(loss_fn, batch_like):
    problem = types.SimpleNamespace(loss_fn=loss_fn)
    tx = of_name(name)[1](problem, workers)
    if guided:
      tx = gsgd_jax.guided(
        tx, loss_fn, window=6, revisit=None, batch_like=batch_like
      )
    return tx

  return make


# Modes: the program, its namesake on one device, and the oracle's run.


class Mode:
  """Everything as one transformation on one device."""

  workers = WORKERS
  chunks = (1,) * CALLS  # Calls of each step.
  first_update = 0  # The call that makes the first update.
  leading_axis = False  # Whether a step has an axis of calls.
  slim = None  # Nesterov momentum of the workers themselves.

  def joined(self, like):
    """Of the server's batches."""
    return like

  def program(self, make, problem, mesh, **options):
    return parallel.data_parallel(
      make, problem.loss_fn, batch_like=problem.batch_like, mesh=mesh
    )

  def namesake(self, tx, problem):
    return tx

  def oracle(self, problem, server):
    """The parameters after every call from the first update's on."""
    start, batches, _ = problem.of_seed(0)
    return reference.asynchronous(
      start, server, problem.loss, problem.gradient, 1, batches
    ).trajectory


class Split(Mode):
  workers = 1


class Delayed(Mode):
  workers = 4
  first_update = 3

  def program(self, make, problem, mesh, **options):
    return parallel.delayed_all_reduce(
      make,
      problem.loss_fn,
      self.workers - 1,
      batch_like=problem.batch_like,
      keep_params=True,
      mesh=mesh,
    )

  def namesake(self, tx, problem):
    return gsgd_jax.delayed(
      tx,
      self.workers - 1,
      batch_like=problem.batch_like,
      keep_params=True,
    )

  def oracle(self, problem, server):
    start, batches, _ = problem.of_seed(0)
    return reference.asynchronous(
      start, server, problem.loss, problem.gradient, self.workers, batches
    ).trajectory


class Rounds(Mode):
  chunks = (CALLS // 3,) * 3
  first_update = WORKERS - 1
  leading_axis = True
  arrivals = staticmethod(gsgd_jax.round_robin)

  def options(self, problem):
    return dict(
      arrivals=self.arrivals(),
      batch_like=problem.batch_like,
      keep_params=True,
      worker_transform=self.slim and optax.trace(self.slim, nesterov=True),
      seed=SEED,
    )

  def program(self, make, problem, mesh, **options):
    return parallel.asynchronous(
      make,
      problem.loss_fn,
      self.workers,
      mesh=mesh,
      **self.options(problem),
      **options,
    )

  def namesake(self, tx, problem):
    return gsgd_jax.asynchronous(tx, self.workers, **self.options(problem))

  def oracle(self, problem, server):
    start, batches, _ = problem.of_seed(0)
    cluster = reference.Table(table(self.arrivals(), self.workers, 90, SEED))
    return reference.asynchronous(
      start,
      server,
      problem.loss,
      problem.gradient,
      self.workers,
      batches,
      cluster,
      worker_momentum=self.slim,
      worker_nesterov=True,
    ).trajectory


class UnevenRounds(Rounds):
  arrivals = staticmethod(lambda: gsgd_jax.gamma_arrivals(0.3, 0.6))


class Turns(Mode):
  """Workers' gradients one after another; of 11 workers the 8 fastest."""

  combine = 'sequential'
  workers = 11
  chunks = (8,) * (CALLS // 8)
  leading_axis = True

  def options(self, problem):
    return dict(
      combine=self.combine,
      wait_for=8,
      arrivals=gsgd_jax.gamma_arrivals(),
      batch_like=problem.batch_like,
      seed=SEED,
    )

  def program(self, make, problem, mesh, **options):
    return parallel.synchronous(
      make, problem.loss_fn, self.workers, mesh=mesh, **self.options(problem)
    )

  def namesake(self, tx, problem):
    return gsgd_jax.synchronous(tx, self.workers, **self.options(problem))

  def oracle(self, problem, server):
    start, batches, _ = problem.of_seed(0)
    # In rounds a worker's tasks are numbered from 1.
    times = table(gsgd_jax.gamma_arrivals(), self.workers, 40, SEED)
    durations = [worker[1:] for worker in times]
    return reference.synchronous(
      start,
      server,
      problem.loss,
      problem.gradient,
      self.workers,
      batches,
      self.combine,
      8,
      durations,
    )[0]


class Means(Turns):
  """Their mean."""

  combine = 'mean'

  def joined(self, like):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((8 * x.shape[0], *x.shape[1:]), x.dtype),
      like,
    )


MODES = {
  'data_parallel': Split,
  'delayed all-reduce': Delayed,
  'rounds': Rounds,
  'uneven rounds': UnevenRounds,
  'synchronous, in turn': Turns,
  'synchronous, their mean': Means,
}


def verification_number(mode, call):
  """Of the batch that a call is given: that of its update."""
  if isinstance(mode, Means):
    return call // 8
  return max(call - mode.first_update, 0)


def inputs(mode, problem, calls, guided):
  """Batches of so many calls, and their extra arguments."""
  batches = jax.tree.map(lambda x: x[0][calls], problem.batches)
  extras = {}
  if guided:
    numbers = [verification_number(mode, call) for call in calls]
    extras['verification'] = jax.tree.map(
      lambda x: x[0][numbers], problem.verification
    )
  if not mode.leading_axis:
    batches, extras = jax.tree.map(lambda x: x[0], (batches, extras))
  return batches, extras


def run(mode, program, problem, guided):
  """(parameters after every chunk, the state, losses of all calls)."""
  step = jax.jit(program.step, donate_argnums=(0, 1))
  params, state = program.init(helpers.to_tree(jnp.array(problem.start[0])))
  trajectory, losses, call = [], [], 0
  for length in mode.chunks:
    calls = np.arange(call, call + length)
    batches, extras = inputs(mode, problem, calls, guided)
    # One step at a time: XLA's devices on a CPU share few threads.
    params, state, loss = jax.block_until_ready(
      step(params, state, batches, **extras)
    )
    flat = helpers.to_flat(jax.device_get(params))
    trajectory.append(np.asarray(flat))
    losses.append(np.mean(loss) if not mode.leading_axis else np.array(loss))
    call += length
  return np.stack(trajectory), jax.device_get(state), np.hstack(losses)


def run_alone(mode, tx, problem, guided):
  """The same on one device, by the namesake."""
  calls = np.arange(CALLS)
  numbers = [verification_number(mode, call) for call in calls]
  batches = jax.tree.map(lambda x: x[0], problem.batches)
  verification = jax.tree.map(lambda x: x[0][numbers], problem.verification)

  def body(carry, x):
    params, state = carry
    batch, verification = x
    value, grads = jax.value_and_grad(problem.loss_fn)(
      worker_params(params, state), batch
    )
    extra = dict(verification=verification) if guided else {}
    updates, state = tx.update(
      grads, state, params, value=value, batch=batch, **extra
    )
    params = optax.apply_updates(params, updates)
    return (params, state), (helpers.to_flat(params), value)

  params = helpers.to_tree(jnp.array(problem.start[0]))
  (_, state), (flat, values) = jax.jit(
    lambda carry, xs: jax.lax.scan(body, carry, xs)
  )((params, tx.init(params)), (batches, verification))
  return np.asarray(flat), jax.device_get(state), np.asarray(values)


def in_order_of_workers(state, devices):
  """The state with its rings as one device has them."""
  order = np.arange(WORKERS).reshape(devices, -1).T.ravel()
  pick = lambda tree: jax.tree.map(lambda x: x[order], tree)
  flight = state.in_flight
  return state._replace(
    in_flight=pick(flight._replace(batch=None))._replace(batch=flight.batch),
    worker_state=type(state.worker_state)(pick(state.worker_state.state)),
  )


def of_all_devices(state, devices):
  """The namesake's state: the mean of the devices', with the latest in it."""

  def mean(flight):
    own = (flight.updates, flight.value)
    fold = lambda x: x.reshape(devices, -1, *x.shape[1:]).mean(axis=0)
    updates, value = jax.tree.map(fold, own)
    return flight._replace(updates=updates, value=value)

  server, latest = state.server, mean(state.latest)
  latest = latest._replace(
    updates=jax.tree.map(lambda x: x[0], latest.updates), value=latest.value[0]
  )
  rings = mean(server.in_flight)
  before = (server.worker - 1) % len(rings.value)
  enter = lambda ring, x: np.concatenate(
    [ring[:before], x[None], ring[before + 1 :]]
  )
  return server._replace(in_flight=jax.tree.map(enter, rings, latest))


def assert_same_state(mode, state, expected, devices):
  """All of it, but for the order of examples in a mean's joined batches."""
  if isinstance(mode, Delayed):
    state = of_all_devices(state, devices)
  if isinstance(mode, Rounds):
    state = in_order_of_workers(state, devices)
  ours = jax.tree_util.tree_leaves_with_path(state)
  theirs = jax.tree_util.tree_leaves_with_path(expected)
  for (path, x), (other, y) in zip(ours, theirs, strict=True):
    assert path == other
    name = jax.tree_util.keystr(path)
    if isinstance(mode, Means) and 'batch' in name and x.ndim:
      continue
    np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9, err_msg=name)


# DANA wants to know whose gradients are; a mean or a split batch has no one.
# What is marked is guided.
CASES = [
  (mode, name.removesuffix('*'), name.endswith('*'))
  for mode, names in {
    'data_parallel': ['heavy ball', 'nesterov*'],
    'delayed all-reduce': ['SMEGA2', 'DC-ASGD-c*', 'exact', 'exact*'],
    'rounds': ['heavy ball', 'DANA*', 'DC-ASGD-c', 'exact*', 'DANA-Slim*'],
    'uneven rounds': ['heavy ball*', 'DANA', 'DC-ASGD-c*'],
    'synchronous, in turn': ['heavy ball*', 'DANA', 'DC-ASGD-c*'],
    'synchronous, their mean': ['heavy ball', 'nesterov*'],
  }.items()
  for name in names
]


def meshes_of(case):
  """So many meshes that every mode sees all of them."""
  alike = [other for other in CASES if other[0] == case[0]]
  share = -(-len(MESHES) // len(alike))
  first = alike.index(case) * share
  return [MESHES[(first + i) % len(MESHES)] for i in range(share)]


def test_every_mode_sees_every_mesh():
  for mode in MODES:
    seen = [
      (case, m) for case in CASES if case[0] == mode for m in meshes_of(case)
    ]
    assert {m for _, m in seen} == {*MESHES}
    for guided in (False, True):
      assert any(m[0] > 1 for (*_, is_guided), m in seen if is_guided == guided)


@pytest.mark.parametrize('case', CASES, ids=str)
def test_as_on_one_device(case):
  mode, name, guided = case
  mode, problem = MODES[mode](), problem_of()
  mode.slim = getattr(helpers.COMPENSATIONS.get(name), 'slim', None)
  server = oracle_server(problem, name, guided, mode.workers)
  expected = mode.oracle(problem, server)
  make = library_server(name, guided, mode.workers)
  inside = make(problem.loss_fn, mode.joined(problem.batch_like))
  tx = mode.namesake(inside, problem)
  flat, theirs, values = run_alone(mode, tx, problem, guided)
  helpers.assert_trajectory(flat[mode.first_update :], expected)
  if guided:
    assert server.replayed and any(server.replayed)
    assert min(server.margins) > 1e-9  # No ties that rounding decides.
  ends = np.cumsum(mode.chunks) - 1
  for number, kind in meshes_of(case):
    program = mode.program(make, problem, mesh_of(number, kind))
    trajectory, state, losses = run(mode, program, problem, guided)
    helpers.assert_trajectory(trajectory, list(flat[ends]))
    np.testing.assert_allclose(losses, values, rtol=1e-9, atol=1e-9)
    assert_same_state(mode, state, theirs, number)


# What the choice of rounds, of chunks and of precision does: nothing.


def loss_of(params, batch):
  inputs, labels = batch
  return jnp.mean(
    jnp.logaddexp(jnp.zeros([], params.dtype), -labels * (inputs @ params))
  )


def draw(calls, examples, dtype=np.float64, seed=0):
  rng = np.random.default_rng(seed)
  inputs = rng.normal(size=(calls, examples, 3)).astype(dtype)
  labels = rng.choice([-1.0, 1.0], size=(calls, examples)).astype(dtype)
  return inputs, labels


def alone(tx, start, batches):
  """Parameters, state and losses by the namesake on one device."""

  def body(carry, batch):
    params, state = carry
    value, grads = jax.value_and_grad(loss_of)(
      worker_params(params, state), batch
    )
    updates, state = tx.update(grads, state, params, value=value, batch=batch)
    return (optax.apply_updates(params, updates), state), value

  run = lambda carry: jax.lax.scan(body, carry, batches)
  (params, state), values = jax.jit(run)((start, tx.init(start)))
  return params, state, values


def go(program, start, batches, chunks, **extras):
  """Parameters, state and losses after chunks of calls."""
  step = jax.jit(program.step)
  params, state = program.init(start)
  losses, call = [], 0
  for length in chunks:
    now = slice(call, call + length)
    piece = jax.tree.map(lambda x, now=now: x[now], batches)
    params, state, loss = jax.block_until_ready(step(params, state, piece))
    losses.append(np.asarray(loss))
    call += length
  return jax.device_get(params), jax.device_get(state), np.concatenate(losses)


ROUND_BATCHES = draw(80, 4)
ROUND_CLUSTER = dict(
  arrivals=gsgd_jax.gamma_arrivals(0.3, 0.6),
  worker_transform=optax.trace(0.5),
  batch_like=jax.tree.map(lambda x: x[0], ROUND_BATCHES),
  overwrite_within=0.003,
  seed=4,
)


def guided_adam(loss_fn, like):
  return gsgd_jax.guided(optax.adam(0.01), loss_fn, window=4, batch_like=like)


@functools.cache
def without_rounds():
  inner = guided_adam(loss_of, ROUND_CLUSTER['batch_like'])
  tx = gsgd_jax.asynchronous(inner, 12, **ROUND_CLUSTER)
  with jax.numpy_dtype_promotion('standard'):  # optax's Adam.
    return jax.device_get(alone(tx, jnp.ones([3]), ROUND_BATCHES))


@pytest.mark.parametrize(
  'number, options, chunks',
  [
    (1, {}, (1, 39, 1, 39)),
    (1, dict(gradients_at_once=1), (80,)),
    (4, dict(round_size=4), (80,)),
    (4, dict(round_size=9, gradients_at_once=3), (11, 69)),
    (4, dict(round_size=100, gradients_at_once=100), (80,)),
  ],
  ids=str,
)
def test_rounds_and_chunks_change_nothing(number, options, chunks):
  expected, theirs, values = without_rounds()
  assert theirs.overwritten > 3
  program = parallel.asynchronous(
    guided_adam,
    loss_of,
    12,
    mesh=mesh_of(number),
    **ROUND_CLUSTER,
    **options,
  )
  with jax.numpy_dtype_promotion('standard'):
    params, state, losses = go(program, jnp.ones([3]), ROUND_BATCHES, chunks)
  np.testing.assert_allclose(params, expected, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(losses, values, rtol=1e-9, atol=1e-9)
  assert state.overwritten == theirs.overwritten
  np.testing.assert_array_equal(state.cluster.finish, theirs.cluster.finish)
  np.testing.assert_array_equal(
    state.inner_state.replayed, theirs.inner_state.replayed
  )


def test_float32(as_users_run_it):
  batches = draw(110, 8, np.float32)
  tx = gsgd_jax.asynchronous(optax.sgd(0.1, momentum=0.5), 8)
  start = jnp.ones([3])
  expected, _, _ = alone(tx, start, batches)
  for number in (1, 8):
    program = parallel.asynchronous(
      optax.sgd(0.1, momentum=0.5), loss_of, 8, mesh=mesh_of(number)
    )
    params, _, _ = go(program, start, batches, (110,))
    assert params.dtype == np.float32
    np.testing.assert_allclose(params, expected, rtol=1e-6, atol=1e-6)


def test_the_end_of_a_trace():
  """After its last arrival nobody arrives, and gradients go on being taken."""
  order = [0, 1, 1, 0, 2, 3, 1, 3, 3, 0]
  trace = gsgd_jax.recorded_arrivals(order)
  batches = draw(30, 4)
  tx = gsgd_jax.asynchronous(optax.sgd(0.1), 4, arrivals=trace)
  start = jnp.ones([3])
  expected, theirs, _ = alone(tx, start, batches)
  program = parallel.asynchronous(
    optax.sgd(0.1), loss_of, 4, arrivals=trace, mesh=mesh_of(2)
  )
  params, state, _ = go(program, start, batches, (30,))
  np.testing.assert_allclose(params, expected, rtol=1e-9)
  assert state.version == theirs.version == len(order)


# The well-known trap: gradients of what is the same everywhere are sums.


@pytest.mark.parametrize('number', [2, 8])
def test_gradients_are_neither_summed_nor_local(number):
  """One step of SGD at rate 1 shows the gradient."""
  batches = draw(1, 8)
  batch = jax.tree.map(lambda x: x[0], batches)
  start = jnp.array([0.3, -0.2, 0.1])
  whole = jax.grad(loss_of)(start, batch)
  sgd, mesh = optax.sgd(1.0), mesh_of(number)
  program = parallel.data_parallel(sgd, loss_of, mesh=mesh)
  params, _, _ = jax.jit(program.step)(*program.init(start), batch)
  np.testing.assert_allclose(start - params, whole, rtol=1e-12)
  # Each device's own gradient, before the delayed sum.
  program = parallel.delayed_all_reduce(sgd, loss_of, mesh=mesh)
  _, state, losses = jax.jit(program.step)(*program.init(start), batch)
  for device in range(number):
    share = tuple(np.split(x, number)[device] for x in batch)
    own = jax.grad(loss_of)(start, share)
    latest = jax.device_get(state.latest.updates)
    np.testing.assert_allclose(latest[device], own, rtol=1e-12)
    np.testing.assert_allclose(losses[device], loss_of(start, share))


@pytest.mark.parametrize('combine', ['sequential', 'mean'])
def test_workers_gradients_are_their_own(combine):
  batches = draw(8, 8)
  start = jnp.array([0.3, -0.2, 0.1])
  gradients = jax.vmap(jax.grad(loss_of), (None, 0))(start, batches)
  combined = {'sequential': jnp.sum, 'mean': jnp.mean}[combine]
  program = parallel.synchronous(
    optax.sgd(1.0), loss_of, combine=combine, mesh=mesh_of(8)
  )
  params, _, _ = jax.jit(program.step)(*program.init(start), batches)
  np.testing.assert_allclose(
    start - params, combined(gradients, axis=0), rtol=1e-12
  )


# Memory and messages.


def bytes_on_first(tree):
  shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(tree)]
  return sum(shard.nbytes for shard in shards)


@pytest.mark.parametrize('mode', MODES)
def test_memory_of_a_device(mode):
  mode, problem = MODES[mode](), problem_of()
  make = library_server('heavy ball', True, mode.workers)
  program = mode.program(make, problem, mesh_of(8))
  params = helpers.to_tree(jnp.array(problem.start[0]))
  memory = dict(program.memory(params))
  room = memory.pop('round', 0)
  _, state = program.init(params)
  assert bytes_on_first(state) == sum(memory.values())
  if isinstance(mode, Rounds):  # One worker a device.
    size = bytes_on_first(params)
    assert memory['in_flight.updates'] == size
    assert memory['in_flight.stale_params'] == size
    # A place, one for what nobody wants, and a gradient.
    assert room == 3 * size


def test_more_devices_hold_less():
  params = jnp.ones([1000])
  size = params.nbytes
  for number in (1, 2, 4, 8):
    program = parallel.asynchronous(
      optax.sgd(0.1), loss_of, 64, mesh=mesh_of(number)
    )
    memory = program.memory(params)
    assert memory['in_flight.updates'] == 64 // number * size
    bounded = parallel.asynchronous(
      optax.sgd(0.1), loss_of, 64, mesh=mesh_of(number), round_size=8
    )
    places = 8 // number
    assert bounded.memory(params)['round'] == (2 * places + 1) * size


@pytest.mark.usefixtures('as_users_compile_it')
def test_a_gradient_crosses_once():
  """All that a round's loop sends for an arrival is the gradient, once."""
  start = jnp.ones([1000])
  loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
  program = parallel.asynchronous(
    optax.sgd(0.1), loss_fn, 16, mesh=mesh_of(8), keep_params=True
  )
  args = (*program.init(start), jnp.zeros([32, 1000]))
  text = jax.jit(program.step).lower(*args).compile().as_text()
  found = hlo.collectives(text)
  # The other one is the losses of the chunk.
  assert sorted(found.values()) == [32 * 8, start.nbytes]


@pytest.mark.usefixtures('as_users_compile_it')
def test_the_delayed_sum_waits_for_nothing():
  """It is of an earlier step: the gradients of this one go on meanwhile.

  And the ring is written in place.
  """
  start = jnp.ones([64, 64])
  loss_fn = lambda params, batch: jnp.mean((batch @ params) ** 2)
  batch = jnp.ones([16, 64])
  for delay, products in ((0, 2), (1, 0), (3, 0)):
    program = parallel.delayed_all_reduce(
      optax.sgd(0.1), loss_fn, delay, mesh=mesh_of(8)
    )
    args = (*program.init(start), batch)
    step = jax.jit(program.step, donate_argnums=(0, 1))
    text = step.lower(*args).compile().as_text()
    assert hlo.products_before_collectives(text) == [products]
    assert not re.search(rf'f64\[{delay + 1},64,64\].* copy\(', text)


# Input.


@pytest.mark.parametrize(
  'make, sentence',
  [
    (
      lambda mesh: parallel.asynchronous(
        optax.sgd(0.1), loss_of, 10, mesh=mesh
      ),
      'there are 10 workers, which 4 devices cannot share equally: 12 would do',
    ),
    (
      lambda mesh: parallel.synchronous(optax.sgd(0.1), loss_of, 7, mesh=mesh),
      'a round waits for 7 gradients, which 4 devices cannot share equally: 8 '
      'would do',
    ),
    (
      lambda mesh: parallel.data_parallel(
        optax.sgd(0.1), loss_of, mesh=mesh, batch_like=jnp.zeros([9, 3])
      ),
      'a batch has 9 examples, which 4 devices cannot share equally: 8 would '
      'do',
    ),
    (
      lambda mesh: parallel.asynchronous(
        optax.sgd(0.1), loss_of, 8, mesh=mesh, round_size=0
      ),
      'round_size must be at least 1, got 0',
    ),
    (
      lambda mesh: parallel.asynchronous(
        optax.sgd(0.1), loss_of, 8, mesh=mesh, gradients_at_once=0
      ),
      'gradients_at_once must be at least 1, got 0',
    ),
    (
      lambda mesh: parallel.data_parallel(
        optax.sgd(0.1),
        loss_of,
        mesh=mesh,
        batch_like=(jnp.zeros([8, 3]), jnp.zeros([4])),
      ),
      'every array of a batch must have a leading axis of examples (scalars '
      'and typed PRNG keys, of jax.random.key, aside), got leading axes of '
      '[4, 8]',
    ),
    (
      lambda mesh: parallel.data_parallel(
        optax.sgd(0.1),
        loss_of,
        mesh=jax.make_mesh((2, 2), ('x', 'y'), (AxisType.Auto,) * 2),
      ),
      'the mesh must have one axis, got 2: x, y',
    ),
    (
      lambda mesh: parallel.make_mesh(9),
      'devices must be at most the 8 there are, got 9',
    ),
    (
      lambda mesh: parallel.delayed_all_reduce(
        optax.sgd(0.1), loss_of, -1, mesh=mesh
      ),
      'delay must be at least 0, got -1',
    ),
  ],
)
def test_bad_input(make, sentence):
  with pytest.raises(ValueError, match=f'^{re.escape(sentence)}$'):
    make(mesh_of(4))


def test_a_batch_that_does_not_divide():
  program = parallel.data_parallel(optax.sgd(0.1), loss_of, mesh=mesh_of(4))
  params, state = program.init(jnp.ones([3]))
  with pytest.raises(ValueError, match='a batch has 6 examples, which 4'):
    program.step(params, state, (jnp.ones([6, 3]), jnp.ones([6])))


def test_batches_of_different_lengths():
  program = parallel.asynchronous(optax.sgd(0.1), loss_of, 4, mesh=mesh_of(4))
  params, state = program.init(jnp.ones([3]))
  with pytest.raises(ValueError, match='the same leading axis'):
    program.step(params, state, (jnp.ones([6, 4, 3]), jnp.ones([5, 4])))


def test_what_keeps_batches_is_made_by_a_function():
  """Given as it is it would see shares, and sum gradients over devices."""
  batches = draw(16, 8)
  like = jax.tree.map(lambda x: x[0], batches)
  exact = gsgd_jax.exact_delay_compensation(loss_of)
  for number, inner in (
    (8, optax.chain(exact, optax.sgd(0.1))),
    (1, gsgd_jax.guided(optax.sgd(0.1), loss_of, batch_like=like)),
    (8, gsgd_jax.guided(optax.sgd(0.1), loss_of, batch_like=like)),
  ):
    program = parallel.asynchronous(
      inner,
      loss_of,
      8,
      batch_like=like,
      keep_params=True,
      mesh=mesh_of(number),
    )
    params, state = program.init(jnp.ones([3]))
    with pytest.raises(ValueError, match=r'inner\(loss_fn, batch_like\)'):
      # Traced, not taken operation by operation up to the mistake.
      jax.eval_shape(program.step, params, state, batches)


@pytest.mark.parametrize('calls', [2, 4, 6, 16])
def test_a_step_is_a_whole_round(calls):
  program = parallel.synchronous(optax.sgd(0.1), loss_of, 8, mesh=mesh_of(4))
  params, state = program.init(jnp.ones([3]))
  with pytest.raises(
    ValueError, match=f'whole round of 8 batches, got {calls}'
  ):
    program.step(params, state, draw(calls, 4))


def test_batches_unlike_batch_like():
  like = jax.tree.map(lambda x: x[0], draw(1, 16))
  for make, calls in ((parallel.asynchronous, 20), (parallel.synchronous, 8)):
    program = make(optax.sgd(0.1), loss_of, 8, batch_like=like, mesh=mesh_of(8))
    params, state = program.init(jnp.ones([3]))
    with pytest.raises(ValueError, match=r'of shape \(16, 3\) and dtype'):
      program.step(params, state, draw(calls, 12))
  program = parallel.data_parallel(
    optax.sgd(0.1), loss_of, batch_like=like, mesh=mesh_of(8)
  )
  params, state = program.init(jnp.ones([3]))
  with pytest.raises(ValueError, match=r'of shape \(16, 3\) and dtype'):
    program.step(params, state, jax.tree.map(lambda x: x[0], draw(1, 8)))


@pytest.mark.parametrize('extra', [np.zeros(3), np.float64(1)], ids=['3', '1'])
def test_extra_arguments_of_another_length(extra):
  for make, calls in ((parallel.asynchronous, 20), (parallel.synchronous, 8)):
    program = make(optax.sgd(0.1), loss_of, 8, mesh=mesh_of(8))
    params, state = program.init(jnp.ones([3]))
    with pytest.raises(
      ValueError, match=f'foo must have a leading axis of {calls}'
    ):
      program.step(params, state, draw(calls, 8), foo=extra)


def test_one_worker_and_no_delay_split_every_batch():
  """They are their namesakes: no ring, no round."""
  batches, start = draw(12, 8), jnp.ones([3])
  sgd = optax.chain(gsgd_jax.delay_compensation(), optax.sgd(0.1))
  expected, _, values = alone(
    gsgd_jax.asynchronous(sgd, 1, keep_params=True), start, batches
  )
  program = parallel.asynchronous(
    sgd, loss_of, 1, keep_params=True, mesh=mesh_of(8)
  )
  params, state, losses = go(program, start, batches, (5, 7))
  np.testing.assert_allclose(params, expected, rtol=1e-9)
  np.testing.assert_allclose(losses, values, rtol=1e-9)
  program = parallel.delayed_all_reduce(
    sgd, loss_of, 0, keep_params=True, mesh=mesh_of(8)
  )
  step = jax.jit(program.step)
  params, state = program.init(start)
  for t in range(12):
    batch = tuple(x[t] for x in batches)
    params, state, _ = jax.block_until_ready(step(params, state, batch))
  np.testing.assert_allclose(params, expected, rtol=1e-9)
  assert gsgd_jax.simulated_time(jax.device_get(state)) == 12


def test_the_callers_parameters_stay():
  start = jnp.ones([3])
  program = parallel.data_parallel(optax.sgd(0.1), loss_of, mesh=mesh_of(1))
  step = jax.jit(program.step, donate_argnums=(0, 1))
  for _ in range(2):
    step(*program.init(start), jax.tree.map(lambda x: x[0], draw(1, 8)))


def test_nobody_else_names_a_collective():
  names = r'\blax\.(p\w*(sum|mean|max|min|cast)|all_\w+|axis_index)\b'
  names += r'|multihost_utils|PartitionSpec|\bjax\.shard_map\('
  for path in pathlib.Path(gsgd_jax.__file__).parent.glob('*.py'):
    named = re.search(names, path.read_text())
    assert bool(named) == (path.name == 'parallel.py'), (path, named)


def test_keys_and_scalars_in_a_batch():
  """A key is everybody's, and so is a scalar; both travel with the batch."""

  def loss_fn(params, batch):
    inputs, key, weight = batch
    noise = jax.random.normal(key, params.shape, params.dtype)
    return weight * jnp.mean(((params + noise)[None] - inputs) ** 2)

  calls, start = 24, jnp.ones([3])
  batches = (
    jnp.asarray(draw(calls, 4)[0]),
    jax.random.split(jax.random.key(0), calls),
    jnp.linspace(0.5, 1.5, calls),
  )
  like = jax.tree.map(lambda x: x[0], batches)
  make = lambda loss_fn, like: gsgd_jax.guided(
    optax.sgd(0.1), loss_fn, window=4, batch_like=like
  )
  for options in (dict(workers=4), dict(workers=4, wait_for=None)):
    found = []
    for number in (1, 4):
      mode = (
        parallel.synchronous if 'wait_for' in options else parallel.asynchronous
      )
      program = mode(
        make, loss_fn, batch_like=like, mesh=mesh_of(number), **options
      )
      chunks = (4,) * 6 if 'wait_for' in options else (24,)
      found.append(go(program, start, batches, chunks))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-9)
    assert found[0][1].inner_state.gradient_evaluations > 20


def test_runs_under_vmap_make_their_rounds_together():
  """Loops have one trip count for all runs; each run is as it is alone."""
  batches = draw(40, 4)
  cluster = dict(arrivals=gsgd_jax.gamma_arrivals(0.3, 0.6), mesh=mesh_of(1))

  def run(seed, start):
    program = parallel.asynchronous(
      optax.sgd(0.1), loss_of, 8, seed=seed, **cluster
    )
    params, state = start, program.init(start)[1]
    return program.step(params, state, batches)[0]

  seeds = jnp.arange(3)
  starts = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3)))
  together = jax.jit(jax.vmap(run))(seeds, starts)
  alone = [jax.jit(run)(*one) for one in zip(seeds, starts, strict=True)]
  np.testing.assert_allclose(together, np.stack(alone), rtol=1e-9)
