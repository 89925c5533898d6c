"""Which stale gradients are accepted at all.

Wrappers, because what is refused must leave everything inside untouched:
parameters, momenta, step counts, guided SGD's window. Their state counts what
they applied and refused, and `asynchronous` reads it: a gradient that is
refused, or only kept, ages nobody.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gsgd_jax import _mean, _protocol, _ring


def drop_stale(
  inner: optax.GradientTransformation, max_staleness: int
) -> optax.GradientTransformationExtraArgs:
  r"""Refuses gradients that are more than so many updates old.

  A gradient reaches ``inner`` only if its staleness is
  :math:`\tau \le` ``max_staleness``; otherwise it is thrown away, and its
  worker reads anew. Ringmaster ASGD with threshold R is
  ``max_staleness=R - 1``.

  Under :func:`asynchronous`, what is refused ages nobody, so it never freezes:
  of N round-robin workers :math:`\min(1, R / N)` of the gradients are applied.

  It stands around everything at the server, :func:`guided` included. What is
  around it sees a refused gradient as zero updates; after it in a chain, or
  beside it in ``optax.multi_transform``, parameters would move by updates that
  nobody counts. It needs the extra argument ``staleness``, one for all
  parameters.

  Args:
    inner: Any optax transformation.
    max_staleness: At least 0. At 0 only fresh gradients are applied.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state counts ``applied``
    and ``refused`` gradients (int32).

  Raises:
    ValueError: ``max_staleness`` is not an int of at least 0; in ``update``,
      ``staleness`` is missing or not one int.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.drop_stale(optax.sgd(1.0), max_staleness=1)
    >>> params = jnp.array([0.0])
    >>> state = tx.init(params)
    >>> for staleness in (0, 2, 1):
    ...   updates, state = tx.update(jnp.array([1.0]), state, params,
    ...                              staleness=staleness)
    ...   print(updates)
    [-1.]
    [0.]
    [-1.]
    >>> print(state.applied, 'applied,', state.refused, 'refused')
    2 applied, 1 refused

  References:
    Maranjyan, Tyurin, Richtarik, `Ringmaster ASGD: The First Asynchronous SGD
    with Optimal Time Complexity`, arXiv:2501.16168, 2025.
  """
  max_staleness = _protocol.count_or_traced(
    'max_staleness', max_staleness, minimum=0
  )
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    return _protocol.Acceptance(
      applied=jnp.zeros([], jnp.int32),
      refused=jnp.zeros([], jnp.int32),
      kept=None,
      inner_state=inner.init(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    staleness = _protocol.one_staleness('drop_stale', extra_args)
    accepts = staleness <= max_staleness

    def apply(carry):
      gradient, inner_state = carry
      return inner.update(gradient, inner_state, params, **extra_args)

    new_updates, inner_state = _ring.applied_when(
      accepts, apply, (updates, state.inner_state)
    )
    return new_updates, _after(
      state, inner_state, reaches=accepts, keeps=accepts, kept=None
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def rennala(
  inner: optax.GradientTransformation, size: int, *, batch_like: Any = None
) -> optax.GradientTransformationExtraArgs:
  r"""Applies the mean of every ``size`` gradients of the current parameters.

  A gradient is kept only if nothing was applied since its worker read
  (:math:`\tau = 0`); otherwise it is thrown away. Once S = ``size`` are kept,
  ``inner`` is given their mean, as a batch S times as large would have it,
  ``staleness`` 0, the mean ``value`` and, with ``batch_like``, the S batches as
  one: joined along their first axis, scalars stacked, of typed PRNG keys the
  first.

  Under :func:`asynchronous`, a gradient that is only kept ages nobody: of N
  round-robin workers :math:`S / (S + N - 1)` of the gradients are kept. S = 1
  is ``drop_stale(inner, 0)``.

  It stands around everything at the server, as :func:`drop_stale` does, and
  needs the extra argument ``staleness``. ``worker`` is that of the last
  gradient of a mean: :func:`dana` inside has all of it enter one momentum.

  Args:
    inner: Any optax transformation.
    size: S, at least 1. It decides shapes: with ``optax.inject_hyperparams``
      name it in ``static_args``.
    batch_like: A batch, or its ``jax.ShapeDtypeStruct`` s, for an ``inner``
      that wants ``batch``; S batches are kept.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state counts the updates
    ``applied`` and the gradients ``refused`` (int32), and holds the sum of the
    gradients kept: one copy of them, in at least float32.

  Raises:
    ValueError: ``size`` is not an int of at least 1; in ``update``,
      ``staleness`` is missing or not one int, ``batch`` is missing or
      different, or ``value`` is no scalar.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.rennala(optax.sgd(1.0), size=2)
    >>> params = jnp.array([0.0])
    >>> state = tx.init(params)
    >>> for gradient, staleness in ((1.0, 0), (9.0, 1), (3.0, 0)):
    ...   updates, state = tx.update(jnp.array([gradient]), state, params,
    ...                              staleness=staleness)
    ...   print(updates)
    [0.]
    [0.]
    [-2.]

  References:
    Tyurin, Richtarik, `Optimal Time Complexities of Parallel Stochastic
    Optimization Methods Under a Fixed Computation Model`, arXiv:2305.12387,
    2023.
  """
  size = _protocol.positive_int('size', size)
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    return _protocol.Acceptance(
      applied=jnp.zeros([], jnp.int32),
      refused=jnp.zeros([], jnp.int32),
      kept=_Kept(
        jnp.zeros([], jnp.int32), _mean.nothing(params, batch_like, size)
      ),
      # What is inside takes gradients of all the batches as one.
      inner_state=_protocol.of_joined_batches(inner.init(params), size),
    )

  def update_fn(updates, state, params=None, **extra_args):
    keeps = _protocol.one_staleness('rennala', extra_args) == 0
    count = state.kept.count
    sums = _mean.added(
      'rennala', state.kept.sums, count, updates, batch_like, extra_args, keeps
    )
    mean, packet = _mean.packet(sums, size, updates, extra_args)
    # All of them were read where this one was; that it is the last one's
    # worker is a convention.
    for name in ('worker', 'stale_params'):
      if name in extra_args:
        packet[name] = extra_args[name]
    full = keeps & (count == size - 1)

    def apply(carry):
      mean, inner_state = carry
      return inner.update(mean, inner_state, params, **packet)

    new_updates, inner_state = _ring.applied_when(
      full, apply, (mean, state.inner_state)
    )
    count = jnp.where(full, 0, count + keeps.astype(jnp.int32))
    return new_updates, _after(
      state, inner_state, reaches=full, keeps=keeps, kept=_Kept(count, sums)
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Kept(NamedTuple):
  """Gradients that wait for others."""

  count: jax.Array  # shape=(), dtype=int32: in [0, size).
  sums: _mean.Sums


def _after(state, inner_state, reaches, keeps, kept):
  """The state after a gradient that is kept, and reaches `inner`, or not."""
  # What is inside may refuse as well.
  applied, refused = _protocol.accepted(state.inner_state, inner_state)
  return _protocol.Acceptance(
    applied=state.applied + reaches.astype(jnp.int32) * applied,
    refused=state.refused + (~keeps).astype(jnp.int32) + refused,
    kept=kept,
    inner_state=inner_state,
  )
