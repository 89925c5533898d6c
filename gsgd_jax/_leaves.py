"""Arithmetic on trees of gradients, parameters and momenta.

Scalars (rates, weights) take the dtype of the leaf that they scale; sums over
leaves or over many gradients are at least float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gsgd_jax import _protocol


def like(x: Any, leaf: jax.Array) -> jax.Array:
  """`x` in the dtype of a leaf."""
  return jnp.asarray(x).astype(leaf.dtype)


def less(params: jax.Array, read: jax.Array) -> jax.Array:
  """`params - read`, in the dtype of `params`."""
  return params - read.astype(params.dtype)


def where_there(fn: Callable, updates: Any, *trees: Any) -> Any:
  """`fn` leaf by leaf, except where a mask hides the updates.

  There the other trees may be whole: a mask does not reach extra arguments.
  """
  masked = lambda x: isinstance(x, optax.MaskedNode)
  return jax.tree.map(
    lambda g, *rest: g if masked(g) else fn(g, *rest),
    updates,
    *trees,
    is_leaf=masked,
  )


def hides_any(updates: Any) -> bool:
  """Whether a mask hides some of the updates."""
  masked = lambda x: isinstance(x, optax.MaskedNode)
  return any(map(masked, jax.tree.leaves(updates, is_leaf=masked)))


def traced(momentum: Any, trace: Any, updates: Any) -> Any:
  """`momentum * trace + updates`, in the dtypes of `trace`."""
  return jax.tree.map(
    lambda v, g: like(momentum, v) * v + g.astype(v.dtype), trace, updates
  )


def zero_sums(params: optax.Params) -> Any:
  """Zeros like the parameters, for sums over many gradients."""
  return jax.tree.map(
    lambda p: jnp.zeros_like(p, _protocol.wide(p.dtype)), params
  )


def dot(tree: Any, other: Any) -> jax.Array:
  """The inner product over all parameters, in the dtype of scores."""
  dtype = _protocol.score_dtype()
  products = jax.tree.map(
    lambda x, y: jnp.sum(x.astype(dtype) * y.astype(dtype)), tree, other
  )
  return sum(jax.tree.leaves(products), jnp.zeros([], dtype))


def norm(tree: Any) -> jax.Array:
  """The Euclidean norm over all parameters."""
  return jnp.sqrt(dot(tree, tree))


def rate_at(learning_rate: optax.ScalarOrSchedule, count: jax.Array) -> Any:
  """The learning rate of an update."""
  return learning_rate(count) if callable(learning_rate) else learning_rate


def collected(
  workers: Any, count: jax.Array, momentum: Any, velocity: Any, total: Any
) -> tuple[Any, Any, jax.Array]:
  """Momentum, sum and count of a round of gradients, after one more.

  When so many as there are workers have been collected, their mean enters the
  momentum and a round begins anew.
  """
  count = count + 1
  ends = count >= workers

  def entered(v, a):
    mean = (a / like(workers, a)).astype(v.dtype)
    return jnp.where(ends, like(momentum, v) * v + mean, v)

  velocity = jax.tree.map(entered, velocity, total)
  total = jax.tree.map(lambda a: jnp.where(ends, 0, a).astype(a.dtype), total)
  return velocity, total, jnp.where(ends, 0, count)
