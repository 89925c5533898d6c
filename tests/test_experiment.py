"""Training runs against the same run written out plainly."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gsgd_jax
from gsgd_jax import data, experiment, guided, models, report

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def load_config(name, **settings):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.update(settings)
  return config


@pytest.fixture(autouse=True)
def as_users_run_it():
  with (
    jax.enable_x64(False),
    jax.numpy_dtype_promotion('standard'),
    jax.numpy_rank_promotion('allow'),
  ):
    yield


SHORT = dict(
  dataset='breast_cancer',
  hidden=(5,),
  workers=3,
  batch_size=8,
  seeds=2,
  updates=25,
  evaluate_every=10,
  window=5,
  learning_rate=0.05,
)


def plainly(config, method, seed):
  """One seed of a method as a loop: gradients wait in a queue."""
  dataset = data.load(config.dataset, seed)
  model = experiment.make_model(config, dataset)
  loss_fn = models.cross_entropy(model)
  params = model.init(jax.random.key(seed))
  rows = lambda r: jax.tree.map(lambda x: jnp.asarray(x[r]), dataset.train)
  n = len(dataset.train.labels)
  tx = optax.with_extra_args_support(optax.sgd(config.learning_rate))
  if method.select:
    tx = guided(
      tx,
      loss_fn,
      window=config.window,
      revisit=config.revisit,
      select=method.select,
      batch_like=rows(np.arange(config.batch_size)),
      seed=seed,
    )
  workers = config.workers if method.asynchronous else 1
  state, waiting, measured, calls = tx.init(params), [], [], 0
  update = jax.jit(tx.update)
  gradient = jax.jit(jax.value_and_grad(loss_fn))
  for t in range(config.updates + 1):
    if t % config.evaluate_every == 0 or t == config.updates:
      test = jax.tree.map(jnp.asarray, dataset.test)
      measured.append(
        [
          t,
          calls + experiment._replays(state),
          loss_fn(params, rows(np.arange(n))),
          models.accuracy(model)(params, test),
        ]
      )
    while len(waiting) < workers:
      batch = rows(data.batch_rows(n, config.batch_size, seed, calls))
      waiting.append((*gradient(params, batch), batch))
      calls += 1
    value, grads, batch = waiting.pop(0)
    sample = rows(data.verification_rows(n, seed, t))
    updates, state = update(
      grads, state, params, value=value, batch=batch, verification=sample
    )
    params = optax.apply_updates(params, updates)
  return np.array(measured, np.float64)


@pytest.mark.parametrize('name', list(experiment.METHODS))
def test_a_method_is_what_it_says(name):
  config = load_config('default', methods=(name,), **SHORT)
  history = experiment.run(config)[name]
  assert history.updates.tolist() == [0, 10, 20, 25]
  for seed in range(config.seeds):
    expected = plainly(config, experiment.METHODS[name], seed)
    # The gradients in flight have been taken by the first update; before it,
    # by neither side's count.
    np.testing.assert_array_equal(
      history.gradient_evaluations[0], np.zeros(config.seeds)
    )
    in_flight = config.workers - 1 if name != 'sequential' else 0
    replays = history.gradient_evaluations[1:, seed]
    taken = history.updates[1:] + in_flight
    np.testing.assert_array_equal(
      replays - taken, expected[1:, 1] - expected[1:, 0] - in_flight
    )
    np.testing.assert_allclose(
      history.train_loss[:, seed], expected[:, 2], rtol=1e-4
    )
    np.testing.assert_allclose(
      history.test_accuracy[:, seed], expected[:, 3], atol=1e-6
    )


def test_counters_stay_unbatched_under_vmap():
  """A ring indexed by a counter per seed would be masked at every step."""
  config = load_config('default', **SHORT)
  method = experiment.METHODS['guided']
  datasets = [data.load('breast_cancer', seed) for seed in range(2)]
  model = experiment.make_model(config, datasets[0])
  init, _ = experiment._programs(config, method, model, datasets, 2)
  arrays = jax.tree.map(
    lambda *s: jnp.stack(s),
    *((d.train, d.validation, d.test) for d in datasets),
  )
  state = init(jnp.arange(2), arrays).opt_state
  assert state.count.shape == state.worker.shape == ()
  assert state.inner_state.count.shape == ()
  assert state.inner_state.window.scores.shape == (2, 5)


def test_data_are_arguments_not_constants():
  config = load_config('default', **SHORT)
  datasets = [data.load('breast_cancer', seed) for seed in range(2)]
  method = experiment.METHODS['guided']
  model = experiment.make_model(config, datasets[0])
  init, advance = experiment._programs(config, method, model, datasets, 2)
  arrays = jax.tree.map(
    lambda *s: jnp.stack(s),
    *((d.train, d.validation, d.test) for d in datasets),
  )
  rows = experiment._rows(config, method, datasets, 0, 5, 2)
  text = advance.lower(init(jnp.arange(2), arrays), arrays, rows, 5).as_text()
  assert 'func.func' in text and len(text) < 10**6
  assert not [line for line in text.splitlines() if len(line) > 20_000]


def test_both_configs_say_how_they_are_run():
  for name in ('default', 'breast_cancer'):
    config = load_config(name)
    experiment.check(config)
    assert 'python train.py' in (CONFIGS / f'{name}.py').read_text()
  paper = load_config('breast_cancer')
  assert (paper.workers, paper.batch_size) == (10, 4)


@pytest.mark.parametrize(
  'setting, message',
  [
    (dict(dataset='mnist'), "dataset must be one of .*got 'mnist'"),
    (dict(model='cnn'), 'model must be one of mlp, softmax_regression'),
    (dict(methods=()), 'at least one of sequential'),
    (dict(methods=('sgd',)), 'methods must be one of'),
    (dict(methods=('guided', 'guided')), 'methods must differ'),
    (dict(workers=0), 'workers must be at least 1, got 0'),
    (dict(updates=-1), 'updates must be at least 1, got -1'),
    (dict(evaluate_every=0), 'evaluate_every must be at least 1'),
    (dict(seeds=0), 'seeds must be at least 1'),
    (dict(batch_size=400), 'at most the 341 training examples'),
    (dict(window=0), 'window must be at least 1'),
    (dict(replays=6), 'from 0 to window=5, got 6'),
    (dict(revisit=-1), 'revisit must be at least 0'),
    (dict(learning_rate=-0.1), 'learning_rate must be finite'),
    (dict(learning_rate=float('nan')), 'learning_rate must be finite'),
    (dict(momentum=1.0), r'momentum must be in \[0, 1\)'),
    (dict(hidden=(0,)), 'hidden must hold positive integers'),
    (dict(hidden=(6.5,)), 'hidden must hold positive integers'),
  ],
)
def test_bad_configs(setting, message):
  with pytest.raises(ValueError, match=message):
    experiment.run(load_config('default', **{**SHORT, **setting}))


def test_a_config_that_lacks_a_setting():
  config = load_config('default')
  del config.evaluate_every
  with pytest.raises(ValueError, match='lacks the setting evaluate_every'):
    experiment.check(config)


def histories_of(accuracies, losses=None):
  """Histories with made-up measurements, (evaluations, seeds) each."""
  out = {}
  for name, accuracy in accuracies.items():
    accuracy = np.array(accuracy, np.float64)
    loss = np.full_like(accuracy, 0.5)
    if losses and name in losses:
      loss = np.array(losses[name], np.float64)
    out[name] = experiment.History(
      np.arange(len(accuracy)),
      np.full(accuracy.shape, 7),
      loss,
      loss,
      accuracy,
      accuracy,
    )
  return out


def test_interval_is_students():
  # t with 2 degrees of freedom: 4.303; deviation 1; n = 3.
  measured = report.interval(np.array([1.0, 2.0, 3.0]))
  assert measured.mean == 2
  np.testing.assert_allclose(measured.half_width, 4.30265 / 3**0.5, rtol=1e-5)
  assert report.interval(np.array([5.0])) == (5.0, None)


def test_table_and_sentences_say_what_was_measured():
  histories = histories_of(
    {
      'sequential': [[0.9, 0.9, 0.92]],
      'asynchronous': [[0.8, 0.81, 0.82]],
      'guided': [[0.9, 0.90, 0.91]],
      'random': [[0.89, 0.92, 0.90]],
    },
    losses={'asynchronous': [[0.5, np.nan, 0.5]]},
  )
  table = report.table(histories)
  assert [line.split('  ')[0] for line in table.splitlines()] == [
    'method',
    table.splitlines()[1],
    'sequential SGD',
    'ASGD',
    'guided ASGD',
    'ASGD + random replays',
  ]
  assert '81.00 ± 2.48' in table and '1 of 3' in table
  # Paired by seed: 10, 9, 10 points.
  assert '+9.67 ± 1.43' in table
  said = report.sentences(load_config('default'), histories)
  assert 'delay of 16 workers changes test accuracy by -9.67 ± 1.43' in said[0]
  assert '(no difference shown)' not in said[0]
  assert '(no difference shown)' in said[3]


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
  config = load_config('default')
  histories = histories_of(
    {'guided': [[0.5, 0.6], [0.7, 0.8]]},
    losses={'guided': [[2.0, 1.0], [np.inf, np.nan]]},
  )
  with np.errstate(all='ignore'):
    report.write(tmp_path, config, histories)
  result = json.loads((tmp_path / 'result.json').read_text())
  assert result['config']['workers'] == 16
  assert result['versions']['jax'] == jax.__version__
  assert result['versions']['gsgd_jax'] == gsgd_jax.__version__
  assert result['methods']['guided']['history']['train_loss'][1] == [None] * 2
  assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')
  assert len(list(tmp_path.iterdir())) == 2

  def full_disk(path, *args):
    path.write_bytes(b'half')
    raise OSError(28, 'No space left on device')

  before = (tmp_path / 'curves.png').read_bytes()
  monkeypatch.setattr(report, 'draw', full_disk)
  with pytest.raises(OSError, match='No space'):
    report.write(tmp_path, config, histories)
  assert (tmp_path / 'curves.png').read_bytes() == before
  assert len(list(tmp_path.iterdir())) == 2


def test_fresh_folders_never_collide(tmp_path):
  made = [report.new_workdir(tmp_path / 'runs', 'x', 'now') for _ in range(3)]
  assert [m.name for m in made] == ['now-x', 'now-2-x', 'now-3-x']
