"""Presets are what they say: compositions of what is tested elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gsgd_jax


def loss_fn(params, batch):
  x, y = batch
  return jnp.mean((x @ params - y) ** 2)


def batches(number, size=4):
  keys = jax.random.split(jax.random.key(0), number)
  x = jax.vmap(lambda k: jax.random.normal(k, (size, 3)))(keys)
  return x, x @ jnp.array([1.0, -2.0, 0.5])


def trained(tx, number=40):
  """The parameters after every call."""
  params = jnp.zeros(3)

  def step(carry, batch):
    params, state = carry
    value, grads = jax.value_and_grad(loss_fn)(
      gsgd_jax.worker_params(params, state), batch
    )
    updates, state = tx.update(grads, state, params, value=value, batch=batch)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  carry = params, tx.init(params)
  return np.asarray(jax.lax.scan(step, carry, batches(number))[1])


def like():
  return jax.tree.map(lambda x: x[0], batches(1))


def by_hand(inner, rate, step, **options):
  return gsgd_jax.guided(
    inner,
    loss_fn,
    **dict(window=4, replays=1, replay_model='shared') | options,
    replay_with=optax.sgd(step * rate),
    batch_like=like(),
  )


@pytest.mark.parametrize(
  ('workers', 'options', 'step'),
  [
    (64, {}, 8),
    (3, {}, 1),
    (16, dict(step=5.0), 5),
    (16, dict(window=6, replays=2, select='random'), 2),
    (16, dict(select=lambda window, **_: -window.losses), 2),
  ],
)
def test_composition(workers, options, step):
  rate = 0.01
  tx = gsgd_jax.guided_sgd(rate, loss_fn, workers, batch_like=like(), **options)
  rule = {k: v for k, v in options.items() if k != 'step'}
  wanted = by_hand(optax.sgd(rate), rate, step, **rule)
  np.testing.assert_array_equal(trained(tx), trained(wanted))


def test_inner():
  rate, inner = 0.02, gsgd_jax.adaptive_braking(0.002)
  tx = gsgd_jax.guided_sgd(rate, loss_fn, 32, batch_like=like(), inner=inner)
  wanted = by_hand(inner, rate, 4)
  np.testing.assert_array_equal(trained(tx), trained(wanted))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(workers=0), 'workers must be'),
    (dict(step=0.0), 'step must be positive and finite, got 0.0'),
    (dict(learning_rate=lambda count: 0.1), 'a number'),
    (dict(window=0), 'window must be'),
    (dict(window=1), 'window must be at least 2, got 1'),
  ],
)
def test_bad_arguments(changes, message):
  arguments = dict(learning_rate=0.1, loss_fn=loss_fn, workers=8)
  with pytest.raises(ValueError, match=message):
    gsgd_jax.guided_sgd(**arguments | changes, batch_like=like())
