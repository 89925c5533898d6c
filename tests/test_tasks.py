"""Images, text and networks in the application, against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from gsgd_jax import (
  augmentation,
  batches,
  data,
  events,
  experiment,
  images,
  layers,
  models,
  networks,
  parallel,
  programs,
  settings,
  tasks,
  transformation,
)
from tests.test_experiment import load_config

pytestmark = pytest.mark.usefixtures('as_users_run_it')
VERSE = 'the quick brown fox jumps over the lazy dog.\n' * 40


def short(**changes):
  config = settings.default_config()
  quick = dict(seeds=2, updates=6, evaluate_every=3, batch_size=8, workers=3)
  quick |= dict(window=3, learning_rate=0.05, methods=('asynchronous+random',))
  config.update({**quick, **changes})
  return config


def of_digits(digits_dir, **changes):
  # A part of the images measures as all of them do, sooner.
  changes = dict(model='cnn_small', measured=60) | changes
  return short(dataset='tfds:digits', data_dir=str(digits_dir), **changes)


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp('text') / 'verse.txt'
  path.write_text(VERSE)
  return str(path)


def of_text(text, **changes):
  small = dict(model='gpt', layers=1, heads=2, width=16, context=12)
  return short(**dict(dataset=text, verification=False) | small | changes)


def the_same(one, other, rtol=0.0):
  for name, history in one.items():
    for field in events.MEASURED:
      np.testing.assert_allclose(
        getattr(history, field),
        getattr(other[name], field),
        rtol=rtol,
        atol=rtol,
        err_msg=f'{name} {field}',
      )


def plain_sgd(config):
  """Sequential SGD by a loop: of each seed losses and accuracies at the end."""
  first = experiment._load(config, 0)
  task = tasks.make(config, first)
  init, measure = jax.jit(task.model.init), jax.jit(task.measure)
  gradient = jax.jit(jax.grad(task.loss_fn))
  for seed in range(config.seeds):
    dataset = experiment._load(config, seed)
    # All that the task knows of the data, so one is compiled for all seeds.
    np.testing.assert_equal(dataset.scale, first.scale)
    assert dataset.classes == first.classes
    params = init(jax.random.key(seed))
    for step in range(config.updates):
      rows = dataset.batch_rows(config.batch_size, seed, step)
      batch = jax.tree.map(jnp.asarray, dataset.take(dataset.train, rows))
      if task.keyed:
        keys = batches.batch_keys(config.batch_size, seed, step)
        batch = batch._replace(keys=jnp.asarray(keys))
      params = jax.tree.map(
        lambda p, g: p - config.learning_rate * g,
        params,
        gradient(params, batch),
      )
    splits = (dataset.train, dataset.validation, dataset.test)
    yield measure(params, jax.tree.map(jnp.asarray, splits))


def assert_as_plainly(config, history):
  for seed, measured in enumerate(plain_sgd(config)):
    for name, value in measured.items():
      np.testing.assert_allclose(
        getattr(history, name)[-1, seed], value, rtol=1e-4, err_msg=name
      )


@pytest.fixture
def shallow_resnet(monkeypatch):
  """ResNet-20 with one block a stage, not three: it compiles in a third."""
  network = networks.ResNet
  monkeypatch.setattr(
    networks,
    'ResNet',
    lambda *args, blocks, **kwargs: network(*args, blocks=1, **kwargs),
  )
  # Compiled faster than patches.
  monkeypatch.setattr(layers.jax, 'default_backend', lambda: 'other')


def test_a_cnn_on_images_is_what_it_says(digits_dir):
  config = of_digits(
    digits_dir,
    methods=('sequential',),
    augmentation='crop_and_flip',
    dropout=0.3,
    measured=300,  # More than a block.
  )
  (history,) = experiment.run(config).values()
  assert_as_plainly(config, history)


def test_what_is_streamed_is_what_is_held(digits_dir):
  """The same batches; small sets are sampled whole for verification."""
  config = of_digits(
    digits_dir, methods=('asynchronous+consistent',), model='mlp', hidden=(8,)
  )
  held = experiment.run(config)
  config.stream = True
  assert experiment._load(config, 0).stream is not None
  the_same(experiment.run(config), held)


def test_seeds_share_what_does_not_differ(digits_dir, text):
  for config in (of_digits(digits_dir), of_text(text)):
    datasets = [experiment._load(config, seed) for seed in range(3)]
    assert set(jax.tree.leaves(data.axes(datasets))) == set()
    arrays = data.stacked(datasets)
    shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]
    assert shapes(arrays) == shapes(tuple(datasets[0][2:5]))
  noisy = of_digits(digits_dir, label_noise=0.2, model='softmax_regression')
  datasets = [experiment._load(noisy, seed) for seed in range(3)]
  train, *_ = data.axes(datasets)
  assert (train.inputs, train.labels) == (None, 0)
  (history,) = experiment.run(noisy).values()
  assert history.status == 'completed'


def test_official_splits(digits_dir):
  config = of_digits(digits_dir, validation_share=0.1)
  read = images.read('tfds:digits', str(digits_dir))
  dataset = experiment._load(config, 5)
  np.testing.assert_array_equal(dataset.test.inputs, read.test.inputs)
  parts = (dataset.train, dataset.validation)
  assert [len(p.labels) for p in parts] == [1260, 140]
  together = np.concatenate([p.inputs for p in parts]).reshape(1400, -1)
  whole = read.train.inputs.reshape(1400, -1)
  ordered = lambda x: x[np.lexsort(x.T)]
  np.testing.assert_array_equal(ordered(together), ordered(whole))


def test_pixels_are_scaled_by_the_training_images(digits_dir):
  config = of_digits(digits_dir)
  read = images.read('tfds:digits', str(digits_dir))
  dataset = experiment._load(config, 0)
  prepare = tasks._preparation(config, dataset)
  scaled = np.asarray(prepare(jnp.asarray(read.train.inputs), None))
  np.testing.assert_allclose([scaled.mean(), scaled.std()], [0, 1], atol=1e-4)
  keys = jnp.asarray(batches.batch_keys(4, 0, 0))
  config.augmentation = 'crop_and_flip'
  seen = tasks._preparation(config, dataset)(read.train.inputs[:4], keys)
  expected = augmentation.normalize(
    augmentation.crop_and_flip(read.train.inputs[:4], keys), *dataset.scale
  )
  np.testing.assert_array_equal(seen, expected)


def test_large_sets_are_measured_block_by_block(digits_dir, monkeypatch):
  """Blocks of any size measure the same, the last one smaller."""
  config = of_digits(digits_dir, measured=300)
  dataset = experiment._load(config, 0)
  splits = (dataset.train, None, dataset.test)
  splits = jax.tree.map(jnp.asarray, splits)
  seen = []
  for block in (64, 100_000):
    monkeypatch.setattr(tasks, '_BLOCK', block)
    task = tasks.make(config, dataset)
    params = task.model.init(jax.random.key(1))
    seen.append(jax.jit(task.measure)(params, splits))
  for name in seen[0]:
    np.testing.assert_allclose(seen[0][name], seen[1][name], rtol=1e-5)
  # 1,120 there are; every third is measured.
  first = jax.tree.map(lambda x: x[:900:3], splits[0])
  np.testing.assert_allclose(
    seen[0]['train_loss'], task.loss_fn(params, first), rtol=1e-5
  )


def test_several_devices_draw_what_one_draws(monkeypatch, digits_dir, text):
  """Dropout and augmentation of split batches and of emulated workers."""
  of_both = dict(workers=4, delay=2, seeds=1)
  split = of_digits(
    digits_dir,
    methods=('delayed',),
    model='mlp',
    augmentation='crop_and_flip',
    **of_both,
  )
  spread = of_text(
    text, methods=('asynchronous+consistent',), dropout=0.4, **of_both
  )
  for config in (split, spread):
    monkeypatch.setattr(parallel, 'device_count', lambda: 1)
    one = experiment.run(config)
    monkeypatch.setattr(parallel, 'device_count', lambda: 4)
    the_same(experiment.run(config), one, rtol=2e-4)


def test_a_replay_draws_what_its_batch_drew(digits_dir):
  """The keys are in the batches that guided SGD keeps."""
  config = of_digits(digits_dir, dropout=0.5, augmentation='crop_and_flip')
  dataset = experiment._load(config, 0)
  task = tasks.make(config, dataset)
  assert task.keyed
  method = events.methods(config)[0]
  like = transformation.batch_like_of(config, method, dataset, task.keyed)
  assert like.keys.shape == (8, 2)
  assert like.inputs.dtype == jnp.uint8  # Buffers hold bytes.
  rows = programs.Feed(config, method, [dataset], True).rows(0, 2)
  for call in range(2):
    np.testing.assert_array_equal(
      rows.keys[0, call], batches.batch_keys(8, 0, call)
    )
  batch = dataset.take(dataset.train, rows.batch[0, 0])
  batch = batch._replace(keys=rows.keys[0, 0])
  params = task.model.init(jax.random.key(0))
  losses = [task.loss_fn(params, batch) for _ in range(2)]
  assert losses[0] == losses[1]
  assert losses[0] != task.loss_fn(params, batch._replace(keys=rows.keys[0, 1]))
  # Without keys, as a verification sample has none, nothing is drawn.
  still = batch._replace(keys=None)
  assert task.loss_fn(params, still) == models.evaluation_loss(
    task.model, tasks._preparation(config, dataset)
  )(params, still)


def test_statistics_are_measured_where_they_are_used(
  digits_dir, shallow_resnet
):
  """Batch normalisation: training leaves nothing behind but parameters."""
  config = of_digits(digits_dir, model='resnet20', normalization='batch')
  dataset = experiment._load(config, 0)
  part = lambda split: jax.tree.map(lambda x: jnp.asarray(x[:50]), split)
  splits = tuple(part(split) for split in dataset[2:5])
  dataset = dataset._replace(
    train=splits[0], validation=splits[1], test=splits[2]
  )
  task = tasks.make(config, dataset)
  prepare = tasks._preparation(config, dataset)
  evaluation_loss = models.evaluation_loss(task.model, prepare)

  @jax.jit
  def both(key):
    params = task.model.init(key)
    inputs = prepare(splits[0].inputs, None)
    evaluated = task.model.calibrate(params, inputs)
    by_hand = (
      task.loss_fn(params, splits[0]),  # Of the sample itself: as in training.
      evaluation_loss(evaluated, splits[2]),
    )
    return task.measure(params, splits), by_hand

  measured, by_hand = both(jax.random.key(0))
  np.testing.assert_allclose(measured['train_loss'], by_hand[0], rtol=1e-4)
  np.testing.assert_allclose(measured['test_loss'], by_hand[1], rtol=1e-4)


def test_replays_leave_nothing_in_batch_normalisation(
  digits_dir, monkeypatch, shallow_resnet
):
  """What is reported is what the parameters give, whatever led to them."""
  config = of_digits(
    digits_dir,
    model='resnet20',
    normalization='batch',
    seeds=1,
    workers=2,
    window=2,
    replays=1,
    updates=4,
    evaluate_every=4,
    measured=20,
  )
  measured_at, made = [], programs.make

  def kept(*args):
    programs_ = made(*args)

    def measure(evaluated, arrays):
      measured_at.append(jax.tree.map(lambda x: x[0], evaluated))
      return programs_.measure(evaluated, arrays)

    return programs_._replace(measure=measure)

  monkeypatch.setattr(programs, 'make', kept)
  (history,) = experiment.run(config).values()
  assert history.gradient_evaluations[-1] > 4 + 1  # Something was replayed.
  dataset = experiment._load(config, 0)
  task = tasks.make(config, dataset)
  arrays = jax.tree.map(jnp.asarray, tuple(dataset[2:5]))
  by_hand = jax.jit(task.measure)(measured_at[-1], arrays)
  for name, value in by_hand.items():
    np.testing.assert_allclose(
      getattr(history, name)[-1, 0], value, rtol=1e-3, err_msg=name
    )
  assert history.train_loss[0] != history.train_loss[1]


def test_mnist_by_its_name():
  config = load_config('mnist_cnn', seeds=1, methods=('delayed',), delay=1)
  config.update(dict(epochs=1.0, evaluate_epochs=1.0, measured=30))
  data._images.cache_clear()  # Another test's may be of other examples.
  with tfds.testing.mock_data(num_examples=200):
    (history,) = experiment.run(config).values()
  assert history.status == 'completed'
  assert history.step.tolist() == [0, 2]  # 180 // 64 in an epoch.


def test_batch_normalisation_wants_whole_batches(monkeypatch, digits_dir):
  config = of_digits(digits_dir, model='resnet20', normalization='batch')
  monkeypatch.setattr(parallel, 'device_count', lambda: 4)
  assert refusal(config).startswith('batch normalisation takes statistics of ')


def test_text_is_windows_of_characters(text):
  config = of_text(text)
  dataset = experiment._load(config, 3)
  characters = sorted(set(VERSE))
  assert dataset.classes == tuple(characters)
  parts = [dataset.train, dataset.validation, dataset.test]
  read = ''.join(dataset.classes[t] for p in parts for t in p.tokens)
  assert read == VERSE
  assert [len(p.tokens) for p in parts] == [1080, 360, 360]
  assert dataset.examples == 1079 // 12
  batch = dataset.take(dataset.train, np.array([0, 13], np.int32))
  spell = lambda tokens: ''.join(dataset.classes[t] for t in tokens)
  assert spell(batch.inputs[0]) == VERSE[:12]
  assert spell(batch.labels[0]) == VERSE[1:13]
  assert spell(batch.inputs[1]) == VERSE[13:25]


def test_every_epoch_of_text_is_cut_elsewhere(text):
  dataset = experiment._load(of_text(text), 0)
  steps = dataset.examples // 8
  epochs = [
    np.concatenate(
      [dataset.batch_rows(8, 0, e * steps + s) for s in range(steps)]
    )
    for e in range(6)
  ]
  for rows in epochs:
    assert len(set(rows)) == len(rows)
    gaps = np.diff(np.sort(rows))
    assert gaps[:-1].min() == 12  # Windows do not overlap, but at the end.
    assert rows.min() >= 0 and rows.max() + 13 <= len(dataset.train.tokens)
  assert len({int(rows.min()) % 12 for rows in epochs}) > 2
  np.testing.assert_array_equal(dataset.batch_rows(8, 0, steps), epochs[1][:8])


@functools.cache
def a_language_model(text, **changes):
  """A config and what came of it."""
  config = of_text(text, methods=('sequential',), dropout=0.2, **changes)
  (history,) = experiment.run(config).values()
  return config, history


def test_a_language_model_is_what_it_says(text):
  config, history = a_language_model(text)
  assert_as_plainly(config, history)


def test_a_language_model_under_delay_learns(text):
  config = of_text(
    text,
    methods=('delayed+consistent',),
    learning_rate=0.3,
    delay=2,
    updates=60,
    evaluate_every=60,
    seeds=1,
    batch_size=6,
    revisit=None,
    verification=True,
  )
  (history,) = experiment.run(config).values()
  assert history.status == 'completed'
  loss = history.validation_loss[:, 0]
  assert loss[-1] < 0.8 * loss[0]


def test_bfloat16_trains_as_float32(text):
  def of_iris(**changes):
    config = short(dataset='iris', methods=('sequential',), **changes)
    return config, *experiment.run(config).values()

  for run in (functools.partial(a_language_model, text), of_iris):
    config, exact = run()
    _, rough = run(dtype='bfloat16')
    assert exact.train_loss[-1, 0] != rough.train_loss[-1, 0]
    np.testing.assert_allclose(
      rough.train_loss, exact.train_loss, rtol=0.05, err_msg=config.model
    )


@pytest.mark.parametrize(
  'changes, said',
  [
    (dict(dropout=0.1), 'dropout is of gpt and the CNNs'),
    (dict(normalization='batch'), 'normalization is of resnet20'),
    (dict(image_size=8), 'image_size is of image sets by name'),
    (dict(stream=True), 'stream is of image sets by name'),
    (dict(data_dir='here'), 'data_dir is of image sets by name'),
  ],
)
def test_settings_of_other_models(changes, said):
  assert said in refusal(short(**changes))


def refusal(config):
  with pytest.raises(ValueError) as error:
    experiment.check(config)
  assert '\n' not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize(
  'changes, said',
  [
    (dict(dataset='iris', model='cnn_small'), 'cnn_small learns images, and '),
    (dict(dataset='wine', model='resnet20'), 'resnet20 learns images, and '),
    (dict(dataset='digits', model='gpt'), 'gpt learns the characters of a '),
    (dict(dataset='iris', augmentation='crop_and_flip'), 'augmentation is of '),
    (dict(model='cnn_small', preprocessing='author'), 'learns images'),
  ],
)
def test_what_a_model_cannot_learn(changes, said):
  assert said in refusal(short(**changes))


def test_bad_images(digits_dir):
  small = of_digits(digits_dir, image_size=3)
  assert refusal(small) == (
    'cnn takes images (height, width, channels) of at least 4 by 4 pixels, got '
    '(3, 3, 1)'
  )
  config = of_digits(digits_dir, preprocessing='author')
  assert (
    refusal(config) == 'preprocessing is of tables, and tfds:digits is none'
  )
  config = of_digits(digits_dir, stream=True, label_noise=0.1)
  assert 'label_noise is not for streamed sets' in refusal(config)
  config = of_digits(digits_dir)
  config.dataset = 'tfds:digts'
  assert 'did you mean' in refusal(config) or 'tfds:digts' in refusal(config)
  config = of_digits(digits_dir, batch_size=1200)
  assert refusal(config) == (
    'batch_size must be at most the 1120 training examples of tfds:digits, got '
    '1200'
  )


@pytest.mark.parametrize(
  'content, said',
  [
    (b'', 'is empty'),
    (b'abc' * 20, 'is too short: its 60 characters leave 12 for validation'),
    (b'a' * 1000, "holds one character only, 'a'"),
    (b'\xff\xfe\x00\x01' * 100, 'is not a text file in UTF-8'),
    (b'PK\x03\x04 zipped' * 90, 'is not a text file: it holds the control'),
  ],
)
def test_bad_text(tmp_path, content, said):
  path = tmp_path / 'odd.txt'
  path.write_bytes(content)
  assert said in refusal(of_text(str(path)))


def test_text_settings_that_mean_nothing(text, tmp_path):
  assert 'heads must divide width' in refusal(of_text(text, heads=3))
  assert 'label_noise is of labels' in refusal(of_text(text, label_noise=0.1))
  with pytest.raises(OSError):
    experiment.check(of_text(str(tmp_path / 'none.txt')))
