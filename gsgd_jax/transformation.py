"""From a config and a method to its optax transformation."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from gsgd_jax import (
  ArrivalProcess,
  Trace,
  _methods,
  asynchronous,
  compensations,
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
  parallel,
  pipeline,
  read_trace,
  record_staleness,
  recorded_arrivals,
  round_robin,
  settings,
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
  keyed: bool = False,
) -> data.Examples:
  """Shapes and dtypes of the batch of a call, with keys or without."""
  size = batch_size(config, method)
  rows = jax.ShapeDtypeStruct((size,), jnp.int32)
  batch = jax.eval_shape(dataset.take, dataset.train, rows)
  if not keyed:
    return batch
  return batch._replace(keys=jax.ShapeDtypeStruct((size, 2), jnp.uint32))


def learning_rate(
  config: ml_collections.ConfigDict,
  method: events.Method | None = None,
  rate: Any = None,
) -> float | Callable[[Any], Any] | None:
  """The learning rate of a method, or the schedule of it, over arrivals.

  ``rate`` is put in place of what the config says; it may be traced.
  """
  if rate is None:
    rate = config.learning_rate
    if method is not None and method.compensation is not None:
      arguments = compensations.arguments_of(config, method.compensation)
      rate = arguments.get('learning_rate', rate)
  if rate is None:
    if config.schedule != 'constant' or config.warmup or config.drops:
      raise ValueError('a schedule, a warm-up and drops need a learning_rate')
    return None
  return optimizers.make_schedule(
    config.schedule,
    rate,
    config.updates,
    _plain(config.schedule_kwargs),
    config.warmup,
    config.warmup_start,
    config.drops,
    config.drop_factor,
  )


def make_optimizer(
  config: ml_collections.ConfigDict,
  loss_fn: Callable,
  method: events.Method | None = None,
  stages: Any = None,
  rate: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """The server's optimizer, which every method shares, at a method's rate."""
  tx = optimizers.make(
    config.optimizer,
    learning_rate(config, method, rate),
    _plain(config.optimizer_kwargs),
    stages,
  )
  return optimizers.with_value_fn(tx, loss_fn, config.weight_decay)


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
  stages: Any = None,
  rate: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """The transformation of a method: any optimizer, guided or not, delayed.

  ``stages`` are the model's, for delays by depth and for Muon; ``rate`` is as
  in `learning_rate`.
  """
  inside = arriving(config, method, batch_like)
  parts = compensation_of(config, method, loss_fn, inside, stages)
  tx = _server(config, method, parts, loss_fn, inside, seed, stages, rate)
  if by_depth(config, method):
    return _pipelined(config, tx, parts, stages)
  return _emulated(config, method, tx, parts, batch_like, seed)


def by_depth(config: ml_collections.ConfigDict, method: events.Method) -> bool:
  """Whether every layer has a delay of its own."""
  return method.parallel == 'delayed' and config.delay == settings.BY_DEPTH


def _delays(config, stages):
  if stages is None:
    raise ValueError(
      f'delay={config.delay} needs a model that says how deep its layers are, '
      f'and {config.model} does not'
    )
  return pipeline.by_depth(stages)


def _pipelined(config, tx, parts, stages):
  """The server's optimizer behind a pipeline."""
  tx = delayed(
    tx, _delays(config, stages), keep_params=parts.needs_stale_params
  )
  return pipeline.timed(tx, max(jax.tree.leaves(stages)) + 1)


def make_parallel(
  config: ml_collections.ConfigDict,
  method: events.Method,
  loss_fn: Callable,
  batch_like: Any,
  devices: parallel.Devices,
  seed: Any = 0,
  stages: Any = None,
) -> _methods.Method:
  """The same on several devices."""

  def server(loss_fn, inside):
    parts = compensation_of(config, method, loss_fn, inside)
    return _server(config, method, parts, loss_fn, inside, seed, stages)

  def whole(loss_fn, batch_like):
    return make_transformation(
      config, method, loss_fn, batch_like, seed, stages
    )

  where = (loss_fn, devices, batch_like)
  kind = parallel_kind(config, method)
  if kind == 'data_parallel':
    return _methods.data_parallel(whole, *where)
  inside = arriving(config, method, batch_like)
  parts = compensation_of(config, method, loss_fn, inside)
  options = _settings(config, method, parts, seed)
  if kind == 'asynchronous':
    del options['max_ahead']
    return _methods.asynchronous(
      server, *where, config.workers, round_size=config.round_size, **options
    )
  if kind == 'synchronous':
    return _methods.synchronous(server, *where, config.workers, **options)
  return _methods.delayed_all_reduce(server, *where, config.delay, **options)


def parallel_kind(
  config: ml_collections.ConfigDict, method: events.Method
) -> str:
  """How several devices train by a method together.

  ``asynchronous``: emulated workers, spread over the devices; ``synchronous``:
  devices are workers; ``delayed``: a delayed all-reduce; ``data_parallel``:
  every batch is split.
  """
  # Who waits for others takes part in no rounds, nor does one alone.
  no_rounds = config.workers == 1 or config.max_ahead is not None
  name = method.parallel
  split = name == 'sequential' or (name == 'asynchronous' and no_rounds)
  split |= by_depth(config, method)
  return 'data_parallel' if split else name


def _server(config, method, parts, loss_fn, inside, seed, stages, rate=None):
  """What is done with an arriving gradient, whose batch is like `inside`."""
  tx = _compensated(config, method, parts, loss_fn, stages, rate)
  if method.select is not None:
    tx = guided(
      tx,
      None if config.stored_gradients else loss_fn,
      window=config.window,
      replays=config.replays,
      revisit=0 if config.stored_gradients else config.revisit,
      select=method.select,
      average_scores=config.average_scores,
      replay_with=_replay_with(config, method, parts, rate),
      replay_model=config.replay_model,
      batch_like=_joined_batch(inside, parts.joined),
      seed=seed,
    )
  tx = record_staleness(tx, BINS, bin_width(config))
  if parts.acceptance is not None:  # What is refused reaches nothing inside.
    tx = parts.acceptance(tx)
  return tx


def compensation_of(
  config: ml_collections.ConfigDict,
  method: events.Method,
  loss_fn: Callable,
  inside: Any,
  stages: Any = None,
) -> compensations.Parts:
  """What a method's compensation puts where; see `arriving`."""
  name = method.compensation
  if name is None:
    return compensations.Parts()
  delay = None
  if by_depth(config, method):
    if name not in compensations.BY_LAYER:
      raise ValueError(
        f'{method.name}: with delay={config.delay} no whole gradient arrives, '
        f'which {name} needs; {", ".join(compensations.BY_LAYER)} do without'
      )
    delay = _delays(config, stages)
  if name in compensations.OPTIMIZERS:
    _check_own_optimizer(config, name)
  if name in compensations.PER_WORKER and method.parallel == 'delayed':
    raise ValueError(
      f'{method.name}: {name} has a momentum for each worker, and delayed has '
      f'no workers; use asynchronous with workers={config.delay + 1}'
    )
  rounds = method.parallel == 'synchronous' and config.combine == 'sequential'
  if name == 'dana_slim' and rounds and config.workers > 1:
    raise ValueError(
      f'{method.name}: the workers of synchronous have no momentum of their '
      'own; use dana, or asynchronous'
    )
  return compensations.parts_of(
    name,
    compensations.arguments_of(config, name),
    compensations.Cluster(
      workers=_stale_workers(config, method, delay),
      loss_fn=loss_fn,
      batch_like=inside,
      own_transform=method.parallel in ('asynchronous', 'sequential'),
      delay=delay,
    ),
  )


def _check_own_optimizer(config, name):
  if config.optimizer != 'sgd' or config.optimizer_kwargs:
    raise ValueError(
      f'compensation {name} is an optimizer of its own: leave optimizer=sgd '
      f'alone, got {config.optimizer}{shown_kwargs(config)}'
    )


def _stale_workers(config, method, delay):
  """How many workers' gradients make one another stale."""
  if delay is not None:
    return max(jax.tree.leaves(delay)) + 1
  if method.parallel == 'asynchronous':
    return config.workers
  if method.parallel == 'delayed':
    return config.delay + 1
  if method.parallel == 'synchronous' and config.combine == 'sequential':
    return config.workers
  return 1


def _compensated(config, method, parts, loss_fn, stages, rate):
  """The server's optimizer, with what a compensation puts around it."""
  if parts.optimizer is None:
    tx = make_optimizer(config, loss_fn, method, stages, rate)
  else:
    tx = compensations.optimizer_of(
      parts, method.compensation, learning_rate(config, method, rate)
    )
  if parts.prediction is not None:
    tx = parts.prediction(tx)
  return _treated(config, parts, tx)


def _treated(config, parts, tx):
  """The optimizer `tx` behind what is done with gradients as they arrive."""
  correction = [] if parts.correction is None else [parts.correction]
  if parts.worker_transform is not None:  # They have done it themselves.
    return _chained(*correction, tx)
  return _chained(*_clipping(config), *correction, *_decay(config), tx)


def _clipping(config):
  if config.clip_norm is None:
    return []
  return [optax.clip_by_global_norm(config.clip_norm)]


def _decay(config):
  if not config.weight_decay:
    return []
  return [optax.add_decayed_weights(config.weight_decay)]


def _chained(*transforms):
  return transforms[0] if len(transforms) == 1 else optax.chain(*transforms)


def _worker_transform(config, parts):
  """The workers' own momentum, and what comes before any momentum."""
  if parts.worker_transform is None:
    return None
  return _chained(*_clipping(config), *_decay(config), parts.worker_transform)


def _replay_with(config, method, parts, rate):
  """What applies replays, where it is not what applies gradients."""
  step = config.replay_step
  if step is None and not parts.per_worker:
    return None
  weight = (1.0 if step is None else step) * _weight(config, parts)
  tx = optimizers.driven(
    lambda rate: optax.sgd(rate * weight),
    learning_rate(config, method, rate),
    'guided SGD',
  )
  if config.stored_gradients and parts.worker_transform is not None:
    return tx  # Its worker has clipped it.
  return _chained(*_clipping(config), *_decay(config), tx)


def _weight(config, parts):
  """What a gradient weighs in the end, over the learning rate."""
  if parts.weight is not None:
    return parts.weight
  momentum = 0.0
  if config.optimizer in ('sgd', 'momentum', 'nesterov'):
    default = 0.0 if config.optimizer == 'sgd' else 0.9
    momentum = config.optimizer_kwargs.get('momentum', default) or 0.0
  return 1 / (1 - momentum)


def _emulated(config, method, tx, parts, batch_like, seed):
  """The cluster around the server's optimizer."""
  options = _settings(config, method, parts, seed)
  if method.parallel == 'sequential':
    return asynchronous(tx, 1, batch_like=batch_like, **options)
  if method.parallel == 'delayed':
    return delayed(tx, config.delay, batch_like=batch_like, **options)
  if method.parallel == 'asynchronous':
    return asynchronous(tx, config.workers, batch_like=batch_like, **options)
  if method.parallel == 'synchronous':
    return synchronous(tx, config.workers, batch_like=batch_like, **options)
  size = batch_size(config, method)
  return data_parallel(tx, config.workers, size, **options)


def _settings(
  config: ml_collections.ConfigDict,
  method: events.Method,
  parts: compensations.Parts,
  seed: Any,
) -> dict[str, Any]:
  """The arguments of a method's emulation, but for sizes."""
  options = dict(sync_cost=config.sync_cost)
  if method.parallel in ('sequential', 'delayed', 'asynchronous'):
    options['keep_params'] = parts.needs_stale_params
  if method.parallel in ('sequential', 'asynchronous'):
    options['worker_transform'] = _worker_transform(config, parts)
  if method.parallel in ('sequential', 'delayed'):
    return options
  options |= dict(arrivals=make_arrivals(config), seed=seed)
  if method.parallel == 'asynchronous':
    options['overwrite_within'] = config.overwrite_within
    options['max_ahead'] = config.max_ahead
  elif method.parallel == 'synchronous':
    options |= dict(combine=config.combine, wait_for=config.wait_for)
  else:
    options['worker_batch_size'] = config.batch_size
  return options


# The histogram of staleness: 128 bins up to four rounds of all workers.
BINS = 128


def bin_width(config: ml_collections.ConfigDict) -> int:
  """Stalenesses that a bin of the histogram counts."""
  delay = 0 if config.delay == settings.BY_DEPTH else config.delay
  return -(-4 * max(config.workers, delay + 1) // BINS)


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


def arriving(
  config: ml_collections.ConfigDict, method: events.Method, batch_like: Any
) -> Any:
  """The batch of an arriving gradient, from that of a call."""
  if method.parallel != 'synchronous' or config.combine != 'mean':
    return batch_like
  return _joined_batch(batch_like, waited_for(config))


def _joined_batch(batch_like, batches):
  """Several batches as one."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (batches * x.shape[0], *x.shape[1:]), x.dtype
    ),
    batch_like,
  )


def filling_calls(
  config: ml_collections.ConfigDict, method: events.Method
) -> int:
  """Calls before the first gradient arrives."""
  if by_depth(config, method):
    return 0  # The last layer has none.
  return {'asynchronous': config.workers - 1, 'delayed': config.delay}.get(
    method.parallel, 0
  )
