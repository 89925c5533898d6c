"""Many runs of one shape under one `vmap`: seeds, learning rates, data sets.

A *lane* is one run. All lanes share one compiled program, which is compiled
once and takes any lanes of its shape: data sets are filled up to common sizes.
A run ends when all its *budgets* are spent: of updates, of gradients, of
simulated time under several prices; or after four times the updates that mean
workers take in its time, as in a cluster with one machine that is much faster
than all others. The parameters of the last moment within
each budget are kept on the way, so that one run answers for all of them.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gsgd_jax import (
  _protocol,
  batches,
  clock,
  data,
  events,
  optimizers,
  programs,
  tasks,
  transformation,
)

_MOST = 4  # Times the updates that mean workers take in a budget.
_TOLERANCE = 1e-6  # Of a budget: sums of float32 are not exact.


class Lane(NamedTuple):
  """A run."""

  dataset: data.Dataset  # As it was loaded.
  seed: int
  learning_rate: float


class Budget(NamedTuple):
  """What a run may spend.

  Attributes:
    name: What it is called.
    kind: ``'updates'`` (arriving gradients), ``'gradients'`` (all that were
      taken for them, replays and those thrown away included) or ``'time'``.
    amount: How much of it.
    sync_cost: Of ``'time'``: what a synchronisation costs, in units.
    shared: Of ``'time'``: whether replays are split over all workers; else
      they cost what the method's ``replay_model`` says.
  """

  name: str
  kind: str
  amount: float
  sync_cost: float = 0.0
  shared: bool = False


class Spent(NamedTuple):
  """What a run has spent."""

  updates: Any
  gradients: Any
  time: Any  # One for each budget.


class Result(NamedTuple):
  """What lanes have come to; ``kept`` of each budget, ``curve`` on the way.

  Attributes:
    validation_accuracy: shape=(budgets, lanes); NaN without such a split.
    test_accuracy: shape=(budgets, lanes); None where nothing was tested.
    diverged: shape=(budgets, lanes), bool: parameters are no longer finite.
    spent: `Spent`, each shape=(budgets, lanes); ``time`` is by the budget's
      own prices.
    curve: (`Spent`, accuracies): each shape=(points, lanes), but ``time``
      (points, lanes, budgets). Accuracies are of the test split where that is
      asked for, else None.
  """

  validation_accuracy: np.ndarray
  test_accuracy: np.ndarray | None
  diverged: np.ndarray
  spent: Spent
  curve: tuple[Spent, np.ndarray | None]


class Shape(NamedTuple):
  """Sizes that data sets are filled up to; None where they are as they are."""

  features: int
  train: int
  validation: int
  test: int


def shape_of(datasets: Sequence[data.Dataset]) -> Shape | None:
  """The least sizes that have room for all; None of what is no table."""
  tables = [
    d.train.inputs for d in datasets if isinstance(d.train, data.Examples)
  ]
  if len(tables) < len(datasets) or any(
    x.ndim != 2 or x.dtype != np.float32 for x in tables
  ):
    return None
  most = lambda split: max(
    0 if getattr(d, split) is None else d.count(getattr(d, split))
    for d in datasets
  )
  features = max(x.shape[1] for x in tables)
  return Shape(features, most('train'), most('validation'), most('test'))


def filled(dataset: data.Dataset, shape: Shape | None) -> data.Dataset:
  """A data set of a shape: with features that are 0, and unused rows."""
  if shape is None:
    return dataset

  def split(examples, rows):
    missing = (
      (0, rows - len(examples.labels)),
      (0, shape.features - examples.inputs.shape[1]),
    )
    inputs = np.pad(examples.inputs, missing)
    return data.Examples(inputs, np.pad(examples.labels, missing[0]))

  features = dataset.shape
  if math.prod(features) != shape.features:
    features = (shape.features,)
  validation = dataset.validation
  return dataset._replace(
    train=split(dataset.train, shape.train),
    validation=None
    if validation is None
    else split(validation, shape.validation),
    test=split(dataset.test, shape.test),
    shape=features,
  )


def filled_params(params: Any, like: Any) -> Any:
  """Parameters with weights of 0 for the features that are filled up."""

  def one(x, wanted):
    missing = [(0, b - a) for a, b in zip(x.shape, wanted.shape, strict=True)]
    return jnp.pad(x, missing)

  return jax.tree.map(one, params, like)


class _State(NamedTuple):
  """Of all lanes; leaves have a leading axis of them."""

  runs: programs.Carry
  kept: Any  # Parameters, with an axis of budgets.
  spent: Spent  # Of what is kept.
  over: jax.Array  # shape=(lanes, budgets), bool: budgets that are spent.


class Sweep:
  """The program for lanes of one shape, compiled when it is first used.

  Args:
    config: Settings that all lanes share; ``learning_rate``, ``seeds`` and
      ``updates`` are not looked at, but by schedules.
    method: The method.
    datasets: Data sets of which lanes may be, of any seed.
    budgets: What ends a run; their amounts may be others in `run`.
    lanes: How many lanes a program has.
    room: The most calls between two points of the curve.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    method: events.Method,
    datasets: Sequence[data.Dataset],
    budgets: Sequence[Budget],
    lanes: int,
    room: int,
  ) -> None:
    self._config = config.copy_and_resolve_references()
    self._config.sync_cost = 0.0  # Counted apart, at any price.
    self._method = method
    self._budgets = tuple(budgets)
    self._lanes = lanes
    self._room = room
    self._shape = shape_of(datasets)
    self._like = filled(datasets[0], self._shape)
    self._task = tasks.make(self._config, self._like)
    if self._task.keyed:
      raise ValueError('sweeps have no dropout and no augmentation')
    sizes = {batches.verification_size(d.examples) for d in datasets}
    # Samples of several sizes are filled up to the largest.
    self._most = max(sizes) if len(sizes) > 1 else None
    kind, task = programs.Settings, self._task
    if self._most is not None:
      kind = _Uneven
      task = task._replace(loss_fn=_of_uneven(task.loss_fn))
    self._settings = kind(self._config, method, task, [self._like])
    self._filling = self._settings.filling
    self._size = transformation.batch_size(self._config, method)
    self._samples = bool(
      method.select and config.verification and not config.stored_gradients
    )
    self._filled = functools.lru_cache(maxsize=None)(self._filled_of)
    self._begun = functools.lru_cache(maxsize=None)(self._params_of)
    self._compiled = {}

  def run(
    self,
    lanes: Sequence[Lane],
    budgets: Sequence[Budget],
    every: int,
    tested: bool = True,
  ) -> Result:
    """Trains so many lanes, all at once.

    Args:
      lanes: At most as many as the program has.
      budgets: Those of the sweep, with amounts of their own.
      every: Calls between two points of the curve.
      tested: Whether test accuracy is measured, on the way as well.

    Returns:
      A `Result`.
    """
    asked = len(lanes)
    lanes = [*lanes, *[lanes[-1]] * (self._lanes - asked)]
    of_all = self._of_all(lanes)
    rates = jnp.array([lane.learning_rate for lane in lanes], jnp.float32)
    state = self._initial(of_all, lanes, rates)
    limits = jnp.array([b.amount for b in budgets], jnp.float32)
    points, call = [], 0
    last = self._last_call(budgets)
    while not bool(jnp.all(state.over)):
      # Calls that only fill come first, so that points lie at whole multiples.
      filling = self._filling - call
      length = min(filling, self._room) if filling > 0 else every
      if call > last:
        state = of_all.programs.stop(state)
        break
      rows = self._rows(lanes, call, length)
      state, now, spent = of_all.programs.advance(
        state, of_all.train, rows, rates, limits, length
      )
      call += length
      if filling <= 0:
        points.append((spent, of_all.accuracy(now, 'test') if tested else None))
    return self._result(asked, state, points, of_all, tested)

  def _of_all(self, lanes):
    """The programs and the data of lanes."""
    datasets = [self._filled(_Same(lane.dataset)) for lane in lanes]
    counts = {}
    if self._shape is not None:
      counts = {
        split: _counts([getattr(x.dataset, split) for x in lanes])
        for split in ('validation', 'test')
      }
    own = data.axes(datasets)
    programs_ = self._programs(str(own), own)
    return _OfAll(programs_, *data.stacked(datasets), counts)

  def _initial(self, of_all, lanes, rates):
    params = [self._begun(_Same(x.dataset), x.seed) for x in lanes]
    params = jax.tree.map(lambda *x: jnp.stack(x), *params)
    seeds = jnp.array([lane.seed for lane in lanes], jnp.int32)
    return of_all.programs.init(seeds, params, rates)

  def _result(self, asked, state, points, of_all, tested):
    def of_budgets(split):
      if getattr(of_all, split) is None:
        return np.full([len(self._budgets), asked], np.nan)
      found = [
        of_all.accuracy(_of_budget(state.kept, i), split)
        for i in range(len(self._budgets))
      ]
      return np.stack(found)[:, :asked].astype(float)

    validation = of_budgets('validation')
    test = of_budgets('test') if tested else None
    finite = [
      jnp.all(jnp.isfinite(x), axis=tuple(range(2, x.ndim)))
      for x in jax.tree.leaves(state.kept)
    ]
    diverged = ~np.all(np.stack(finite), axis=0)[:asked].T
    chance = 1 / len(self._like.classes)
    for accuracy in (validation, test):
      if accuracy is not None:
        accuracy[diverged & ~np.isnan(accuracy)] = chance
    spent = Spent(*(np.asarray(x)[:asked].T for x in state.spent))
    curve = Spent(
      *(
        np.stack([np.asarray(getattr(s, name))[:asked] for s, _ in points])
        for name in Spent._fields
      )
    )
    accuracies = None
    if tested:
      accuracies = np.stack([np.asarray(a)[:asked] for _, a in points])
    return Result(validation, test, diverged, spent, (curve, accuracies))

  def _filled_of(self, same):
    return filled(same.dataset, self._shape)

  def _params_of(self, same, seed):
    """Initial parameters: drawn as if nothing were filled up."""
    model = self._task.model
    if self._shape is not None:
      model = tasks.make_model(self._config, same.dataset)
    params = model.init(jax.random.key(seed))
    return filled_params(params, self._settings.params())

  def _last_call(self, budgets):
    """Calls after which a run ends, whatever its budgets still hold."""
    workers = self._config.workers
    most = max(
      b.amount * (max(workers, self._size) if b.kind == 'time' else 1)
      for b in budgets
    )
    return self._filling + int(_MOST * most)

  def _rows(self, lanes, first, length):
    """The rows of so many calls; of what only fills, samples are not read."""

    def of(rows, offset):
      like = rows(1)
      taken = np.zeros([self._room, *like.shape[1:]], like.dtype)
      begin = max(0, offset - first)
      if begin < length:
        steps = rows(first + length - offset)
        taken[begin:length] = steps[first + begin - offset :]
      return taken

    def stacked(rows_of, offset=0):
      distinct = {}
      for lane in lanes:
        key = (id(lane.dataset), lane.seed)
        if key not in distinct:
          distinct[key] = of(functools.partial(rows_of, lane), offset)
      return np.stack(
        [distinct[id(lane.dataset), lane.seed] for lane in lanes], axis=1
      )

    batch = stacked(
      lambda lane, steps: _batch_rows(
        _Same(lane.dataset), self._size, lane.seed, steps
      )
    )
    verification = None
    if self._samples:
      verification = stacked(
        lambda lane, steps: self._samples_of(lane, steps),
        self._filling,
      )
      if self._most is not None:
        verification = self._uneven(lanes, verification)
    return programs.Rows(batch, None, verification)

  def _samples_of(self, lane, steps):
    rows = _verification_rows(_Same(lane.dataset), lane.seed, steps)
    if self._most is None:
      return rows
    return np.pad(rows, ((0, 0), (0, self._most - rows.shape[1])))

  def _uneven(self, lanes, rows):
    sizes = [batches.verification_size(x.dataset.examples) for x in lanes]
    sizes = np.array(sizes, np.int32)
    return rows, np.broadcast_to(sizes, rows.shape[:2])

  def _programs(self, key, own):
    if key not in self._compiled:
      self._compiled[key] = _compile(
        self._settings, self._budgets, own, self._filling, self._lanes
      )
    return self._compiled[key]


def _of_budget(kept, i):
  return jax.tree.map(lambda x: x[:, i], kept)


def _counts(splits):
  """Examples of each, of tables; None where there are no such splits."""
  if splits[0] is None:
    return None
  return np.array([len(s.labels) for s in splits], np.int32)


class _Sample(NamedTuple):
  """A verification sample that is filled up."""

  examples: data.Examples
  count: jax.Array


class _Uneven(programs.Settings):
  """Settings whose samples are of several sizes."""

  def verification(
    self, train: data.Examples | data.Text, rows: Any
  ) -> _Sample:
    """The verification sample, from its rows and their number."""
    return _Sample(super().verification(train, rows[0]), rows[1])


def _of_uneven(loss_fn):
  """The mean over those examples of a sample that are there."""

  def mean(params, batch):
    if not isinstance(batch, _Sample):
      return loss_fn(params, batch)
    of_one = lambda example: loss_fn(
      params, jax.tree.map(lambda x: x[None], example)
    )
    losses = jax.vmap(of_one)(batch.examples)
    there = jnp.arange(len(losses), dtype=jnp.int32) < batch.count
    return jnp.sum(jnp.where(there, losses, 0)) / batch.count

  return mean


class _Same(NamedTuple):
  """A data set that is hashed by what it is, not by what it holds."""

  dataset: data.Dataset

  def __hash__(self):
    return id(self.dataset.train)

  def __eq__(self, other):
    return self.dataset.train is other.dataset.train


def _grown(rows_of):
  """Rows of steps from 0 on, kept, and drawn anew when more are wanted."""
  kept = {}

  def rows(same, *args):
    *args, steps = args
    key = (same, *args)
    there = kept.get(key)
    if there is None or len(there) < steps:
      there = rows_of(same.dataset, *args, max(64, 2 * steps))
      kept[key] = there
    return there[:steps]

  return rows


_batch_rows = _grown(lambda d, *args: d.all_batch_rows(*args))
_verification_rows = _grown(lambda d, *args: d.all_verification_rows(*args))


class _Compiled(NamedTuple):
  init: Any
  advance: Any
  stop: Any
  accuracy: Any


class _OfAll(NamedTuple):
  """The programs of all lanes, and their data, stacked."""

  programs: _Compiled
  train: Any
  validation: Any
  test: Any
  counts: dict[str, Any]  # Examples of each lane's split, of tables.

  def accuracy(self, params, split):
    """Of all lanes, on a split."""
    there = self.counts.get(split)
    return self.programs.accuracy(
      params, self.train, getattr(self, split), there
    )


def _compile(settings, budgets, own, filling, lanes):
  """The programs of all lanes; `own` are the axes of the splits' arrays."""
  init_one, step = programs.stepper(settings)

  def one(seed, params, train, rows, rate):
    # In a loop, as what is the same for all at first may differ later.
    return jax.lax.fori_loop(
      0,
      jnp.int32(1),
      lambda _, run: step(run, train, rows, rate)[0],
      init_one(seed, params, rate),
    )

  axes = programs.batched_axes(one, *_like(settings))
  rule = _Rule(settings, budgets, filling, lanes, axes, own, init_one, step)
  jit = lambda fn, **options: jax.jit(functools.partial(fn, rule), **options)
  return _Compiled(
    jit(_init), jit(_advance, donate_argnums=0), jit(_stop), jit(_accuracy)
  )


class _Rule(NamedTuple):
  """What the programs of all lanes have in common."""

  settings: programs.Settings
  budgets: Sequence[Budget]
  filling: int
  lanes: int
  axes: Any  # Of the runs: what differs between lanes.
  own: Any  # Of the splits' arrays, likewise.
  init: Any  # Of a run.
  step: Any

  def of_runs(self, fn, runs):
    """`fn` of every run."""
    return jax.vmap(fn, in_axes=(self.axes,))(runs)

  def now(self, runs):
    """The parameters to be evaluated, and what is spent."""
    params = self.of_runs(
      lambda run: optimizers.evaluation_params(run.params, run.opt_state), runs
    )
    return params, self.spent(runs)

  def spent(self, runs):
    """What every run has spent."""
    settings, budgets, filling = self[:3]
    return self.of_runs(
      lambda run: _spent(settings, budgets, filling, run), runs
    )


def _init(rule, seeds, params, rates):
  runs = jax.vmap(rule.init, out_axes=rule.axes)(seeds, params, rates)
  number = len(rule.budgets)
  params, _ = rule.now(runs)
  kept = jax.tree.map(lambda x: jnp.repeat(x[:, None], number, axis=1), params)
  zero = jnp.zeros([rule.lanes, number])
  return _State(runs, kept, Spent(zero, zero, zero), zero > 0)


def _advance(rule, state, train, rows, rates, limits, length):
  """So many calls of all runs."""
  every = jax.vmap(
    rule.step,
    in_axes=(rule.axes, rule.own[0], 0, 0),
    out_axes=(rule.axes, 0),
  )

  def call(i, state):
    rows_of_call = jax.tree.map(lambda r: r[i], rows)
    runs, _ = every(state.runs, train, rows_of_call, rates)
    return _after_call(rule, state, runs, limits)

  state = jax.lax.fori_loop(0, length, call, state)
  return state, *rule.now(state.runs)


def _after_call(rule, state, runs, limits):
  """Keeps what the budgets had that this call is beyond."""
  spent = rule.spent(runs)
  looked_at = [
    spent.time[:, i] if b.kind == 'time' else getattr(spent, b.kind)
    for i, b in enumerate(rule.budgets)
  ]
  beyond = jnp.stack(looked_at, axis=1) > limits * (1 + _TOLERANCE)
  now = beyond & ~state.over
  kept, spent = jax.lax.fori_loop(
    0,
    jnp.any(now).astype(jnp.int32),  # Seldom: so it costs nothing else.
    lambda _, kept: _where(now, rule.now(state.runs), kept),
    (state.kept, state.spent),
  )
  return _State(runs, kept, spent, state.over | beyond)


def _stop(rule, state):
  """Keeps what there is, for budgets that are not spent."""
  kept, spent = _where(
    ~state.over, rule.now(state.runs), (state.kept, state.spent)
  )
  return state._replace(kept=kept, spent=spent)


def _accuracy(rule, params, train, split, counts):
  """Of each lane; of the first `counts` examples where splits are filled up."""
  axes = (0, rule.own[0], rule.own[2], None if counts is None else 0)
  accuracy = rule.settings.task.accuracy
  return jax.vmap(accuracy, in_axes=axes)(params, train, split, counts)


def _where(now, values, kept_and_spent):
  """`values` of the lanes, at the budgets that are spent just now."""
  (params, spent), (kept, kept_spent) = values, kept_and_spent

  def one(x, kept):
    which = now.reshape(*now.shape, *[1] * (kept.ndim - 2))
    return jnp.where(which, x[:, None], kept)

  kept = jax.tree.map(one, params, kept)
  columns = (spent.updates[:, None], spent.gradients[:, None], spent.time)
  kept_spent = Spent(
    *(jnp.where(now, x, k) for x, k in zip(columns, kept_spent, strict=True))
  )
  return kept, kept_spent


def _like(settings):
  """What a call of one lane takes."""
  dataset = settings.datasets[0]
  feed = programs.Feed(
    settings.config, settings.method, settings.datasets, settings.task.keyed
  )
  rows = jax.tree.map(lambda r: r[0, 0], feed.rows(0, 1))
  if isinstance(settings, _Uneven) and rows.verification is not None:
    rows = rows._replace(verification=(rows.verification, np.int32(1)))
  rate = np.float32(0)
  return np.int32(0), settings.params(), dataset.train, rows, rate


def _spent(settings, budgets, filling, run):
  """What one run has spent so far."""
  config, method = settings.config, settings.method
  joined = 1.0
  if method.parallel == 'data_parallel':
    joined = transformation.joined(config, method)
  arrived = jnp.maximum(run.calls - filling, 0)
  taken = transformation.gradients_taken(config, method, run.calls)
  # Gradients that are still on their way are no more than those of others.
  taken = jnp.maximum(taken - filling, 0).astype(jnp.float32)
  costs = _costs(run.opt_state)
  extra = costs.extra * transformation.joined(config, method)
  times = [
    costs.workers
    + costs.server
    + (costs.shared + costs.replays * b.sync_cost if b.shared else costs.alone)
    + _synchronisations(config, method, run.calls) * b.sync_cost
    for b in budgets
  ]
  return Spent(
    arrived.astype(jnp.float32) * joined,
    taken + extra.astype(jnp.float32),
    jnp.stack([t.astype(jnp.float32) for t in times]),
  )


def _synchronisations(config, method, calls):
  if method.parallel == 'data_parallel':
    return calls
  if method.parallel == 'synchronous':
    return calls // transformation.waited_for(config)
  return 0 * calls


class _Costs(NamedTuple):
  """Simulated time of a run, by what it was for; in units."""

  workers: jax.Array  # What workers took.
  server: jax.Array  # Gradients of the server's own, but for replays.
  replays: jax.Array  # How many.
  alone: jax.Array  # What they cost as the method takes them,
  shared: jax.Array  # and split over all workers, synchronisations aside.
  extra: jax.Array  # All gradients beside those that arrived.


def _costs(state):
  outermost = _protocol.announced(state, _protocol.Clock)[0]
  unit = clock.in_units(outermost.unit)
  zero = jnp.zeros([])
  replays = alone = shared = server = extra = zero
  for r in _protocol.announced(state, _protocol.Replays):
    sizes = jnp.arange(1, r.parallel.shape[-1] + 1, dtype=jnp.int32)
    number = r.serial + r.shared + jnp.sum(sizes * r.parallel)
    whole = unit * r.batches
    rounds = jnp.sum(-(-sizes // outermost.workers) * r.parallel)
    replays = replays + number
    alone = alone + (r.serial + r.shared + rounds) * whole
    split = jnp.minimum(outermost.workers, r.batch_size)
    shared = shared + number * whole / split
    extra = extra + number * r.batches
  for g in _protocol.announced(state, _protocol.ServerGradients):
    server = server + g.count * g.batches * unit
    extra = extra + g.count * g.batches
  return _Costs(
    jnp.asarray(clock.in_units(outermost.time)),
    server,
    replays,
    alone,
    shared,
    extra,
  )
