"""Training by one method, chunk by chunk.

All seeds train at once under one `vmap`. The compiled program takes a chunk of
calls, as many as fit into half a second or lie before the next evaluation. The
host works while it runs: it draws the rows of the next chunk, and reports the
chunk before.
"""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax import custom_batching

from gsgd_jax import (
  _protocol,
  data,
  diagnostics,
  events,
  models,
  optimizers,
  simulated_time,
  transformation,
  worker_params,
  worker_shares,
)

_CHUNK_SECONDS = 0.5
_PROFILED = 5  # Calls in a trace, from the second call on.


class _Rows(NamedTuple):
  """The rows that a chunk of calls reads; leading axes (seeds, calls)."""

  batch: np.ndarray
  verification: np.ndarray | None


class _Cluster(NamedTuple):
  """What the transformations have counted since the start."""

  clock: Any  # What `simulated_time` reads.
  record: diagnostics.StalenessRecord
  applied: Any  # What `worker_shares` reads; None where nobody counts.
  overwritten: jax.Array
  lost: jax.Array
  refused: jax.Array
  extra_gradients: jax.Array  # Of the server: replays, and corrections.


class _Carry(NamedTuple):
  params: Any
  opt_state: optax.OptState
  calls: jax.Array  # shape=(), int32.
  bad_call: jax.Array  # shape=(), int32: the first with no finite loss, or -1.
  bad_loss: jax.Array  # shape=(): that loss.


class _Totals(NamedTuple):
  """What a chunk leaves on the device for the host, beside its carry."""

  loss: jax.Array  # Sum of the chunk's.
  bad_call: jax.Array
  bad_loss: jax.Array
  cluster: _Cluster


def train(
  config: ml_collections.ConfigDict,
  method: events.Method,
  model: models.Model,
  datasets: list[data.Dataset],
  params: Any,
  arrays: Any,
  profile_to: pathlib.Path | None = None,
) -> Iterator[events.Event]:
  """Trains all seeds of a config by one method.

  Args:
    config: A config that ``experiment.check`` has passed.
    method: The method.
    model: The model.
    datasets: A data set for each seed.
    params: Initial parameters, with a leading axis of seeds.
    arrays: The data sets' (train, validation or None, test), likewise.
    profile_to: A folder for a ``jax.profiler`` trace of a few steps, or None.

  Yields:
    `Progress`, `Evaluation` and at last a `Finished`.
  """
  filling = transformation.filling_calls(config, method)
  init, advance, measure = _programs(config, method, model, datasets)
  carry = init(jnp.arange(config.seeds), params)
  reports = _Reports(config, method, datasets, filling)
  pace = _Pace()
  waiting = None
  for first, length, ends in _chunks(config, filling, pace, profile_to):
    rows = _rows(config, method, datasets, first, length, filling)
    with _traced(profile_to if first == 1 else None) as wait_for:
      carry, totals, evaluated = advance(carry, arrays, rows, length)
      wait_for(totals)
    measured = measure(evaluated, arrays) if ends else None
    pace.dispatched()
    # The host turns to the chunk before while this one is computed.
    if waiting is not None:
      yield from reports.of(*waiting)
      pace.finished(waiting[1])
      if reports.finished:
        return
    waiting = (first + length, length, totals, measured)
  yield from reports.of(*waiting)
  if not reports.finished:
    yield events.Finished(method, 'completed', None)


def _chunks(config, filling, pace, profile_to):
  """(first call, calls, whether an evaluation follows), chunk by chunk."""
  first = 0
  for step in _evaluated_steps(config):
    end = step + filling if step else 0
    if first == end:
      yield first, 0, True
    while first < end:
      # The first call is a chunk of its own; what it sets up is not traced.
      traced = profile_to is not None and first == 1
      most = _PROFILED if traced else pace.calls
      length = min(end - first, _padded(config), most)
      yield first, length, first + length == end
      first += length


@contextlib.contextmanager
def _traced(folder):
  """Traces what is computed meanwhile, if there is a folder for it."""
  if folder is None:
    yield lambda arrays: None
    return
  with jax.profiler.trace(str(folder)):
    yield jax.block_until_ready


def _evaluated_steps(config):
  yield 0
  step = 0
  while step < config.updates:
    step = min(step + config.evaluate_every, config.updates)
    yield step


def _padded(config):
  """Calls that a chunk has room for; its rows take 64 MB, or are one call's."""
  size = max(config.batch_size, config.split_batch_size or 0)
  numbers = size + data.MOST_VERIFICATION
  room = 2**24 // (config.seeds * numbers)
  return max(1, min(config.evaluate_every, config.updates, 512, room))


class _Pace:
  """How many calls fit into half a second."""

  def __init__(self):
    self.calls = 1
    self._dispatched = [0.0, 0.0]  # Times of the last two chunks.
    self._finished = 0.0

  def dispatched(self):
    """A chunk was handed to the device."""
    self._dispatched = [self._dispatched[1], time.perf_counter()]

  def finished(self, length):
    """The chunk before the last one, of so many calls, has finished."""
    now = time.perf_counter()
    took = now - max(self._dispatched[0], self._finished)
    self._finished = now
    if length:
      self.calls = max(1, int(length * _CHUNK_SECONDS / max(took, 1e-6)))


class _Reports:
  """Turns what chunks leave behind into events."""

  def __init__(self, config, method, datasets, filling):
    self.finished = False
    self._config = config
    self._method = method
    self._filling = filling
    size = transformation.batch_size(config, method)
    self._epoch = size / len(datasets[0].train.labels)
    self._stopping = _Stopping(config.patience, config.seeds)
    self._seen = np.zeros([2, config.seeds])  # Sums of the chunk before.
    self._recent = np.zeros([2, config.seeds])  # Since the last evaluation.

  def of(self, calls, length, totals, measured):
    """Events of a chunk that ends after so many calls; waits for it."""
    totals = jax.device_get(totals)
    step = max(calls - self._filling, 0)
    arrived = self._arrived(totals)
    diverged = self._diverged(totals.bad_call >= 0, totals)
    if diverged is None and length:
      losses = totals.loss[~self._stopping.stopped]
      loss = float(np.mean(losses)) / length
      staleness = float(_ratio(*arrived.sum(axis=1)))
      yield events.Progress(self._method, step, loss, staleness)
    if diverged is None and measured is not None:
      measured = jax.device_get(measured)
      bad = ~np.isfinite(measured['train_loss'])
      diverged = self._diverged(bad, totals, measured['train_loss'], step)
      if diverged is None:
        yield self._evaluation(calls, step, totals, measured)
    if diverged is not None:
      self.finished = True
      yield diverged
    elif self._stopping.all:
      self.finished = True
      yield events.Finished(self._method, 'stopped_early', None)

  def _evaluation(self, calls, step, totals, measured):
    config, cluster = self._config, totals.cluster
    joined = transformation.joined(config, self._method)
    taken = transformation.gradients_taken(config, self._method, calls)
    measured['gradient_evaluations'] = taken + joined * cluster.extra_gradients
    measured['simulated_time'] = simulated_time(cluster.clock)
    measured['staleness'] = _ratio(*self._recent)
    self._recent = np.zeros_like(self._recent)
    measured['latest_staleness'] = cluster.record.latest
    measured['maximal_staleness'] = cluster.record.maximum
    measured['applied'] = cluster.record.count
    measured['overwritten'] = cluster.overwritten
    measured['lost'] = cluster.lost
    measured['refused'] = cluster.refused
    measured = self._stopping.frozen(measured | _arrivals(cluster)).copy()
    mean, histogram, shares = (
      measured.pop(name) for name in events.Arrivals._fields
    )
    if shares.shape[1]:
      shares = shares.mean(axis=0) * shares.shape[1]
    evaluation = events.Evaluation(
      self._method,
      step,
      step * self._epoch,
      events.Arrivals(mean, histogram.sum(axis=0), shares.reshape(-1)),
      **measured,
    )
    if step:
      self._stopping.see(evaluation)
    return evaluation

  def _arrived(self, totals):
    """(Sum of staleness, arrivals) of the chunk, for every seed."""
    record = totals.cluster.record
    now = np.array([diagnostics.total_staleness(record), record.count], float)
    arrived, self._seen = now - self._seen, now
    self._recent = self._recent + arrived
    return arrived

  def _diverged(self, bad, totals, losses=None, step=None):
    """The end of a method with a seed whose loss is not finite."""
    bad = np.flatnonzero(bad & ~self._stopping.stopped)
    if not len(bad):
      return None
    if losses is None:
      seed = bad[np.argmin(totals.bad_call[bad])]
      step = max(int(totals.bad_call[seed]) - self._filling, 0)
      loss = totals.bad_loss[seed]
    else:
      seed, loss = bad[0], losses[bad[0]]
    what = 'NaN' if math.isnan(loss) else 'infinite'
    also = f' ({len(bad)} of {len(totals.loss)} seeds)' if len(bad) > 1 else ''
    return events.Finished(
      self._method,
      'diverged',
      f'{self._method.label} diverged: the loss of seed {seed} is {what} at '
      f'step {step}{also}',
    )


def _ratio(total, number):
  return total / np.where(number, number, np.nan)


def _arrivals(cluster):
  """The fields of `events.Arrivals`, seed by seed."""
  record = cluster.record
  shares = np.zeros([len(record.count), 0])
  if cluster.applied is not None:
    shares = np.sort(worker_shares(cluster.applied), axis=1)
  return {
    'mean': _ratio(diagnostics.total_staleness(record), record.count),
    'histogram': record.histogram,
    'shares': shares,
  }


def _where(stopped, last, values):
  """`last` of the seeds that have stopped, `values` of the others."""
  values = np.asarray(values)
  return np.where(stopped.reshape(-1, *[1] * (values.ndim - 1)), last, values)


class _Stopping:
  """Early stopping, seed by seed.

  A seed stops when so many evaluations in a row have not bettered its
  validation accuracy, or at equal accuracy its validation loss. What is
  reported of it from then on is what it was when it stopped.
  """

  def __init__(self, patience, seeds):
    self._patience = patience
    self._best = [(-math.inf, -math.inf)] * seeds
    self._since = np.zeros(seeds, int)
    self._last = None
    self.stopped = np.zeros(seeds, bool)

  @property
  def all(self):
    return bool(self.stopped.all())

  def frozen(self, measured):
    """The measurements, those of stopped seeds as they were."""
    if self._last is not None:
      measured = {
        name: _where(self.stopped, self._last[name], values)
        for name, values in measured.items()
      }
    self._last = measured
    return measured

  def see(self, evaluation):
    """Takes note of an evaluation."""
    if self._patience is None:
      return
    loss = np.nan_to_num(evaluation.validation_loss, nan=np.inf)
    scores = zip(evaluation.validation_accuracy, -loss, strict=True)
    for seed, score in enumerate(scores):
      better = score > self._best[seed]
      self._best[seed] = max(score, self._best[seed])
      self._since[seed] = 0 if better else self._since[seed] + 1
    self.stopped |= self._since >= self._patience


def _rows(config, method, datasets, first_call, length, filling):
  """Batches by call, verification samples by update; padded to one length."""
  examples = len(datasets[0].train.labels)
  batch_size = transformation.batch_size(config, method)

  def stack(rows_of, size, offset):
    rows = np.zeros([config.seeds, _padded(config), size], np.int32)
    for seed in range(config.seeds):
      for i in range(length):
        step = first_call + i - offset
        if step >= 0:
          rows[seed, i] = rows_of(examples, seed, step)
    return rows

  batch = stack(
    lambda examples, seed, step: data.batch_rows(
      examples, batch_size, seed, step
    ),
    batch_size,
    0,
  )
  verification = None
  if method.select and config.verification and not config.stored_gradients:
    size = data.verification_size(examples)
    verification = stack(data.verification_rows, size, filling)
  return _Rows(batch, verification)


def _programs(config, method, model, datasets):
  """Compiled `init`, `advance` and `measure`, over all seeds."""
  loss_fn = models.cross_entropy(model)
  accuracy_fn = models.accuracy(model)
  batch_like = transformation.batch_like_of(config, method, datasets[0])
  filling = transformation.filling_calls(config, method)

  def transformation_of(seed):
    return transformation.make_transformation(
      config, method, loss_fn, batch_like, seed
    )

  def init_one(seed, params):
    return _Carry(
      params,
      transformation_of(seed).init(params),
      calls=jnp.zeros([], jnp.int32),
      bad_call=jnp.full([], -1, jnp.int32),
      bad_loss=jnp.zeros([]),
    )

  def step(carry, arrays, rows):
    params, opt_state, calls, bad_call, bad_loss = carry
    train = arrays[0]
    batch = jax.tree.map(lambda x: x[rows.batch], train)
    value, grads = jax.value_and_grad(loss_fn)(
      worker_params(params, opt_state), batch
    )
    extra = {}
    if rows.verification is not None:
      extra['verification'] = jax.tree.map(
        lambda x: x[rows.verification], train
      )
    # What a seed decides is in the state, so here any seed will do.
    updates, opt_state = transformation_of(0).update(
      grads,
      opt_state,
      params,
      value=value,
      batch=batch,
      arrival=jnp.maximum(calls - filling, 0),
      **extra,
    )
    first_bad = (bad_call < 0) & ~jnp.isfinite(value)
    carry = _Carry(
      optax.apply_updates(params, updates),
      opt_state,
      calls + 1,
      jnp.where(first_bad, calls, bad_call),
      jnp.where(first_bad, value, bad_loss),
    )
    return carry, value

  def advance_one(carry, arrays, rows, length):
    def body(i, carry_and_loss):
      carry, loss = carry_and_loss
      carry, value = step(carry, arrays, jax.tree.map(lambda r: r[i], rows))
      return carry, loss + value

    carry, loss = jax.lax.fori_loop(0, length, body, (carry, jnp.zeros([])))
    state = carry.opt_state
    totals = _Totals(
      loss=loss,
      bad_call=carry.bad_call,
      bad_loss=carry.bad_loss,
      cluster=_counted(state),
    )
    # Copies, to be measured while the next chunk overwrites the carry.
    return carry, totals, optimizers.evaluation_params(carry.params, state)

  def measure(params, arrays):
    measured = {}
    names = ('train', 'validation', 'test')
    for name, split in zip(names, arrays, strict=True):
      nothing = split is None
      loss = jnp.nan if nothing else loss_fn(params, split)
      accuracy = jnp.nan if nothing else accuracy_fn(params, split)
      measured[f'{name}_loss'] = jnp.asarray(loss)
      measured[f'{name}_accuracy'] = jnp.asarray(accuracy)
    return measured

  def both(seed, params, arrays, rows):
    return advance_one(init_one(seed, params), arrays, rows, 1)[0]

  one = (datasets[0].train, datasets[0].validation, datasets[0].test)
  rows = jax.tree.map(
    lambda r: r[0], _rows(config, method, datasets, 0, 1, filling)
  )
  params = jax.eval_shape(model.init, jax.random.key(0))
  axes = batched_axes(both, np.int32(0), params, one, rows)
  return (
    jax.jit(jax.vmap(init_one, out_axes=axes)),
    jax.jit(
      jax.vmap(advance_one, in_axes=(axes, 0, 0, None), out_axes=(axes, 0, 0)),
      donate_argnums=0,
    ),
    jax.jit(jax.vmap(measure)),
  )


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
  return _Cluster(
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
