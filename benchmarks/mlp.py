"""The network that the benchmarks train: one hidden layer, a batch of 64."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

BATCH = 64


def problem(sizes: Sequence[int]):
  """Parameters for (inputs, hidden units, classes), and a batch."""
  inputs, hidden, classes = sizes
  keys = jax.random.split(jax.random.key(0), 4)
  params = {
    'w1': jax.random.normal(keys[0], (inputs, hidden)) / inputs**0.5,
    'b1': jnp.zeros([hidden]),
    'w2': jax.random.normal(keys[1], (hidden, classes)) / hidden**0.5,
    'b2': jnp.zeros([classes]),
  }
  x = jax.random.normal(keys[2], (BATCH, inputs))
  return params, (x, jax.random.randint(keys[3], (BATCH,), 0, classes))


def loss_fn(params, batch):
  """Cross-entropy."""
  x, y = batch
  hidden = jax.nn.relu(x @ params['w1'] + params['b1'])
  logits = hidden @ params['w2'] + params['b2']
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
