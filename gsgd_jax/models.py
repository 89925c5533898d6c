"""Flax NNX models as plain functions of plain pytrees, and their losses."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class Model(NamedTuple):
  """A model as two pure functions.

  Attributes:
    init: ``init(key) -> params``, a pytree of arrays.
    apply: ``apply(params, inputs) -> logits``, shape ``(batch, classes)``.
  """

  init: Callable[[jax.Array], Any]
  apply: Callable[[Any, jax.Array], jax.Array]


class MLP(nnx.Module):
  """Linear layers with ReLU between them; no hidden layer, no ReLU."""

  def __init__(self, sizes: Sequence[int], *, rngs: nnx.Rngs):
    self.layers = nnx.List(
      nnx.Linear(n_in, n_out, rngs=rngs)
      for n_in, n_out in itertools.pairwise(sizes)
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    *hidden, last = self.layers
    for layer in hidden:
      x = nnx.relu(layer(x))
    return last(x)


def mlp(inputs: int, hidden: Sequence[int], classes: int) -> Model:
  """A multilayer perceptron.

  Args:
    inputs: Number of features.
    hidden: Units of each hidden layer; none is softmax regression.
    classes: Number of classes.

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
  make = lambda key: MLP(sizes, rngs=nnx.Rngs(key))
  structure = nnx.graphdef(nnx.eval_shape(make, jax.random.key(0)))
  return Model(
    init=lambda key: nnx.state(make(key)),
    apply=lambda params, inputs: nnx.merge(structure, params)(inputs),
  )


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


def cross_entropy(model: Model) -> Callable[[Any, Any], jax.Array]:
  r"""The loss of a batch of labelled examples.

  .. math::

    \frac{1}{B} \sum_b \Big(\log \sum_c e^{z_{bc}} - z_{b y_b}\Big)

  by a shifted log-sum-exp: finite for logits of any size.

  Args:
    model: A ``Model``.

  Returns:
    ``loss_fn(params, (inputs, labels)) -> scalar``.

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
    inputs, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(
      model.apply(params, inputs), labels
    ).mean()

  return loss_fn


def accuracy(model: Model) -> Callable[[Any, Any], jax.Array]:
  """The share of a batch that is classified correctly.

  A model whose logits are not finite classifies nothing correctly.

  Args:
    model: A ``Model``.

  Returns:
    ``accuracy_fn(params, (inputs, labels)) -> scalar`` in [0, 1].

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from gsgd_jax import models
    >>> model = models.Model(init=None, apply=lambda params, x: x)
    >>> batch = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1])
    >>> print(models.accuracy(model)(None, batch))
    0.5
  """

  def accuracy_fn(params, batch):
    inputs, labels = batch
    logits = model.apply(params, inputs)
    correct = jnp.argmax(logits, axis=-1) == labels
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return jnp.mean(correct & finite)

  return accuracy_fn
