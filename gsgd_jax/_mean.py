"""The mean of several packets, collected one by one.

What a round of `synchronous` by its mean applies, and what `rennala` does.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gsgd_jax import _leaves, _protocol, _ring


class Sums(NamedTuple):
  """What has been collected so far."""

  updates: optax.Updates  # At least float32.
  value: jax.Array  # shape=(), float.
  batch: Any  # A leading axis of packets; None without `batch_like`.


def nothing(params: optax.Params, batch_like: Any, size: int) -> Sums:
  """Room for so many packets."""
  return Sums(
    updates=_leaves.zero_sums(params),
    value=jnp.zeros([], _protocol.score_dtype()),
    batch=_ring.empty(_protocol.abstract(batch_like), size),
  )


def added(
  who: str,
  sums: Sums,
  position: jax.Array,
  updates: optax.Updates,
  batch_like: Any,
  extra_args: dict[str, Any],
  keeps: jax.Array | bool = True,
) -> Sums:
  """With one packet more, if it `keeps` it; at position 0 a new beginning."""
  value = _protocol.scalar_value(who, extra_args)
  batch = None
  if batch_like is not None:
    batch = _protocol.checked_batch(who, extra_args, batch_like)

  def plus(total, x):
    so_far = jnp.where(position == 0, 0, total)
    return so_far + jnp.where(keeps, jnp.asarray(x, total.dtype), 0)

  return Sums(
    updates=jax.tree.map(plus, sums.updates, updates),
    value=plus(sums.value, 0 if value is None else value),
    # What is not kept is overwritten by what is kept next.
    batch=_ring.write(sums.batch, position, batch),
  )


def packet(
  sums: Sums, size: int, updates: optax.Updates, extra_args: dict[str, Any]
) -> tuple[optax.Updates, dict[str, Any]]:
  """The mean of `size` gradients, and what it carries."""
  mean = _ring.cast_like(optax.tree.scale(1 / size, sums.updates), updates)
  extras = _protocol.other_extras(extra_args, mean)
  extras['staleness'] = jnp.zeros([], jnp.int32)
  if extra_args.get('value') is not None:
    extras['value'] = sums.value / size
  if sums.batch is not None:
    extras['batch'] = jax.tree.map(_join, sums.batch)
  return mean, extras


def _join(stacked):
  """N arrays of shape (B, ...), stacked, as one of shape (N * B, ...)."""
  if jnp.issubdtype(stacked.dtype, jax.dtypes.prng_key):
    return stacked[0]
  if stacked.ndim == 1:
    return stacked
  return stacked.reshape((-1, *stacked.shape[2:]))
