"""Data sets, and batches as a function of (seed, step)."""

import numpy as np
import pytest

from gsgd_jax import data


@pytest.mark.parametrize(
  'name, examples, features, classes',
  [('digits', 1797, 64, 10), ('breast_cancer', 569, 30, 2)],
)
def test_load(name, examples, features, classes):
  dataset = data.load(name, seed=3)
  splits = dataset.train, dataset.validation, dataset.test
  assert sum(len(s.labels) for s in splits) == examples
  assert len(dataset.train.labels) == int(0.6 * examples)
  assert dataset.classes == classes
  for split in splits:
    assert split.inputs.shape == (len(split.labels), features)
    assert split.inputs.dtype == np.float32 and split.labels.dtype == np.int32
    assert set(np.unique(split.labels)) == set(range(classes))


def test_only_training_rows_standardise():
  dataset = data.load('breast_cancer', seed=0)
  np.testing.assert_allclose(dataset.train.inputs.mean(axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(dataset.train.inputs.std(axis=0), 1, atol=1e-5)
  assert np.abs(dataset.test.inputs.mean(axis=0)).max() > 0.01


def test_splits_are_disjoint_and_follow_the_seed():
  def rows(seed):
    dataset = data.load('breast_cancer', seed)
    scale = 1e4  # Rows are told apart by one feature, back in its units.
    raw = data._raw('breast_cancer').inputs
    key = np.rint(raw[:, 3] * scale) + np.rint(raw[:, 20] * scale) * 1e9
    assert len(np.unique(key)) == len(key)
    order = np.random.default_rng([seed, 0]).permutation(len(key))
    sizes = [len(s.labels) for s in dataset[2:]]
    return np.split(order, np.cumsum(sizes)[:-1])

  first, again, other = rows(0), rows(0), rows(1)
  assert len(set(np.concatenate(first).tolist())) == 569
  np.testing.assert_array_equal(first[2], again[2])
  assert not np.array_equal(first[2], other[2])
  one, two = data.load('digits', 0), data.load('digits', 0)
  np.testing.assert_array_equal(one.test.inputs, two.test.inputs)


def test_unknown_name():
  with pytest.raises(ValueError, match=r'breast_cancer, digits, got .mnist.'):
    data.load('mnist', seed=0)


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own():
  def epoch(number, seed=5):
    steps = range(number * 6, number * 6 + 6)
    return np.concatenate([data.batch_rows(20, 3, seed, s) for s in steps])

  for number in range(3):
    assert len(set(epoch(number).tolist())) == 18
  assert not np.array_equal(epoch(0), epoch(1))
  assert not np.array_equal(epoch(0), epoch(0, seed=6))


def test_batches_need_nothing_but_the_step():
  later = data.batch_rows(1078, 16, seed=1, step=1000)
  for step in (3, 999, 1001):
    data.batch_rows(1078, 16, seed=1, step=step)
  data._epoch_order.cache_clear()
  np.testing.assert_array_equal(
    later, data.batch_rows(1078, 16, seed=1, step=1000)
  )


def test_verification_is_drawn_anew_with_replacement():
  assert data.verification_size(5) == 1
  rows = [data.verification_rows(50, seed=0, step=s) for s in range(200)]
  assert all(r.shape == (5,) and r.min() >= 0 and r.max() < 50 for r in rows)
  assert len({tuple(r) for r in rows}) > 190
  assert any(len(set(r.tolist())) < 5 for r in rows)  # With replacement.
  np.testing.assert_array_equal(
    rows[7], data.verification_rows(50, seed=0, step=7)
  )
