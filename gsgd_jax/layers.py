"""Layers of the networks: convolution, pooling, normalisation, dropout.

Images are NHWC. Parameters are float32; a layer computes in the dtype of its
input, and normalises in float32 at least.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

_METHODS = (None, 'patches', 'lax')
_EPSILON = 1e-5


def convolve(
  x: jax.Array, kernel: jax.Array, stride: int = 1, method: str | None = None
) -> jax.Array:
  r"""A convolution with SAME padding.

  .. math::

    y_{bijo} = \sum_{pqc} x_{b, s i + p - a, s j + q - a', c} k_{pqco}

  with the image zero outside and :math:`a, a'` as XLA's SAME puts them.

  ``'patches'`` gathers the shifted images side by side and takes one matrix
  product: inside ``lax.scan`` and other loops the CPU's own convolution runs on
  a slow path, and a replay of :func:`gsgd_jax.guided` is such a loop.

  Args:
    x: Images, shape ``(batch, height, width, channels)``.
    kernel: Shape ``(rows, columns, channels, out)``, of the dtype of ``x``.
    stride: At least 1, in both directions.
    method: ``'patches'``, ``'lax'`` (``lax.conv_general_dilated``), or ``None``
      for patches where the default backend is the CPU and ``lax`` elsewhere.

  Returns:
    Shape ``(batch, ceil(height / stride), ceil(width / stride), out)``.

  Raises:
    ValueError: ``method`` is none of these.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gsgd_jax import layers
    >>> ones = jnp.ones([1, 3, 3, 1])
    >>> print(layers.convolve(ones, jnp.ones([3, 3, 1, 1]))[0, :, :, 0])
    [[4. 6. 4.]
     [6. 9. 6.]
     [4. 6. 4.]]
  """
  check_method(method)
  if method is None:
    method = 'patches' if jax.default_backend() == 'cpu' else 'lax'
  if method == 'lax':
    return lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
  shifted = _shifted(x, kernel.shape[:2], stride)
  return jnp.concatenate(shifted, -1) @ kernel.reshape(-1, kernel.shape[-1])


def check_method(method: str | None) -> None:
  """Raises unless `convolve` knows it."""
  if method not in _METHODS:
    raise ValueError(
      f"convolution must be 'patches', 'lax' or None, got {method!r}"
    )


def _shifted(x, window, stride):
  """The image as each entry of a kernel sees it, in the kernel's order."""
  padding = lax.padtype_to_pads(x.shape[1:3], window, (stride, stride), 'SAME')
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  rows, columns = (
    [slice(i, n - k + i + 1, stride) for i in range(k)]
    for n, k in zip(x.shape[1:3], window, strict=True)
  )
  return [x[:, i, j] for i in rows for j in columns]


def max_pool(x: jax.Array) -> jax.Array:
  """The largest of every 2 by 2 pixels; an odd last row or column is left out.

  By maxima of slices: the gradient of ``lax.reduce_window`` is slow on a CPU.

  Args:
    x: Images, shape ``(batch, height, width, channels)``.

  Returns:
    Shape ``(batch, height // 2, width // 2, channels)``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gsgd_jax import layers
    >>> print(layers.max_pool(jnp.arange(15).reshape(1, 3, 5, 1))[0, :, :, 0])
    [[6 8]]
  """
  height, width = (n // 2 * 2 for n in x.shape[1:3])
  x = x[:, :height, :width]
  x = jnp.maximum(x[:, ::2], x[:, 1::2])
  return jnp.maximum(x[:, :, ::2], x[:, :, 1::2])


def dropout(
  x: jax.Array, rate: float, keys: jax.Array | None, site: int
) -> jax.Array:
  """Zeroes entries at random and scales the others by ``1 / (1 - rate)``.

  An example's mask depends on its own key alone, so it is the same however a
  batch is split.

  Args:
    x: Shape ``(batch, ...)``.
    rate: The share that is zeroed, in [0, 1).
    keys: Raw key data (``threefry2x32``), uint32 of shape ``(batch, 2)``;
      ``None`` drops nothing.
    site: Where in the network this is: other sites draw other masks.

  Returns:
    As ``x``.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from gsgd_jax import layers
    >>> keys = jax.random.key_data(jax.random.split(jax.random.key(0), 2))
    >>> print(layers.dropout(jnp.ones([2, 5]), 0.5, keys, 0))
    [[2. 0. 2. 0. 2.]
     [0. 2. 2. 2. 2.]]
  """
  if not rate or keys is None:
    return x
  kept_share = jnp.float32(1 - rate)

  def one(x, key):
    key = jax.random.fold_in(key, site)
    kept = jax.random.bernoulli(key, kept_share, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)

  return jax.vmap(one)(x, jax.random.wrap_key_data(keys, impl='threefry2x32'))


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """What is computed in float32 at least, for a network of this dtype."""
  return jnp.dtype('float64' if dtype == jnp.float64 else 'float32')


def _last_axis(vector, x):
  return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _standardized(x, mean, variance):
  return (x - mean) * lax.rsqrt(variance + _EPSILON)


class _Affine(nnx.Module):
  """A learned scale and shift of every channel."""

  def __init__(self, channels: int) -> None:
    self.scale = nnx.Param(jnp.ones([channels], jnp.float32))
    self.bias = nnx.Param(jnp.zeros([channels], jnp.float32))

  def scaled(self, x: jax.Array) -> jax.Array:
    return x * _last_axis(self.scale[...], x) + _last_axis(self.bias[...], x)


class LayerNorm(_Affine):
  """Every vector along the last axis has mean 0 and variance 1."""

  def __call__(self, x: jax.Array) -> jax.Array:
    z = x.astype(wide(x.dtype))
    mean, variance = z.mean(-1, keepdims=True), z.var(-1, keepdims=True)
    return self.scaled(_standardized(z, mean, variance)).astype(x.dtype)


class GroupNorm(_Affine):
  """An image's groups of neighbouring channels have mean 0 and variance 1.

  Wu & He, `Group Normalization`, arXiv:1803.08494.
  """

  def __init__(self, channels: int, groups: int) -> None:
    super().__init__(channels)
    self.groups = groups

  def __call__(self, x: jax.Array) -> jax.Array:
    z = x.astype(wide(x.dtype)).reshape(
      len(x), -1, self.groups, x.shape[-1] // self.groups
    )
    axes = (1, 3)
    mean, variance = z.mean(axes, keepdims=True), z.var(axes, keepdims=True)
    z = _standardized(z, mean, variance).reshape(x.shape)
    return self.scaled(z).astype(x.dtype)


class BatchNorm(_Affine):
  """A channel has mean 0 and variance 1, over a batch or as measured before.

  In training the batch's own statistics are used. They are also left in
  ``mean`` and ``var``, and after ``module.eval()`` those are used.

  Ioffe & Szegedy, `Batch Normalization`, arXiv:1502.03167.
  """

  def __init__(
    self, channels: int, dtype: jax.typing.DTypeLike = jnp.float32
  ) -> None:
    super().__init__(channels)
    self.mean = nnx.BatchStat(jnp.zeros([channels], wide(dtype)))
    self.var = nnx.BatchStat(jnp.ones([channels], wide(dtype)))
    self.use_running_average = False  # What `eval()` sets.

  def __call__(self, x: jax.Array) -> jax.Array:
    z = x.astype(wide(x.dtype))
    if not self.use_running_average:
      axes = tuple(range(x.ndim - 1))
      self.mean[...], self.var[...] = z.mean(axes), z.var(axes)
    mean, variance = _last_axis(self.mean[...], z), _last_axis(self.var[...], z)
    return self.scaled(_standardized(z, mean, variance)).astype(x.dtype)


class Convolution(nnx.Module):
  """A 3 by 3 convolution, initialised for ReLU (He et al., 1502.01852)."""

  def __init__(
    self,
    channels: int,
    out: int,
    *,
    stride: int = 1,
    bias: bool = True,
    method: str | None = None,
    rngs: nnx.Rngs,
  ) -> None:
    he = nnx.initializers.he_normal()
    shape = (3, 3, channels, out)
    self.kernel = nnx.Param(he(rngs.params(), shape, jnp.float32))
    self.bias = nnx.Param(jnp.zeros([out], jnp.float32)) if bias else None
    self.stride = stride
    self.method = method

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.kernel[...].astype(x.dtype)
    x = convolve(x, kernel, self.stride, self.method)
    return x if self.bias is None else x + _last_axis(self.bias[...], x)
