"""Gradients of large batches in little memory: one piece after another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gsgd_jax import _protocol


def in_pieces(
  loss_fn: Callable[[Any, Any], jax.Array], pieces: int
) -> Callable[[Any, Any], jax.Array]:
  r"""The same mean loss, taken over a batch's pieces one after another.

  .. math::

    f(w; B) = \frac{1}{K} \sum_k f(w; B_k)

  with the batch B cut along its leading axis into K equal pieces
  :math:`B_k`. What a piece's gradient needs is computed when it is its turn,
  and forgotten: a gradient needs the memory of one piece, and a third more
  time. Derivatives of any order are those of ``loss_fn`` but for rounding.

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``, a mean over the examples of
      the batch, which is a pytree of arrays with a leading axis of examples.
    pieces: K, at least 1. Of a batch that it does not divide (a verification
      sample, say) as many as do, below it.

  Returns:
    A function like ``loss_fn``; with one piece ``loss_fn`` itself.

  Raises:
    ValueError: ``pieces`` is not an int of at least 1; in a call, the arrays
      of a batch differ in their leading axes.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from gsgd_jax import accumulation
    >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
    >>> loss_in_two = accumulation.in_pieces(loss_fn, 2)
    >>> batch = jnp.array([1.0, 2.0, 3.0, 6.0])
    >>> print(jax.grad(loss_fn)(1.0, batch), jax.grad(loss_in_two)(1.0, batch))
    -4.0 -4.0
  """
  pieces = _protocol.positive_int('pieces', pieces)
  if pieces == 1:
    return loss_fn

  def mean(params, batch):
    sizes = {x.shape[:1] for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes == {()}:
      raise ValueError(
        'every array of a batch that is taken in pieces must have the same '
        f'leading axis, got {sorted(sizes)}'
      )
    ((size,),) = sizes
    number = max(n for n in range(1, pieces + 1) if size % n == 0)
    if number == 1:
      return loss_fn(params, batch)
    cut = lambda x: x.reshape(number, size // number, *x.shape[1:])
    one = jax.checkpoint(lambda piece: loss_fn(params, piece))
    return jnp.mean(jax.lax.map(one, jax.tree.map(cut, batch)))

  return mean
