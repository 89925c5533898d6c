"""A delay of its own for every leaf of the parameters: a pipeline's stages.

What `delayed` does with a tree of delays; the delays of pipelined
backpropagation; and its clock.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gsgd_jax import _cluster, _protocol, _ring, clock


class DelayedState(NamedTuple):
  """State of `delayed` with a tree of ints."""

  count: jax.Array  # shape=(), dtype=int32: calls so far.
  in_flight: optax.Updates  # A ring of delay + 1 slots a leaf; none for 0.
  stale_params: optax.Params | None  # Likewise, with `keep_params`.
  inner_state: optax.OptState


class TimedState(NamedTuple):
  """State of `timed`."""

  count: jax.Array  # shape=(), dtype=int32: calls so far.
  clock: _protocol.Clock
  inner_state: optax.OptState


def by_depth(stages: Any) -> Any:
  r"""The delays of pipelined backpropagation.

  .. math::

    D_s = 2 (S - 1 - s)

  updates for stage s of S: a batch has S - 1 - s stages to go until its loss
  is known, and as many to come back, while the pipeline takes in a new batch
  every update.

  Args:
    stages: A pytree of ints of at least 0: the stage of every leaf of the
      parameters, 0 nearest to the input. S is the largest plus 1.

  Returns:
    A pytree of ints, for ``delayed``.

  Raises:
    ValueError: ``stages`` holds none, or one that is not an int.

  Examples:
    >>> from gsgd_jax import pipeline
    >>> pipeline.by_depth({'first': 0, 'middle': 1, 'last': 2})
    {'first': 4, 'last': 0, 'middle': 2}

  References:
    Kosson et al., `Pipelined Backpropagation at Scale`, arXiv:2003.11666, 2021.
  """
  stages = jax.tree.map(
    lambda s: _protocol.positive_int('a stage', s, minimum=0), stages
  )
  if not jax.tree.leaves(stages):
    raise ValueError(f'stages must be a tree of ints, got {stages!r}')
  last = max(jax.tree.leaves(stages))
  return jax.tree.map(lambda s: 2 * (last - s), stages)


def timed(
  inner: optax.GradientTransformation, stages: int
) -> optax.GradientTransformationExtraArgs:
  """Puts a clock around `inner`: so many stages work at once.

  Each has its share of a gradient, so that a call takes ``1 / stages`` units.
  """
  inner = optax.with_extra_args_support(inner)
  shares = clock.of_float64(np.arange(1, stages + 1) / stages)

  def init_fn(params):
    return TimedState(
      count=jnp.zeros([], jnp.int32),
      clock=_cluster.clock_of(stages, 0.0),
      inner_state=inner.init(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra_args
    )
    time = clock.at(shares, state.count % stages)
    time = time._replace(whole=time.whole + state.count // stages)
    return updates, TimedState(
      count=_protocol.one_more(state.count),
      clock=state.clock._replace(time=time),
      inner_state=inner_state,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def delayed_leaves(
  inner: optax.GradientTransformation, delay: Any, keep_params: bool
) -> optax.GradientTransformationExtraArgs:
  """`delayed` with a tree of ints."""
  inner = optax.with_extra_args_support(inner)
  first = min(jax.tree.leaves(delay))

  def delays_of(params):
    return _protocol.broadcast('delay', delay, params)

  def rings_of(params):
    if not jax.tree.leaves(params):  # Also what optax.tree.map_params puts in.
      return params
    return jax.tree.map(
      lambda p, d: _ring.stack(p, d + 1 if d else 0),
      params,
      delays_of(params),
    )

  def through_ring(ring, x, d, count):
    """Writes `x`, reads what was written `d` calls ago."""
    if d == 0:
      return ring, x
    ring = _ring.write(ring, count % (d + 1), x)
    return ring, _ring.read(ring, (count + 1) % (d + 1)).astype(x.dtype)

  def through_rings(rings, tree, delays, count):
    pairs = jax.tree.map(
      lambda r, x, d: through_ring(r, x, d, count), rings, tree, delays
    )
    return jax.tree.transpose(
      jax.tree.structure(tree), jax.tree.structure((0, 0)), pairs
    )

  def init_fn(params) -> _protocol.State:
    return DelayedState(
      count=jnp.zeros([], jnp.int32),
      # Slots that were never written hold zeros: no gradient yet.
      in_flight=rings_of(optax.tree.zeros_like(params)),
      stale_params=rings_of(params) if keep_params else None,
      inner_state=inner.init(params),
    )

  def update_fn(
    updates, state, params: Any = None, **extra_args
  ) -> tuple[optax.Updates, _protocol.State]:
    if keep_params:
      _protocol.required_params('delayed', params)
    count, delays = state.count, delays_of(updates)
    in_flight, arrived = through_rings(state.in_flight, updates, delays, count)
    extras = _protocol.other_extras(extra_args, arrived)
    version = jnp.maximum(count - first, 0)
    extras['staleness'] = jax.tree.map(
      lambda d: version - jnp.maximum(count - d - first, 0), delays
    )
    stale_params = None
    if keep_params:
      read = _protocol.worker_params(params, state.inner_state)
      stale_params, extras['stale_params'] = through_rings(
        state.stale_params, read, delays, count
      )

    def apply(carry):
      arrived, inner_state = carry
      return inner.update(arrived, inner_state, params, **extras)

    carry = (arrived, state.inner_state)
    new_updates, inner_state = (
      apply(carry)
      if first == 0
      else _ring.applied_when(count >= first, apply, carry)
    )
    new_updates = mute_filling(new_updates, delays, count)
    return _ring.cast_like(new_updates, updates), DelayedState(
      count=_protocol.one_more(count),
      in_flight=in_flight,
      stale_params=stale_params,
      inner_state=inner_state,
    )

  def mute_filling(updates, delays, count):
    return jax.tree.map(
      lambda u, d: u if d == 0 else jnp.where(count >= d, u, 0),
      updates,
      delays,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
