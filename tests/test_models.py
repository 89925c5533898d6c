"""Models and losses against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsgd_jax import models


@pytest.mark.parametrize('hidden', [(), (5,), (5, 7)])
def test_mlp_against_numpy(hidden):
  model = models.mlp(4, hidden, 3)
  params = model.init(jax.random.key(0))
  x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
  layers = nnx_layers(params)
  assert len(layers) == len(hidden) + 1
  expected = x
  for i, (kernel, bias) in enumerate(layers):
    expected = expected @ kernel + bias
    if i < len(hidden):
      expected = np.maximum(expected, 0)
  np.testing.assert_allclose(
    model.apply(params, jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6
  )


def nnx_layers(params):
  layers = params['layers']
  return [
    (np.asarray(layers[i]['kernel'][...]), np.asarray(layers[i]['bias'][...]))
    for i in sorted(layers)
  ]


def test_init_under_jit_and_vmap():
  model = models.mlp(4, (8,), 3)
  keys = jax.random.split(jax.random.key(1), 5)
  params = jax.jit(jax.vmap(model.init))(keys)
  alone = model.init(keys[2])
  jax.tree.map(
    lambda p, q: np.testing.assert_allclose(p[2], q, rtol=1e-6), params, alone
  )


def identity_model():
  return models.Model(init=None, apply=lambda params, x: params * x)


def test_cross_entropy_is_safe_for_logits_of_any_size():
  loss_fn = models.cross_entropy(identity_model())
  batch = jnp.array([[1e4, -1e4], [-1e4, 1e4]]), jnp.array([0, 0])
  value, gradient = jax.value_and_grad(loss_fn)(jnp.float64(1.0), batch)
  assert value == 1e4
  assert np.isfinite(gradient)
  batch = jnp.array([[0.0, jnp.log(3.0)]]), jnp.array([1])
  np.testing.assert_allclose(
    loss_fn(jnp.float64(1.0), batch), -np.log(0.75), rtol=1e-12
  )


def test_what_is_not_finite_is_not_correct():
  accuracy_fn = models.accuracy(identity_model())
  batch = (
    jnp.array([[2.0, 1.0], [jnp.nan, 1.0], [1.0, 2.0]]),
    jnp.array([0, 0, 0]),
  )
  np.testing.assert_allclose(accuracy_fn(jnp.float64(1.0), batch), 1 / 3)
