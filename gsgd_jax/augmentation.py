"""What images go through on their way into a model, inside of jit."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def normalize(
  images: ArrayLike, mean: ArrayLike, deviation: ArrayLike
) -> jax.Array:
  r""":math:`(x / 255 - \mu) / \sigma`, by channel.

  Args:
    images: uint8 or float, from 0 to 255, shape ``(..., channels)``.
    mean: Of x / 255, shape ``(channels,)``.
    deviation: Of x / 255, positive, shape ``(channels,)``.

  Returns:
    float32, shaped as `images`.

  Examples:
    >>> import numpy as np
    >>> from gsgd_jax import augmentation
    >>> images = np.array([[[[0], [255]]]], np.uint8)
    >>> print(augmentation.normalize(images, [0.5], [0.25]).ravel())
    [-2.  2.]
  """
  images, mean, deviation = (
    jnp.asarray(x, jnp.float32) for x in (images, mean, deviation)
  )
  along = (1,) * (images.ndim - 1) + (-1,)
  # A product by one factor: nothing is divided image by image.
  scale = (1 / (255 * deviation)).reshape(along)
  return images * scale - (mean / deviation).reshape(along)


def crop_and_flip(
  images: ArrayLike, keys: ArrayLike, padding: int = 4
) -> jax.Array:
  """The usual augmentation of CIFAR: random crops and mirror images.

  Each image is padded by zeros on all sides, cropped to its size again at a
  random place, and mirrored left to right with probability 1/2. What happens to
  an image depends on its key alone, however a batch is split.

  Args:
    images: Any dtype, shape ``(batch, height, width, channels)``.
    keys: Raw data of a key each, uint32, shape ``(batch, 2)``, as
      :func:`gsgd_jax.batches.batch_keys` gives them.
    padding: Pixels on each side, at least 0.

  Returns:
    Images of the same shape and dtype.

  References:
    He et al., 2015. Deep Residual Learning for Image Recognition.
    https://arxiv.org/abs/1512.03385 (section 4.2)

  Examples:
    >>> import numpy as np
    >>> from gsgd_jax import augmentation, batches
    >>> images = np.arange(2 * 9, dtype=np.uint8).reshape(2, 3, 3, 1)
    >>> keys = batches.batch_keys(2, seed=0, step=0)
    >>> augmented = augmentation.crop_and_flip(images, keys, padding=1)
    >>> print(augmented.shape, augmented.dtype)
    (2, 3, 3, 1) uint8
  """
  images = jnp.asarray(images)
  rows, columns, flipped = _draws(keys, padding)
  _, height, width, _ = images.shape
  sides = (padding, padding)
  padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)))
  down = jnp.arange(height, dtype=jnp.int32)
  right = jnp.arange(width, dtype=jnp.int32)
  right = jnp.where(flipped[:, None], right[::-1][None], right[None])
  down = (rows[:, None] + down[None])[:, :, None, None]
  right = (columns[:, None] + right)[:, None, :, None]
  cropped = jnp.take_along_axis(padded, down, axis=1)
  return jnp.take_along_axis(cropped, right, axis=2)


def _draws(keys, padding):
  """First row and column of the crop, int32, and whether to mirror it."""
  keys = jax.random.wrap_key_data(keys, impl='threefry2x32')
  ends = jnp.array([2 * padding + 1, 2 * padding + 1, 2], jnp.int32)
  zeros = jnp.zeros_like(ends)
  draw = lambda key: jax.random.randint(key, (3,), zeros, ends, jnp.int32)
  rows, columns, flipped = jax.vmap(draw)(keys).T
  return rows, columns, flipped == 1
