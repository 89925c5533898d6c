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
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from gsgd_jax import (
  data,
  diagnostics,
  events,
  programs,
  simulated_time,
  tasks,
  transformation,
  worker_shares,
)

_CHUNK_SECONDS = 0.5
_PROFILED = 5  # Calls in a trace, from the second call on.


def train(
  config: ml_collections.ConfigDict,
  method: events.Method,
  task: tasks.Task,
  datasets: list[data.Dataset],
  params: Any,
  arrays: Any,
  mesh: jax.sharding.Mesh,
  profile_to: pathlib.Path | None = None,
) -> Iterator[events.Event]:
  """Trains all seeds of a config by one method.

  Args:
    config: A config that ``experiment.check`` has passed.
    method: The method.
    task: What is learned.
    datasets: A data set for each seed.
    params: Initial parameters, with a leading axis of seeds.
    arrays: What ``data.stacked`` makes of the data sets.
    mesh: The devices that train.
    profile_to: A folder for a ``jax.profiler`` trace of a few steps, or None.

  Yields:
    `Progress`, `Evaluation` and at last a `Finished`.
  """
  filling = transformation.filling_calls(config, method)
  of_method = programs.make(config, method, task, datasets, mesh)
  feed = programs.Feed(config, method, datasets, task.keyed)
  room = programs.padded(config, datasets[0])
  carry = of_method.init(np.arange(config.seeds), params)
  reports = _Reports(config, method, datasets, filling)
  pace = _Pace()
  waiting = None
  for first, length, ends in _chunks(config, filling, pace, room):
    rows, proposed = of_method.placed(feed.rows(first, length), pace.own)
    with _traced(profile_to if first == 1 else None) as wait_for:
      carry, totals, evaluated = of_method.advance(
        carry, arrays, rows, length, proposed
      )
      wait_for(totals)
    _wait_on_cpus(mesh, totals)
    measured = of_method.measure(evaluated, arrays) if ends else None
    _wait_on_cpus(mesh, measured)
    pace.dispatched()
    # The host turns to the chunk before while this one is computed.
    if waiting is not None:
      yield from reports.of(*waiting)
      pace.finished(waiting[1], waiting[2].pace)
      if reports.finished:
        return
    waiting = (first + length, length, totals, measured)
  yield from reports.of(*waiting)
  if not reports.finished:
    yield events.Finished(method, 'completed', None)


def _wait_on_cpus(mesh, arrays):
  """Devices on a CPU share few threads: two programs may block one another."""
  if mesh.size > 1 and mesh.devices.flat[0].platform == 'cpu':
    jax.block_until_ready(arrays)


def _chunks(config, filling, pace, room):
  """(first call, calls, whether an evaluation follows), chunk by chunk."""
  first = 0
  for step in _evaluated_steps(config):
    end = step + filling if step else 0
    if first == end:
      yield first, 0, True
    while first < end:
      # The first call is a chunk of its own; what it sets up is not traced.
      traced = config.profile and first == 1
      most = _PROFILED if traced else pace.calls
      length = min(end - first, room, most)
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


class _Pace:
  """How many calls fit into half a second.

  All hosts have to agree on it: each chunk is given what they propose (`own`),
  and its totals bring the least of that (`calls`).
  """

  def __init__(self):
    self.calls = 1
    self.own = 1
    self._dispatched = [0.0, 0.0]  # Times of the last two chunks.
    self._finished = 0.0

  def dispatched(self):
    """A chunk was handed to the device."""
    self._dispatched = [self._dispatched[1], time.perf_counter()]

  def finished(self, length, agreed):
    """The chunk before the last one, of so many calls, has finished."""
    now = time.perf_counter()
    took = now - max(self._dispatched[0], self._finished)
    self._finished = now
    if length:
      self.own = max(1, int(length * _CHUNK_SECONDS / max(took, 1e-6)))
    self.calls = self.own
    if jax.process_count() > 1:
      self.calls = int(np.min(agreed))


class _Reports:
  """Turns what chunks leave behind into events."""

  def __init__(self, config, method, datasets, filling):
    self.finished = False
    self._config = config
    self._method = method
    self._filling = filling
    size = transformation.batch_size(config, method)
    self._epoch = size / datasets[0].examples
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
