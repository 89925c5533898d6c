"""state_memory against states that were really made."""

import jax
import jax.numpy as jnp
import optax
import pytest

import gsgd_jax

PARAMS = {
  'kernel': jnp.ones([3, 5], jnp.float32),
  'layers': [jnp.ones([2], jnp.bfloat16), {}],
  'nothing': jnp.ones([0], jnp.float32),
}
PARAMS_BYTES = 15 * 4 + 2 * 2
SUM_BYTES = 15 * 4 + 2 * 4  # Of sums over many gradients: at least float32.
BATCH = {'x': jnp.ones([4, 3], jnp.float32), 'y': jnp.ones([4], jnp.int32)}
BATCH_BYTES = 4 * 3 * 4 + 4 * 4
LEAVES = {'kernel': 3, 'layers': 0, 'nothing': 2}
ADAM = optax.adam(0.1)
HEAVY_BALL = optax.sgd(0.1, momentum=0.9)


def loss_fn(params, batch):
  return jnp.mean((batch['x'] @ params['kernel']) ** 2)


def around_guided(inner, **options):
  guided = gsgd_jax.guided(
    inner, loss_fn, window=6, batch_like=BATCH, **options
  )
  return gsgd_jax.asynchronous(guided, 4, batch_like=BATCH, keep_params=True)


# What a composition must name, and how many bytes that takes. Momenta are in
# the dtypes of the parameters.
COMPOSITIONS = {
  'asynchronous around guided around Adam': (
    around_guided(ADAM),
    {
      'in_flight.updates': 4 * PARAMS_BYTES,
      'in_flight.stale_params': 4 * PARAMS_BYTES,
      'in_flight.batch': 4 * BATCH_BYTES,
      'in_flight.value': 4 * 8,
      'read_at': 4 * 4,
      'inner_state.window.batches': 6 * BATCH_BYTES,
      'inner_state.window.scores': 6 * 8,
      'inner_state.inner_state[0].mu': PARAMS_BYTES,
      'inner_state.inner_state[0].nu': PARAMS_BYTES,
    },
  ),
  'a server with all there is': (
    around_guided(
      HEAVY_BALL,
      average_scores=True,
      select='random',
      replay_with=ADAM,
    ),
    {
      'inner_state.window.collected': 6 * 4,
      'inner_state.key': 2 * 4,
      'inner_state.replay_state.state[0].mu': PARAMS_BYTES,
      'inner_state.inner_state[0].trace': PARAMS_BYTES,
    },
  ),
  'stored gradients': (
    gsgd_jax.guided(HEAVY_BALL, window=7, replays=3),
    {
      'window.updates': 7 * PARAMS_BYTES,
      'window.staleness': 7 * 4,
      'replayed': 3 * 4,
      'inner_state[0].trace': PARAMS_BYTES,
    },
  ),
  'workers with momenta': (
    gsgd_jax.asynchronous(optax.sgd(0.1), 5, worker_transform=optax.trace(0.9)),
    {
      'in_flight.updates': 5 * PARAMS_BYTES,
      'worker_state.state.trace': 5 * PARAMS_BYTES,
    },
  ),
  'one worker': (gsgd_jax.asynchronous(ADAM, 1), {'version': 4}),
  'delayed': (
    gsgd_jax.delayed(HEAVY_BALL, 3),
    {
      'in_flight.updates': 4 * PARAMS_BYTES,
      'inner_state[0].trace': PARAMS_BYTES,
    },
  ),
  'delayed leaves': (
    gsgd_jax.delayed(HEAVY_BALL, LEAVES, keep_params=True),
    {
      'in_flight': (3 + 1) * 60,  # None for a delay of 0.
      'stale_params': (3 + 1) * 60,  # None for a delay of 0.
    },
  ),
  'sequential': (
    gsgd_jax.synchronous(ADAM, 3),
    {'round_start.params': PARAMS_BYTES, 'round_start.active': 1},
  ),
  'mean': (
    gsgd_jax.synchronous(ADAM, 3, combine='mean', batch_like=BATCH),
    {'sums.updates': 15 * 4 + 2 * 4, 'sums.batch': 3 * BATCH_BYTES},
  ),
  'a chain': (
    optax.chain(optax.clip(1.0), gsgd_jax.delayed(HEAVY_BALL, 3)),
    {
      '[1].in_flight.updates': 4 * PARAMS_BYTES,
      '[1].inner_state[0].trace': PARAMS_BYTES,
    },
  ),
  'DANA': (
    gsgd_jax.dana(0.1, 7),
    {'momenta.tree': 7 * PARAMS_BYTES, 'offset.tree': SUM_BYTES},
  ),
  'SMEGA2': (
    gsgd_jax.smega2(0.1, 7),
    {'velocity.tree': PARAMS_BYTES, 'gradients.tree': SUM_BYTES},
  ),
  'Rennala': (
    gsgd_jax.rennala(ADAM, 7, batch_like=BATCH),
    {'kept.sums.updates': SUM_BYTES, 'kept.sums.batch': 7 * BATCH_BYTES},
  ),
  'nothing at all': (optax.sgd(0.1), {}),
  'the parameters themselves': (
    optax.GradientTransformation(lambda params: params, None),
    {'state': 64},
  ),
}


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def bytes_of(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def part(state, name):
  """The part of a state that a name denotes, as Python reads it."""
  if name == 'state':
    return state
  dot = '' if name.startswith('[') else '.'
  return eval(f'state{dot}{name}', {'state': state})


@pytest.mark.parametrize(
  'tx, expected', COMPOSITIONS.values(), ids=COMPOSITIONS
)
def test_bytes_of_a_real_state(tx, expected):
  memory = gsgd_jax.state_memory(tx, PARAMS)
  state = tx.init(PARAMS)
  assert sum(memory.values()) == bytes_of(state)
  assert memory == {name: bytes_of(part(state, name)) for name in memory}
  assert all(memory.values())
  assert expected == {name: memory.get(name) for name in expected}
  assert all(type(size) is int for size in memory.values())


@pytest.mark.parametrize('tx', [tx for tx, _ in COMPOSITIONS.values()])
def test_shapes_are_enough(tx):
  assert gsgd_jax.state_memory(tx, abstract(PARAMS)) == gsgd_jax.state_memory(
    tx, PARAMS
  )


def test_names_follow_the_state():
  """In its order, each once, down to the last field of a state."""
  assert list(gsgd_jax.state_memory(around_guided(ADAM), PARAMS)) == [
    'count',
    'version',
    'worker',
    'read_at',
    'applied.by_worker',
    'clock.time.whole',
    'clock.time.ticks',
    'clock.workers',
    'clock.unit.whole',
    'clock.unit.ticks',
    'clock.sync_cost.whole',
    'clock.sync_cost.ticks',
    'cluster.machines.whole',
    'cluster.machines.ticks',
    'cluster.finish.whole',
    'cluster.finish.ticks',
    'cluster.tasks',
    'in_flight.updates',
    'in_flight.value',
    'in_flight.batch',
    'in_flight.stale_params',
    'inner_state.count',
    'inner_state.average_error',
    'inner_state.window.scores',
    'inner_state.window.losses',
    'inner_state.window.surprises',
    'inner_state.window.workers',
    'inner_state.window.batches',
    'inner_state.replayed',
    'inner_state.gradient_evaluations',
    'inner_state.replays.serial',
    'inner_state.replays.parallel',
    'inner_state.replays.shared',
    'inner_state.replays.batch_size',
    'inner_state.replays.batches',
    'inner_state.inner_state[0].count',
    'inner_state.inner_state[0].mu',
    'inner_state.inner_state[0].nu',
  ]


def test_random_keys_count():
  tx = optax.add_noise(0.1, 0.5, jax.random.key(0))
  assert gsgd_jax.state_memory(tx, PARAMS)['rng_key'] == 8


def test_floats_follow_x64():
  tx = gsgd_jax.guided(optax.sgd(0.1), window=4)
  assert gsgd_jax.state_memory(tx, PARAMS)['window.scores'] == 4 * 8
  with jax.enable_x64(False):
    assert gsgd_jax.state_memory(tx, PARAMS)['window.scores'] == 4 * 4


HUGE = 10**12
HUGE_BATCH = jax.ShapeDtypeStruct([HUGE], jnp.int8)


@pytest.mark.parametrize(
  'tx, name, size',
  [
    (
      gsgd_jax.asynchronous(ADAM, 16, keep_params=True),
      'in_flight.stale_params',
      16 * 4 * HUGE,
    ),
    (
      gsgd_jax.asynchronous(ADAM, 16, batch_like=HUGE_BATCH),
      'in_flight.batch',
      16 * HUGE,
    ),
    (gsgd_jax.guided(ADAM), 'window.updates', 10 * 4 * HUGE),
    (
      gsgd_jax.guided(ADAM, loss_fn, batch_like=HUGE_BATCH),
      'window.batches',
      10 * HUGE,
    ),
    (gsgd_jax.delayed(ADAM, {'w': 5}), 'in_flight', 6 * 4 * HUGE),
    (gsgd_jax.synchronous(ADAM, 3), 'round_start.params', 4 * HUGE),
    (
      gsgd_jax.synchronous(ADAM, 3, combine='mean'),
      'inner_state[0].nu',
      4 * HUGE,
    ),
  ],
)
def test_nothing_is_allocated(tx, name, size):
  params = {'w': jax.ShapeDtypeStruct([HUGE], jnp.float32)}
  before = bytes_of(jax.live_arrays())
  memory = gsgd_jax.state_memory(tx, params)
  assert memory[name] == size
  assert bytes_of(jax.live_arrays()) - before < 1000


# Copies of the parameters in a state, by the number of workers.
COPIES = {
  'DC-ASGD-c': (gsgd_jax.delay_compensation(), 0),
  'DC-ASGD-a': (gsgd_jax.delay_compensation(adaptive=True), 1),
  'exact': (gsgd_jax.exact_delay_compensation(loss_fn), 0),
  'scale_by_staleness': (gsgd_jax.scale_by_staleness(), 0),
  'drop_stale': (gsgd_jax.drop_stale(optax.sgd(0.1), 3), 0),
  'rennala': (lambda n: gsgd_jax.rennala(optax.sgd(0.1), n), 1),
  'dana': (lambda n: gsgd_jax.dana(0.1, n), lambda n: n + 1),
  'smega2': (lambda n: gsgd_jax.smega2(0.1, n), 2),
  'predict': (lambda n: gsgd_jax.predict(optax.sgd(0.1), n), 1),
  'spike': (lambda n: gsgd_jax.spike_compensation(0.1, n), 1),
  'braking': (gsgd_jax.adaptive_braking(0.1), 1),
  'delayed Nesterov': (lambda n: gsgd_jax.delayed_nesterov(0.1, n), 2),
  'asynchronous Nesterov': (gsgd_jax.asynchronous_nesterov(0.1), 1),
}


@pytest.mark.parametrize('workers', [2, 256])
@pytest.mark.parametrize('name', COPIES)
def test_copies_of_a_compensation(name, workers):
  """No offset is stored that could be derived; the rest are scalars."""
  tx, copies = COPIES[name]
  tx = tx if isinstance(tx, tuple) else tx(workers)
  copies = copies(workers) if callable(copies) else copies
  params = jax.ShapeDtypeStruct((1000,), jnp.float32)
  total = sum(gsgd_jax.state_memory(tx, params).values())
  assert 0 <= total - copies * 4000 <= 48
