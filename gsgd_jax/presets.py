r"""Guided SGD as the studies recommend it.

Stale gradients stand small steps only: SGD at a constant staleness
:math:`\tau` is stable on a quadratic of curvature c for
:math:`\eta c < 2 \sin(\pi / (4 \tau + 2))` alone. A replay's gradient is
fresh, and stands :math:`\eta c < 2`. So replays take larger steps than arrivals
do, and a few of them win back what the small steps cost.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from gsgd_jax import _protocol
from gsgd_jax.guided import Select, guided


def guided_sgd(
  learning_rate: float | jax.Array,
  loss_fn: Callable[[Any, Any], jax.Array],
  workers: int,
  *,
  batch_like: Any,
  inner: optax.GradientTransformation | None = None,
  step: float | None = None,
  window: int = 4,
  replays: int = 1,
  select: str | Select = 'consistent',
  replay_model: str = 'shared',
  seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Guided SGD for many workers: few replays, at large fresh steps.

  .. math::

    w \leftarrow w - \eta\, g, \qquad
    \text{and every } \rho \text{ updates} \quad
    w \leftarrow w - s\, \eta\, \nabla f(w; \psi)

  with :math:`-\eta g` the step of an arriving gradient g, and :math:`\psi` the
  most consistent batch of the window, by free scoring. It is :func:`guided`
  around ``inner`` with ``replay_with=optax.sgd(step * learning_rate)``. Where
  labels are noisy large steps on single batches hurt: give a smaller ``step``.

  Args:
    learning_rate: :math:`\eta`, a number; that of delayed SGD, or a little
      more. A schedule does not know when replays are taken: compose
      :func:`guided` yourself for one.
    loss_fn: As in :func:`guided`.
    workers: N, at least 1.
    batch_like: As in :func:`guided`.
    inner: What applies arriving gradients; ``None`` is
      ``optax.sgd(learning_rate)``. ``learning_rate`` is then what a gradient
      weighs in the end, as in ``adaptive_braking(0.1 * learning_rate)``, whose
      momentum is 0.9.
    step: s, how many times as large a step a replay takes; ``None`` is
      ``max(1, workers / 8)``.
    window: :math:`\rho`, updates between replays, at least 2: the last batch of
      a window has no score.
    replays: Batches replayed then.
    select: As in :func:`guided`; the studies show little between
      ``'consistent'`` and ``'random'``.
    replay_model: As in :func:`guided`.
    seed: As in :func:`guided`.

  Returns:
    An ``optax.GradientTransformationExtraArgs``, for inside
    :func:`asynchronous`, that wants ``value`` and ``batch``.

  Raises:
    ValueError: An argument is out of its range, or ``learning_rate`` is a
      schedule.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
    >>> batch = jnp.ones([8, 2])
    >>> tx = gsgd_jax.asynchronous(
    ...     gsgd_jax.guided_sgd(0.01, loss_fn, workers=64, batch_like=batch),
    ...     workers=64, batch_like=batch)
    >>> params = jnp.zeros(2)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state):
    ...   value, grads = jax.value_and_grad(loss_fn)(params, batch)
    ...   updates, state = tx.update(
    ...       grads, state, params, value=value, batch=batch)
    ...   return optax.apply_updates(params, updates), state
    >>> for _ in range(63 + 80):
    ...   params, state = step(params, state)
    >>> print(bool(loss_fn(params, batch) < 0.1))
    True

  References:
    Sharma, `Guided parallelized stochastic gradient descent for delay
    compensation`, arXiv:2101.07259, 2021. The larger steps are this package's;
    ``configs/delay.py`` measures them.
  """
  workers = _protocol.positive_int('workers', workers)
  if callable(learning_rate):
    raise ValueError(
      'guided_sgd takes a learning_rate that is a number, as a schedule does '
      'not know when replays are taken; compose guided yourself'
    )
  if step is None:
    step = max(1.0, workers / 8)
  if not 0 < step < math.inf:
    raise ValueError(f'step must be positive and finite, got {step!r}')
  if _protocol.positive_int('window', window) == 1:
    raise ValueError(
      'window must be at least 2, got 1: the last batch of a window has no '
      'score, so nothing would be replayed'
    )
  return guided(
    optax.sgd(learning_rate) if inner is None else inner,
    loss_fn,
    window=window,
    replays=replays,
    select=select,
    replay_with=optax.sgd(step * learning_rate),
    replay_model=replay_model,
    batch_like=batch_like,
    seed=seed,
  )
