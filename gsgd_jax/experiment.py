"""A training run: config -> data, model, optimizer -> step -> loop -> events.

All seeds of a method train at once under one `vmap`. The compiled program
takes a chunk of calls, as many as fit into half a second or lie before the next
evaluation. The host works while it runs: it draws the rows of the next chunk,
and reports the chunk before.
"""

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
  asynchronous,
  data,
  delayed,
  guided,
  models,
  optimizers,
  settings,
  synchronous,
  worker_params,
)

PARALLEL = ('sequential', 'synchronous', 'asynchronous', 'delayed')
# Guidance, and how it is said.
GUIDANCE = {
  'consistent': 'guided',
  'random': 'random replays',
  'hardest': 'hardest replays',
  'inconsistent': 'inconsistent replays',
  'surprise': 'surprise replays',
}
_CHUNK_SECONDS = 0.5
_PROFILED = 5  # Calls.


class Method(NamedTuple):
  """A row of the comparison: where gradients come from, and guidance."""

  name: str
  parallel: str
  select: str | None  # Guided SGD's selection; None is no guidance.

  @property
  def label(self) -> str:
    """What it is called in tables and pictures."""
    if self.select is None:
      return self.parallel
    return f'{self.parallel}, {GUIDANCE[self.select]}'


def methods(config: ml_collections.ConfigDict) -> list[Method]:
  """The methods of a config, in order.

  Raises:
    ValueError: One is unknown, or named twice.
  """
  names = [n.strip() for m in config.methods for n in m.split(',')]
  if config.parallel is not None:
    guidance = '' if config.guidance is None else f'+{config.guidance}'
    names = [f'{config.parallel}{guidance}']
  if not names:
    raise ValueError(f'methods must name at least one of {", ".join(PARALLEL)}')
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f'methods must differ, got {name} twice')
  return [_method(name) for name in names]


def _method(name):
  parallel, plus, select = name.partition('+')
  settings.one_of('a method', parallel, PARALLEL)
  if plus:
    settings.one_of(f'the guidance of {name}', select, GUIDANCE)
  return Method(name, parallel, select if plus else None)


class Started(NamedTuple):
  """A method is about to be compiled."""

  method: Method


class Progress(NamedTuple):
  """A chunk of calls has finished."""

  method: Method
  step: int  # Arriving gradients so far.
  loss: float  # Mean over the chunk's batches and the seeds, as workers saw it.
  staleness: float  # Mean over the chunk's arrivals; NaN if there was none.


class Evaluation(NamedTuple):
  """Measurements at a step, for every seed: shape=(seeds,) each."""

  method: Method
  step: int
  epoch: float
  gradient_evaluations: np.ndarray  # Those in flight and replays included.
  train_loss: np.ndarray  # Over the whole split; NaN where there is no split.
  validation_loss: np.ndarray
  test_loss: np.ndarray
  train_accuracy: np.ndarray  # In [0, 1].
  validation_accuracy: np.ndarray
  test_accuracy: np.ndarray
  staleness: np.ndarray  # Mean since the last evaluation; NaN at the first.


MEASURED = Evaluation._fields[3:]


class Finished(NamedTuple):
  """A method has ended."""

  method: Method
  status: str  # 'completed', 'stopped_early' or 'diverged'.
  message: str | None  # What happened to a method that diverged.


Event = Started | Progress | Evaluation | Finished


class History(NamedTuple):
  """All evaluations of a method: shape=(evaluations, seeds), but for `step`."""

  method: Method
  status: str  # Of `Finished`; or 'not_started', 'interrupted'.
  message: str | None
  step: np.ndarray  # shape=(evaluations,), int.
  epoch: np.ndarray  # shape=(evaluations,).
  gradient_evaluations: np.ndarray
  train_loss: np.ndarray
  validation_loss: np.ndarray
  test_loss: np.ndarray
  train_accuracy: np.ndarray
  validation_accuracy: np.ndarray
  test_accuracy: np.ndarray
  staleness: np.ndarray


class Results:
  """Collects events into a history for each method."""

  def __init__(self, config: ml_collections.ConfigDict):
    self._seeds = config.seeds
    self._evaluations = {m: [] for m in methods(config)}
    self._ends = {m: ('not_started', None) for m in self._evaluations}

  def add(self, event: Event) -> None:
    """Takes the next event."""
    if isinstance(event, Started):
      self._ends[event.method] = ('interrupted', None)  # Until it finishes.
    elif isinstance(event, Evaluation):
      self._evaluations[event.method].append(event)
    elif isinstance(event, Finished):
      self._ends[event.method] = (event.status, event.message)

  def histories(self) -> dict[str, History]:
    """What was measured so far, by the method's name."""
    return {m.name: self._history(m) for m in self._evaluations}

  def _history(self, method):
    events = self._evaluations[method]
    stack = lambda field: np.array([getattr(e, field) for e in events])
    return History(
      method,
      *self._ends[method],
      stack('step').astype(int),
      stack('epoch').astype(float),
      *(stack(field).reshape(-1, self._seeds) for field in MEASURED),
    )


def check(config: ml_collections.ConfigDict) -> None:
  """Raises a ValueError that says what is wrong with a config, if anything.

  Everything is looked at, the data and the optimizer included; nothing is
  computed. A data file that cannot be read is an OSError.
  """
  settings.check(config)
  methods(config)
  dataset = _load(config, 0)
  examples = len(dataset.train.labels)
  if config.batch_size > examples:
    raise ValueError(
      f'batch_size must be at most the {examples} training examples of '
      f'{config.dataset}, got {config.batch_size}'
    )
  for seed in range(1, config.seeds):
    _load(config, seed)
  optimizers.check_rates(config.schedule, _rate(config), config.updates)
  model = make_model(config, dataset)
  params = jax.eval_shape(model.init, jax.random.key(0))
  optimizers.dry_run(
    _optimizer(config, models.cross_entropy(model)),
    params,
    config.optimizer,
    value=jax.ShapeDtypeStruct([], jnp.float32),
    batch=_batch_like(config, dataset),
    arrival=jax.ShapeDtypeStruct([], jnp.int32),
  )


def run(
  config: ml_collections.ConfigDict,
  watch: Callable[[Event], Any] = lambda event: None,
) -> dict[str, History]:
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
  results = Results(config)
  for event in events(config):
    results.add(event)
    watch(event)
  return results.histories()


def events(
  config: ml_collections.ConfigDict,
  profile_to: pathlib.Path | None = None,
) -> Iterator[Event]:
  """Trains every method of a config, event by event.

  For every method a `Started`, then `Progress` about twice a second and an
  `Evaluation` at step 0, every ``config.evaluate_every`` updates and at the
  last, then a `Finished`. A method whose loss is no longer finite in one of its
  seeds ends there; its evaluations up to then stand.

  Args:
    config: Like that of ``settings.default_config()``.
    profile_to: A folder for a ``jax.profiler`` trace of a few steps of each
      method, or None.

  Yields:
    Events, as they happen.

  Raises:
    ValueError: The config is bad; raised before anything is computed.
    OSError: The data cannot be read.
  """
  check(config)
  datasets = [_load(config, seed) for seed in range(config.seeds)]
  model = make_model(config, datasets[0])
  arrays = _arrays(datasets)
  params = _initial_params(model, config.seeds)
  for method in methods(config):
    yield Started(method)
    traced = profile_to and profile_to / method.name
    yield from _train(config, method, model, datasets, params, arrays, traced)


def _load(config, seed):
  return data.load(
    config.dataset,
    seed,
    target=config.target,
    preprocessing=config.preprocessing,
    train_share=config.train_share,
    validation_share=config.validation_share,
    label_noise=config.label_noise,
  )


def _arrays(datasets):
  """(train, validation or None, test) with a leading axis of seeds."""
  splits = [(d.train, d.validation, d.test) for d in datasets]
  return jax.tree.map(lambda *arrays: jnp.stack(arrays), *splits)


def _initial_params(model, seeds):
  # A map, not a vmap: random numbers of many seeds compile three times slower.
  keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
  return jax.jit(lambda keys: jax.lax.map(model.init, keys))(keys)


def make_model(
  config: ml_collections.ConfigDict, dataset: data.Dataset
) -> models.Model:
  """The model of a config."""
  features = dataset.train.inputs.shape[1]
  if config.model == 'mlp':
    return models.mlp(features, config.hidden, len(dataset.classes))
  return models.softmax_regression(features, len(dataset.classes))


def _batch_like(config, dataset):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype),
    dataset.train,
  )


def _rate(config):
  """The learning rate, or the schedule of it."""
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


def _optimizer(config, loss_fn):
  tx = optimizers.make(
    config.optimizer, _rate(config), _plain(config.optimizer_kwargs)
  )
  return optimizers.with_value_fn(tx, loss_fn)


def _plain(config):
  return config.to_dict() if hasattr(config, 'to_dict') else dict(config)


def make_transformation(
  config: ml_collections.ConfigDict,
  method: Method,
  loss_fn: Callable,
  batch_like: Any,
  seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
  """The transformation of a method: any optimizer, guided or not, delayed."""
  tx = _optimizer(config, loss_fn)
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


def _joined(config, method):
  """How many gradients of workers arrive as one."""
  mean = method.parallel == 'synchronous' and config.combine == 'mean'
  return config.workers if mean else 1


def _arriving(config, method, batch_like):
  """The batch of an arriving gradient."""
  size = _joined(config, method) * config.batch_size
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), batch_like
  )


def _filling(config, method):
  """Calls before the first gradient arrives."""
  return {'asynchronous': config.workers - 1, 'delayed': config.delay}.get(
    method.parallel, 0
  )


class _RecordedState(NamedTuple):
  staleness: jax.Array  # shape=(), dtype=int32: sum over arrivals; may wrap.
  arrivals: jax.Array  # shape=(), dtype=int32.
  inner_state: optax.OptState


def _recorded(inner):
  """Adds up the staleness of what arrives."""

  def init_fn(params):
    # Arrays of their own: the state is donated.
    zero = lambda: jnp.zeros([], jnp.int32)
    return _RecordedState(zero(), zero(), inner.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra_args
    )
    staleness = jnp.asarray(extra_args.get('staleness', 0), jnp.int32)
    return updates, _RecordedState(
      state.staleness + staleness, state.arrivals + 1, inner_state
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Rows(NamedTuple):
  """The rows that a chunk of calls reads; leading axes (seeds, calls)."""

  batch: np.ndarray
  verification: np.ndarray | None


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
  staleness: jax.Array  # Since the start, as the next two.
  arrivals: jax.Array
  replays: jax.Array


def _train(config, method, model, datasets, params, arrays, profile_to):
  filling = _filling(config, method)
  init, advance, measure = _programs(config, method, model, datasets)
  carry = init(jnp.arange(config.seeds), params)
  reports = _Reports(config, method, datasets, filling)
  pace = _Pace()
  calls, waiting = 0, None
  padded = _padded(config)
  for target in _evaluated_steps(config):
    target_calls = target + filling if target else 0
    while True:
      length = min(target_calls - calls, padded, pace.calls)
      traced = profile_to is not None and 0 < calls <= 2 * _PROFILED
      if traced:
        length = min(length, _PROFILED)
      rows = _rows(config, method, datasets, calls, length, filling)
      if traced:
        with jax.profiler.trace(str(profile_to)):
          carry, totals, evaluated = advance(carry, arrays, rows, length)
          jax.block_until_ready(totals)
        profile_to = None
      else:
        carry, totals, evaluated = advance(carry, arrays, rows, length)
      pace.dispatched()
      calls += length
      ends = calls == target_calls
      measured = measure(evaluated, arrays) if ends else None
      if waiting is not None:
        yield from reports.of(*waiting)
        pace.finished(waiting[1])
        if reports.finished:
          return
      waiting = (calls, length, totals, measured)
      if ends:
        break
  yield from reports.of(*waiting)
  if not reports.finished:
    yield Finished(method, 'completed', None)


def _evaluated_steps(config):
  yield 0
  step = 0
  while step < config.updates:
    step = min(step + config.evaluate_every, config.updates)
    yield step


def _padded(config):
  """Calls that a chunk has room for: its rows stay below 64 MB."""
  room = 2**24 // (config.seeds * config.batch_size)
  return max(1, min(config.evaluate_every, config.updates, 512, room))


class _Pace:
  """How many calls fit into half a second."""

  def __init__(self):
    self.calls = 1
    self._began = 0.0
    self._last = 0.0

  def dispatched(self):
    self._began, self._previous = time.perf_counter(), self._began

  def finished(self, length):
    """The chunk before the one just dispatched has finished."""
    now = time.perf_counter()
    took = now - max(self._previous, self._last)
    self._last = now
    if length:
      self.calls = max(1, int(length * _CHUNK_SECONDS / max(took, 1e-6)))


class _Reports:
  """Turns what chunks leave behind into events."""

  def __init__(self, config, method, datasets, filling):
    self.finished = False
    self._method = method
    self._filling = filling
    self._joined = _joined(config, method)
    self._epoch = config.batch_size / len(datasets[0].train.labels)
    self._stopping = _Stopping(config.patience, config.seeds)
    self._seen = dict(progress=(0, 0), evaluation=(0, 0))

  def of(self, calls, length, totals, measured):
    """Events of a chunk that ends after so many calls; waits for it."""
    totals = jax.device_get(totals)
    step = max(calls - self._filling, 0)
    diverged = self._diverged(totals.bad_call >= 0, totals)
    if diverged is None and length:
      seeds = len(totals.loss)
      loss = float(np.sum(totals.loss) / (length * seeds))
      staleness = float(np.mean(self._staleness('progress', totals)))
      yield Progress(self._method, step, loss, staleness)
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
      yield Finished(self._method, 'stopped_early', None)

  def _evaluation(self, calls, step, totals, measured):
    taken = calls + self._joined * np.broadcast_to(
      totals.replays, totals.loss.shape
    )
    measured['gradient_evaluations'] = taken
    measured['staleness'] = self._staleness('evaluation', totals)
    measured = self._stopping.frozen(measured)
    evaluation = Evaluation(self._method, step, step * self._epoch, **measured)
    if step:
      self._stopping.see(evaluation)
    return evaluation

  def _staleness(self, since, totals):
    """Mean staleness since the last time; sums that wrapped come out right."""
    before = self._seen[since]
    self._seen[since] = (totals.staleness, totals.arrivals)
    total, number = (
      np.subtract(now, was, dtype=np.int32)
      for now, was in zip(self._seen[since], before, strict=True)
    )
    with np.errstate(invalid='ignore'):
      mean = np.float64(total) / number
    return np.broadcast_to(mean, totals.loss.shape)

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
    return Finished(
      self._method,
      'diverged',
      f'{self._method.label} diverged: the loss of seed {seed} is {what} at '
      f'step {step}{also}',
    )


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
        name: np.where(self.stopped, self._last[name], values)
        for name, values in measured.items()
      }
    self._last = measured
    return measured

  def see(self, evaluation):
    """Takes note of an evaluation."""
    if self._patience is None:
      return
    scores = zip(
      evaluation.validation_accuracy, -evaluation.validation_loss, strict=True
    )
    for seed, score in enumerate(scores):
      better = score > self._best[seed]
      self._best[seed] = max(score, self._best[seed])
      self._since[seed] = 0 if better else self._since[seed] + 1
    self.stopped |= self._since >= self._patience


def _rows(config, method, datasets, first_call, length, filling):
  """Batches by call, verification samples by update; padded to one length."""
  examples = len(datasets[0].train.labels)

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
      examples, config.batch_size, seed, step
    ),
    config.batch_size,
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
  batch_like = _batch_like(config, datasets[0])
  filling = _filling(config, method)

  def transformation(seed):
    return make_transformation(config, method, loss_fn, batch_like, seed)

  def init_one(seed, params):
    return _Carry(
      params,
      transformation(seed).init(params),
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
    # A selection's seed is in the state, so here any seed will do.
    updates, opt_state = transformation(0).update(
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
      staleness=optax.tree.get(state, 'staleness', filtering=_is_record),
      arrivals=optax.tree.get(state, 'arrivals', filtering=_is_record),
      replays=_replays(state),
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
  axes = _batched_axes(both, np.int32(0), params, one, rows)
  return (
    jax.jit(jax.vmap(init_one, out_axes=axes)),
    jax.jit(
      jax.vmap(advance_one, in_axes=(axes, 0, 0, None), out_axes=(axes, 0, 0)),
      donate_argnums=0,
    ),
    jax.jit(jax.vmap(measure)),
  )


def _is_record(path, value):
  """Whether a leaf is one of `_RecordedState` itself."""
  del value
  return '_RecordedState' in str(path[-1])


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


def _batched_axes(fn: Callable, *args: Any) -> Any:
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
