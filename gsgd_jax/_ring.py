"""Rings of slots that XLA updates in place.

A ring is a pytree whose leaves carry a leading axis of slots. XLA writes a
slot in place only when nobody wants the old contents any more. Three habits
keep it so, and the step's cost independent of the number of slots:

* write a slot first, then read (another slot, or the same one back);
* never carry a ring through a `cond`, nor select it whole;
* what may be skipped runs in a loop of zero or one trips (`when`), whose
  carry XLA updates in place.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def stack(tree: Any, slots: int) -> Any:
  """A ring that holds `tree` in every slot.

  `jnp.broadcast_to` keeps a leaf's sharding, with the slots unsharded, and
  allocates the ring alone.
  """
  return jax.tree.map(
    lambda x: jnp.broadcast_to(x, (slots,) + jnp.shape(x)), tree
  )


def empty(like: Any, slots: int) -> Any:
  """A ring of zeros for trees like `like` (shapes and dtypes)."""

  def zeros(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # There is no zero key.
      return jnp.broadcast_to(
        jax.random.key(0, impl=x.dtype), (slots, *x.shape)
      )
    return jnp.zeros((slots, *x.shape), x.dtype)

  return jax.tree.map(zeros, like)


def write(ring: Any, slot: jax.Array, tree: Any) -> Any:
  """Puts `tree` into a slot, in the ring's dtypes."""
  return jax.tree.map(
    lambda r, x: lax.dynamic_update_index_in_dim(
      r, _as_dtype(x, r.dtype), slot, 0
    ),
    ring,
    tree,
  )


def read(ring: Any, slot: jax.Array) -> Any:
  """The contents of a slot."""
  return jax.tree.map(
    lambda r: lax.dynamic_index_in_dim(r, slot, 0, keepdims=False), ring
  )


def when(active: jax.Array, fn: Callable[[Any], Any], carry: Any) -> Any:
  """`fn(carry)` if active, else `carry`; what `fn` returns keeps the dtypes.

  A loop of one or no trip: unlike `cond` it copies nothing that `carry` holds.
  """
  carry = jax.tree.map(jnp.asarray, carry)

  def body(_, carry):
    return cast_like(fn(carry), carry)

  return lax.fori_loop(0, jnp.where(active, 1, 0), body, carry)


def applied_when(
  active: jax.Array, update: Callable[[Any], Any], carry: Any
) -> Any:
  """`update((updates, state))` if active, else zero updates and `state`.

  The loop is there to protect the state; where there is none, none is needed.
  """
  updates, state = carry
  if jax.tree.leaves(state):
    new_updates, state = when(active, update, carry)
  else:
    new_updates, state = update(carry)
  new_updates = jax.tree.map(
    lambda new, u: jnp.where(active, new, 0).astype(u.dtype),
    new_updates,
    updates,
  )
  return new_updates, state


def cast_like(tree: Any, like: Any) -> Any:
  """`tree` in the dtypes of `like`."""
  return jax.tree.map(lambda x, y: _as_dtype(x, y.dtype), tree, like)


def _as_dtype(x, dtype):
  # PRNG keys have dtypes that nothing converts to.
  x = jnp.asarray(x)
  return x if x.dtype == dtype else jnp.asarray(x, dtype)
