"""From a config and a method to its optax transformation."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import optax

from gsgd_jax import (
  ArrivalProcess,
  Trace,
  asynchronous,
  data,
  data_parallel,
  delayed,
  events,
  exponential_arrivals,
  failing,
  fixed_speeds,
  gamma_arrivals,
  guided,
  optimizers,
  read_trace,
  record_staleness,
  recorded_arrivals,
  round_robin,
  straggler,
  synchronous,
  uniform_arrivals,
)


def batch_size(config: ml_collections.ConfigDict, method: events.Method) -> int:
  """Examples in the batch of a call."""
  split = config.split_batch_size
  if method.parallel == 'data_parallel' and split is not None:
    return split
  return config.batch_size


def batch_like_of(
  config: ml_collections.ConfigDict,
  method: events.Method,
  dataset: data.Dataset,
) -> data.Examples:
  """Shapes and dtypes of the batch of a call."""
  size = batch_size(config, method)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype),
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


def make_arrivals(config: ml_collections.ConfigDict) -> ArrivalProcess:
  """The cluster of workers."""
  process = {
    'round_robin': round_robin,
    'gamma': lambda: gamma_arrivals(config.cv, config.machine_cv),
    'uniform': lambda: uniform_arrivals(config.spread, config.machine_cv),
    'exponential': lambda: exponential_arrivals(config.machine_cv),
    'speeds': lambda: fixed_speeds(config.speeds),
    'recorded': lambda: recorded_arrivals(
      trace_of(config), unit=config.trace_unit
    ),
  }[config.arrivals]()
  if config.straggler is not None:
    process = straggler(process, config.straggler)
  if config.fails_at is not None:
    process = failing(
      process, config.fails_at, config.workers - 1, config.back_at
    )
  return process


def trace_of(config: ml_collections.ConfigDict) -> Trace:
  """The trace of 'recorded' arrivals, read once."""
  return _read_trace(config.trace, os.stat(config.trace))


@functools.lru_cache(maxsize=1)
def _read_trace(path, version):
  del version  # A file that changes is read again.
  return read_trace(path)


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
      replay_model=config.replay_model,
      batch_like=_arriving(config, method, batch_like),
      seed=seed,
    )
  tx = record_staleness(tx, BINS, bin_width(config))
  return _emulated(config, method, tx, batch_like, seed)


def _emulated(config, method, tx, batch_like, seed):
  """The cluster around the server's optimizer."""
  clock = dict(sync_cost=config.sync_cost)
  if method.parallel == 'sequential':
    return asynchronous(tx, 1, batch_like=batch_like, **clock)
  if method.parallel == 'delayed':
    return delayed(tx, config.delay, batch_like=batch_like, **clock)
  cluster = dict(arrivals=make_arrivals(config), seed=seed, **clock)
  if method.parallel == 'asynchronous':
    return asynchronous(
      tx,
      config.workers,
      batch_like=batch_like,
      overwrite_within=config.overwrite_within,
      max_ahead=config.max_ahead,
      **cluster,
    )
  if method.parallel == 'synchronous':
    return synchronous(
      tx,
      config.workers,
      combine=config.combine,
      wait_for=config.wait_for,
      batch_like=batch_like,
      **cluster,
    )
  return data_parallel(
    tx,
    config.workers,
    batch_size(config, method),
    worker_batch_size=config.batch_size,
    **cluster,
  )


# The histogram of staleness: 128 bins up to four rounds of all workers.
BINS = 128


def bin_width(config: ml_collections.ConfigDict) -> int:
  """Stalenesses that a bin of the histogram counts."""
  return -(-4 * max(config.workers, config.delay + 1) // BINS)


def joined(config: ml_collections.ConfigDict, method: events.Method) -> float:
  """How many gradients of ``batch_size`` examples arrive as one."""
  if method.parallel == 'data_parallel':
    return batch_size(config, method) / config.batch_size
  if method.parallel == 'synchronous' and config.combine == 'mean':
    return waited_for(config)
  return 1


def waited_for(config: ml_collections.ConfigDict) -> int:
  """Gradients in a round of 'synchronous'."""
  return config.workers if config.wait_for is None else config.wait_for


def gradients_taken(
  config: ml_collections.ConfigDict, method: events.Method, calls: int
) -> float:
  """Gradients that so many calls stand for, those thrown away included."""
  if method.parallel == 'data_parallel':
    return calls * joined(config, method)
  if method.parallel == 'synchronous':
    waited = waited_for(config)
    return calls + calls // waited * (config.workers - waited)
  return calls


def _arriving(config, method, batch_like):
  """The batch of an arriving gradient."""
  if method.parallel != 'synchronous' or config.combine != 'mean':
    return batch_like
  size = waited_for(config) * config.batch_size
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
