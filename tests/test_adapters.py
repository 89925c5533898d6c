"""Flax models with state of their own, under delay and with replays."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gsgd_jax
from gsgd_jax import models

pytestmark = pytest.mark.usefixtures('as_users_run_it')

WORKERS, WINDOW, BATCH, STEPS = 4, 5, 16, 120
MOMENTUM, RATE = 0.9, 0.2


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(6, 16, rngs=rngs)
    self.norm = nnx.BatchNorm(16, momentum=MOMENTUM, rngs=rngs)
    self.dropout = nnx.Dropout(RATE, rngs=rngs)
    self.last = nnx.Linear(16, 3, rngs=rngs)

  def __call__(self, x):
    x = self.first(x)
    self.features = nnx.Intermediate(x)
    return self.last(self.dropout(nnx.relu(self.norm(x))))


class LinenNet(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(16, name='first')(x)
    self.sow('intermediates', 'features', x)
    norm = nn.BatchNorm(not train, momentum=MOMENTUM, name='norm')
    x = nn.Dropout(RATE, deterministic=not train)(nn.relu(norm(x)))
    return nn.Dense(3, name='last')(x)


def scored(logits, labels):
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean(), {'correct': jnp.argmax(logits, -1) == labels}


def nnx_loss(model, batch):
  return scored(model(batch['x']), batch['y'])


def linen_loss(model, batch):
  return scored(model(batch['x'], train=True), batch['y'])


def batches():
  rng = np.random.default_rng(0)
  y = rng.integers(0, 3, (STEPS, BATCH))
  x = rng.normal(size=(3, 6))[y] + 0.7 * rng.normal(size=(STEPS, BATCH, 6))
  return dict(
    x=jnp.asarray(x, jnp.float32),
    y=jnp.asarray(y, jnp.int32),
    key=jax.random.key_data(jax.random.split(jax.random.key(1), STEPS)),
  )


def rngs(batch):
  return {'dropout': jax.random.wrap_key_data(batch['key'])}


class Nnx:
  adapted = models.from_nnx(NnxNet, nnx_loss)

  def statistics(model_state):
    norm = model_state['norm']
    return np.asarray(norm['mean'][...]), np.asarray(norm['var'][...])

  def first_layer(params):
    layer = params['first']
    return np.asarray(layer['kernel'][...]), np.asarray(layer['bias'][...])

  def logits(params, model_state, x):
    model = Nnx.adapted.merge(params, model_state)
    model.eval()
    return model(x)


class Linen:
  adapted = models.from_linen(
    LinenNet(),
    linen_loss,
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batches()
    ),
    rngs,
  )

  def statistics(model_state):
    norm = model_state['batch_stats']['norm']
    return np.asarray(norm['mean']), np.asarray(norm['var'])

  def first_layer(params):
    layer = params['first']
    return np.asarray(layer['kernel']), np.asarray(layer['bias'])

  def logits(params, model_state, x):
    variables = Linen.adapted.merge(params, model_state)
    return LinenNet().apply(variables, x, train=False)


KINDS = pytest.mark.parametrize('kind', [Nnx, Linen])


def transformation(kind, packed, replays):
  return gsgd_jax.asynchronous(
    gsgd_jax.guided(
      optax.sgd(0.1),
      kind.adapted.loss_fn,
      window=WINDOW,
      replays=replays,
      batch_like=packed,
    ),
    workers=WORKERS,
    batch_like=packed,
  )


@functools.cache
def run(kind, replays):
  """What every call read and returned, and the last state of all."""
  data = batches()
  params, model_state = kind.adapted.init(jax.random.key(0))
  first = jax.tree.map(lambda x: x[0], data)
  tx = transformation(kind, models.StatefulBatch(first, model_state), replays)

  def step(carry, batch):
    params, model_state, opt_state = carry
    packed = models.StatefulBatch(batch, model_state)
    (value, aux, model_state), grads = kind.adapted.value_and_grad(
      params, packed
    )
    updates, opt_state = tx.update(
      grads, opt_state, params, value=value, batch=packed
    )
    read = params, packed.model_state
    carry = optax.apply_updates(params, updates), model_state, opt_state
    return carry, (*read, value, aux, model_state)

  carry = params, model_state, tx.init(params)
  return jax.jit(lambda carry: jax.lax.scan(step, carry, data))(carry)


@KINDS
@pytest.mark.parametrize('replays', [0, 3])
def test_a_call_moves_the_state_once(kind, replays):
  """By hand, from the parameters that each worker read; no replay shows."""
  (_, last, _), (params, _, _, _, after) = run(kind, replays)
  mean, var = kind.statistics(kind.adapted.init(jax.random.key(0))[1])
  for t, x in enumerate(np.asarray(batches()['x'])):
    read = jax.tree.map(lambda p, t=t: p[t], params)
    kernel, bias = kind.first_layer(read)
    features = x @ kernel + bias
    mean = MOMENTUM * mean + (1 - MOMENTUM) * features.mean(0)
    var = MOMENTUM * var + (1 - MOMENTUM) * features.var(0)
    state = jax.tree.map(lambda s, t=t: s[t], after)
    for found, expected in zip(
      kind.statistics(state), (mean, var), strict=True
    ):
      np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
  jax.tree.map(np.testing.assert_array_equal, last, state)


@KINDS
def test_replays_are_applied_and_it_learns(kind):
  (params, model_state, _), (_, _, values, aux, _) = run(kind, 3)
  plain, guided = run(kind, 0)[0], run(kind, 3)[0]
  assert int(guided[2].inner_state.gradient_evaluations) > STEPS
  differ = jax.tree.map(lambda p, q: np.any(p != q), plain[0], guided[0])
  assert all(jax.tree.leaves(differ))
  assert aux['correct'].shape == (STEPS, BATCH)
  values = np.asarray(values)
  assert values[-20:].mean() < 0.6 * values[:5].mean()
  data = batches()
  x, y = data['x'][-20:].reshape(-1, 6), data['y'][-20:].reshape(-1)
  logits = kind.logits(params, model_state, x)
  assert np.mean(np.argmax(logits, -1) == y) > 0.85


@KINDS
def test_a_replay_draws_what_its_worker_drew_and_writes_nothing(kind):
  """The loss is a function of parameters and batch, also while it draws."""
  params, model_state = kind.adapted.init(jax.random.key(0))
  batch = jax.tree.map(lambda x: x[0], batches())
  packed = models.StatefulBatch(batch, model_state)
  value_and_grad = jax.jit(kind.adapted.value_and_grad)
  (value, _, after), grads = value_and_grad(params, packed)
  for _ in range(2):
    again, same = jax.value_and_grad(kind.adapted.loss_fn)(params, packed)
    np.testing.assert_allclose(again, value, rtol=1e-6)
  jax.tree.map(
    lambda g, h: np.testing.assert_allclose(g, h, rtol=1e-4, atol=1e-6),
    grads,
    same,
  )
  # The next state, or another key, draws other masks.
  batch |= {'key': batch['key'] + 1}
  other = models.StatefulBatch(batch, after)
  assert abs(kind.adapted.loss_fn(params, other) - value) > 1e-3


def test_a_dropout_counter_moves_once_a_call():
  _, (_, before, _, _, after) = run(Nnx, 3)
  count = lambda state: np.asarray(state['dropout']['rngs']['count'][...])
  np.testing.assert_array_equal(count(before), np.arange(STEPS))
  np.testing.assert_array_equal(count(after), np.arange(STEPS) + 1)


@KINDS
def test_a_window_of_states_is_kept(kind):
  state = run(kind, 3)[0][2]
  ring = state.inner_state.window.batches.model_state
  assert {leaf.shape[0] for leaf in jax.tree.leaves(ring)} == {WINDOW}


@pytest.mark.parametrize('adapt', [models.from_nnx, 'linen'])
def test_a_model_without_state_or_auxiliary_output(adapt):
  loss = lambda model, batch: jnp.mean(model(batch[0]) ** 2)
  x = (jnp.ones([4, 3]),)
  if adapt == 'linen':
    adapted = models.from_linen(nn.Dense(2), loss, x)
  else:
    adapted = adapt(lambda rngs: nnx.Linear(3, 2, rngs=rngs), loss)
  params, model_state = adapted.init(jax.random.key(0))
  assert not jax.tree.leaves(model_state)
  packed = models.StatefulBatch(x, model_state)
  (value, aux, after), _ = adapted.value_and_grad(params, packed)
  assert aux is None and not jax.tree.leaves(after)
  np.testing.assert_allclose(value, adapted.loss_fn(params, packed))
