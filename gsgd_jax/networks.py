"""Networks as Flax NNX modules; `models` makes plain functions of them.

Each keeps its layers in a list ``layers``, in the order in which they are
computed. A call is ``network(inputs, keys=None)``; ``keys`` are for dropout,
one for each example, and ``None`` drops nothing.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gsgd_jax import layers


class MLP(nnx.Module):
  """Linear layers with ReLU between them; no hidden layer, no ReLU."""

  def __init__(
    self,
    sizes: Sequence[int],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    rngs: nnx.Rngs,
  ) -> None:
    self.layers: nnx.List[nnx.Linear] = nnx.List(
      nnx.Linear(n_in, n_out, dtype=dtype, rngs=rngs)
      for n_in, n_out in itertools.pairwise(sizes)
    )
    self.dtype = dtype

  def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    del keys
    x = x.reshape(len(x), -1)
    *hidden, last = self.layers
    for layer in hidden:
      x = nnx.relu(layer(x))
    x = last(x)
    return x if self.dtype is None else x.astype(layers.wide(self.dtype))


class CNN(nnx.Module):
  """Groups of convolutions, each halved by pooling; then dense layers.

  Dropout is before every dense layer.
  """

  def __init__(
    self,
    image_shape: tuple[int, int, int],
    groups: Sequence[Sequence[int]],
    hidden: Sequence[int],
    classes: int,
    *,
    dropout: float,
    dtype: jax.typing.DTypeLike,
    convolution: str | None,
    rngs: nnx.Rngs,
  ) -> None:
    height, width, channels = image_shape
    convolutions = []
    for group in groups:
      for out in group:
        convolutions.append(
          layers.Convolution(channels, out, method=convolution, rngs=rngs)
        )
        channels = out
    halved = 2 ** len(groups)
    pixels = (height // halved) * (width // halved)
    sizes = (pixels * channels, *hidden)
    dense = [
      nnx.Linear(
        n_in,
        n_out,
        dtype=dtype,
        kernel_init=nnx.initializers.he_normal(),
        rngs=rngs,
      )
      for n_in, n_out in itertools.pairwise(sizes)
    ]
    head = nnx.Linear(sizes[-1], classes, dtype=dtype, rngs=rngs)
    self.layers: nnx.List[Any] = nnx.List([*convolutions, *dense, head])
    ends = itertools.accumulate(map(len, groups))
    self.pooled = tuple(end - 1 for end in ends)
    self.dropout = dropout
    self.dtype = dtype

  def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    every = list(self.layers)
    flat = self.pooled[-1] + 1
    x = x.astype(self.dtype)
    for i, layer in enumerate(every[:flat]):
      x = nnx.relu(layer(x))
      if i in self.pooled:
        x = layers.max_pool(x)
    x = x.reshape(len(x), -1)
    for i, layer in enumerate(every[flat:]):
      x = layer(layers.dropout(x, self.dropout, keys, i))
      if flat + i + 1 < len(every):
        x = nnx.relu(x)
    return x.astype(layers.wide(self.dtype))


class NormalizedConvolution(nnx.Module):
  """A convolution without bias and the norm behind it."""

  def __init__(
    self,
    channels: int,
    out: int,
    *,
    stride: int,
    groups: int | None,
    dtype: jax.typing.DTypeLike,
    method: str | None,
    rngs: nnx.Rngs,
  ) -> None:
    self.convolution = layers.Convolution(
      channels, out, stride=stride, bias=False, method=method, rngs=rngs
    )
    self.norm = (
      layers.GroupNorm(out, groups) if groups else layers.BatchNorm(out, dtype)
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.norm(self.convolution(x))


class ResNet(nnx.Module):
  """The residual networks for small images: 3 stages of basic blocks.

  He et al., `Deep Residual Learning for Image Recognition`, arXiv:1512.03385,
  section 4.2, with shortcuts of option A.
  """

  def __init__(
    self,
    channels: int,
    classes: int,
    *,
    blocks: int,
    groups: int | None,  # Of group norm; None is batch norm.
    dtype: jax.typing.DTypeLike,
    convolution: str | None,
    rngs: nnx.Rngs,
  ) -> None:
    def unit(n_in, n_out, stride=1):
      return NormalizedConvolution(
        n_in,
        n_out,
        stride=stride,
        groups=groups,
        dtype=dtype,
        method=convolution,
        rngs=rngs,
      )

    units = [unit(channels, 16)]
    n_in = 16
    for n_out in (16, 32, 64):
      for _ in range(blocks):
        units += [unit(n_in, n_out, n_out // n_in), unit(n_out, n_out)]
        n_in = n_out
    head = nnx.Linear(n_in, classes, dtype=dtype, rngs=rngs)
    self.layers: nnx.List[Any] = nnx.List([*units, head])
    self.dtype = dtype

  def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    del keys
    stem, *units, head = self.layers
    x = nnx.relu(stem(x.astype(self.dtype)))
    for first, second in zip(units[::2], units[1::2], strict=True):
      y = second(nnx.relu(first(x)))
      x = nnx.relu(y + _shortcut(x, y))
    x = x.astype(layers.wide(self.dtype)).mean((1, 2)).astype(self.dtype)
    return head(x).astype(layers.wide(self.dtype))


def _shortcut(x, y):
  """The identity, every other pixel where `y` is smaller, new channels zero."""
  stride = 1 if x.shape[1:3] == y.shape[1:3] else 2
  new = y.shape[-1] - x.shape[-1]
  x = x[:, ::stride, ::stride]
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, new))) if new else x


class GPT(nnx.Module):
  """A decoder-only transformer with norms before its layers.

  Radford et al., `Language Models are Unsupervised Multitask Learners`, 2019
  (GPT-2), with an output matrix of its own.
  """

  def __init__(
    self,
    vocabulary: int,
    context: int,
    *,
    blocks: int,
    heads: int,
    width: int,
    dropout: float,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ) -> None:
    residual = 0.02 / (2 * blocks) ** 0.5
    sites = itertools.count()
    self.layers: nnx.List[Any] = nnx.List(
      [
        Embedding(
          vocabulary, context, width, dropout, next(sites), dtype, rngs
        ),
        *(
          Block(
            width,
            heads,
            residual,
            dropout,
            (next(sites), next(sites)),
            dtype,
            rngs,
          )
          for _ in range(blocks)
        ),
        Head(width, vocabulary, dtype, rngs),
      ]
    )
    self.context = context

  def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    if x.shape[1] > self.context:
      raise ValueError(
        f'gpt takes at most context={self.context} tokens, got {x.shape[1]}'
      )
    *hidden, head = self.layers
    for layer in hidden:
      x = layer(x, keys)
    return head(x)


def _normal(rngs, shape, deviation=0.02):
  draw = nnx.initializers.normal(deviation)
  return nnx.Param(draw(rngs.params(), shape, jnp.float32))


def _linear(n_in, n_out, dtype, rngs, deviation=0.02, bias=True):
  return nnx.Linear(
    n_in,
    n_out,
    use_bias=bias,
    dtype=dtype,
    kernel_init=nnx.initializers.normal(deviation),
    rngs=rngs,
  )


class Embedding(nnx.Module):
  """The sum of a token's and a position's learned vector."""

  def __init__(
    self,
    vocabulary: int,
    context: int,
    width: int,
    dropout: float,
    site: int,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ) -> None:
    self.tokens = _normal(rngs, (vocabulary, width))
    self.positions = _normal(rngs, (context, width))
    self.dropout, self.site, self.dtype = dropout, site, dtype

  def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
    # A token outside of the vocabulary becomes NaN.
    tokens = jnp.take(self.tokens[...], x, axis=0, mode='fill')
    positions = self.positions[...][None, : x.shape[1]]
    wide = layers.wide(self.dtype)
    x = tokens.astype(wide) + positions.astype(wide)
    return layers.dropout(x.astype(self.dtype), self.dropout, keys, self.site)


class Block(nnx.Module):
  """Causal attention and a two-layer MLP, each added to its input."""

  def __init__(
    self,
    width: int,
    heads: int,
    residual: float,
    dropout: float,
    sites: tuple[int, int],
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ) -> None:
    self.norm1 = layers.LayerNorm(width)
    self.query = _linear(width, width, dtype, rngs)
    self.key = _linear(width, width, dtype, rngs)
    self.value = _linear(width, width, dtype, rngs)
    self.mix = _linear(width, width, dtype, rngs, residual)
    self.norm2 = layers.LayerNorm(width)
    self.expand = _linear(width, 4 * width, dtype, rngs)
    self.contract = _linear(4 * width, width, dtype, rngs, residual)
    self.heads, self.dropout, self.sites = heads, dropout, sites

  def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
    drop = lambda x, site: layers.dropout(x, self.dropout, keys, site)
    y = self.norm1(x)
    heads = (*x.shape[:2], self.heads, -1)
    query, key, value = (
      project(y).reshape(heads)
      for project in (self.query, self.key, self.value)
    )
    y = self.mix(_attention(query, key, value).reshape(x.shape))
    x = x + drop(y, self.sites[0])
    y = self.contract(nnx.gelu(self.expand(self.norm2(x))))
    return x + drop(y, self.sites[1])


def _attention(query_BxTxHxD, key_BxTxHxD, value_BxTxHxD):
  """Every token's mean of the values up to its own, softmax in float32."""
  length, _, size = query_BxTxHxD.shape[1:]
  scores_BxHxTxT = jnp.einsum('bthd,bshd->bhts', query_BxTxHxD, key_BxTxHxD)
  scores_BxHxTxT = scores_BxHxTxT.astype(layers.wide(query_BxTxHxD.dtype))
  past_TxT = jnp.tril(jnp.ones([length, length], bool))
  scores_BxHxTxT = jnp.where(
    past_TxT[None, None], scores_BxHxTxT * size**-0.5, -jnp.inf
  )
  weights_BxHxTxT = jax.nn.softmax(scores_BxHxTxT).astype(value_BxTxHxD.dtype)
  return jnp.einsum('bhts,bshd->bthd', weights_BxHxTxT, value_BxTxHxD)


class Head(nnx.Module):
  """The last norm and the logits."""

  def __init__(
    self,
    width: int,
    vocabulary: int,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ) -> None:
    self.norm = layers.LayerNorm(width)
    self.logits = _linear(width, vocabulary, dtype, rngs, bias=False)
    self.dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.logits(self.norm(x)).astype(layers.wide(self.dtype))
