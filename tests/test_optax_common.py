"""optax's own tests for contributed optimizers, on our transformations.

They ship with optax. Each looks its optimizer up by name in `optax.contrib`,
so ours take the place of one: `momo`, which they give a `value`.
"""

import unittest
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest

import gsgd_jax

common = pytest.importorskip('optax.contrib._common_test')

NAME = 'momo'
BASE = dict(sgd=optax.sgd, adam=optax.adam)
# Steps of SGD that are stable on each target under a delay of 3.
TARGETS = {
  '_setup_parabola': 1e-2,
  '_setup_rosenbrock': 3e-4,
  '_setup_matrix_parabola': 1e-2,
  '_setup_mixed_tensor_target': 1e-2,
}


@pytest.fixture(autouse=True)
def settings_of_optax():
  """JAX's standard settings, which optax's tests are written for."""
  # Not `jax.enable_x64`: a test of optax sets the global value itself.
  strict = jax.config.jax_enable_x64
  jax.config.update('jax_enable_x64', False)
  with (
    jax.numpy_rank_promotion('allow'),
    jax.numpy_dtype_promotion('standard'),
  ):
    yield
  jax.config.update('jax_enable_x64', strict)


def distance(params, batch):
  leaves = jax.tree.leaves(params)
  return sum(jnp.mean((p - batch.astype(p.dtype)) ** 2) for p in leaves)


def with_batch(tx, batch):
  """Adds a batch to the extra arguments."""

  def update(updates, state, params=None, **extra_args):
    return tx.update(updates, state, params, batch=batch, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def guided_with_loss(tx):
  batch = jnp.array([0.5], jnp.float32)
  tx = gsgd_jax.guided(
    tx, distance, window=2, replays=1, revisit=None, batch_like=batch
  )
  return with_batch(tx, batch)


WRAPPERS = {
  'guided': lambda tx: gsgd_jax.guided(tx, window=4),
  'asynchronous': lambda tx: gsgd_jax.asynchronous(tx, workers=4),
  'delayed': lambda tx: gsgd_jax.delayed(tx, 3),
  'synchronous': lambda tx: gsgd_jax.synchronous(tx, workers=4),
}
ALL_WRAPPERS = WRAPPERS | {
  'guided with loss_fn': guided_with_loss,
  'asynchronous with everything': lambda tx: gsgd_jax.asynchronous(
    tx, workers=3, keep_params=True, worker_transform=optax.trace(0.9)
  ),
  'mean': lambda tx: gsgd_jax.synchronous(tx, workers=3, combine='mean'),
  'an uneven cluster': lambda tx: gsgd_jax.asynchronous(
    gsgd_jax.record_staleness(tx),
    workers=3,
    arrivals=gsgd_jax.failing(
      gsgd_jax.gamma_arrivals(machine_cv=0.6), at=2.0, back=3.0
    ),
    overwrite_within=0.01,
    max_ahead=2,
  ),
  'data parallel': lambda tx: gsgd_jax.data_parallel(
    tx, workers=3, batch_size=8, arrivals=gsgd_jax.gamma_arrivals()
  ),
}


def late(make):
  """A compensation inside four workers, with all they have to tell it."""
  batch = jnp.array([0.5], jnp.float32)

  def factory(learning_rate: optax.ScalarOrSchedule):
    tx = gsgd_jax.asynchronous(
      make(learning_rate), 4, keep_params=True, batch_like=batch
    )
    return with_batch(tx, batch)

  return factory


def correcting(correction):
  return lambda rate: optax.chain(correction, optax.sgd(rate))


COMPENSATIONS = {
  name: late(make)
  for name, make in {
    'DC-ASGD-c': correcting(gsgd_jax.delay_compensation()),
    'DC-ASGD-a': correcting(gsgd_jax.delay_compensation(adaptive=True)),
    'exact': correcting(gsgd_jax.exact_delay_compensation(distance)),
    'staleness': correcting(gsgd_jax.scale_by_staleness('polynomial')),
    'spike': lambda rate: gsgd_jax.spike_compensation(rate, 3),
    'braking': gsgd_jax.adaptive_braking,
    'dana': lambda rate: gsgd_jax.dana(rate, 4),
    'smega2': lambda rate: gsgd_jax.smega2(rate, 4),
    'predict': lambda rate: gsgd_jax.predict(optax.sgd(rate), 3),
    'delayed Nesterov': lambda rate: gsgd_jax.delayed_nesterov(rate, 4),
    'asynchronous Nesterov': gsgd_jax.asynchronous_nesterov,
    'drop_stale': lambda rate: gsgd_jax.drop_stale(optax.sgd(rate), 1),
    'rennala': lambda rate: gsgd_jax.rennala(optax.sgd(rate), 2),
  }.items()
}


def factory_of(base, wrapper):
  """A factory as optax has them; the learning rate alone is injectable."""
  if base is None:
    return COMPENSATIONS[wrapper]

  def factory(learning_rate: optax.ScalarOrSchedule):
    return ALL_WRAPPERS[wrapper](BASE[base](learning_rate))

  return factory


def run(test, base, wrapper, learning_rate=1e-2, **case):
  """Runs one of optax's tests, which must not skip itself."""
  parametrised = getattr(common.ContribTest, test + '0', None)
  if not hasattr(parametrised, '__wrapped__'):
    pytest.skip(f'this optax has no {test} that takes its case as arguments')
  factory = factory_of(base, wrapper)
  with mock.patch.object(optax.contrib, NAME, factory, create=True):
    try:
      parametrised.__wrapped__(
        common.ContribTest(),
        opt_name=NAME,
        opt_kwargs=dict(learning_rate=learning_rate),
        wrapper_name=None,
        wrapper_kwargs=None,
        **case,
      )
    except unittest.SkipTest as e:
      pytest.fail(f'{test} skipped itself: {e}')


# Every wrapper on two targets, every target by two wrappers.
@pytest.mark.parametrize(
  'wrapper, target',
  [
    (wrapper, target)
    for i, wrapper in enumerate(WRAPPERS)
    for j, target in enumerate(TARGETS)
    if (i + j) % len(TARGETS) < 2
  ],
)
def test_converges(wrapper, target):
  run(
    'test_optimizers',
    'sgd',
    wrapper,
    TARGETS[target],
    target=getattr(common, target),
    dtype='float32',
  )


# Adam has more of a state than SGD: it is in all wrappers.
ROWS = [
  *(('adam', name) for name in ALL_WRAPPERS),
  *(('sgd', name) for name in ('guided', 'asynchronous with everything')),
  *((None, name) for name in COMPENSATIONS),
]
# What is slow; of other compensations' rates see test_compensation.
WRAPPED = [
  *(row for row in ROWS if row[0] == 'adam'),
  *((None, name) for name in ('predict', 'drop_stale', 'rennala')),
]


def every(rows=ROWS):
  return pytest.mark.parametrize('base, wrapper', rows)


def every_with(*dtypes):
  """Every row with one of the data types, in turn."""
  rows = [(*row, dtypes[i % len(dtypes)]) for i, row in enumerate(ROWS)]
  return pytest.mark.parametrize('base, wrapper, dtype', rows)


class TestEverything:
  """The cheap tests of optax."""

  @every()
  def test_accepts_extra_args(self, base, wrapper):
    test = 'test_optimizers_accept_extra_args'
    run(test, base, wrapper, learning_rate=1e-4, wrap=False)

  @every(WRAPPED)
  def test_inject_hyperparams(self, base, wrapper):
    test = 'test_optimizers_can_be_wrapped_in_inject_hyperparams'
    run(test, base, wrapper)

  @every_with('bfloat16', 'float32')
  def test_preserves_dtype(self, base, wrapper, dtype):
    run('test_preserve_dtype', base, wrapper, dtype=dtype)

  @every_with('float32', 'bfloat16')
  def test_accumulates_gradients(self, base, wrapper, dtype):
    run('test_gradient_accumulation', base, wrapper, dtype=dtype)

  @every_with('float16', 'float64', 'bfloat16', 'float32')
  def test_stable_state(self, base, wrapper, dtype):
    test = 'test_state_shape_dtype_shard_stability'
    run(test, base, wrapper, dtype=getattr(jnp, dtype))

  @every(WRAPPED)
  def test_learning_rate_schedule(self, base, wrapper):
    test = (
      'test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such'
    )
    run(test, base, wrapper)
