"""Who arrives next at the parameter server.

An arrival process is a pair of pure functions, an `ArrivalProcess`. They run
inside the jitted step, so what they remember is a pytree of arrays and what
they do is traced.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class ArrivalProcess(NamedTuple):
  """The order in which workers arrive.

  Attributes:
    init: ``init(workers, key) -> state``: what the process remembers at the
      start, a pytree of arrays. ``workers`` is a Python int, ``key`` a raw
      PRNG key (uint32, shape (2,)).
    next: ``next(state) -> (worker, state)``: the worker that arrives next, an
      int32 scalar in ``[0, workers)``, and the new state. Called once for
      every applied gradient, never while workers are still taking their first.

  Examples:
    Worker 0 is so fast that it alone ever arrives:

    >>> import jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> hare = gsgd_jax.ArrivalProcess(
    ...     init=lambda workers, key: (),
    ...     next=lambda state: (jnp.zeros([], jnp.int32), state))
    >>> tx = gsgd_jax.asynchronous(optax.sgd(0.1), workers=4, arrivals=hare)
  """

  init: Callable[[int, jax.Array], Any]
  next: Callable[[Any], tuple[jax.Array, Any]]


class RoundRobinState(NamedTuple):
  """State of `round_robin`."""

  worker: jax.Array  # shape=(), dtype=int32: who arrives next.
  workers: jax.Array  # shape=(), dtype=int32.


def round_robin() -> ArrivalProcess:
  """Workers arrive in turn: 0, 1, ..., N-1, 0, 1, ...

  The kindest cluster: the first N gradients have staleness 0, 1, ..., N-1 and
  every later one N-1.

  Returns:
    An :class:`ArrivalProcess`.

  Examples:
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.asynchronous(
    ...     optax.sgd(0.1), workers=4, arrivals=gsgd_jax.round_robin())
  """

  def init(workers, key):
    del key
    return RoundRobinState(
      worker=jnp.zeros([], jnp.int32),
      workers=jnp.asarray(workers, jnp.int32),
    )

  def next_worker(state):
    following = (state.worker + 1) % state.workers
    return state.worker, state._replace(worker=following)

  return ArrivalProcess(init, next_worker)
