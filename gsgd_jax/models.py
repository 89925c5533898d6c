"""Models as plain functions of plain pytrees.

The networks themselves, Flax NNX modules, are in `networks`. Bring your own by
`from_nnx` or `from_linen`, or as a `Model`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gsgd_jax import layers, networks
from gsgd_jax._model import Model as Model
from gsgd_jax._model import functions_of
from gsgd_jax.adapters import Adapted as Adapted
from gsgd_jax.adapters import StatefulBatch as StatefulBatch
from gsgd_jax.adapters import from_linen as from_linen
from gsgd_jax.adapters import from_nnx as from_nnx
from gsgd_jax.losses import accuracy as accuracy
from gsgd_jax.losses import cross_entropy as cross_entropy
from gsgd_jax.losses import evaluation_loss as evaluation_loss

_SMALLEST = 4  # Pixels that two halvings leave one of.
_CNNS = {  # Channels of the convolutions between poolings; hidden units.
  'small': (((32,), (64,)), ()),
  'large': (((64, 64), (128, 128)), (256,)),
}


def mlp(
  inputs: int,
  hidden: Sequence[int],
  classes: int,
  *,
  dtype: jax.typing.DTypeLike | None = None,
) -> Model:
  """A multilayer perceptron; images and the like are flattened.

  Args:
    inputs: Number of features: of an image, pixels times channels.
    hidden: Units of each hidden layer; none is softmax regression.
    classes: Number of classes.
    dtype: As in :func:`cnn`; ``None`` is that of the parameters.

  Returns:
    A ``Model``.

  Examples:
    >>> import jax
    >>> from gsgd_jax import models
    >>> model = models.mlp(64, [64], 10)
    >>> params = model.init(jax.random.key(0))
    >>> print(sum(x.size for x in jax.tree.leaves(params)))
    4810
  """
  sizes = (inputs, *hidden, classes)
  return functions_of(lambda rngs: networks.MLP(sizes, dtype=dtype, rngs=rngs))


def softmax_regression(inputs: int, classes: int) -> Model:
  """Softmax regression, an MLP without hidden layers.

  Args:
    inputs: Number of features.
    classes: Number of classes.

  Returns:
    A ``Model``.

  Examples:
    >>> import jax
    >>> from gsgd_jax import models
    >>> params = models.softmax_regression(30, 2).init(jax.random.key(0))
    >>> print(sum(x.size for x in jax.tree.leaves(params)))
    62
  """
  return mlp(inputs, (), classes)


def cnn(
  image_shape: tuple[int, int, int],
  classes: int,
  size: str = 'small',
  *,
  dropout: float = 0.0,
  dtype: jax.typing.DTypeLike = jnp.float32,
  convolution: str | None = None,
) -> Model:
  """A convolutional network with ReLU and max pooling.

  ``'small'``: 3 by 3 convolutions of 32 and 64 channels, each halved by
  pooling, and a dense layer. ``'large'``: two of 64 and two of 128, halved
  after each pair, and dense layers of 256 and ``classes``.

  Args:
    image_shape: Height, width and channels; at least 4 by 4 pixels.
    classes: Number of classes.
    size: ``'small'`` or ``'large'``.
    dropout: The share of the inputs of each dense layer that training zeroes,
      in [0, 1).
    dtype: What is computed in, such as ``jnp.bfloat16``; parameters, their
      gradients and logits stay float32.
    convolution: How convolutions are computed; see
      :func:`gsgd_jax.layers.convolve`. The parameters are the same.

  Returns:
    A ``Model`` of images ``(batch, height, width, channels)``.

  Raises:
    ValueError: An argument is out of its range.

  Examples:
    >>> import jax
    >>> from gsgd_jax import models
    >>> model = models.cnn((28, 28, 1), 10)
    >>> params = jax.eval_shape(model.init, jax.random.key(0))
    >>> print(sum(x.size for x in jax.tree.leaves(params)))
    50186
  """
  image_shape = _checked_image('cnn', image_shape)
  layers.check_method(convolution)
  if size not in _CNNS:
    raise ValueError(f"size must be 'small' or 'large', got {size!r}")
  groups, hidden = _CNNS[size]
  make = lambda rngs: networks.CNN(
    image_shape,
    groups,
    hidden,
    classes,
    dropout=dropout,
    dtype=dtype,
    convolution=convolution,
    rngs=rngs,
  )
  return functions_of(make, _checked_rate(dropout))


def resnet20(
  image_shape: tuple[int, int, int],
  classes: int,
  normalization: str = 'group',
  *,
  groups: int = 8,
  dtype: jax.typing.DTypeLike = jnp.float32,
  convolution: str | None = None,
) -> Model:
  r"""The residual network of 20 layers for images like CIFAR's.

  A 3 by 3 convolution of 16 channels; 9 blocks of two convolutions, of 16, 32
  and 64 channels, whose input is added to their output; the mean over all
  pixels; a dense layer. Where a block halves the image its shortcut takes
  every other pixel and adds channels of zeros (the paper's option A).

  Norms over groups of channels know no batch, so nothing of them can be stale.
  With ``normalization='batch'`` training uses the statistics of each batch
  itself, and *no running averages are kept*: under delay they would be of
  parameters that are gone, and a replayed batch would count twice. Instead
  ``calibrate(params, inputs)`` measures

  .. math::

    \mu_c = \mathrm{mean}\, x_c, \quad
    \sigma_c^2 = \mathrm{mean} (x_c - \mu_c)^2

  of every channel at the very parameters that are evaluated, layer by layer in
  one forward pass over a sample of training inputs, given as one batch,
  prepared but not augmented. So evaluation depends on parameters and sample
  alone. ``apply`` takes what ``calibrate`` returns. A batch is what the model
  is given at once: where devices share one (``shard_map``), a device's share.

  Args:
    image_shape: Height, width and channels; at least 4 by 4 pixels.
    classes: Number of classes.
    normalization: ``'group'`` or ``'batch'``.
    groups: Groups of a group norm; divides 16.
    dtype: As in :func:`cnn`.
    convolution: As in :func:`cnn`.

  Returns:
    A ``Model`` of images ``(batch, height, width, channels)``.

  Raises:
    ValueError: An argument is out of its range; in ``apply``, a model with
      batch normalisation was given parameters that are not calibrated.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from gsgd_jax import models
    >>> model = models.resnet20((8, 8, 3), 10, 'batch')
    >>> params = jax.eval_shape(model.init, jax.random.key(0))  # Shapes.
    >>> print(sum(x.size for x in jax.tree.leaves(params)))
    269722
    >>> sample = jax.random.normal(jax.random.key(1), (16, 8, 8, 3))
    >>> evaluated = jax.eval_shape(model.calibrate, params, sample)
    >>> print(jax.eval_shape(model.apply, evaluated, sample[:4]).shape)
    (4, 10)

  References:
    He et al., `Deep Residual Learning for Image Recognition`,
    arXiv:1512.03385, 2015.
    Wu & He, `Group Normalization`, arXiv:1803.08494, 2018.
    Wu & Johnson, `Rethinking "Batch" in BatchNorm` (precise BatchNorm),
    arXiv:2105.07576, 2021.
  """
  image_shape = _checked_image('resnet20', image_shape)
  layers.check_method(convolution)
  if normalization not in ('group', 'batch'):
    raise ValueError(
      f"normalization must be 'group' or 'batch', got {normalization!r}"
    )
  if groups not in (1, 2, 4, 8, 16):
    raise ValueError(f'groups must be 1, 2, 4, 8 or 16, got {groups!r}')
  return functions_of(
    lambda rngs: networks.ResNet(
      image_shape[-1],
      classes,
      blocks=3,
      groups=groups if normalization == 'group' else None,
      dtype=dtype,
      convolution=convolution,
      rngs=rngs,
    )
  )


def gpt(
  vocabulary: int,
  context: int,
  layers: int = 5,
  heads: int = 4,
  width: int = 128,
  *,
  dropout: float = 0.0,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> Model:
  r"""A decoder-only transformer, GPT-2 in small.

  .. math::

    x_0 &= E_{t} + P, \qquad
    y_l = x_l + \mathrm{attention}(\mathrm{norm}(x_l)) \\
    x_{l+1} &= y_l + W_2\, \mathrm{gelu}(W_1\, \mathrm{norm}(y_l)), \qquad
    z = W\, \mathrm{norm}(x_L)

  A token sees itself and those before it. Matrices start from
  :math:`N(0, 0.02^2)`, those added to the residual stream smaller by
  :math:`\sqrt{2 L}`. Every projection is a matrix of its own, as Muon wants.

  Args:
    vocabulary: Number of tokens; a token outside of it makes logits NaN.
    context: The most tokens in a row.
    layers: Number of blocks.
    heads: Heads of an attention; divides ``width``.
    width: Length of a token's vector; the MLP between has four times as many
      units.
    dropout: The share that training zeroes of the embedding and of what each
      layer adds, in [0, 1).
    dtype: As in :func:`cnn`.

  Returns:
    A ``Model`` of integers ``(batch, length)``, with logits
    ``(batch, length, vocabulary)``.

  Raises:
    ValueError: An argument is out of its range; in ``apply``, more tokens than
      ``context``.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from gsgd_jax import models
    >>> model = models.gpt(vocabulary=65, context=128)
    >>> params = jax.eval_shape(model.init, jax.random.key(0))  # Shapes.
    >>> print(sum(x.size for x in jax.tree.leaves(params)))
    1024640
    >>> tokens = jnp.zeros([2, 16], jnp.int32)
    >>> print(jax.eval_shape(model.apply, params, tokens).shape)
    (2, 16, 65)

  References:
    Radford et al., `Language Models are Unsupervised Multitask Learners`, 2019.
  """
  sizes = dict(
    vocabulary=vocabulary,
    context=context,
    layers=layers,
    heads=heads,
    width=width,
  )
  for name, given in sizes.items():
    if given < 1:
      raise ValueError(f'{name} must be at least 1, got {given}')
  if width % heads:
    raise ValueError(
      f'heads must divide width, got heads={heads} and width={width}'
    )
  make = lambda rngs: networks.GPT(
    vocabulary,
    context,
    blocks=layers,
    heads=heads,
    width=width,
    dropout=dropout,
    dtype=dtype,
    rngs=rngs,
  )
  return functions_of(make, _checked_rate(dropout))


def _checked_image(who, image_shape):
  if len(image_shape) != 3 or min(image_shape[:2]) < _SMALLEST:
    raise ValueError(
      f'{who} takes images (height, width, channels) of at least {_SMALLEST} '
      f'by {_SMALLEST} pixels, got {tuple(image_shape)}'
    )
  return tuple(image_shape)


def _checked_rate(dropout):
  if not 0 <= dropout < 1:
    raise ValueError(f'dropout must be at least 0 and below 1, got {dropout}')
  return dropout
