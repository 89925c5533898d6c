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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gsgd_jax import (
  data,
  diagnostics,
  events,
  programs,
  resuming,
  simulated_time,
  tasks,
  transformation,
  worker_shares,
)

_CHUNK_SECONDS = 0.5
_CHUNK_CALLS = 64  # At least, where chunks must not depend on the clock.
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
  saving: resuming.Saving | None = None,
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
    saving: Where checkpoints go, and the one to go on from, if any.

  Yields:
    `Progress`, `Evaluation` and at last a `Finished`; none where somebody asked
    to leave.
  """
  filling = transformation.filling_calls(config, method)
  of_method = programs.make(config, method, task, datasets, mesh)
  carry = of_method.init(np.arange(config.seeds), params)
  reports = _Reports(config, method, datasets, filling)
  best, last = _Kept(), _Kept()
  begun = None
  if saving is not None and saving.start is not None:
    begun = saving.start.position['calls']
    carry, best.params, last.params = saving.restored(of_method, carry, params)
    reports.restore(saving.start.position['reports'])
  pace = _Pace(_fixed_chunks(config, method, mesh))
  feed = programs.Feed(config, method, datasets, task.keyed)

  def reported(chunk):
    yield from reports.of(chunk)
    pace.finished(chunk)
    best.see(reports.better, chunk.evaluated)
    last.see(reports.stopping, chunk.evaluated)

  def save(chunk, status):
    reported = chunk.evaluated
    if reports.stopped.any():
      reported = _chosen(reports.stopped, last.params, reported)
    items = dict(state=carry, params=reported, best=best.params)
    step = reports.step_of(chunk.calls)
    assert saving is not None  # Whoever calls this has looked.
    saving.save(step, chunk.calls, status, reports.state(), items)

  waiting = chunk = None
  with contextlib.closing(feed):
    for first, length, ends in _chunks(
      config, filling, pace, feed.room, begun, saving
    ):
      wanted = saving is not None and saving.wants(reports.step_of(first))
      rows, proposed = of_method.placed(
        feed.rows(first, length), pace.proposed(wanted)
      )
      when = time.perf_counter()
      with _traced(profile_to if first == 1 else None) as wait_for:
        carry, totals, evaluated = of_method.advance(
          carry, arrays, rows, length, proposed
        )
        wait_for(totals)
      _wait_on_cpus(mesh, totals)
      measured = of_method.measure(evaluated, arrays) if ends else None
      _wait_on_cpus(mesh, measured)
      chunk = _Chunk(first + length, length, totals, evaluated, measured, when)
      # The host turns to the chunk before while this one is computed.
      if waiting is not None:
        yield from reported(waiting)
        if reports.ended is not None:
          break
      waiting = chunk
      saves = saving is not None and _saves(saving, pace, reports, chunk)
      # Nothing may run ahead of what is saved, or of what may be the end.
      if saves or (ends and config.patience is not None):
        yield from reported(chunk)
        waiting = None
        if reports.ended is not None:
          break
      if saves:
        save(chunk, 'running')
      if saving is not None and saving.leaving:
        return
    if waiting is not None and reports.ended is None:
      yield from reported(waiting)
  ended = reports.ended or events.Finished(method, 'completed', None)
  if saving is not None and ended.status != 'diverged' and chunk is not None:
    save(chunk, ended.status)
  yield ended


def _saves(saving, pace, reports, chunk):
  """Whether there is to be a checkpoint after a chunk, but for the last."""
  step = reports.step_of(chunk.calls)
  wanted = pace.wanted if jax.process_count() > 1 else saving.wants(step)
  return reports.runs_on(step) and (saving.must(step) or (wanted and step > 0))


class _Chunk(NamedTuple):
  """A chunk of calls that has been handed to the device."""

  calls: int  # Since the start.
  length: int
  totals: programs.Totals
  evaluated: Any  # The parameters after it.
  measured: dict[str, jax.Array] | None
  when: float


class _Kept:
  """Parameters of an evaluation on the device; every seed has its own one."""

  def __init__(self):
    self.params = None

  def see(self, which, params):
    """Takes those of some seeds, if there are any."""
    if which is None or not which.any():
      return
    if self.params is None:
      self.params = params
    else:
      self.params = _chosen(which, params, self.params)


@jax.jit
def _chosen(which, params, others):
  def of_seeds(x, other):
    return jnp.where(which.reshape(-1, *[1] * (x.ndim - 1)), x, other)

  return jax.tree.map(of_seeds, params, others)


def _wait_on_cpus(mesh, arrays):
  """Devices on a CPU share few threads: two programs may block one another."""
  if mesh.size > 1 and mesh.devices.flat[0].platform == 'cpu':
    jax.block_until_ready(arrays)


def _fixed_chunks(config, method, mesh):
  """Calls a chunk where its ends change what is computed, else None.

  Rounds of workers end where a chunk ends, and gradients that are taken at once
  are rounded otherwise than those taken one by one.
  """
  if mesh.size == 1:
    return None
  if transformation.parallel_kind(config, method) != 'asynchronous':
    return None
  return -(-_CHUNK_CALLS // config.workers) * config.workers


def _chunks(config, filling, pace, room, begun, saving):
  """(first call, calls, whether an evaluation follows), chunk by chunk.

  From the first call on, or after so many as have `begun`.
  """
  first = begun or 0
  for step in _evaluated_steps(config):
    end = step + filling if step else 0
    if begun is None and not step:
      yield first, 0, True
    while first < end:
      most = pace.calls
      if config.profile:  # What the first call sets up is not traced.
        most = {0: 1, 1: _PROFILED}.get(first, most)
      length = min(end - first, room, most)
      if saving is not None:
        stop = saving.next_stop(max(first - filling, 0)) + filling
        length = int(min(length, stop - first))
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
  """How many calls a chunk has: as many as fit into half a second, or `fixed`.

  All hosts have to agree on it: each chunk is given what they propose
  (`proposed`), and its totals bring the least of that (`calls`).

  Attributes:
    calls: How many.
    own: How many this host would take.
    wanted: Whether any host wants a checkpoint.
  """

  def __init__(self, fixed=None):
    self._fixed = fixed
    self.calls = self.own = fixed or 1
    self.wanted = False
    self._finished = 0.0

  def proposed(self, wanted):
    """What to propose; 0 where a checkpoint is wanted."""
    return 0 if wanted else self.own

  def finished(self, chunk):
    """A chunk has finished."""
    now = time.perf_counter()
    took = now - max(chunk.when, self._finished)
    self._finished = now
    if chunk.length and self._fixed is None:
      self.own = max(1, int(chunk.length * _CHUNK_SECONDS / max(took, 1e-6)))
    if jax.process_count() == 1:
      self.calls = self.own
      return
    agreed = int(np.min(chunk.totals.pace))
    self.wanted = not agreed
    self.calls = agreed or self.calls


class _Reports:
  """Turns what chunks leave behind into events."""

  def __init__(self, config, method, datasets, filling):
    self.ended = None  # A `Finished`, before the last step.
    self.better = None  # Which seeds the last chunk's evaluation bettered,
    self.stopping = None  # and which it has stopped.
    self._config = config
    self._method = method
    self._filling = filling
    size = transformation.batch_size(config, method)
    self._epoch = size / datasets[0].examples
    self._seeds = _Seeds(config.patience, config.seeds)
    self._seen = np.zeros([2, config.seeds])  # Sums of the chunk before.
    self._recent = np.zeros([2, config.seeds])  # Since the last evaluation.

  @property
  def stopped(self):
    """Which seeds have stopped early."""
    return self._seeds.stopped

  def step_of(self, calls):
    """Arriving gradients after so many calls."""
    return max(calls - self._filling, 0)

  def runs_on(self, step):
    """Whether there is more to come after a step."""
    return step < self._config.updates

  def state(self):
    """What a checkpoint needs to know; JSON can say it."""
    return {
      'seen': self._seen.tolist(),
      'recent': self._recent.tolist(),
      'seeds': self._seeds.state(),
    }

  def restore(self, state):
    """Goes on from there."""
    self._seen = np.array(state['seen'])
    self._recent = np.array(state['recent'])
    self._seeds.restore(state['seeds'])

  def of(self, chunk):
    """Events of a chunk; waits for it."""
    calls, length, totals, measured = (
      chunk.calls,
      chunk.length,
      jax.device_get(chunk.totals),
      chunk.measured,
    )
    step = self.step_of(calls)
    self.better = self.stopping = None
    arrived = self._arrived(totals)
    diverged = self._diverged(totals.bad_call >= 0, totals)
    if diverged is None and length:
      losses = totals.loss[~self._seeds.stopped]
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
      self.ended = diverged
    elif self._seeds.all_stopped:
      self.ended = events.Finished(self._method, 'stopped_early', None)

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
    measured = self._seeds.frozen(measured | _arrivals(cluster)).copy()
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
      before = self.stopped.copy()
      self.better = self._seeds.see(evaluation)
      self.stopping = self.stopped & ~before
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
    bad = np.flatnonzero(bad & ~self._seeds.stopped)
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


class _Seeds:
  """How well every seed has done, and which have stopped early.

  A seed is better where its validation accuracy is, or at equal accuracy its
  validation loss. It stops when so many evaluations in a row were not; what is
  reported of it from then on is what it was when it stopped.
  """

  def __init__(self, patience, seeds):
    self._patience = patience
    self._best = [(-math.inf, -math.inf)] * seeds
    self._best_step = np.zeros(seeds, int)
    self._since = np.zeros(seeds, int)
    self._last = None
    self.stopped = np.zeros(seeds, bool)

  @property
  def all_stopped(self):
    return bool(self.stopped.all())

  def frozen(self, measured):
    """The measurements, those of stopped seeds as they were."""
    if self._patience is None:
      return measured
    if self._last is not None:
      measured = {
        name: _where(self.stopped, self._last[name], values)
        for name, values in measured.items()
      }
    self._last = measured
    return measured

  def see(self, evaluation):
    """Takes note of an evaluation; returns which seeds are better."""
    loss = np.nan_to_num(evaluation.validation_loss, nan=np.inf)
    scores = zip(
      evaluation.validation_accuracy.tolist(), (-loss).tolist(), strict=True
    )
    better = np.zeros(len(loss), bool)
    for seed, score in enumerate(scores):
      if score > self._best[seed]:  # Nothing is better than NaN, nor is NaN.
        better[seed], self._best[seed] = True, score
    self._best_step[better] = evaluation.step
    self._since = np.where(better, 0, self._since + 1)
    if self._patience is not None:
      self.stopped |= self._since >= self._patience
    return better

  def state(self):
    """What a checkpoint needs to know; JSON can say it."""
    last = self._last and {
      k: np.asarray(v).tolist() for k, v in self._last.items()
    }
    return {
      'best': self._best,
      'best_step': self._best_step.tolist(),
      'since': self._since.tolist(),
      'stopped': self.stopped.tolist(),
      'last': last,
    }

  def restore(self, state):
    """Goes on from there."""
    self._best = [tuple(score) for score in state['best']]
    self._best_step = np.array(state['best_step'])
    self._since = np.array(state['since'])
    self.stopped = np.array(state['stopped'])
    if state['last'] is not None:
      self._last = {k: np.array(v) for k, v in state['last'].items()}
