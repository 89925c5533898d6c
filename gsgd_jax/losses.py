"""Losses of models, and how many examples they get right."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gsgd_jax._model import Model


def cross_entropy(
  model: Model, prepare: Callable[[Any, Any], Any] | None = None
) -> Callable[[Any, Any], jax.Array]:
  r"""The loss that training descends, of a batch of labelled examples.

  .. math::

    \frac{1}{B} \sum_b \Big(\log \sum_c e^{z_{bc}} - z_{b y_b}\Big)

  by a shifted log-sum-exp: finite for logits of any size. Of text it is the
  mean over all tokens. The model is applied as in training, by its
  ``train_apply``; :func:`evaluation_loss` is the other.

  Args:
    model: A ``Model``.
    prepare: ``prepare(inputs, keys) -> inputs``, applied first: normalisation,
      augmentation. ``keys`` are one raw key for each example, or ``None`` where
      nothing is to be drawn. An example's key is split (``jax.random.split``):
      the first is for ``prepare``, the second for the model.

  Returns:
    ``loss_fn(params, (inputs, labels)) -> scalar``, or with a batch
    ``(inputs, labels, keys)``: keys as in :class:`Model`, or ``None``. Labels
    are integers of shape ``(batch,)``, or ``(batch, length)`` for text.

  Raises:
    ValueError: In ``loss_fn``, the model draws and there are no keys. That is
      so of a verification batch of :func:`gsgd_jax.guided`, too.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from gsgd_jax import models
    >>> model = models.softmax_regression(2, 4)
    >>> params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
    >>> batch = jnp.ones([3, 2]), jnp.array([0, 1, 2])
    >>> print(f'{models.cross_entropy(model)(params, batch):.4f}')
    1.3863
  """

  def loss_fn(params, batch):
    inputs, labels, keys = (*batch, None)[:3]
    for_inputs, for_model = _split_keys(keys)
    if prepare is not None:
      inputs = prepare(inputs, for_inputs)
    if model.train_apply is None:
      logits = model.apply(params, inputs)
    else:
      logits = model.train_apply(params, inputs, for_model)
    return _cross_entropy(logits, labels)

  return loss_fn


def evaluation_loss(
  model: Model, prepare: Callable[[Any, Any], Any] | None = None
) -> Callable[[Any, Any], jax.Array]:
  """The loss of :func:`cross_entropy` with the model as in evaluation.

  Nothing is drawn; keys in a batch are not looked at.

  Args:
    model: A ``Model``.
    prepare: ``prepare(inputs, None) -> inputs``, applied first.

  Returns:
    ``loss_fn(params, (inputs, labels)) -> scalar``; of a model with
    ``calibrate``, ``params`` is what that returns.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gsgd_jax import models
    >>> model = models.Model(init=None, apply=lambda params, x: x)
    >>> batch = jnp.zeros([3, 4]), jnp.array([0, 1, 2])
    >>> print(f'{models.evaluation_loss(model)(None, batch):.4f}')
    1.3863
  """

  def loss_fn(params, batch):
    return _cross_entropy(_evaluated(model, prepare, params, batch), batch[1])

  return loss_fn


def accuracy(
  model: Model, prepare: Callable[[Any, Any], Any] | None = None
) -> Callable[[Any, Any], jax.Array]:
  """The share of a batch, or of its tokens, that is classified correctly.

  A model whose logits are not finite classifies nothing correctly.

  Args:
    model: A ``Model``, applied as in evaluation.
    prepare: ``prepare(inputs, None) -> inputs``, applied first.

  Returns:
    ``accuracy_fn(params, (inputs, labels)) -> scalar`` in [0, 1]; of a model
    with ``calibrate``, ``params`` is what that returns.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from gsgd_jax import models
    >>> model = models.Model(init=None, apply=lambda params, x: x)
    >>> batch = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1])
    >>> print(models.accuracy(model)(None, batch))
    0.5
  """

  correct = correctness(model, prepare)
  return lambda params, batch: jnp.mean(correct(params, batch))


def correctness(
  model: Model, prepare: Callable[[Any, Any], Any] | None = None
) -> Callable[[Any, Any], jax.Array]:
  """Which of a batch's examples, or tokens, are classified correctly.

  Args:
    model: A ``Model``, applied as in evaluation.
    prepare: ``prepare(inputs, None) -> inputs``, applied first.

  Returns:
    ``correct(params, (inputs, labels))``, bool, of the labels' shape; see
    :func:`accuracy`.
  """

  def correct(params, batch):
    logits = _evaluated(model, prepare, params, batch)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return (jnp.argmax(logits, axis=-1) == batch[1]) & finite

  return correct


def _cross_entropy(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _evaluated(model, prepare, params, batch):
  inputs = batch[0] if prepare is None else prepare(batch[0], None)
  return model.apply(params, inputs)


def _split_keys(keys):
  """Two raw keys for every one."""
  if keys is None:
    return None, None
  keys = jax.random.wrap_key_data(keys, impl='threefry2x32')
  pairs = jax.random.key_data(jax.vmap(jax.random.split)(keys))
  return pairs[:, 0], pairs[:, 1]
