"""Image sets as tensorflow-datasets prepares them, and folders that break."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import weakref

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from gsgd_jax import (
  _machine,
  _streams,
  application,
  batches,
  data,
  experiment,
  images,
  settings,
)
from gsgd_jax.images import DamagedData
from tests import tfds_digits
from tests.tfds_digits import TRAIN, prepare


@pytest.fixture
def copied(digits_dir, tmp_path):
  """A data_dir of its own that holds digits, and the folder of the version."""
  shutil.copytree(digits_dir / 'digits', tmp_path / 'digits')
  return tmp_path, tmp_path / 'digits' / '1.0.0'


def fails(name, *args, error=ValueError, **kwargs):
  """The one sentence that `images.read` raises."""
  with pytest.raises(error) as caught:
    images.read(name, *args, **kwargs)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def numbers_of(split):
  """Which of scikit-learn's digits these are."""
  inputs, _ = tfds_digits.digits()
  numbers = {x.tobytes(): i for i, x in enumerate(inputs)}
  assert len(numbers) == len(inputs)
  return [numbers[x.tobytes()] for x in split.inputs]


def small(classes=2, n=12, shape=(4, 4, 3)):
  """Random images; their labels in turn."""
  inputs = np.random.default_rng(n).integers(0, 256, (n, *shape), np.uint8)
  return inputs, np.arange(n) % classes


def in_order(split, inputs):
  """The rows of a split that hold these inputs, which were shuffled."""
  at = {x.tobytes(): i for i, x in enumerate(split.inputs)}
  return [at[x.tobytes()] for x in inputs]


# In memory.


def test_digits(digits_dir):
  inputs, labels = tfds_digits.digits()
  read = images.read('tfds:digits', str(digits_dir))
  assert read.name == 'tfds:digits' and read.shape == (8, 8, 1)
  assert read.classes == tuple('0123456789')
  for split, rows in (
    (read.train, range(TRAIN)),
    (read.test, range(TRAIN, len(labels))),
  ):
    assert split.examples == len(rows)
    assert split.inputs.dtype == np.uint8 and split.labels.dtype == np.int32
    numbers = numbers_of(split)
    assert sorted(numbers) == list(rows)
    np.testing.assert_array_equal(split.labels, labels[numbers])
    with pytest.raises(ValueError, match='read-only'):
      split.inputs[0] = 0
  scaled = inputs[:TRAIN] / 255
  for actual, expected in (
    (read.mean, scaled.mean()),
    (read.deviation, scaled.std()),
  ):
    assert actual.dtype == np.float32 and actual.shape == (1,)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_a_set_is_read_once(digits_dir, monkeypatch):
  folder = str(digits_dir)
  load = lambda seed, **kwargs: data.load(
    'tfds:digits', seed, validation_share=0.2, **kwargs
  )
  loaded = load(0, data_dir=folder)
  assert load(1, data_dir=folder) is loaded
  smaller = load(0, data_dir=folder, image_size=4)
  assert smaller.shape == (4, 4, 1) and loaded.shape == (8, 8, 1)
  monkeypatch.setenv('TFDS_DATA_DIR', folder)
  np.testing.assert_array_equal(load(0).train.inputs, loaded.train.inputs)


def test_no_image_is_held_twice(digits_dir, monkeypatch):
  seen = []
  read = images.read

  def reading(*args, **kwargs):
    seen.append(read(*args, **kwargs))
    return seen[-1]

  monkeypatch.setattr(images, 'read', reading)
  loaded = data.load('tfds:digits', 0, data_dir=digits_dir, image_size=7)
  (whole,) = seen
  assert loaded.test.inputs is whole.test.inputs
  of_read = weakref.ref(whole.train.inputs)
  del seen[:], whole
  assert of_read() is None


@pytest.mark.parametrize('channels', [1, 3])
def test_png_images_and_names(tmp_path, channels):
  inputs, labels = small(3, shape=(5, 4, channels))
  splits = {'train': (inputs, labels), 'test': (inputs[:2], labels[:2])}
  feature = tfds.features.Image(shape=(5, 4, channels))
  names = tfds.features.ClassLabel(names=['cat', 'dog', 'guinea pig'])
  prepare(tmp_path, 'pets', splits, image=feature, label=names, png=True)
  read = images.read('tfds:pets', tmp_path)
  assert read.classes == ('cat', 'dog', 'guinea pig')
  order = in_order(read.train, inputs)
  np.testing.assert_array_equal(read.train.labels[order], labels)
  scaled = inputs / 255
  np.testing.assert_allclose(read.mean, scaled.mean((0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(read.deviation, scaled.std((0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize(
  'dtype, classes',
  [(np.int64, (-3, 7, 11)), (np.uint8, (0, 200)), (np.bool_, (0, 1))],
)
def test_labels_that_are_numbers(tmp_path, dtype, classes):
  inputs, positions = small(len(classes), shape=(3, 5))
  labels = np.array(classes)[positions].astype(dtype).tolist()
  splits = {'train': (inputs, labels), 'test': (inputs[:3], labels[:3])}
  label = tfds.features.Scalar(dtype=dtype)
  prepare(tmp_path, 'numbers', splits, label=label)
  read = images.read('tfds:numbers', tmp_path)
  assert read.shape == (3, 5, 1)
  assert read.classes == tuple(map(str, classes))
  order = in_order(read.train, inputs)
  np.testing.assert_array_equal(read.train.labels[order], positions)


def test_constant_channels_have_a_deviation_of_one(tmp_path):
  inputs, labels = small()
  inputs[..., 1] = 51
  splits = {'train': (inputs, labels), 'test': (inputs, labels)}
  prepare(tmp_path, 'flat', splits)
  read = images.read('tfds:flat', tmp_path)
  assert read.deviation[1] == 1 and read.deviation[0] < 0.5
  np.testing.assert_allclose(read.mean[1], 0.2, rtol=1e-6)


def test_validation_examples_test_where_nothing_else_does(tmp_path):
  inputs, labels = small()
  other = small(n=6)
  splits = {'train': (inputs, labels), 'validation': other}
  prepare(tmp_path, 'validated', splits)
  read = images.read('tfds:validated', tmp_path)
  assert len(in_order(read.test, other[0])) == 6
  splits['test'] = inputs[:3], [-1] * 3  # As where labels are withheld.
  prepare(tmp_path, 'withheld', splits)
  read = images.read('tfds:withheld', tmp_path)
  assert len(in_order(read.test, other[0])) == 6


@pytest.mark.parametrize('name', ['mnist', 'cifar10'])
def test_real_sets_with_made_up_images(name):
  with tfds.testing.mock_data(num_examples=30):
    read = images.read(f'tfds:{name}')
    streamed = images.read(f'tfds:{name}', stream=True)
    batch = streamed.train.batches(10, 0).take(1, 1)
  assert read.shape == {'mnist': (28, 28, 1), 'cifar10': (32, 32, 3)}[name]
  assert len(read.classes) == 10
  assert read.train.inputs.shape == (30, *read.shape)
  assert set(read.train.labels) <= set(range(10))
  rows = batches.batch_rows(30, 10, 0, 1)
  np.testing.assert_array_equal(batch.inputs[0], read.train.inputs[rows])


# Sizes and channels.


def uneven(tmp_path, **changes):
  """Prepares PNG images of several sizes and modes; returns their pixels."""
  generator = np.random.default_rng(0)
  shapes = [(9, 7, 3), (16, 16, 3), (5, 20, 3), (8, 8, 1), (6, 9, 4)]
  inputs = [generator.integers(0, 256, s, np.uint8) for s in shapes]
  splits = {s: (inputs, [0, 1, 0, 1, 0]) for s in ('train', 'test')}
  prepare(tmp_path, 'uneven', splits, png=True, shards=1, **changes)
  return inputs


def test_images_that_differ_in_size(tmp_path):
  feature = tfds.features.Image(shape=(None, None, 3))
  inputs = uneven(tmp_path, image=feature)
  assert fails('tfds:uneven', tmp_path) == (
    'the images of tfds:uneven differ in size; give --config.image_size=SIDE'
  )
  read = images.read('tfds:uneven', tmp_path, image_size=8)
  assert read.train.inputs.shape == (5, 8, 8, 3) and read.shape == (8, 8, 3)
  expected = []
  for pixels in inputs:
    pixels = np.broadcast_to(pixels[..., :3], (*pixels.shape[:2], 3))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    expected.append(np.asarray(image.resize((8, 8), Image.BILINEAR)))
  assert sorted(in_order(read.train, expected)) == list(range(5))


@pytest.mark.parametrize('channels', [1, 2, 3])
def test_images_are_resized_to_a_constant_where_they_are_constant(
  tmp_path, channels
):
  inputs = np.full((4, 6, 3, channels), [[[10, 200, 90][:channels]]], np.uint8)
  labels = [0, 1, 0, 1]
  splits = {s: (inputs, labels) for s in ('train', 'test')}
  prepare(tmp_path, 'plain', splits)
  read = images.read('tfds:plain', tmp_path, image_size=5)
  assert read.train.inputs.shape == (4, 5, 5, channels)
  assert (read.train.inputs == inputs[:, :1, :1]).all()


# Streamed.


def test_large_sets_are_streamed(digits_dir, monkeypatch):
  assert 2**28 < images.memory_limit() < 2**50
  size = 1797 * 64
  for limit, streamed in ((size, False), (size - 1, True)):
    monkeypatch.setattr(images, 'memory_limit', lambda limit=limit: limit)
    for split in images.read('tfds:digits', digits_dir)[3:5]:
      assert isinstance(split, images.Streamed) == streamed
  read = images.read('tfds:digits', digits_dir, stream=False)
  assert isinstance(read.train, images.Images)


@pytest.mark.parametrize(
  'content, memory', [('max\n', None), (f'{2**20}\n', 2**20)]
)
def test_a_container_may_have_less_memory(
  tmp_path, monkeypatch, content, memory
):
  file = tmp_path / 'memory.max'
  file.write_text(content)
  monkeypatch.setattr(_machine, '_LIMITS', ())
  whole = _machine.memory()
  monkeypatch.setattr(_machine, '_LIMITS', (tmp_path / 'none', file))
  assert _machine.memory() == (memory or whole)
  assert images.memory_limit() == (memory or whole) // 4


def both(folder, **kwargs):
  """The same set in memory and streamed."""
  return [
    images.read('tfds:digits', folder, stream=s, **kwargs)
    for s in (False, True)
  ]


def same(one, other):
  for a, b in zip(one, other, strict=True):
    np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize('image_size', [None, 6])
def test_streamed_sets_hold_what_those_in_memory_do(digits_dir, image_size):
  memory, streamed = both(digits_dir, image_size=image_size)
  assert streamed[:3] == memory[:3]
  same(streamed[5:], memory[5:])  # All are in the sample.
  for one, other in zip(memory[3:5], streamed[3:5], strict=True):
    assert one.examples == other.examples
    for rows in ([3], [390, 0, 5, 5], np.arange(200, dtype=np.int32)):
      same(one.gather(rows), other.gather(rows))


def test_the_sample_is_fixed_and_near(digits_dir, monkeypatch):
  memory, _ = both(digits_dir)
  monkeypatch.setattr(images, 'MOST_SAMPLED', 200)
  seen = []
  for _ in range(2):
    seen.append(both(digits_dir)[1][5:])
  same(*seen)
  assert not np.array_equal(seen[0][0], memory.mean)
  np.testing.assert_allclose(seen[0], memory[5:], atol=0.01)


def expected(memory, rows, batch_size, seed, steps):
  """The batches of these steps, from memory."""
  return memory.train.gather(
    np.stack(
      [rows[batches.batch_rows(len(rows), batch_size, seed, s)] for s in steps]
    )
  )


def test_streamed_batches_are_those_of_memory(digits_dir):
  memory, streamed = both(digits_dir)
  rows = np.random.default_rng(0).permutation(TRAIN)[:100]
  streams = [streamed.train.part(rows).batches(16, seed) for seed in (0, 1)]
  for first, length in ((0, 3), (3, 1), (4, 9), (2, 2), (1000, 3), (0, 1)):
    for seed, stream in enumerate(streams):
      steps = range(first, first + length)
      batches = stream.take(first, length)
      assert batches.inputs.shape == (length, 16, 8, 8, 1)
      same(batches, expected(memory, rows, 16, seed, steps))
  for stream in streams:
    stream.close()


def test_an_epoch_of_a_stream_visits_every_row_once(digits_dir):
  _, streamed = both(digits_dir)
  rows = np.arange(7, 7 + 50)
  stream = streamed.train.part(rows).batches(8, seed=2)
  wanted = {x.tobytes() for x in streamed.train.gather(rows).inputs}
  orders = []
  for epoch in range(3):
    inputs = stream.take(6 * epoch, 6).inputs.reshape(48, -1)
    seen = [x.tobytes() for x in inputs]
    assert len(set(seen)) == 48 and set(seen) < wanted
    orders.append(seen)
  assert orders[0] != orders[1] != orders[2]


def test_a_restored_stream_goes_on(digits_dir):
  _, streamed = both(digits_dir)
  rows = np.arange(TRAIN)
  stream = streamed.train.part(rows).batches(32, seed=0)
  stream.take(0, 50)  # Beyond the first epoch.
  position = json.loads(json.dumps(stream.position()))
  ahead = stream.take(50, 5)
  other = streamed.train.part(rows).batches(32, seed=0)
  other.restore(position)
  assert other.position() == position
  same(other.take(50, 5), ahead)
  assert other.position() == stream.position()


def test_a_stream_reads_ahead_no_more_than_its_buffer(digits_dir, monkeypatch):
  memory, streamed = both(digits_dir)
  monkeypatch.setattr(_streams, '_BUFFER', 1)
  stream = streamed.train.batches(4, seed=0)
  steps = range(5)
  same(stream.take(0, 5), expected(memory, np.arange(TRAIN), 4, 0, steps))


def test_a_step_that_failed_can_be_taken_again(digits_dir, monkeypatch):
  memory, streamed = both(digits_dir)
  rows = np.arange(TRAIN)
  stream = streamed.train.batches(16, seed=0)
  record = streamed.train._record
  failing = int(batches.batch_rows(TRAIN, 16, 0, 5)[3])

  def once(row):
    nonlocal failing
    if row == failing:
      failing = None
      raise ValueError('a slip')
    return record(row)

  monkeypatch.setattr(streamed.train, '_record', once)
  with pytest.raises(ValueError) as caught:
    stream.take(2, 6)
  assert str(caught.value) == 'a slip'
  assert stream.position() == {'next_index': 2}
  same(stream.take(2, 6), expected(memory, rows, 16, 0, range(2, 8)))


@pytest.mark.parametrize('batch_size', [0, 51])
def test_a_batch_size_that_is_out_of_range(digits_dir, batch_size):
  _, streamed = both(digits_dir)
  with pytest.raises(ValueError, match=r'^batch_size must be from 1 to 50, '):
    streamed.train.part(range(50)).batches(batch_size, seed=0)


# Names and folders.


@pytest.mark.parametrize(
  'name',
  ['mnist', 'tfds:', 'tfds:a b', 'tfds:mnist/', 'tfds:mnist:3', 'tfds:x:mnist'],
)
def test_malformed_names(name):
  assert fails(name) == (
    'dataset must be tfds:NAME, tfds:NAME/CONFIG or '
    f'tfds:NAME/CONFIG:VERSION, got {name!r}'
  )


def test_unknown_sets(tmp_path):
  start = 'tensorflow-datasets knows no set {}, and none is prepared in {}'
  message = fails('tfds:mnits', tmp_path)
  assert message == (
    start.format('mnits', tmp_path) + '; did you mean tfds:mnist?'
  )
  message = fails('tfds:qqqq', tmp_path)
  assert message == start.format('qqqq', tmp_path)


@pytest.mark.parametrize(
  'given, meant',
  [
    ('MNIST', 'mnist'),
    ('CIFAR10', 'cifar10'),
    ('cifar-10', 'cifar10'),
    ('FashionMNIST', 'fashion_mnist'),
    ('fashion-mnist:3.0.1', 'fashion_mnist:3.0.1'),
    ('EMNIST/letters', 'emnist/letters'),
    ('digts', 'digits'),
  ],
)
def test_sets_by_other_names(digits_dir, given, meant):
  message = fails(f'tfds:{given}', digits_dir)
  assert message.endswith(f' {digits_dir}; did you mean tfds:{meant}?')


def test_a_data_dir_that_is_a_folder_of_the_set(digits_dir):
  for inside in ('digits', 'digits/1.0.0'):
    assert fails('tfds:digits', digits_dir / inside) == (
      f'{digits_dir / inside} is a folder of tfds:digits itself; give the one '
      f'that holds all of it: --config.data_dir={digits_dir}'
    )


def build(name, folder):
  return (
    f'pip install tensorflow tensorflow-datasets && tfds build {name} '
    f'--file_format=array_record --data_dir={folder}'
  )


@pytest.mark.parametrize(
  'name', ['mnist', 'cifar10:3.0.2', 'imagenet_resized/8x8', 'coco']
)
def test_sets_that_are_not_prepared(tmp_path, monkeypatch, name, capfd):
  folder = tmp_path / 'sets of mine'
  top = folder / re.split('[:/]', name)[0]
  monkeypatch.setenv('TFDS_DATA_DIR', str(folder))
  for _ in range(2):
    assert fails(f'tfds:{name}') == (
      f'tfds:{name} is not prepared in {folder}; say by --config.data_dir '
      'where it is, or prepare it where there is a network and copy '
      f'{top} here: ' + build(name, f"'{folder}'")
    )
    folder.mkdir(exist_ok=True)
  assert capfd.readouterr() == ('', '')


def test_data_dir(tmp_path, digits_dir):
  start = 'data_dir must be a folder that holds prepared sets, got '
  missing, file = tmp_path / 'missing', tmp_path / 'file'
  file.touch()
  message = fails('tfds:digits', missing, error=FileNotFoundError)
  assert message == f'{start}{missing}, which does not exist'
  message = fails('tfds:digits', str(file), error=FileNotFoundError)
  assert message == f'{start}{file}, which is a file'
  home = pathlib.Path('~') / digits_dir.relative_to('/')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('HOME', '/')
    assert images.read('tfds:digits', str(home)).classes


def test_versions(copied):
  root, folder = copied
  inputs, labels = small(10, 20)
  splits = {'train': (inputs, labels), 'test': (inputs, labels)}
  for version in ('9.0.0', '10.0.0'):
    prepare(root, 'digits', splits, version=version)
    splits['train'] = inputs[:15], labels[:15]
  for version, examples in (('', 15), (':9.0.0', 20), (':1.0.0', TRAIN)):
    read = images.read(f'tfds:digits{version}', root)
    assert read.train.examples == examples
  assert fails('tfds:digits:2.0.0', root) == (
    f'{folder.parent} does not hold version 2.0.0 of tfds:digits:2.0.0, only '
    '1.0.0, 9.0.0, 10.0.0'
  )


def test_configurations(tmp_path):
  inputs, labels = small()
  splits = {'train': (inputs, labels), 'test': (inputs, labels)}
  prepare(tmp_path, 'pets', splits, config='small')
  assert images.read('tfds:pets', tmp_path).train.examples == 12
  splits['train'] = inputs[:4], labels[:4]
  prepare(tmp_path, 'pets', splits, config='smaller-x4')
  assert fails('tfds:pets', tmp_path) == (
    f'{tmp_path / "pets"} holds several configurations of tfds:pets; name one '
    'of them, as tfds:pets/small, tfds:pets/smaller-x4'
  )
  for name in ('smaller-x4', 'smaller-x4:1.0.0'):
    read = images.read(f'tfds:pets/{name}', tmp_path)
    assert read.train.examples == 4
  assert 'is not prepared in' in fails('tfds:pets/big', tmp_path)


# Half-prepared folders.

FILES = [
  'dataset_info.json',
  'features.json',
  'digits-train.array_record-00000-of-00003',
  'digits-train.array_record-00002-of-00003',
  'digits-test.array_record-00001-of-00003',
]


def flip(file):
  """Changes a byte of a record: there are 64 KB of records, and an index."""
  content = bytearray(file.read_bytes())
  content[30_000] ^= 255
  file.write_bytes(content)


DAMAGES = {
  'missing': lambda file: file.unlink(),
  'empty': lambda file: file.write_bytes(b''),
  'cut': lambda file: file.write_bytes(file.read_bytes()[:100]),
  'half': lambda file: file.write_bytes(
    file.read_bytes()[: file.stat().st_size // 2]
  ),
  'binary': lambda file: file.write_bytes(bytes(range(256)) * 1000),
  'other': lambda file: file.write_text('{}'),
  'list': lambda file: file.write_text('[1]'),
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('file', FILES)
def test_damaged_files(copied, file, damage, capfd):
  root, folder = copied
  DAMAGES[damage](folder / file)
  for stream in (False, True):
    message = fails('tfds:digits', root, stream=stream)
    assert message.startswith(
      f'{folder} does not hold the whole of tfds:digits ('
    )
    assert message.endswith(
      '); delete it and prepare it anew, where there is a network: '
      + build('PATH_OF_ITS_BUILDER', root)
    )
    assert damage != 'missing' or file in message or '.json' in file
  assert capfd.readouterr() == ('', '')


def test_a_shard_of_another_split(copied):
  root, folder = copied
  test, train = (
    f'digits-{s}.array_record-00001-of-00003' for s in ('test', 'train')
  )
  shutil.copy(folder / test, folder / train)
  message = fails('tfds:digits', root)
  assert f'({train} holds 133 records, not ' in message


def test_a_damaged_record(copied, monkeypatch):
  root, folder = copied
  file = folder / 'digits-train.array_record-00002-of-00003'
  flip(file)
  for stream in (False, True):
    message = fails('tfds:digits', root, stream=stream, error=DamagedData)
    assert re.match(
      rf'{folder} does not hold the whole of tfds:digits \(record \d+: ',
      message,
    )
  monkeypatch.setattr(images, 'MOST_SAMPLED', 1)
  streamed = images.read('tfds:digits', root, stream=True)
  stream = streamed.train.batches(50, seed=0)
  with pytest.raises(DamagedData) as caught:
    stream.take(0, TRAIN // 50)
  assert str(caught.value) == message


def test_a_damaged_record_ends_a_run(copied, tmp_path, monkeypatch, capsys):
  """What was measured until it was met is kept."""
  jax.config.update('jax_enable_x64', False)  # As `train.py` has it.
  root, folder = copied
  monkeypatch.setattr(images, 'MOST_SAMPLED', 1)
  monkeypatch.setattr(data, '_SAMPLE', 8)
  config = settings.default_config()
  config.update(
    dataset='tfds:digits',
    data_dir=str(root),
    stream=True,
    methods=('sequential',),
    seeds=1,
    verification=False,
    updates=TRAIN // 16,
    evaluate_every=5,
  )
  experiment.check(config)  # Nothing is wrong yet.
  flip(folder / 'digits-train.array_record-00002-of-00003')
  workdir = tmp_path / 'run'
  workdir.mkdir()
  assert application.run(config, workdir, 0.0) == application.FAILED
  printed = capsys.readouterr().err
  assert 'Traceback' not in printed
  assert re.search(
    r'^train.py: cannot go on: .* \(record \d+: .*; delete it',
    printed,
    re.MULTILINE,
  )
  result = json.loads((workdir / 'result.json').read_text())
  assert result['status'] == 'failed'
  assert (workdir / 'metrics.jsonl').read_text()


def test_a_preparation_that_broke_off(copied):
  root, folder = copied
  left = folder.with_name('incomplete.AB12CD_1.0.0')
  folder.rename(left)
  assert fails('tfds:digits', root) == (
    f'{left} was left by a preparation of tfds:digits that broke off; delete '
    'it and prepare it anew, where there is a network: '
    + build('PATH_OF_ITS_BUILDER', root)
  )
  mnist = root / 'mnist' / 'incomplete.AB12CD_3.0.1'
  mnist.mkdir(parents=True)
  message = fails('tfds:mnist', root)
  assert message.startswith(f'{mnist} was left by a preparation of tfds:mnist')
  assert message.endswith(build('mnist', root))


def test_an_empty_version_of_a_known_set(tmp_path):
  folder = tmp_path / 'mnist' / '3.0.1'
  folder.mkdir(parents=True)
  message = fails('tfds:mnist', tmp_path)
  assert message.startswith(f'{folder} does not hold the whole of tfds:mnist (')
  assert message.endswith(build('mnist', tmp_path))


def edit(folder, **changes):
  """Changes what dataset_info.json says."""
  file = folder / 'dataset_info.json'
  info = json.loads(file.read_text())
  file.write_text(json.dumps(info | changes))


def test_another_format(copied):
  root, folder = copied
  edit(folder, fileFormat='tfrecord')
  assert fails('tfds:digits', root) == (
    f'{folder} holds tfds:digits as tfrecord rather than array_record; where '
    'TensorFlow is installed, convert it: tfds convert_format '
    f'--dataset_version_dir={folder} --out_file_format=array_record'
  )
  edit(folder, alternativeFileFormats=['array_record'])  # Once converted.
  assert images.read('tfds:digits', root).train.examples == TRAIN


# Sets that are no image classification sets.


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'keys': None}, '{} has no labels: it does not say which feature is the'),
    (
      {'label': tfds.features.Scalar(dtype=np.float32)},
      '{} has no labels that are classes: its target label is Scalar of shape '
      '() and type float32',
    ),
    (
      {'label': tfds.features.Tensor(shape=(1,), dtype=np.int64)},
      '{} has no labels that are classes: its target label is Tensor of shape '
      '(1,) and type int64',
    ),
    (
      {'image': tfds.features.Tensor(shape=(4, 4, 3), dtype=np.int32)},
      '{} is no set of images of 8 bits: its input image is Tensor of shape '
      '(4, 4, 3) and type int32',
    ),
    (
      {'keys': ('label', 'image')},
      '{} is no set of images of 8 bits: its input label is ClassLabel of '
      'shape () and type int64',
    ),
  ],
)
def test_sets_without_images_or_classes(tmp_path, changes, message):
  inputs, labels = small()
  image, label = changes.get('image'), changes.get('label')
  inputs = inputs.astype(image.np_dtype) if image else inputs
  if label and label.shape:
    labels = labels[:, None]
  labels = labels.astype(label.np_dtype) if label else labels
  splits = {s: (inputs, labels) for s in ('train', 'test')}
  prepare(tmp_path, 'odd', splits, **changes)
  assert fails('tfds:odd', tmp_path).startswith(message.format('tfds:odd'))


@pytest.mark.parametrize(
  'name, message',
  [
    ('celeb_a', 'tfds:celeb_a has no labels: '),
    ('imdb_reviews', 'tfds:imdb_reviews is no set of images of 8 bits: its in'),
    ('tf_flowers', 'the images of tfds:tf_flowers differ in size'),
  ],
)
def test_real_sets_of_other_kinds(name, message):
  with tfds.testing.mock_data(num_examples=3):
    assert fails(f'tfds:{name}').startswith(message)


@pytest.mark.parametrize(
  'splits, message',
  [
    (['train'], 'must have a split train and a split test or validation, its '),
    (['test'], 'must have a split train and a split test or validation, its '),
  ],
)
def test_missing_splits(tmp_path, splits, message):
  splits = {s: small() for s in splits}
  image = tfds.features.Tensor(shape=(4, 4, 3), dtype=np.uint8)
  prepare(tmp_path, 'halves', splits, image=image)
  assert fails('tfds:halves', tmp_path) == (
    f'tfds:halves {message}splits are {", ".join(splits)}'
  )


@pytest.mark.parametrize('labels', [[4] * 12, list(range(12))])
def test_numbers_that_are_no_classes(tmp_path, labels):
  splits = {s: (small()[0], labels) for s in ('train', 'test')}
  label = tfds.features.Scalar(dtype=np.int64)
  prepare(tmp_path, 'numbers', splits, label=label)
  assert fails('tfds:numbers', tmp_path) == (
    f'tfds:numbers holds {len(set(labels))} different labels in 12 training '
    'examples, which are no classes'
  )


def test_one_class(tmp_path):
  splits = {s: (small()[0], [0] * 12) for s in ('train', 'test')}
  label = tfds.features.ClassLabel(names=['cat'])
  prepare(tmp_path, 'cats', splits, label=label)
  assert fails('tfds:cats', tmp_path) == (
    'tfds:cats holds one class only (cat); classification needs two or more'
  )


def test_a_test_label_that_is_none_of_the_training_labels(tmp_path):
  inputs, labels = small()
  splits = {'train': (inputs, labels), 'test': (inputs[:1], [5])}
  label = tfds.features.Scalar(dtype=np.int64)
  prepare(tmp_path, 'numbers', splits, label=label, shards=1)
  assert fails('tfds:numbers', tmp_path, error=DamagedData) == (
    'record 0 of tfds:numbers is of class 5, which is none of the 2 classes to '
    'train on'
  )


def test_an_image_size_that_is_none():
  assert fails('tfds:mnist', image_size=0) == (
    'image_size must be at least 1, got 0'
  )


@pytest.mark.parametrize('package', ['tensorflow_datasets', 'grain'])
def test_missing_packages(digits_dir, monkeypatch, package):
  monkeypatch.setitem(sys.modules, package, None)
  assert fails('tfds:digits', digits_dir) == (
    f"tfds:digits needs the package {package}: pip install 'gsgd_jax[train]'"
  )


# The example.

EXAMPLE = pathlib.Path(__file__).parents[1] / 'examples' / 'prepare_digits.py'


@pytest.mark.parametrize(
  'argument, sentence',
  [
    ('--data_dir=/proc/x', '/proc/x: No such file or directory'),
    ('--data_dir=file', 'file: File exists'),
    ('--data_dir=file/x', 'file/x: Not a directory'),
    ('--data_dir=', 'data_dir must name a folder, got an empty name'),
    ('x', "unexpected argument 'x'"),
    (
      '--data_dir=new',
      'the package tensorflow_datasets is needed: pip install '
      "'gsgd_jax[train]'",
    ),
  ],
)
def test_the_example_says_what_is_wrong(tmp_path, argument, sentence):
  (tmp_path / 'file').touch()
  program = (
    'import runpy, sys; sys.modules["tensorflow_datasets"] = None; '
    f'runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")'
  )
  done = subprocess.run(
    [sys.executable, '-c', program, argument],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr == f'prepare_digits.py: {sentence}\n'
