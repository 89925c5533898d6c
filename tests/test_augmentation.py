"""Augmentation, against loops; normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsgd_jax import augmentation, batches


def by_loops(images, keys, padding):
  """Pad, crop and mirror image by image, with the same draws."""
  rows, columns, flipped = map(np.asarray, augmentation._draws(keys, padding))
  out = np.zeros_like(images)
  _, height, width, channels = images.shape
  for n in range(len(images)):
    for i in range(height):
      for j in range(width):
        to = width - 1 - j if flipped[n] else j
        y, x = i + rows[n] - padding, j + columns[n] - padding
        if 0 <= y < height and 0 <= x < width:
          for c in range(channels):
            out[n, i, to, c] = images[n, y, x, c]
  return out


def example(batch, shape=(6, 5, 3), dtype=np.uint8, step=0):
  generator = np.random.default_rng(step)
  images = generator.integers(1, 256, size=(batch, *shape)).astype(dtype)
  return images, batches.batch_keys(batch, seed=3, step=step)


@pytest.mark.parametrize('padding', [0, 1, 4])
@pytest.mark.parametrize('dtype', [np.uint8, np.float32, np.float64])
def test_against_loops(padding, dtype):
  images, keys = example(40, dtype=dtype)
  actual = augmentation.crop_and_flip(images, keys, padding)
  expected = by_loops(images, keys, padding)
  np.testing.assert_array_equal(actual, expected, strict=True)


def test_all_places_and_both_sides_are_drawn_evenly():
  keys = np.concatenate([batches.batch_keys(512, 0, s) for s in range(32)])
  rows, columns, flipped = map(np.asarray, augmentation._draws(keys, 4))
  places = (rows * 9 + columns) * 2 + flipped
  counts = np.bincount(places, minlength=162)
  assert len(counts) == 162 and rows.min() == 0 and columns.max() == 8
  # 101 expected of each; six deviations.
  assert counts.min() > 40 and counts.max() < 162


def test_an_image_depends_on_its_key_alone():
  images, keys = example(12)
  whole = augmentation.crop_and_flip(images, keys)
  one = [
    augmentation.crop_and_flip(images[i : i + 1], keys[i : i + 1])[0]
    for i in range(12)
  ]
  np.testing.assert_array_equal(whole, one)
  order = np.random.default_rng(0).permutation(12)
  other = augmentation.crop_and_flip(images[order], keys[order])
  np.testing.assert_array_equal(whole[order], other)
  assert not np.array_equal(
    whole, augmentation.crop_and_flip(images, batches.batch_keys(12, 3, 1))
  )


def test_inside_jit_vmap_and_scan():
  batches = [example(8, step=s) for s in range(4)]
  images, keys = map(np.stack, zip(*batches, strict=True))
  expected = [augmentation.crop_and_flip(*batch) for batch in batches]
  together = jax.jit(jax.vmap(augmentation.crop_and_flip))(images, keys)
  np.testing.assert_array_equal(together, expected)
  step = lambda carry, batch: (carry, augmentation.crop_and_flip(*batch))
  _, scanned = jax.lax.scan(step, None, (jnp.array(images), jnp.array(keys)))
  np.testing.assert_array_equal(scanned, expected)


def test_without_padding_an_image_stays_or_is_mirrored():
  images, keys = example(30)
  actual = augmentation.crop_and_flip(images, keys, padding=0)
  same = [np.array_equal(a, b) for a, b in zip(actual, images, strict=True)]
  mirrored = [
    np.array_equal(a, b[:, ::-1]) for a, b in zip(actual, images, strict=True)
  ]
  assert np.all(np.logical_xor(same, mirrored))
  assert 5 < sum(mirrored) < 25


@pytest.mark.parametrize('dtype', [np.uint8, np.float64])
def test_normalize(dtype):
  images, _ = example(4, dtype=dtype)
  mean, deviation = [0.1, 0.5, 0.9], [0.25, 0.3, 1.0]
  actual = augmentation.normalize(images, mean, deviation)
  expected = (images / 255 - mean) / deviation
  assert actual.dtype == np.float32
  np.testing.assert_allclose(actual, expected, atol=1e-5)
