"""What a transformation's state will take, before anything is allocated."""

import math

import jax
import optax


def state_memory(
  tx: optax.GradientTransformation, params: optax.Params
) -> dict[str, int]:
  r"""The bytes that each part of a transformation's state will take.

  Nothing is allocated: ``tx.init`` is evaluated for its shapes alone. Rings,
  windows, scores and momenta are listed by the names they have in the state.

  Args:
    tx: Any optax transformation or chain. Batches count through the
      ``batch_like`` it was made with.
    params: The parameters, as arrays or as ``jax.ShapeDtypeStruct`` s.

  Returns:
    A dictionary from a part's name to its bytes (on one device, unsharded), in
    the state's order. Parts of no bytes are left out; the sum of the values is
    the whole state.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> million = jax.ShapeDtypeStruct((1_000_000,), jnp.float32)
    >>> tx = gsgd_jax.asynchronous(optax.sgd(0.1, momentum=0.9), workers=16)
    >>> memory = gsgd_jax.state_memory(tx, million)
    >>> print(memory['in_flight.updates'] // 10**6, 'MB in flight')
    64 MB in flight
    >>> print(memory['inner_state[0].trace'] // 10**6, 'MB of momentum')
    4 MB of momentum
  """
  state = jax.eval_shape(tx.init, params)
  like_params = jax.tree.structure(params)
  parts = jax.tree_util.tree_leaves_with_path(
    state, is_leaf=lambda x: jax.tree.structure(x) == like_params
  )
  memory: dict[str, int] = {}
  for path, part in parts:
    size = sum(
      math.prod(leaf.shape) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(part)
    )
    if size:
      name = _name(path)
      memory[name] = memory.get(name, 0) + size
  return memory


def _name(path):
  """The path down to the last named field: below are the user's own trees."""
  fields = [
    i for i, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey)
  ]
  end = fields[-1] + 1 if fields else len(path)
  return jax.tree_util.keystr(path[:end]).removeprefix('.') or 'state'
