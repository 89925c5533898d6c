"""Training runs against the same run written out plainly."""

import contextlib
import importlib.util
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import tensorflow_datasets as tfds

from gsgd_jax import (
  batches,
  data,
  diagnostics,
  events,
  experiment,
  guided,
  models,
  optimizers,
  parallel,
  programs,
  report,
  settings,
  studying,
  tasks,
  training,
)

pytestmark = pytest.mark.usefixtures('as_users_run_it')
CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def load_config(name, **changes):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.update(changes)
  return config


SHORT = dict(
  dataset='breast_cancer',
  model='softmax_regression',
  workers=3,
  delay=4,
  batch_size=8,
  seeds=2,
  updates=25,
  evaluate_every=10,
  window=5,
  learning_rate=0.05,
)


def short(**changes):
  config = settings.default_config()
  config.update({**SHORT, **changes})
  return config


class Plain:
  """One seed of a method, step by step; gradients wait in lists.

  What another seed has compiled is used again.
  """

  def __init__(self, config, method, seed, other=None):
    self.config, self.method, self.seed = config, method, seed
    self.dataset = data.load(
      config.dataset, seed, label_noise=config.label_noise
    )
    self.n = len(self.dataset.train.labels)
    model = tasks.make_model(config, self.dataset)
    if other is None:
      self.loss_fn = jax.jit(models.cross_entropy(model))
      self.accuracy_fn = jax.jit(models.accuracy(model))
      self.gradient = jax.jit(jax.value_and_grad(self.loss_fn))
      self.update = jax.jit(
        lambda seed, *args, **extra: self.inner(seed).update(*args, **extra)
      )
    else:
      for name in ('loss_fn', 'accuracy_fn', 'gradient', 'update'):
        setattr(self, name, getattr(other, name))
    self.params = model.init(jax.random.key(seed))
    self.state = self.inner(seed).init(self.params)
    self.calls = self.arrivals = self.applied = self.replays = 0
    self.stalenesses = []
    self.maximum = self.clock = 0

  def inner(self, seed):
    config = self.config
    rate = optimizers.make_schedule(
      config.schedule, config.learning_rate, config.updates
    )
    tx = optimizers.make(config.optimizer, rate)
    if self.method.select is None:
      return tx
    batch = self.rows(np.arange(config.batch_size * self.joined()))
    return guided(
      tx,
      None if config.stored_gradients else self.loss_fn,
      window=config.window,
      revisit=0 if config.stored_gradients else config.revisit,
      select=self.method.select,
      batch_like=batch,
      seed=seed,
    )

  def joined(self):
    mean = self.config.combine == 'mean'
    synchronous = self.method.parallel == 'synchronous'
    return self.config.workers if mean and synchronous else 1

  def rows(self, rows):
    return jax.tree.map(lambda x: jnp.asarray(x[rows]), self.dataset.train)

  def take(self):
    """A gradient of the next batch at the current parameters."""
    config = self.config
    batch = self.rows(
      batches.batch_rows(self.n, config.batch_size, self.seed, self.calls)
    )
    self.calls += 1
    return (*self.gradient(self.params, batch), batch, self.applied)

  def apply(self, value, grads, batch, read_at):
    sample = self.rows(
      batches.verification_rows(self.n, self.seed, self.arrivals - 1)
    )
    before = programs._replays(self.state)
    updates, self.state = self.update(
      self.seed,
      grads,
      self.state,
      self.params,
      value=value,
      batch=batch,
      verification=sample,
      arrival=jnp.int32(self.arrivals - 1),
    )
    self.replays += int(programs._replays(self.state) - before)
    self.params = optax.apply_updates(self.params, updates)
    self.stalenesses.append(self.applied - read_at)
    self.latest = self.stalenesses[-1]
    self.maximum = max(self.maximum, self.latest)
    self.applied += 1

  def steps(self):
    """Runs on, one arrival at a time."""
    config, parallel = self.config, self.method.parallel
    if parallel == 'synchronous':
      while True:
        waiting = [self.take() for _ in range(config.workers)]
        taken, self.calls = self.calls, self.calls - config.workers
        for i, packet in enumerate(waiting):
          self.arrivals += 1
          self.calls += 1
          if config.combine == 'sequential':
            self.apply(*packet)
          elif i == config.workers - 1:
            mean = lambda *x: sum(x) / len(x)
            join = lambda *x: jnp.concatenate(x)
            values, grads, batches, read_at = zip(*waiting, strict=True)
            self.apply(
              mean(*values),
              jax.tree.map(mean, *grads),
              jax.tree.map(join, *batches),
              read_at[0],
            )
          if i == config.workers - 1:
            self.clock += 1 + config.sync_cost
          yield
        assert self.calls == taken
    queue = []
    length = {
      'sequential': 1,
      'asynchronous': config.workers,
      'delayed': config.delay + 1,
    }[parallel]
    while True:
      while len(queue) < length:
        queue.append(self.take())
      self.arrivals += 1
      self.apply(*queue.pop(0))
      self.clock += 1 / length
      yield

  def measured(self):
    out = {}
    for name, split in zip(
      ('train', 'validation', 'test'), self.dataset[2:5], strict=True
    ):
      split = jax.tree.map(jnp.asarray, split)
      params = self.params
      if self.config.optimizer == 'schedule_free_sgd':
        params = optax.contrib.schedule_free_eval_params(self.state, params)
      out[f'{name}_loss'] = self.loss_fn(params, split)
      out[f'{name}_accuracy'] = self.accuracy_fn(params, split)
    out['gradient_evaluations'] = self.calls + self.replays * self.joined()
    stalenesses, self.stalenesses = self.stalenesses, []
    out['staleness'] = np.mean(stalenesses) if stalenesses else np.nan
    out['latest_staleness'] = self.latest if self.applied else 0
    out['maximal_staleness'] = self.maximum
    out['applied'] = self.applied
    out['overwritten'] = out['lost'] = out['refused'] = 0
    # The server takes replays itself, a unit for each gradient of a worker.
    stored = self.config.stored_gradients
    replay_units = 0 if stored else self.replays * self.joined()
    out['simulated_time'] = self.clock + replay_units
    return out


METHODS = (
  'sequential',
  'asynchronous',
  'asynchronous+consistent',
  'delayed+random',
  'synchronous+hardest',
)


def assert_as_plainly(config, name):
  history = experiment.run(config)[name]
  assert history.status == 'completed' and history.message is None
  assert history.step.tolist() == [0, 10, 20, 25]
  plain = None
  for seed in range(config.seeds):
    plain = Plain(config, history.method, seed, plain)
    expected, steps = [plain.measured()], plain.steps()
    for step in range(1, config.updates + 1):
      next(steps)
      if step in history.step:
        expected.append(plain.measured())
    epoch = history.step * config.batch_size / plain.n
    np.testing.assert_allclose(history.epoch, epoch, rtol=1e-12)
    for field in events.MEASURED:
      exact = 'loss' not in field and 'accuracy' not in field
      np.testing.assert_allclose(
        getattr(history, field)[:, seed],
        [e[field] for e in expected],
        rtol=1e-8 if exact else 1e-3,
        atol=0 if exact else 1e-5,
        err_msg=field,
      )


@pytest.mark.parametrize('name', METHODS)
def test_a_method_is_what_it_says(name):
  assert_as_plainly(short(methods=(name,)), name)


def test_mean_rounds():
  config = short(parallel='synchronous', guidance='random', combine='mean')
  config.window = 2
  assert_as_plainly(config, 'synchronous+random')


def test_schedules_count_arrivals():
  name = 'asynchronous+random'
  config = short(methods=(name,), schedule='linear', optimizer='adam')
  assert_as_plainly(config, name)


def test_label_noise_reaches_training():
  assert_as_plainly(
    short(methods=('sequential',), label_noise=0.3), 'sequential'
  )


@pytest.mark.usefixtures('as_users_compile_it')
def test_chunks_change_nothing(monkeypatch):
  """However the run is cut into chunks: bit for bit the same."""
  config = short(methods=('asynchronous+random',), revisit=0)
  whole = experiment.run(config)['asynchronous+random']
  lengths = iter([1, 4] * 100)
  cut = property(lambda self: next(lengths), lambda self, value: None)
  monkeypatch.setattr(training._Pace, 'calls', cut, raising=False)
  pieces = experiment.run(config)['asynchronous+random']
  for field in ('step', *events.MEASURED):
    np.testing.assert_array_equal(getattr(whole, field), getattr(pieces, field))


def test_methods_are_parsed():
  config = short(methods=('sequential, delayed+random', 'asynchronous'))
  assert [m.name for m in events.methods(config)] == [
    'sequential',
    'delayed+random',
    'asynchronous',
  ]
  labels = [m.label for m in events.methods(config)]
  assert labels == ['sequential', 'delayed, random replays', 'asynchronous']
  config.parallel = 'delayed'
  assert [m[:3] for m in events.methods(config)] == [
    ('delayed', 'delayed', None)
  ]
  config.guidance = 'consistent'
  assert events.methods(config)[0].label == 'delayed, guided'


def test_one_method_diverges_and_the_others_go_on():
  config = short(
    methods=('delayed', 'sequential'),
    learning_rate=3.0,
    delay=40,
    model='mlp',
    hidden=(8, 8, 8),
    updates=300,
    evaluate_every=50,
  )
  delayed, sequential = experiment.run(config).values()
  assert delayed.status == 'diverged' and sequential.status == 'completed'
  assert sequential.step[-1] == 300


@pytest.mark.parametrize(
  'parallel, step, value, said',
  [
    ('sequential', 17, np.inf, 'infinite'),
    ('delayed', 13, np.nan, 'NaN'),
    ('asynchronous', 15, np.nan, 'NaN'),
  ],
)
def test_divergence_names_seed_and_step(
  monkeypatch, parallel, step, value, said
):
  """Two batches of one seed have no finite loss: those of calls 17 and 18."""
  config = short(methods=(parallel,))
  train = data.load(config.dataset, 1).train
  rows = [
    batches.batch_rows(len(train.labels), config.batch_size, 1, call)[3]
    for call in (17, 18)
  ]
  cross_entropy = models.cross_entropy

  def poisoned(model, prepare=None):
    def loss_fn(params, batch):
      marked = train.inputs[rows]
      here = jnp.all(batch.inputs[:, None] == marked, axis=-1).any()
      here &= len(batch.labels) == config.batch_size
      return jnp.where(
        here, value, cross_entropy(model, prepare)(params, batch)
      )

    return loss_fn

  monkeypatch.setattr(models, 'cross_entropy', poisoned)
  (history,) = experiment.run(config).values()
  assert history.status == 'diverged'
  assert history.message == (
    f'{parallel} diverged: the loss of seed 1 is {said} at step {step}'
  )
  assert history.step.tolist() == [0, 10]
  assert np.isfinite(history.train_loss).all()


def totals_of(loss, total_staleness=0, arrivals=0, bad=()):
  """What a chunk leaves behind, for the seeds of `loss`."""
  integers = lambda n: np.full(len(loss), n, np.int32)
  record = diagnostics.StalenessRecord(
    count=integers(arrivals),
    latest=integers(0),
    maximum=integers(0),
    total=tuple(map(integers, divmod(total_staleness, 2**20))),
    histogram=np.zeros([len(loss), 4], np.int32),
    bin_width=integers(1),
    inner_state=None,
  )
  bad_call = integers(-1)
  bad_call[list(bad)] = 4
  cluster = programs.Cluster(None, record, None, *[integers(0)] * 4)
  return programs.Totals(
    loss, bad_call, np.where(bad_call >= 0, np.nan, 0.0), cluster, pace=1
  )


def test_a_split_whose_loss_is_not_finite_is_divergence():
  reports = training._Reports(
    short(seeds=3), events.methods(short())[0], [data.load('iris', 0)], 0
  )
  totals = totals_of(np.ones(3))
  bad = np.array([1.0, np.inf, np.nan])
  end = reports._diverged(~np.isfinite(bad), totals, bad, 40)
  assert end.message == (
    'sequential diverged: the loss of seed 1 is infinite at step 40 '
    '(2 of 3 seeds)'
  )


def evaluation(accuracies, losses, **others):
  measured = {f: np.zeros(len(accuracies)) for f in events.MEASURED}
  measured.update(
    validation_accuracy=np.array(accuracies, float),
    validation_loss=np.array(losses, float),
    **others,
  )
  return measured


def test_early_stopping_seed_by_seed():
  stopping = training._Seeds(patience=2, seeds=2)
  method = events.methods(short())[0]

  def see(step, accuracies, losses):
    measured = stopping.frozen(
      evaluation(accuracies, losses, test_accuracy=np.full(2, step / 100))
    )
    stopping.see(events.Evaluation(method, step, 0.0, None, **measured))
    return measured['test_accuracy'].tolist(), stopping.stopped.tolist()

  assert see(1, [0.5, 0.5], [1, 1]) == ([0.01, 0.01], [False, False])
  # Seed 0 worse, seed 1 as accurate at a lower loss: better.
  assert see(2, [0.4, 0.5], [1, 0.9]) == ([0.02, 0.02], [False, False])
  assert see(3, [0.5, 0.5], [1, 0.9]) == ([0.03, 0.03], [True, False])
  # Seed 0 is reported as it was at 3 from now on.
  assert see(4, [0.9, 0.6], [0, 1]) == ([0.03, 0.04], [True, False])
  assert see(5, [0.9, 0.6], [0, 1]) == ([0.03, 0.05], [True, False])
  assert not stopping.all_stopped
  assert see(6, [0.9, 0.6], [0, 1]) == ([0.03, 0.06], [True, True])
  assert stopping.all_stopped


def test_early_stopping_ends_the_run():
  config = short(
    methods=('sequential',), patience=2, updates=10_000, evaluate_every=5
  )
  history = experiment.run(config)['sequential']
  assert history.status == 'stopped_early'
  assert history.step[-1] < 10_000
  for seed in range(2):
    accuracy = history.validation_accuracy[1:, seed]
    loss = history.validation_loss[1:, seed]
    best = max(range(len(loss)), key=lambda i: (accuracy[i], -loss[i], -i))
    # Frozen two evaluations after its best, whatever came later.
    end = best + 2
    after = history.test_loss[1 + end :, seed]
    assert (after == history.test_loss[-1, seed]).all()
    assert report.chosen(history, 'last').step[seed] == history.step[1 + end]
    spent = history.gradient_evaluations[-1, seed]
    assert spent == history.step[1 + end]
  # What has arrived is told as it was then, too.
  assert history.arrivals.histogram.sum() == history.applied[-1].sum()


def test_progress_leaves_out_seeds_that_stopped():
  reports = training._Reports(
    short(patience=1), events.methods(short())[0], [data.load('iris', 0)], 0
  )
  reports._seeds.stopped[:] = [True, False]
  totals = totals_of(np.array([np.nan, 6.0]), arrivals=3, bad=[0])
  chunk = training._Chunk(3, 3, totals, evaluated=None, measured=None, when=0)
  (progress,) = reports.of(chunk)
  assert (progress.step, progress.loss, progress.staleness) == (3, 2.0, 0.0)


def test_a_method_that_fails_is_not_interrupted():
  results = events.Results(short())
  first, second, *_ = events.methods(short())
  results.add(events.Started(first))
  results.add(events.Finished(first, 'completed', None))
  results.add(events.Started(second))
  results.fail('no memory')
  ends = [h[1:3] for h in results.histories().values()]
  assert ends == [
    ('completed', None),
    ('failed', 'asynchronous failed: no memory'),
    ('not_started', None),
    ('not_started', None),
  ]


def test_no_validation_split():
  config = short(methods=('sequential',), validation_share=0.0)
  history = experiment.run(config)['sequential']
  assert np.isnan(history.validation_loss).all()
  assert np.isnan(history.validation_accuracy).all()
  assert np.isfinite(history.test_loss).all()


def test_schedule_free_methods_are_evaluated_where_they_say():
  config = short(methods=('asynchronous',), optimizer='schedule_free_sgd')
  assert_as_plainly(config, 'asynchronous')


def test_stored_gradients():
  name = 'asynchronous+random'
  assert_as_plainly(short(methods=(name,), stored_gradients=True), name)


def test_sums_of_staleness_beyond_int32():
  reports = training._Reports(
    short(), events.methods(short())[1], [data.load('iris', 0)], 2
  )
  most = 2**31 - 1
  loss = np.zeros(2)
  reports._arrived(totals_of(loss, most - 10, 50))
  arrived = reports._arrived(totals_of(loss, most + 10, 54))
  assert arrived.tolist() == [[20, 20], [4, 4]]
  assert reports._recent.tolist() == [[most + 10] * 2, [54] * 2]


def make_programs(config, name):
  datasets = [data.load(config.dataset, s) for s in range(config.seeds)]
  task = tasks.make(config, datasets[0])
  method = events.method_named(name)
  params = experiment._initial_params(task.model, config.seeds)
  arrays = data.stacked(datasets)
  mesh = parallel.make_mesh(1)
  made = programs.make(config, method, task, datasets, mesh)
  rows = programs.Feed(config, method, datasets, task.keyed).rows(0, 5)
  return made, params, arrays, rows


def test_counters_stay_unbatched_under_vmap():
  """A ring indexed by a counter per seed would be masked at every step."""
  made, params, _, _ = make_programs(short(), 'asynchronous+consistent')
  carry = made.init(jnp.arange(2), params)
  state = carry.opt_state
  assert carry.calls.shape == state.count.shape == state.worker.shape == ()
  recorded = state.inner_state
  assert recorded.latest.shape == recorded.count.shape == ()
  assert recorded.inner_state.count.shape == ()
  assert recorded.inner_state.window.scores.shape == (2, 5)


@pytest.mark.usefixtures('as_users_compile_it')
def test_data_are_arguments_not_constants():
  """No constant of the compiled programs is as large as a split's labels."""
  config = short(dataset='digits')
  made, params, arrays, rows = make_programs(config, 'asynchronous+consistent')
  carry = made.init(jnp.arange(2), params)
  _, _, evaluated = jax.eval_shape(made.advance, carry, arrays, rows, 5, 1)
  for lowered in (
    made.advance.lower(carry, arrays, rows, 5, 1),
    made.measure.lower(evaluated, arrays),
  ):
    compiled = lowered.compile().as_text()
    for text in (lowered.as_text(), compiled):
      assert max(map(len, text.splitlines())) < 20_000
    shapes = [
      line.split('=')[1].split()[0]
      for line in compiled.splitlines()
      if ' constant(' in line and '=' in line
    ]
    assert shapes  # There are some.
    sizes = [
      math.prod(
        int(d) for d in s[s.index('[') + 1 : s.index(']')].split(',') if d
      )
      for s in shapes
      if '[' in s
    ]
    assert max(sizes) < len(data.load('digits', 0).test.labels)


def test_initial_params_are_those_of_the_seed():
  model = models.mlp(4, (3,), 2)
  params = experiment._initial_params(model, 3)
  alone = model.init(jax.random.key(2))
  jax.tree.map(
    lambda p, q: np.testing.assert_allclose(p[2], q, rtol=1e-6), params, alone
  )


def test_configs_say_how_they_are_run(digits_dir, monkeypatch):
  """Sets that are not there are made up; text is the README."""
  monkeypatch.syspath_prepend(CONFIGS.parent)  # As `train.py` has it.
  needs = {
    'digits_cnn': dict(data_dir=str(digits_dir)),
    'gpt': dict(dataset=str(CONFIGS.parent / 'README.md')),
  }
  for path in sorted(CONFIGS.glob('*.py')):
    config = load_config(path.stem, **needs.get(path.stem, {}))
    made_up = config.dataset.startswith('tfds:') and config.data_dir is None
    with contextlib.ExitStack() as stack:
      if made_up:
        stack.enter_context(tfds.testing.mock_data(num_examples=400))
      if 'axes' not in config:
        experiment.check(config)
      else:
        if 'workers' in config.axes:  # With any number methods are the same.
          config.only = f'workers={[*config.axes.workers][-1]}'
        cells = studying.check(config)
        found = {cell.values['method'] for cell in cells}
        assert found == {*config.axes.method}
    assert 'python train.py' in path.read_text()
  paper = load_config('breast_cancer')
  assert (paper.workers, paper.batch_size) == (10, 4)


@pytest.mark.parametrize(
  'setting, message',
  [
    (dict(dataset='mnist'), r"dataset must be one of .*got 'mnist'"),
    (dict(methods=()), 'at least one of sequential'),
    (dict(methods=('sgd',)), 'a method must be one of'),
    (dict(methods=('asynchronos',)), 'did you mean asynchronous'),
    (dict(methods=('delayed+consistant',)), 'did you mean consistent'),
    (dict(methods=('delayed+',)), 'what follows . in delayed'),
    (dict(methods=('delayed', 'delayed')), 'methods must differ'),
    (dict(parallel='async'), 'a method must be one of'),
    (dict(batch_size=400), 'at most the 341 training examples'),
    (dict(optimizer='adamm'), 'did you mean adam'),
    (dict(optimizer_kwargs=dict(momentun=0.9)), 'did you mean momentum'),
    (
      dict(optimizer_kwargs=dict(momentum='x')),
      "optimizer sgd with momentum='x' cannot be used",
    ),
    (dict(schedule='cosin_decay'), 'did you mean cosine_decay_schedule'),
    (dict(schedule='exponential_decay'), 'needs the argument decay_rate'),
    (
      dict(schedule='linear', schedule_kwargs=dict(end_value=-1.0)),
      'must be finite and not negative',
    ),
    (dict(learning_rate=None, warmup=3), 'need a learning_rate'),
    (dict(workers=0), 'workers must be'),
    (
      dict(methods=('delayed+random',), window=26),
      "server's 25 updates, got 26",
    ),
    (dict(parallel='delayed', guidance='random', replays=0), 'replay nothing'),
    (dict(parallel='delayed', guidance='random', window=1), 'replay nothing'),
    (
      dict(parallel='synchronous', guidance='random', combine='mean', window=9),
      "server's 8 updates, got 9",
    ),
    (dict(parallel='asynchronous', workers=2**31 - 1), 'GiB of memory for 2'),
    (dict(parallel='delayed', delay=2**31 - 2), 'GiB of memory for 2 seeds'),
    (dict(model='mlp', hidden=(10**6, 10**6)), 'GiB of memory for 2 seeds'),
    (dict(optimizer='rprop', warmup=3), 'rprop looks at its rate once'),
    (dict(split_batch_size=400), 'split_batch_size must be at most the 341'),
    (
      dict(parallel='asynchronous', arrivals='speeds', speeds=(1.0, 2.0)),
      'speeds must be as many as the workers, got 2 for 3',
    ),
    (
      dict(parallel='synchronous', fails_at=1.0),
      r'wait for ever: .* 1 of them may stop for good; wait_for=2 would not',
    ),
    (
      dict(parallel='data_parallel', fails_at=1.0),
      'data_parallel would wait for ever',
    ),
    (
      dict(parallel='asynchronous', fails_at=1.0, max_ahead=2),
      'max_ahead waits for the slowest worker',
    ),
    (
      dict(parallel='asynchronous', workers=1, fails_at=1.0),
      'every worker stops for good',
    ),
    (
      dict(parallel='asynchronous', arrivals='recorded', trace='nowhere.csv'),
      'nowhere.csv',
    ),
  ],
)
def test_bad_configs(setting, message):
  with pytest.raises((ValueError, OSError), match=message) as raised:
    experiment.run(short(**setting))
  assert '\n' not in str(raised.value)


# Clusters.


def test_every_seed_has_a_cluster_of_its_own():
  config = short(
    methods=('asynchronous', 'delayed'),
    arrivals='gamma',
    machine_cv=0.6,
    updates=60,
  )
  asynchronous, delayed = experiment.run(config).values()
  first, second = asynchronous.simulated_time[-1]
  assert first != second
  # Others wait as long as ever.
  np.testing.assert_allclose(delayed.simulated_time[-1], 60 / 5)
  assert asynchronous.arrivals.histogram.sum() == 2 * 60
  shares = asynchronous.arrivals.shares
  np.testing.assert_allclose(shares.mean(), 1)
  assert (np.diff(shares) >= 0).all() and shares[-1] > 1.1
  for seed, mean in enumerate(asynchronous.arrivals.mean):
    ends = asynchronous.applied[:, seed]
    means = asynchronous.staleness[1:, seed]
    np.testing.assert_allclose(mean, np.dot(means, np.diff(ends)) / ends[-1])
  # A seed alone is the same seed.
  one = dict(seeds=1, methods=('asynchronous',))
  alone = experiment.run(short(**config.to_dict() | one))
  np.testing.assert_array_equal(
    alone['asynchronous'].simulated_time[:, 0],
    asynchronous.simulated_time[:, 0],
  )


def test_rounds_of_the_fastest():
  config = short(
    methods=('synchronous', 'synchronous+random'),
    combine='mean',
    wait_for=2,
    window=2,
    updates=24,
    evaluate_every=8,
    arrivals='exponential',
  )
  plain, replayed = experiment.run(config).values()
  # Two calls are a round, for which three gradients are taken.
  assert plain.applied[-1].tolist() == [12, 12]
  assert plain.gradient_evaluations[-1].tolist() == [36, 36]
  replays = replayed.gradient_evaluations - plain.gradient_evaluations
  assert replays[-1].min() > 0
  # A replay is of two batches, which the server takes itself.
  np.testing.assert_allclose(
    replayed.simulated_time, plain.simulated_time + replays, rtol=1e-9
  )


def test_data_parallel_is_sequential_but_for_the_clock():
  config = short(methods=('sequential', 'data_parallel'), workers=4)
  sequential, split = experiment.run(config).values()
  np.testing.assert_allclose(split.train_loss, sequential.train_loss, rtol=1e-5)
  np.testing.assert_array_equal(
    split.gradient_evaluations, sequential.gradient_evaluations
  )
  step = np.array([[0], [10], [20], [25]])
  np.testing.assert_allclose(sequential.simulated_time, step + [0, 0])
  np.testing.assert_allclose(
    split.simulated_time, step * (1 / 4 + 0.1) + [0, 0], rtol=1e-6
  )
  large = experiment.run(
    short(methods=('data_parallel',), workers=4, split_batch_size=32)
  )['data_parallel']
  assert large.gradient_evaluations[-1].tolist() == [100, 100]
  np.testing.assert_allclose(large.epoch, 4 * split.epoch)
  np.testing.assert_allclose(large.simulated_time[-1], 25 * 1.1, rtol=1e-6)


def test_overwritten_and_lost_gradients_are_counted():
  config = short(
    methods=('asynchronous',),
    arrivals='exponential',
    overwrite_within=0.1,
    fails_at=2.0,
    back_at=4.0,
    updates=60,
  )
  history = experiment.run(config)['asynchronous']
  assert history.lost[-1].tolist() == [1, 1]
  assert history.overwritten[-1].min() > 0
  arrived = history.applied + history.overwritten + history.lost
  assert arrived[-1].tolist() == [60, 60]


def test_bounded_staleness_bounds_it():
  config = short(
    methods=('asynchronous',), arrivals='gamma', machine_cv=0.6, updates=200
  )
  free = experiment.run(config)['asynchronous']
  config.max_ahead = 1
  bounded = experiment.run(config)['asynchronous']
  # Between a worker's read and its arrival others finish at most 3 tasks each.
  assert bounded.maximal_staleness[-1].max() <= 2 * 3
  assert free.maximal_staleness[-1].max() > bounded.maximal_staleness[-1].max()
  assert (bounded.simulated_time[-1] > free.simulated_time[-1]).all()


def test_a_recorded_trace(tmp_path):
  path = tmp_path / 'trace.csv'
  rows = [(i * 7 % 3, 0.5 * i) for i in range(1, 26)]
  path.write_text('worker,time\n' + '\n'.join(f'{w},{t}' for w, t in rows))
  config = short(
    methods=('asynchronous',),
    arrivals='recorded',
    trace=str(path),
    trace_unit=2.0,
  )
  history = experiment.run(config)['asynchronous']
  np.testing.assert_allclose(
    history.simulated_time, np.array([[0], [2.5], [5], [6.25]]) + [0, 0]
  )
  config.updates = 26
  with pytest.raises(ValueError, match=r'line 26: the trace is too short'):
    experiment.run(config)
  config.update(updates=20, workers=2)
  with pytest.raises(ValueError, match=r'line 3: worker must be below .* 2'):
    experiment.run(config)
