"""An experiment: config -> data, model -> training, method by method."""

import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from gsgd_jax import (
  _machine,
  checkpoints,
  compensations,
  data,
  events,
  hosts,
  optimizers,
  parallel,
  resuming,
  settings,
  tasks,
  training,
  transformation,
)
from gsgd_jax._methods import nearest_multiple


def check(config: ml_collections.ConfigDict) -> None:
  """Raises a ValueError that says what is wrong with a config, if anything.

  Everything is looked at, the data and the optimizer included; nothing is
  trained. A data file that cannot be read is an OSError.
  """
  settings.check(config)
  named = events.methods(config)
  compensations.check_used(config)
  config = resolved(config)
  dataset = _load(config, 0)
  check_sizes(config, dataset)
  if config.distributed:
    hosts.check_same_data(dataset)
  for seed in range(1, config.seeds):
    _load(config, seed)
  for method in named:
    rate = transformation.learning_rate(config, method)
    optimizers.check_rates(config.schedule, rate, config.updates)
  task = tasks.make(config, dataset)
  loss_fn = task.loss_fn
  params = jax.eval_shape(task.model.init, jax.random.key(0))
  stages = task.model.stages
  batch_like_of = lambda method: transformation.batch_like_of(
    config, method, dataset, task.keyed
  )
  optimizers.dry_run(
    transformation.make_optimizer(config, loss_fn, stages=stages),
    params,
    config.optimizer + transformation.shown_kwargs(config),
    value=jax.ShapeDtypeStruct([], jnp.float32),
    batch=batch_like_of(named[0]),
    arrival=jax.ShapeDtypeStruct([], jnp.int32),
  )
  mesh, devices = parallel.devices_of(parallel.make_mesh(config.devices))
  _check_statistics(config, devices.number)
  _check_divides(config, named, devices.number)
  for method in named:
    _check_pieces(config, method, devices.number)
  for method in named:
    batch_like = batch_like_of(method)
    tx = transformation.make_transformation(
      config, method, loss_fn, batch_like, stages=stages
    )
    if transformation.by_depth(config, method):
      _check_layers(config, method, tx, params)
    if method.compensation is not None:
      inside = transformation.arriving(config, method, batch_like)
      parts = transformation.compensation_of(
        config, method, loss_fn, inside, stages
      )
      _check_joined(config, method, parts.joined)
      _check_compensation(config, method, tx, params, batch_like)
    init, room = tx.init, 0
    if devices.number > 1:
      apart = transformation.make_parallel(
        config, method, loss_fn, batch_like, devices, stages=stages
      )
      init, room = apart.local_init, apart.room
    state = jax.eval_shape(init, params)
    _check_memory(config, method, state, params, room, mesh)
    _check_trace(config, method)


def check_sizes(
  config: ml_collections.ConfigDict, dataset: data.Dataset
) -> None:
  """Raises a ValueError where a window or a batch is too large, or idle.

  Args:
    config: A config whose lengths are `resolved`.
    dataset: Its data.
  """
  for method in events.methods(config):
    _check_guidance(config, method)
  _check_batches(config, dataset)


def resolved(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A config with the length of its run, and what is in it, in updates.

  An epoch has so many updates as there are whole batches of ``batch_size`` in
  the training examples, also for methods that split larger batches. Lengths in
  epochs are rounded to the nearest update, and to at least 1 for ``epochs`` and
  ``evaluate_epochs``.

  Args:
    config: A config that ``settings.check`` has passed. Where it says nothing
      in epochs, the data are not looked at.

  Returns:
    A copy in which ``updates``, ``evaluate_every``, ``warmup`` and ``drops``
    are what ``epochs``, ``evaluate_epochs``, ``warmup_epochs`` and
    ``drop_epochs`` come to, where these are given. Once more it is the same.

  Raises:
    ValueError: A length is given both ways, and differently; or it is not
      within the run.
    OSError: The data cannot be read.

  Examples:
    >>> from gsgd_jax import experiment, settings
    >>> config = settings.default_config()
    >>> config.epochs, config.drop_epochs = 20, (10, 15)
    >>> config = experiment.resolved(config)
    >>> print(config.updates, config.drops)  # Of 1078 // 16 = 67 an epoch.
    1340 (670, 1005)
  """
  given = (config.epochs, config.evaluate_epochs, config.warmup_epochs)
  if not any(given) and not config.drop_epochs:
    return config
  config = config.copy_and_resolve_references()
  dataset = _load(config, 0)
  _check_batches(config, dataset)
  batches = dataset.examples // config.batch_size
  if config.epochs is not None:
    config.updates = max(1, round(config.epochs * batches))
  length = config.updates / batches
  for name, epochs in (
    ('warmup_epochs', (config.warmup_epochs,)),
    ('drop_epochs', config.drop_epochs),
  ):
    if epochs and max(epochs) > length:
      raise ValueError(
        f'{name} must be at most the {length:g} epochs of the run, got '
        f'{epochs[0] if len(epochs) == 1 else tuple(epochs)}'
      )
    if any(e and not round(e * batches) for e in epochs):
      raise ValueError(
        f'{name} must be at least one of the {batches} updates in an epoch, '
        f'got {min(e for e in epochs if e)}'
      )
  if config.evaluate_epochs is not None:
    config.evaluate_every = max(1, round(config.evaluate_epochs * batches))
  for name, nothing, value in (
    ('warmup', 0, round(config.warmup_epochs * batches)),
    ('drops', (), tuple(round(e * batches) for e in config.drop_epochs)),
  ):
    if value and config[name] not in (nothing, value):
      raise ValueError(
        f'{name}={config[name]} and {name.removesuffix("s")}_epochs, which is '
        f'{value}, are two lengths for one thing: give one of them'
      )
    config[name] = value or config[name]
  settings.check(config)
  settings.check_lengths(config)
  return config


def _check_batches(config, dataset):
  """A batch holds no example twice."""
  examples = dataset.examples
  for name in ('batch_size', 'split_batch_size'):
    if (config[name] or 0) > examples:
      raise ValueError(
        f'{name} must be at most the {examples} training examples of '
        f'{config.dataset}, got {config[name]}'
      )


def _check_guidance(config, method):
  """Guidance that would do nothing is a mistake."""
  if method.select is None:
    return
  if transformation.by_depth(config, method):
    raise ValueError(
      f'{method.name} replays whole batches, and with delay={config.delay} no '
      'whole gradient arrives: leave out the guidance, or give delay a number'
    )
  updates = config.updates
  if method.parallel == 'synchronous':
    updates //= transformation.joined(config, method)
  if config.window > updates:
    raise ValueError(
      f'{method.name} replays at the end of a window: window must be at most '
      f"the server's {updates} updates, got {config.window}"
    )
  replays = config.replays
  if replays == 0 or (replays is None and config.window < 2):
    raise ValueError(
      f'{method.name} would replay nothing, as replays={replays} and '
      f'window={config.window}'
    )


def _check_joined(config, method, batches):
  """Means of more gradients than there are."""
  if batches > config.updates:
    raise ValueError(
      f'{method.name} applies means of {batches} gradients, and there are only '
      f'updates={config.updates}; lower compensation_kwargs.size'
    )
  if method.select is not None and config.window > config.updates // batches:
    raise ValueError(
      f'{method.name} replays at the end of a window: window must be at most '
      f"the server's {config.updates // batches} updates, got {config.window}"
    )


def _check_compensation(config, method, tx, params, batch_like):
  """A compensation that cannot be used with the other settings."""
  stored = method.select is not None and config.stored_gradients
  if stored and method.compensation in compensations.NEED_STALE_PARAMS:
    raise ValueError(
      f'{method.name}: {method.compensation} needs to know where a gradient '
      'was taken, and replays of stored gradients do not; leave '
      'stored_gradients=False'
    )
  optimizers.dry_run(
    tx,
    params,
    f'{config.optimizer} with compensation {method.compensation}',
    value=jax.ShapeDtypeStruct([], jnp.float32),
    batch=batch_like,
    arrival=jax.ShapeDtypeStruct([], jnp.int32),
  )


def _check_layers(config, method, tx, params):
  """What arrives layer by layer comes without a loss and a batch."""
  optimizers.dry_run(
    tx,
    params,
    f'{config.optimizer} in {method.name} with delay={config.delay}',
    value=jax.ShapeDtypeStruct([], jnp.float32),
    arrival=jax.ShapeDtypeStruct([], jnp.int32),
  )


def _check_trace(config, method):
  """A trace must last as long as the run."""
  if config.trace is None or method.parallel != 'asynchronous':
    return
  entries = transformation.trace_of(config).entries
  if len(entries) < config.updates:
    raise ValueError(
      f'{entries[-1]}: the trace is too short: it ends after {len(entries):,} '
      f'arrivals, and {config.updates:,} updates need as many'
    )


def _check_divides(config, named, devices):
  """Several devices share batches and workers equally."""
  shared = {}
  for method in named:
    for name in _shared(config, method):
      shared.setdefault(name, (config[name], method))
  hosts, common = (
    jax.process_count(),
    math.gcd(*(n for n, _ in shared.values())),
  )
  for name, (number, method) in shared.items():
    if number % devices:
      nearest = nearest_multiple(number, devices)
      fewer = [
        d for d in range(1, devices) if common % d == 0 and d % hosts == 0
      ]
      hint = f', or --config.devices={fewer[-1]}' if fewer else ''
      raise ValueError(
        f'{method.name}: {devices} devices cannot share {name}={number} '
        f'equally; {nearest} would do{hint}'
      )


def _check_pieces(config, method, devices):
  """A batch, or a device's share of it, has pieces of equal size."""
  name, *_ = _shared(config, method)
  size, whose = config[name], ''
  kind = transformation.parallel_kind(config, method)
  if devices > 1 and kind in ('data_parallel', 'delayed'):
    size //= devices
    whose = f', which leaves {size} examples to a device'
  if size % config.accumulate:
    raise ValueError(
      f'{method.name}: accumulate={config.accumulate} pieces must divide '
      f'{name}={config[name]}{whose}'
    )


def _check_statistics(config, devices):
  """Batches that several devices split have no statistics of their own."""
  normalizes = config.model == 'resnet20' and config.normalization == 'batch'
  if normalizes and devices > 1:
    raise ValueError(
      'batch normalisation takes statistics of whole batches, which '
      f'{devices} devices split; use --config.normalization=group or '
      '--config.devices=1'
    )


def _shared(config, method):
  """The settings that several devices share."""
  split = method.parallel == 'data_parallel' and config.split_batch_size
  names = ['split_batch_size' if split else 'batch_size']
  kind = transformation.parallel_kind(config, method)
  if kind == 'asynchronous':
    names.append('workers')
  if kind == 'synchronous':
    names.append('workers' if config.wait_for is None else 'wait_for')
  return names


def _check_memory(config, method, state, params, room, mesh):
  # With the gradient, and what a device needs of parameters meanwhile.
  trees = (state, *[params] * (2 + room))
  sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(trees)]
  needed, there = config.seeds * sum(sizes), _memory()
  if mesh.devices.flat[0].platform == 'cpu':  # They share it.
    needed *= mesh.size // jax.process_count()
  if there is not None and needed > there:
    raise ValueError(
      f'{method.name} needs at least {needed / 2**30:,.0f} GiB of memory for '
      f'{config.seeds} seeds, {there / 2**30:,.0f} GiB are there; see workers, '
      'delay, window, hidden and seeds'
    )


def _memory():
  """Bytes of memory of the device that trains, or None where unknown."""
  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    return (device.memory_stats() or {}).get('bytes_limit')
  return _machine.memory()


def run(
  config: ml_collections.ConfigDict,
  watch: Callable[[events.Event], Any] = lambda event: None,
) -> dict[str, events.History]:
  """Trains every method of a config.

  Args:
    config: Like that of ``settings.default_config()``.
    watch: Called with every event.

  Returns:
    A ``History`` for each method's name.

  Raises:
    ValueError: The config is bad; raised before anything is computed.
    OSError: The data cannot be read.
  """
  results = events.Results(config)
  for event in stream(config):
    results.add(event)
    watch(event)
  return results.histories()


def stream(
  config: ml_collections.ConfigDict,
  profile_to: pathlib.Path | None = None,
  writer: checkpoints.Writer | None = None,
  done: resuming.Plan | None = None,
  say: Callable[[str], Any] = lambda sentence: None,
) -> Iterator[events.Event]:
  """Trains every method of a config, event by event.

  For every method a `Started`, then `Progress` about twice a second and an
  `Evaluation` at step 0, every ``config.evaluate_every`` updates and at the
  last, then a `Finished`. A method whose loss is no longer finite in one of its
  seeds ends there; its evaluations up to then stand.

  Args:
    config: Like that of ``settings.default_config()``.
    profile_to: A folder for a ``jax.profiler`` trace of a few steps of each
      method, or None.
    writer: Writes checkpoints; None is none.
    done: What was done before, and where to go on. Of methods that have ended
      nothing is told again.
    say: Called with sentences about where a method goes on.

  Yields:
    Events, as they happen.

  Raises:
    ValueError: The config is bad; raised before anything is computed.
    OSError: The data cannot be read.
  """
  check(config)
  config = resolved(config)
  datasets = load_all(config)
  task = tasks.make(config, datasets[0])
  mesh = parallel.make_mesh(config.devices)
  arrays = parallel.everywhere(mesh, data.stacked(datasets))
  params = parallel.everywhere(mesh, _initial_params(task.model, config.seeds))
  done = done or resuming.nothing()
  journal = resuming.Journal(config, datasets[0], mesh, done)
  for method in events.methods(config):
    if method.name in done.ended:
      continue
    yield events.Started(method)
    traced = profile_to and profile_to / method.name
    start, saving = done.starts.get(method.name), None
    if start is not None:
      for sentence in resuming.notices(start, config, mesh):
        say(sentence)
    if writer is not None:
      saving = resuming.Saving(writer, journal, method, start)
    for event in training.train(
      config, method, task, datasets, params, arrays, mesh, traced, saving
    ):
      journal.add(event)
      yield event
    if writer is not None and writer.leaving:
      return


def load_all(
  config: ml_collections.ConfigDict, seeds: int | None = None
) -> list[data.Dataset]:
  """A data set for each seed, or for the first ones."""
  seeds = config.seeds if seeds is None else seeds
  return [_load(config, seed) for seed in range(seeds)]


def _load(config, seed):
  return data.load(
    config.dataset,
    seed,
    target=config.target,
    preprocessing=config.preprocessing,
    train_share=config.train_share,
    validation_share=config.validation_share,
    label_noise=config.label_noise,
    context=config.context if config.model == 'gpt' else None,
    data_dir=config.data_dir,
    image_size=config.image_size,
    stream=config.stream,
  )


def _initial_params(model, seeds):
  # A map, not a vmap: random numbers of many seeds compile three times slower.
  keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
  return jax.jit(lambda keys: jax.lax.map(model.init, keys))(keys)
