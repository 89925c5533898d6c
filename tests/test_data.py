"""Data sets, and batches as a function of (seed, step)."""

import math

import numpy as np
import pytest

from gsgd_jax import batches, data, sources


@pytest.fixture
def save(tmp_path):
  """Writes examples in the author's format; returns the file's name."""

  def save(inputs, labels, name='examples.data'):
    rows = [
      ','.join(map(repr, [*row, label]))
      for row, label in zip(np.array(inputs).tolist(), labels, strict=True)
    ]
    path = tmp_path / name
    path.write_text('\n'.join([str(len(inputs[0]) + 1), *rows]))
    return str(path)

  return save


def numbered(rows, classes=2, features=0):
  """Examples whose first feature is the row's number; the rest is random."""
  rng = np.random.default_rng(7)
  extra = rng.normal(3, 5, size=(rows, features)).round(4)
  labels = (np.arange(rows) * 5 // 3 % classes).tolist()
  return np.column_stack([np.arange(rows), extra]), labels


def rows_of(dataset, column=0):
  """Which rows of `numbered` every split holds, None for a split left out."""
  splits = [s for s in dataset[2:5] if s is not None]
  feature = np.concatenate([s.inputs[:, column] for s in splits])
  feature = (feature - feature.min()) / (feature.max() - feature.min())
  rows = np.rint(feature * (len(feature) - 1)).astype(int)
  assert sorted(rows) == list(range(len(rows)))  # All, and each once.
  rows = iter(np.split(rows, np.cumsum([len(s.labels) for s in splits])))
  return [None if s is None else next(rows) for s in dataset[2:5]]


def same(one, other):
  """Whether two data sets hold the same inputs, and the same labels."""
  return [
    all(
      np.array_equal(getattr(a, field), getattr(b, field))
      for a, b in zip(one[2:5], other[2:5], strict=True)
    )
    for field in ('inputs', 'labels')
  ]


@pytest.mark.parametrize(
  'name, examples, features, classes',
  [
    ('digits', 1797, 64, 10),
    ('breast_cancer', 569, 30, 2),
    ('iris', 150, 4, 3),
    ('wine', 178, 13, 3),
  ],
)
def test_load(name, examples, features, classes):
  dataset = data.load(name, seed=3)
  splits = dataset.train, dataset.validation, dataset.test
  assert dataset.name == name
  assert dataset.classes == sources.read(name).classes
  assert len(dataset.classes) == classes
  sizes = int(0.6 * examples), int(0.2 * examples)
  assert [len(s.labels) for s in splits] == [*sizes, examples - sum(sizes)]
  for split in splits:
    assert split.inputs.shape == (len(split.labels), features)
    assert split.inputs.dtype == np.float32 and split.labels.dtype == np.int32
    assert set(np.unique(split.labels)) == set(range(classes))


def test_unknown_name():
  with pytest.raises(
    ValueError, match=r'breast_cancer, digits, iris, wine, .*got .mnist.'
  ):
    data.load('mnist', seed=0)


def test_target_names_the_classes(tmp_path):
  path = tmp_path / 'examples.csv'
  rows = [f'{i},{"ab"[i % 2]},{i % 3}\n' for i in range(30)]
  path.write_text('size,kind,grade\n' + ''.join(rows))
  with pytest.raises(ValueError, match='line 2, column kind'):
    data.load(str(path), seed=0, target='grade')
  dataset = data.load(str(path), seed=0, target='kind')
  assert dataset.name == str(path) and dataset.classes == ('a', 'b')
  for split, rows in zip(dataset[2:5], rows_of(dataset), strict=True):
    np.testing.assert_array_equal(split.labels, rows % 2)


# Splits.


@pytest.mark.parametrize('preprocessing', ['standard', 'author'])
def test_splits_partition_the_examples_and_follow_the_seed(save, preprocessing):
  inputs, labels = numbered(100, classes=3)
  name = save(inputs, labels)
  seen = []
  for seed in (0, 1, 0):
    dataset = data.load(name, seed, preprocessing=preprocessing)
    seen.append(rows_of(dataset, column=-1))
    for split, rows in zip(dataset[2:5], seen[-1], strict=True):
      np.testing.assert_array_equal(split.labels, np.array(labels)[rows])
  for first, other, again in zip(*seen, strict=True):
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)
  assert same(data.load('digits', 0), data.load('digits', 0)) == [True, True]


@pytest.mark.parametrize(
  'examples, shares, sizes',
  [
    (100, {}, (60, 20, 20)),
    (100, {'train_share': 0.29, 'validation_share': 0.57}, (29, 57, 14)),
    (100, {'train_share': 0.07, 'validation_share': 0.14}, (7, 14, 79)),
    (100, {'train_share': 0.7, 'validation_share': 0.0}, (70, None, 30)),
    (100, {'train_share': 0.29, 'validation_share': 0}, (29, None, 71)),
    (99, {'train_share': 0.6, 'validation_share': 0}, (59, None, 40)),
    (7, {'train_share': 0.6, 'validation_share': 0.2}, (4, 1, 2)),
    (10, {'train_share': 0.8, 'validation_share': 0.1}, (8, 1, 1)),
  ],
)
def test_shares_give_exact_sizes(save, examples, shares, sizes):
  dataset = data.load(save(*numbered(examples)), seed=0, **shares)
  splits = dataset.train, dataset.validation, dataset.test
  assert sizes == tuple(None if s is None else len(s.labels) for s in splits)
  rows_of(dataset)


@pytest.mark.parametrize(
  'train_share, validation_share, part',
  [
    (0.05, 0.2, 'training'),
    (0.05, 0.0, 'training'),
    (0.6, 0.05, 'validation'),
    (0.8, 0.2, 'testing'),
    (1.0, 0.0, 'testing'),
    (0.7, 0.4, 'testing'),
  ],
)
def test_an_empty_split(save, train_share, validation_share, part):
  name = save(*numbered(10))
  with pytest.raises(ValueError) as error:
    data.load(
      name, 0, train_share=train_share, validation_share=validation_share
    )
  assert str(error.value) == (
    f'the 10 examples of {name} leave none for {part} '
    f'(train_share={train_share:g}, validation_share={validation_share:g})'
  )


@pytest.mark.parametrize('label_noise', [0.0, 0.5])
def test_training_rows_of_one_class(save, label_noise):
  inputs, _ = numbered(20)
  name = save(inputs, [1] + [0] * 19)
  raised = []
  for seed in range(12):
    try:
      dataset = data.load(name, seed, label_noise=label_noise)
    except ValueError as error:
      assert str(error).startswith(
        f'the 12 training examples of {name}, seed {seed}, are all of one class'
      )
      raised.append(seed)
    else:
      assert 0 in rows_of(dataset)[0]
  assert 0 < len(raised) < 12


# Preprocessing.


def standardised(column, rows):
  """The column by the statistics of these rows, term by term."""
  mean = sum(column[i] for i in rows) / len(rows)
  deviation = math.sqrt(sum((column[i] - mean) ** 2 for i in rows) / len(rows))
  return [(x - mean) / (deviation or 1) for x in column]


def test_standard_preprocessing_by_loops(save):
  inputs, labels = numbered(50, features=3)
  inputs = np.column_stack([inputs, np.full(50, 4.0)])
  name = save(inputs, labels)
  rows = rows_of(data.load(name, seed=2))
  inputs[rows[2][0], -1] = 6.5  # Still constant on the training rows.
  dataset = data.load(save(inputs, labels, 'other.data'), seed=2)
  columns = [standardised(column, rows[0]) for column in inputs.T.tolist()]
  expected = np.transpose(columns)
  assert set(expected[:, -1]) == {0.0, 2.5}
  for split, of_split in zip(dataset[2:5], rows, strict=True):
    np.testing.assert_allclose(split.inputs, expected[of_split], atol=1e-6)


def test_only_training_rows_standardise():
  dataset = data.load('breast_cancer', seed=0)
  np.testing.assert_allclose(dataset.train.inputs.mean(axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(dataset.train.inputs.std(axis=0), 1, atol=1e-5)
  assert np.abs(dataset.test.inputs.mean(axis=0)).max() > 0.01


def test_a_constant_feature_that_is_no_binary_fraction(save):
  inputs = np.column_stack([np.arange(20), np.full(20, 0.1)])
  labels = [0, 1] * 10
  rows = rows_of(data.load(save(inputs, labels), seed=0, train_share=0.5))
  inputs[rows[2][0], 1] = 0.6
  name = save(inputs, labels, 'other.data')
  dataset = data.load(name, seed=0, train_share=0.5)
  np.testing.assert_allclose(dataset.train.inputs[:, 1], 0, atol=1e-6)
  np.testing.assert_allclose(dataset.test.inputs[0, 1], 0.5, atol=1e-6)


@pytest.mark.parametrize('validation_share', [0.0, 0.2])
def test_the_authors_preprocessing_by_loops(save, validation_share):
  inputs, labels = numbered(50, features=3)
  inputs = np.column_stack([inputs, np.full(50, -4.0), np.full(50, 0.1)])
  expected = [[1.0] * 50]
  for column in inputs.T.tolist():
    column = standardised(column, range(50))
    low, high = min(column), max(column)
    expected.append([(x - low) / ((high - low) or 1) for x in column])
  expected = np.transpose(expected)
  assert expected[:, 1:5].min() == 0 and expected[:, 1:5].max() == 1
  assert not expected[:, 5:].any()
  for seed in range(3):
    dataset = data.load(
      save(inputs, labels),
      seed,
      preprocessing='author',
      validation_share=validation_share,
    )
    assert (dataset.validation is None) == (validation_share == 0)
    rows = rows_of(dataset, column=1)
    for split, of_split in zip(dataset[2:5], rows, strict=True):
      if split is not None:
        assert split.inputs.dtype == np.float32
        np.testing.assert_allclose(split.inputs, expected[of_split], atol=1e-6)


# Label noise.


@pytest.mark.parametrize('name', ['breast_cancer', 'iris', 'digits'])
@pytest.mark.parametrize('share', [0.0, 0.005, 0.03, 0.4, 1.0])
def test_label_noise_flips_a_share_to_other_classes(name, share):
  noisy = data.load(name, seed=1, label_noise=share)
  clean = data.load(name, seed=1)
  examples, classes = len(clean.train.labels), len(clean.classes)
  shift = (noisy.train.labels - clean.train.labels) % classes
  assert np.count_nonzero(shift) == round(share * examples)
  assert noisy.train.labels.dtype == np.int32
  assert set(noisy.train.labels) <= set(range(classes))
  if share == 1:  # Every other class, about as often.
    counts = np.bincount(shift, minlength=classes)
    assert counts[0] == 0
    assert counts[1:].min() > 0.6 * examples / (classes - 1)
  for split in ('validation', 'test'):
    for one, other in zip(
      getattr(noisy, split), getattr(clean, split), strict=True
    ):
      np.testing.assert_array_equal(one, other)
  np.testing.assert_array_equal(noisy.train.inputs, clean.train.inputs)


def test_label_noise_is_drawn_by_seed():
  def flipped(seed):
    noisy = data.load('digits', seed, label_noise=0.3)
    clean = data.load('digits', seed)
    return noisy.train.labels - clean.train.labels

  np.testing.assert_array_equal(flipped(0), flipped(0))
  # Two draws of 0.3 share 0.09.
  overlap = np.mean((flipped(0) != 0) & (flipped(1) != 0))
  assert 0.05 < overlap < 0.13
  # Anywhere among the training rows.
  assert np.count_nonzero(flipped(0)[:500]) in range(110, 190)


# Batches and verification samples.


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own():
  def epoch(number, seed=5):
    steps = range(number * 6, number * 6 + 6)
    return np.concatenate([batches.batch_rows(20, 3, seed, s) for s in steps])

  for number in range(3):
    assert len(set(epoch(number).tolist())) == 18
  assert not np.array_equal(epoch(0), epoch(1))
  assert not np.array_equal(epoch(0), epoch(0, seed=6))


def test_batches_need_nothing_but_the_step():
  later = batches.batch_rows(1078, 16, seed=1, step=1000)
  for step in (3, 999, 1001):
    batches.batch_rows(1078, 16, seed=1, step=step)
  batches._epoch_order.cache_clear()
  np.testing.assert_array_equal(
    later, batches.batch_rows(1078, 16, seed=1, step=1000)
  )


def test_verification_is_drawn_anew_with_replacement():
  assert batches.verification_size(5) == 1
  assert batches.verification_size(999) == 99
  assert batches.verification_size(5000) == 100
  rows = [batches.verification_rows(50, seed=0, step=s) for s in range(200)]
  assert all(r.shape == (5,) and r.min() >= 0 and r.max() < 50 for r in rows)
  assert all(r.dtype == np.int32 for r in rows)
  assert set(np.concatenate(rows).tolist()) == set(range(50))
  assert len({tuple(r) for r in rows}) > 190
  assert any(len(set(r.tolist())) < 5 for r in rows)  # With replacement.
  np.testing.assert_array_equal(
    rows[7], batches.verification_rows(50, seed=0, step=7)
  )


def test_verification_needs_nothing_but_the_seed_and_the_step():
  def rows(steps, seed=3):
    batches._verification_block.cache_clear()
    return {s: batches.verification_rows(900, seed, s).tolist() for s in steps}

  forward = rows(range(130))  # Two blocks of 64, and a part of a third.
  assert len(set(map(tuple, forward.values()))) == 130
  assert rows(reversed(range(130))) == forward
  for step in (0, 63, 64, 65, 127, 128):
    assert rows([step]) == {step: forward[step]}
    assert rows([step], seed=4) != {step: forward[step]}
  mixed = rows([64, 63, 128, 0, 127])
  assert mixed == {step: forward[step] for step in mixed}


def test_keys_need_nothing_but_the_seed_and_the_step():
  def keys(steps, seed=3):
    batches._key_block.cache_clear()
    return {s: batches.batch_keys(5, seed, s).tolist() for s in steps}

  forward = keys(range(130))  # Two blocks of 64, and a part of a third.
  drawn = {tuple(key) for step in forward.values() for key in step}
  assert len(drawn) == 130 * 5
  assert keys(reversed(range(130))) == forward
  assert keys([64], seed=4)[64] != forward[64]
  several = batches.batch_keys(5, 0, 9)
  assert several.shape == (5, 2) and several.dtype == np.uint32
  halves = several.astype(np.float64) / 2**32
  assert halves.min() >= 0 and halves.max() < 1
  many = np.concatenate([batches.batch_keys(64, 0, s) for s in range(64)])
  assert abs(np.mean(many / 2**32) - 0.5) < 0.02
