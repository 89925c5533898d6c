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


def test_mlp_flattens_images():
  model = models.mlp(12, (5,), 3)
  params = model.init(jax.random.key(0))
  images = jax.random.normal(jax.random.key(1), (4, 2, 3, 2), jnp.float32)
  np.testing.assert_array_equal(
    model.apply(params, images), model.apply(params, images.reshape(4, 12))
  )


def test_text_is_averaged_over_tokens():
  logits = np.random.default_rng(0).normal(size=(2, 3, 4))
  labels = np.array([[0, 1, 2], [3, 0, 1]])
  batch = jnp.asarray(logits), jnp.asarray(labels)
  shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  of_labels = np.take_along_axis(shares, labels[..., None], -1)
  one = jnp.float64(1.0)
  for loss in (models.cross_entropy, models.evaluation_loss):
    value = loss(identity_model())(one, batch)
    np.testing.assert_allclose(value, -np.log(of_labels).mean(), rtol=1e-12)
  np.testing.assert_allclose(
    models.accuracy(identity_model())(one, batch),
    (logits.argmax(-1) == labels).mean(),
  )


def drawing_model():
  """The identity, with noise in training."""

  def train_apply(params, x, keys):
    return params * x + drawn(keys)

  return identity_model()._replace(train_apply=train_apply, needs_keys=True)


def drawn(keys):
  keys = jax.random.wrap_key_data(keys, impl='threefry2x32')
  return jax.vmap(lambda key: jax.random.normal(key, [2]))(keys)


def raw_keys(number):
  return jax.random.key_data(jax.random.split(jax.random.key(0), number))


def prepare(x, keys):
  return 2 * x if keys is None else 2 * x + 10 * drawn(keys)


def test_preparation_and_model_draw_from_keys_of_their_own():
  x, labels = jnp.ones([3, 2]), jnp.array([0, 1, 1])
  keys = raw_keys(3)
  logits = np.full((3, 2), 2.0)
  for i, key in enumerate(jax.random.split(jax.random.key(0), 3)):
    for_inputs, for_model = jax.random.split(key)
    logits[i] += 10 * np.asarray(jax.random.normal(for_inputs, [2]))
    logits[i] += np.asarray(jax.random.normal(for_model, [2]))
  expected = models.evaluation_loss(identity_model())(
    jnp.float64(1.0), (jnp.asarray(logits), labels)
  )
  value = models.cross_entropy(drawing_model(), prepare)(
    jnp.float64(1.0), (x, labels, keys)
  )
  np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_evaluation_prepares_and_draws_nothing():
  x = jnp.array([[1.0, 0.0], [0.0, 3.0], [0.0, 2.0]])
  labels = jnp.array([0, 1, 0])
  one = jnp.float64(1.0)
  for loss, reference in (
    (models.evaluation_loss, models.cross_entropy),
    (models.accuracy, models.accuracy),
  ):
    expected = reference(identity_model())(one, (2 * x, labels))
    for batch in ((x, labels), (x, labels, raw_keys(3)), (x, labels, None)):
      value = loss(drawing_model(), prepare)(one, batch)
      np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_training_without_train_apply_is_evaluation():
  x, labels = jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.array([0, 0])
  one = jnp.float64(1.0)
  expected = models.evaluation_loss(identity_model())(one, (x, labels))
  for batch in ((x, labels), (x, labels, None), (x, labels, raw_keys(2))):
    value = models.cross_entropy(identity_model())(one, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
