"""The compiled programs of a method, for one device or for many.

A program trains all seeds of a method at once under one `vmap`, a chunk of
calls at a time. On one device it takes call by call; on several each method
has its own way (`transformation.parallel_kind`), all of them under `shard_map`.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax import custom_batching

from gsgd_jax import (
  _methods,
  _protocol,
  batches,
  data,
  diagnostics,
  events,
  optimizers,
  parallel,
  tasks,
  transformation,
  worker_params,
)


class Rows(NamedTuple):
  """The rows that a chunk of calls reads; leading axes (seeds, calls)."""

  batch: Any  # Row numbers; or the examples themselves, where they stream.
  keys: Any  # A key for each example; or None.
  verification: Any  # Row numbers; or None.


class Cluster(NamedTuple):
  """What the transformations have counted since the start."""

  clock: Any  # What `simulated_time` reads.
  record: diagnostics.StalenessRecord
  applied: Any  # What `worker_shares` reads; None where nobody counts.
  overwritten: jax.Array
  lost: jax.Array
  refused: jax.Array
  extra_gradients: jax.Array  # Of the server: replays, and corrections.


class Carry(NamedTuple):
  """What a run carries from call to call."""

  params: Any
  opt_state: optax.OptState
  calls: jax.Array  # shape=(), int32.
  bad_call: jax.Array  # shape=(), int32: the first with no finite loss, or -1.
  bad_loss: jax.Array  # shape=(): that loss.


class Totals(NamedTuple):
  """What a chunk leaves on the device for the host, beside its carry."""

  loss: jax.Array  # Sum of the chunk's.
  bad_call: jax.Array
  bad_loss: jax.Array
  cluster: Cluster
  pace: jax.Array  # Calls that a next chunk should have; agreed by all hosts.


class Programs(NamedTuple):
  """What a method is trained by; every leaf has a leading axis of seeds.

  Attributes:
    init: ``init(seeds, params) -> carry``.
    advance: ``advance(carry, arrays, rows, length, pace) -> (carry, totals,
      evaluated)``: a chunk of so many calls; the carry is donated.
    measure: ``measure(evaluated, arrays)``: losses and accuracies.
    placed: ``placed(rows, pace)``: both where `advance` wants them.
    like: ``like(devices)``: shapes of the carry on so many devices.
    moved: ``moved(carry, devices)``: a carry of so many devices, as `advance`
      wants it.
  """

  init: Callable
  advance: Callable
  measure: Callable
  placed: Callable
  like: Callable
  moved: Callable


def make(
  config: ml_collections.ConfigDict,
  method: events.Method,
  task: tasks.Task,
  datasets: list[data.Dataset],
  mesh: jax.sharding.Mesh,
) -> Programs:
  """The programs of a method on the devices of a mesh."""
  settings = Settings(config, method, task, datasets)
  if mesh.size > 1:
    return _many_devices(settings, mesh)
  init_one, advance_one = _one_device(settings)
  axes = _axes_on(settings, 1)
  own = data.axes(datasets)
  return Programs(
    jax.jit(jax.vmap(init_one, out_axes=axes)),
    jax.jit(
      jax.vmap(
        advance_one, in_axes=(axes, own, 0, None, None), out_axes=(axes, 0, 0)
      ),
      donate_argnums=0,
    ),
    jax.jit(jax.vmap(task.measure, in_axes=(0, own))),
    lambda rows, pace: (rows, pace),
    functools.partial(_like, settings),
    functools.partial(_moved, settings, 1, None),
  )


class Settings(NamedTuple):
  """What is trained, and by which method."""

  config: ml_collections.ConfigDict
  method: events.Method
  task: tasks.Task
  datasets: list[data.Dataset]

  def make(self, how: Callable, *where: Any, **options: Any) -> Any:
    """What trains, of a seed; `how` says on what."""
    batch_like = transformation.batch_like_of(
      self.config, self.method, self.datasets[0], self.task.keyed
    )
    return how(
      self.config,
      self.method,
      self.task.loss_fn,
      batch_like,
      *where,
      stages=self.task.model.stages,
      **options,
    )

  def batch(
    self, train: data.Examples | data.Text, batch: Any, keys: Any
  ) -> data.Examples:
    """A batch, from its rows."""
    dataset = self.datasets[0]
    if dataset.stream is None:
      batch = dataset.take(train, batch)
    return batch._replace(keys=keys)

  def verification(self, train: data.Examples | data.Text, rows: Any) -> Any:
    """The verification sample: without keys nothing is drawn."""
    return self.datasets[0].take(train, rows)

  @property
  def filling(self) -> int:
    """Calls until the first gradient arrives."""
    return transformation.filling_calls(self.config, self.method)

  def params(self) -> optax.Params:
    """Their shapes."""
    return jax.eval_shape(self.task.model.init, jax.random.key(0))


def padded(config: ml_collections.ConfigDict, dataset: data.Dataset) -> int:
  """Calls that a chunk has room for; its rows take 64 MB, or are one call's."""
  size = max(config.batch_size, config.split_batch_size or 0)
  numbers = size + batches.MOST_VERIFICATION
  if dataset.stream is not None:  # The images themselves, bytes.
    numbers += size * math.prod(dataset.shape) // 4
  room = 2**24 // (config.seeds * numbers)
  return max(1, min(config.evaluate_every, config.updates, 512, room))


class Feed:
  """What chunks of calls read: batches by call, samples by update.

  Args:
    config: The run's settings.
    method: What reads.
    datasets: A data set for each seed.
    keyed: Whether examples need keys.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    method: events.Method,
    datasets: list[data.Dataset],
    keyed: bool,
  ) -> None:
    self._datasets = datasets
    self._keyed = keyed
    self.room: int = padded(config, datasets[0])
    self._filling = transformation.filling_calls(config, method)
    self._size = transformation.batch_size(config, method)
    self._samples = bool(
      method.select and config.verification and not config.stored_gradients
    )
    self._streams = [
      d.stream.batches(self._size, seed)
      for seed, d in enumerate(datasets)
      if d.stream is not None
    ]

  def rows(self, first_call: int, length: int) -> Rows:
    """The rows of a chunk; padded to one length."""
    keys = verification = None
    if self._streams:
      batch = self._streamed(first_call, length)
    else:
      rows_of = [
        functools.partial(d.batch_rows, self._size, seed)
        for seed, d in enumerate(self._datasets)
      ]
      batch = self._stacked(rows_of, first_call, length)
    if self._keyed:
      keys_of = [
        functools.partial(batches.batch_keys, self._size, seed)
        for seed in range(len(self._datasets))
      ]
      keys = self._stacked(keys_of, first_call, length)
    if self._samples:
      rows_of = [
        functools.partial(d.verification_rows, seed)
        for seed, d in enumerate(self._datasets)
      ]
      verification = self._stacked(rows_of, first_call, length, self._filling)
    return Rows(batch, keys, verification)

  def close(self) -> None:
    """Streams read ahead no more."""
    for stream in self._streams:
      stream.close()

  def _stacked(self, of_seeds, first_call, length, offset=0):
    """What there is of each step, from `offset` on, in the room of a chunk."""
    like = of_seeds[0](0)
    stacked = np.zeros([len(of_seeds), self.room, *like.shape], like.dtype)
    begin = max(0, offset - first_call)
    for seed, of_step in enumerate(of_seeds):
      for i in range(begin, length):
        stacked[seed, i] = of_step(first_call + i - offset)
    return stacked

  def _streamed(self, first_call, length):
    """The examples of a chunk, likewise padded."""
    missing = self.room - length

    def joined(*arrays):
      x = np.stack(arrays)
      return np.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])

    taken = (s.take(first_call, length) for s in self._streams)
    return data.Examples(*map(joined, *taken))


def stepper(settings: Settings) -> tuple[Callable, Callable]:
  """A run on one device alone, call by call.

  Args:
    settings: What is trained.

  Returns:
    ``init(seed, params, rate=None) -> carry`` and ``step(carry, train, rows,
    rate=None) -> (carry, loss)``, of one seed and one call. ``rate`` is a
    learning rate in place of the config's; it may be traced.
  """
  loss_fn = settings.task.loss_fn
  filling = settings.filling

  def transformation_of(seed, rate):
    return settings.make(transformation.make_transformation, seed, rate=rate)

  def init_one(seed, params, rate=None):
    return _begin(params, transformation_of(seed, rate).init(params))

  def step(carry, train, rows, rate=None):
    params, opt_state, calls, bad_call, bad_loss = carry
    batch = settings.batch(train, rows.batch, rows.keys)
    value, grads = jax.value_and_grad(loss_fn)(
      worker_params(params, opt_state), batch
    )
    extra = {}
    if rows.verification is not None:
      extra['verification'] = settings.verification(train, rows.verification)
    # What a seed decides is in the state, so here any seed will do.
    updates, opt_state = transformation_of(0, rate).update(
      grads,
      opt_state,
      params,
      value=value,
      batch=batch,
      arrival=jnp.maximum(calls - filling, 0),
      **extra,
    )
    first_bad = (bad_call < 0) & ~jnp.isfinite(value)
    carry = Carry(
      optax.apply_updates(params, updates),
      opt_state,
      calls + 1,
      jnp.where(first_bad, calls, bad_call),
      jnp.where(first_bad, value, bad_loss),
    )
    return carry, value

  return init_one, step


def _one_device(settings):
  """`init` and `advance` of a seed, on one device alone."""
  init_one, step = stepper(settings)

  def advance_one(carry, arrays, rows, length, pace):
    def body(i, carry_and_loss):
      carry, loss = carry_and_loss
      carry, value = step(carry, arrays[0], jax.tree.map(lambda r: r[i], rows))
      return carry, loss + value

    carry, loss = jax.lax.fori_loop(0, length, body, (carry, jnp.zeros([])))
    return carry, *_results(carry, loss, pace)

  return init_one, advance_one


def _many_devices(settings, mesh):
  """The programs for several devices."""
  _, devices = parallel.devices_of(mesh)
  everywhere = parallel.EVERYWHERE
  # Of a batch that is split a host has the rows of its devices' shares alone.
  by_example = parallel.by_device(mesh, axis=2)
  of_batch = by_example if _splits(settings) else everywhere
  rows_specs = Rows(of_batch, of_batch, everywhere)
  axes = _axes_on(settings, mesh.size)
  own = data.axes(settings.datasets)
  init_one, advance_one = _on_device(settings, devices)

  def advance(carry, arrays, rows, length, pace):
    over_seeds = jax.vmap(
      advance_one, in_axes=(axes, own, 0, None, None), out_axes=(axes, 0, 0)
    )
    # What the slowest host proposes.
    pace = devices.least(pace[0])
    return over_seeds(carry, arrays, rows, length, pace)

  def measure(evaluated, arrays):
    over_seeds = jax.vmap(settings.task.measure, in_axes=(0, own))
    return devices.by_the_first(over_seeds, evaluated, arrays)

  params = settings.params()
  specs = jax.eval_shape(init_one, 0, params)
  specs = jax.tree.map(lambda x: everywhere, specs)
  method = settings.make(transformation.make_parallel, devices, 0)
  specs = specs._replace(opt_state=parallel.state_specs(method, params))
  specs = parallel.with_axes(specs, axes)
  advance = parallel.shard_map(
    advance,
    mesh,
    (specs, everywhere, rows_specs, everywhere, parallel.by_device(mesh)),
    (specs, everywhere, everywhere),
  )
  measure = parallel.shard_map(
    measure, mesh, (everywhere, everywhere), everywhere
  )

  def placed(rows, pace):
    put = lambda tree, spec: jax.tree.map(
      lambda x: parallel.of_host(mesh, x, spec), tree
    )
    pace = np.full([mesh.size], pace, np.int32)
    return Rows(*map(put, rows, rows_specs)), put(
      pace, parallel.by_device(mesh)
    )

  expected = parallel.shardings(mesh, specs)
  return Programs(
    jax.jit(jax.vmap(init_one, out_axes=axes), out_shardings=expected),
    jax.jit(advance, donate_argnums=0),
    jax.jit(measure),
    placed,
    functools.partial(_like, settings),
    functools.partial(_moved, settings, mesh.size, expected),
  )


def _like(settings, devices):
  """Shapes of the carry of all seeds on so many devices."""
  if devices == 1:
    init_one, _ = _one_device(settings)
  else:
    init_one, _ = _on_device(settings, parallel.Devices('', devices))
  seeds = settings.config.seeds
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((seeds, *x.shape), x.dtype),
    settings.params(),
  )
  init = jax.vmap(init_one, out_axes=_axes_on(settings, devices))
  return jax.eval_shape(init, np.arange(seeds), params)


def _axes_on(settings, devices):
  """The axes of seeds of the carry on so many devices."""
  if devices == 1:
    return _axes(settings, *_one_device(settings))
  return _axes(settings, *_on_device(settings, parallel.Devices('', 1)))


def _moved(settings, devices, expected, carry, before):
  """A carry of `before` devices as so many have it, where it is `expected`."""
  kind = transformation.parallel_kind(*settings[:2])

  def one(carry):
    state = _methods.as_on_one(kind, carry.opt_state, before)
    return carry._replace(opt_state=_methods.as_on(kind, state, devices))

  axes = (_axes_on(settings, n) for n in (before, devices))
  over_seeds = jax.vmap(one, in_axes=(next(axes),), out_axes=next(axes))
  return jax.jit(over_seeds, out_shardings=expected)(carry)


def _splits(settings):
  kind = transformation.parallel_kind(*settings[:2])
  return kind in ('data_parallel', 'delayed')


def _on_device(settings, devices):
  """`init` and `advance` of a seed, on one of several devices."""
  splits = _splits(settings)
  room = padded(settings.config, settings.datasets[0])

  def parallel_of(seed):
    return settings.make(transformation.make_parallel, devices, seed)

  def init_one(seed, params):
    return _begin(params, parallel_of(seed).init(params))

  def calls_of(carry, train, rows):
    of_call = lambda call: jax.tree.map(
      lambda x: x[call], (rows.batch, rows.keys)
    )

    def share(call):
      batch = of_call(call)
      return settings.batch(train, *(batch if splits else devices.share(batch)))

    def extras(call):
      extras = dict(
        arrival=jnp.maximum(carry.calls + call - settings.filling, 0)
      )
      if rows.verification is not None:
        extras['verification'] = settings.verification(
          train, rows.verification[call]
        )
      return extras

    return parallel.Calls(
      lambda call: settings.batch(train, *of_call(call)), share, extras
    )

  def advance_one(carry, arrays, rows, length, pace):
    method = parallel_of(0)
    params, opt_state, losses = method.advance(
      carry.params,
      carry.opt_state,
      calls_of(carry, arrays[0], rows),
      length,
      room,
    )
    if method.apart:
      losses = devices.mean(losses)
    there = jnp.arange(room, dtype=jnp.int32) < length
    bad = there & ~jnp.isfinite(losses)
    first = jnp.argmax(bad).astype(jnp.int32)
    first_bad = (carry.bad_call < 0) & bad[first]
    loss = jnp.sum(jnp.where(there, losses, 0))
    carry = Carry(
      params,
      opt_state,
      carry.calls + length,
      jnp.where(first_bad, carry.calls + first, carry.bad_call),
      jnp.where(first_bad, losses[first], carry.bad_loss),
    )
    return carry, *_results(carry, loss, pace)

  return init_one, advance_one


def _axes(settings, init_one, advance_one):
  """The axes of seeds of the carry."""

  def both(seed, params, arrays, rows):
    return advance_one(init_one(seed, params), arrays, rows, 1, 1)[0]

  dataset = settings.datasets[0]
  arrays = (dataset.train, dataset.validation, dataset.test)
  feed = Feed(
    settings.config,
    settings.method,
    settings.datasets[:1],
    settings.task.keyed,
  )
  with contextlib.closing(feed):
    rows = jax.tree.map(lambda r: r[0], feed.rows(0, 1))
  return batched_axes(both, np.int32(0), settings.params(), arrays, rows)


def _begin(params, opt_state):
  return Carry(
    params,
    opt_state,
    calls=jnp.zeros([], jnp.int32),
    bad_call=jnp.full([], -1, jnp.int32),
    bad_loss=jnp.zeros([]),
  )


def _results(carry, loss, pace):
  """What a chunk leaves for the host, and the parameters to be measured."""
  state = carry.opt_state
  totals = Totals(
    loss=loss,
    bad_call=carry.bad_call,
    bad_loss=carry.bad_loss,
    cluster=_counted(state),
    pace=pace,
  )
  # Copies, to be measured while the next chunk overwrites the carry.
  return totals, optimizers.evaluation_params(carry.params, state)


def _counted(state):
  """What is counted in a state, small enough for the host."""
  clocks, replays, gradients, records, applied, acceptance = (
    _protocol.announced(state, kind)
    for kind in (
      _protocol.Clock,
      _protocol.Replays,
      _protocol.ServerGradients,
      diagnostics.StalenessRecord,
      _protocol.Applied,
      _protocol.Acceptance,
    )
  )
  zero = jnp.zeros([], jnp.int32)
  counts = (getattr(state, name, None) for name in ('overwritten', 'lost'))
  overwritten, lost = (zero if n is None else n for n in counts)
  return Cluster(
    clock=(clocks, replays, gradients),
    record=records[0]._replace(inner_state=None),
    applied=applied[0] if applied else None,
    overwritten=overwritten,
    lost=lost,
    refused=acceptance[0].refused if acceptance else zero,
    extra_gradients=sum(
      (g.count * g.batches for g in gradients),
      _replays(state) * (replays[0].batches if replays else 1),
    ),
  )


def _replays(opt_state):
  """Gradients that guided SGD took for replays."""
  spent = optax.tree.get(opt_state, 'gradient_evaluations')
  if spent is None:
    return jnp.zeros([], jnp.int32)
  arrivals = optax.tree.get(
    opt_state,
    'count',
    filtering=lambda path, _: 'GuidedState' in str(path[-1]),
  )
  return spent - arrivals


def batched_axes(fn: Callable, *args: Any) -> Any:
  """For each leaf of `fn(*args)`: 0 if it differs between seeds, else None.

  Under `vmap` counters that are the same for every seed must stay unbatched:
  a loop or a ring indexed by a batched counter masks all that it carries.
  """
  batched = []

  @custom_batching.custom_vmap
  def probe(tree):
    return tree

  @probe.def_vmap
  def rule(axis_size, in_batched, tree):
    del axis_size
    batched.append(in_batched[0])
    return tree, in_batched[0]

  one = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), args
  )
  jax.eval_shape(jax.vmap(lambda *args: probe(fn(*args))), *one)
  return jax.tree.map(lambda b: 0 if b else None, batched[0])
