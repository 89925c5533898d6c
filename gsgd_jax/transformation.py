"""From a config and a method to its optax transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from gsgd_jax import (
  asynchronous,
  data,
  delayed,
  events,
  guided,
  optimizers,
  synchronous,
)


def batch_like_of(
  config: ml_collections.ConfigDict, dataset: data.Dataset
) -> data.Examples:
  """Shapes and dtypes of a batch."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype),
    dataset.train,
  )


def learning_rate(
  config: ml_collections.ConfigDict,
) -> float | Callable[[Any], Any] | None:
  """The learning rate, or the schedule of it, over arrivals."""
  if config.learning_rate is None:
    if config.schedule != 'constant' or config.warmup:
      raise ValueError('a schedule and a warm-up need a learning_rate')
    return None
  return optimizers.make_schedule(
    config.schedule,
    config.learning_rate,
    config.updates,
    _plain(config.schedule_kwargs),
    config.warmup,
  )


def make_optimizer(
  config: ml_collections.ConfigDict, loss_fn: Callable
) -> optax.GradientTransformationExtraArgs:
  """The server's optimizer, which every method shares."""
  tx = optimizers.make(
    config.optimizer, learning_rate(config), _plain(config.optimizer_kwargs)
  )
  return optimizers.with_value_fn(tx, loss_fn)


def _plain(config):
  return config.to_dict() if hasattr(config, 'to_dict') else dict(config)


def shown_kwargs(config: ml_collections.ConfigDict) -> str:
  """The optimizer's arguments, for sentences about them."""
  given = _plain(config.optimizer_kwargs)
  shown = ', '.join(f'{name}={value!r}' for name, value in given.items())
  return f' with {shown}' if shown else ''


def make_transformation(
  config: ml_collections.ConfigDict,
  method: events.Method,
  loss_fn: Callable,
  batch_like: Any,
  seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
  """The transformation of a method: any optimizer, guided or not, delayed."""
  tx = make_optimizer(config, loss_fn)
  if method.select is not None:
    tx = guided(
      tx,
      None if config.stored_gradients else loss_fn,
      window=config.window,
      replays=config.replays,
      revisit=0 if config.stored_gradients else config.revisit,
      select=method.select,
      average_scores=config.average_scores,
      batch_like=_arriving(config, method, batch_like),
      seed=seed,
    )
  tx = _recorded(tx)
  if method.parallel == 'asynchronous':
    return asynchronous(tx, config.workers, batch_like=batch_like)
  if method.parallel == 'delayed':
    return delayed(tx, config.delay, batch_like=batch_like)
  if method.parallel == 'synchronous':
    return synchronous(
      tx, config.workers, combine=config.combine, batch_like=batch_like
    )
  return tx


def joined(config: ml_collections.ConfigDict, method: events.Method) -> int:
  """How many gradients of workers arrive as one."""
  mean = method.parallel == 'synchronous' and config.combine == 'mean'
  return config.workers if mean else 1


def _arriving(config, method, batch_like):
  """The batch of an arriving gradient."""
  size = joined(config, method) * config.batch_size
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), batch_like
  )


def filling_calls(
  config: ml_collections.ConfigDict, method: events.Method
) -> int:
  """Calls before the first gradient arrives."""
  return {'asynchronous': config.workers - 1, 'delayed': config.delay}.get(
    method.parallel, 0
  )


class RecordedState(NamedTuple):
  """State around the server's optimizer: what has arrived."""

  staleness: jax.Array  # shape=(), dtype=int32: sum over arrivals; may wrap.
  arrivals: jax.Array  # shape=(), dtype=int32.
  inner_state: optax.OptState


def _recorded(inner):
  """Adds up the staleness of what arrives."""

  def init_fn(params):
    # Arrays of their own: the state is donated.
    zero = lambda: jnp.zeros([], jnp.int32)
    return RecordedState(zero(), zero(), inner.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra_args
    )
    staleness = jnp.asarray(extra_args.get('staleness', 0), jnp.int32)
    return updates, RecordedState(
      state.staleness + staleness, state.arrivals + 1, inner_state
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
