"""How stale the gradients are, and whose they are.

`record_staleness` stands where gradients are applied and reads the extra
argument `staleness` alone, so it works on a real server too. `worker_shares`
reads what the emulations count.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gsgd_jax import _protocol

_LOW_BITS = 20


class StalenessRecord(NamedTuple):
  """State of `record_staleness`."""

  count: jax.Array  # shape=(), dtype=int32: gradients so far.
  latest: jax.Array  # shape=(), dtype=int32: staleness of the last one.
  maximum: jax.Array  # shape=(), dtype=int32.
  total: tuple[jax.Array, jax.Array]  # int32: millions (2^20), and the rest.
  histogram: jax.Array  # shape=(bins,), dtype=int32.
  bin_width: jax.Array  # shape=(), dtype=int32.
  inner_state: optax.OptState


def record_staleness(
  inner: optax.GradientTransformation, bins: int = 128, bin_width: int = 1
) -> optax.GradientTransformationExtraArgs:
  r"""Records the staleness of the gradients that reach ``inner``.

  Changes nothing else. Read it with :func:`staleness_summary`. Of
  :func:`delayed` with a tree of delays it is the largest of every gradient.

  Args:
    inner: Any optax transformation.
    bins: Bins of the histogram, at least 1. Bin i counts stalenesses from
      ``i * bin_width`` to ``(i + 1) * bin_width - 1``, the last one all above.
    bin_width: At least 1.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` whose state is a
    ``StalenessRecord``: a few integers and the histogram.

  Raises:
    ValueError: ``bins`` or ``bin_width`` is not an int of at least 1; in
      ``update``, the extra argument ``staleness`` is missing.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.asynchronous(
    ...     gsgd_jax.record_staleness(optax.sgd(0.1), bins=4), workers=3)
    >>> params = jnp.array([1.0])
    >>> state = tx.init(params)
    >>> for _ in range(2 + 6):
    ...   updates, state = tx.update(params, state, params)
    >>> summary = gsgd_jax.staleness_summary(state)
    >>> print(summary.mean, summary.maximum, summary.histogram)
    1.5 2 [1 1 4 0]
  """
  bins = _protocol.positive_int('bins', bins)
  bin_width = _protocol.positive_int('bin_width', bin_width)
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    # Every leaf is an array of its own: the state may be donated.
    zero = lambda: jnp.zeros([], jnp.int32)
    return StalenessRecord(
      count=zero(),
      latest=zero(),
      maximum=zero(),
      total=(zero(), zero()),
      histogram=jnp.zeros([bins], jnp.int32),
      bin_width=jnp.asarray(bin_width, jnp.int32),
      inner_state=inner.init(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    staleness = _largest(extra_args)
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra_args
    )
    low = state.total[1] + staleness
    total = (state.total[0] + (low >> _LOW_BITS), low & (2**_LOW_BITS - 1))
    bin_ = jnp.minimum(staleness // state.bin_width, bins - 1)
    return updates, StalenessRecord(
      count=_protocol.one_more(state.count),
      latest=staleness,
      maximum=jnp.maximum(state.maximum, staleness),
      total=total,
      histogram=jnp.asarray(state.histogram).at[bin_].add(1),
      bin_width=state.bin_width,
      inner_state=inner_state,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _largest(extra_args):
  given = dict(extra_args)
  leaves = jax.tree.leaves(given.get('staleness'))
  if leaves:
    given['staleness'] = functools.reduce(jnp.maximum, leaves)
  return _protocol.one_staleness('record_staleness', given)


class StalenessSummary(NamedTuple):
  """What :func:`record_staleness` has seen, in NumPy.

  Attributes:
    count: Gradients so far, int64.
    latest: Staleness of the last one, int64.
    mean: Mean staleness, float64; NaN before the first gradient.
    maximum: The largest, int64.
    histogram: How many gradients, int64, shape ``(bins,)``.
    bin_width: Stalenesses a bin, int64.

  Examples:
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.record_staleness(optax.sgd(0.1), bins=2)
    >>> gsgd_jax.staleness_summary(tx.init(1.0)).histogram
    array([0, 0])
  """

  count: np.ndarray
  latest: np.ndarray
  mean: np.ndarray
  maximum: np.ndarray
  histogram: np.ndarray
  bin_width: np.ndarray


def staleness_summary(state: optax.OptState) -> StalenessSummary:
  """What :func:`record_staleness` has recorded, for people and plots.

  Args:
    state: A state with one ``StalenessRecord`` in it, outside of any
      transformation of JAX.

  Returns:
    A :class:`StalenessSummary`; shapes follow the state's (seeds under
    ``vmap``).

  Raises:
    ValueError: ``state`` holds no such record.

  Examples:
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.record_staleness(optax.sgd(0.1))
    >>> state = tx.init(1.0)
    >>> for staleness in (0, 1, 5):
    ...   _, state = tx.update(1.0, state, staleness=staleness)
    >>> print(gsgd_jax.staleness_summary(state).mean)
    2.0
  """
  records = _protocol.announced(state, StalenessRecord)
  if not records:
    raise ValueError(
      'staleness_summary found no record in this state: put record_staleness '
      "around the server's optimizer"
    )
  record = jax.tree.map(np.asarray, records[0]._replace(inner_state=None))
  integers = {
    name: getattr(record, name).astype(np.int64)[()]
    for name in ('count', 'latest', 'maximum', 'histogram', 'bin_width')
  }
  return StalenessSummary(
    mean=total_staleness(record) / np.where(record.count, record.count, np.nan),
    **integers,
  )


def total_staleness(record: StalenessRecord) -> np.ndarray:
  """The sum of all stalenesses, int64."""
  high, low = (np.asarray(x, np.int64) for x in record.total)
  return (high << _LOW_BITS) + low


def worker_shares(state: optax.OptState) -> np.ndarray:
  """Each worker's share of the gradients that were applied.

  Methods that refuse stale gradients, or wait for the fastest alone, starve
  slow workers: their data are hardly learned from. A fair share is 1 / N.

  Args:
    state: The state of :func:`asynchronous` or :func:`synchronous`, or of any
      chain around one, outside of any transformation of JAX.

  Returns:
    Shares, float64, shape ``(workers,)`` (seeds before it, under ``vmap``);
    NaN while nothing has been applied.

  Raises:
    ValueError: ``state`` counts no workers.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.asynchronous(
    ...     optax.sgd(0.1), 2, arrivals=gsgd_jax.fixed_speeds([3.0, 1.0]))
    >>> params = jnp.array([1.0])
    >>> state = tx.init(params)
    >>> for _ in range(1 + 8):
    ...   updates, state = tx.update(params, state, params)
    >>> print(gsgd_jax.worker_shares(state))
    [0.75 0.25]
  """
  found = _protocol.announced(state, _protocol.Applied)
  if not found:
    raise ValueError(
      'worker_shares found no workers in this state: asynchronous, delayed '
      'with an int, and synchronous count theirs'
    )
  counts = np.asarray(found[0].by_worker, np.float64)
  total = counts.sum(axis=-1, keepdims=True)
  return counts / np.where(total, total, np.nan)
