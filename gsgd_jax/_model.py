"""What a model is, and how a Flax NNX network becomes one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Model(NamedTuple):
  """A model as pure functions.

  Attributes:
    init: ``init(key) -> params``, a pytree of arrays.
    apply: ``apply(params, inputs) -> logits`` for evaluation: nothing is drawn.
      Logits of shape ``(batch, classes)``, or ``(batch, length, vocabulary)``
      for text.
    train_apply: ``train_apply(params, inputs, keys) -> logits`` for training.
      ``keys`` is raw key data, one key for each example, uint32 of shape
      ``(batch, 2)`` (``jax.random.wrap_key_data(keys, impl='threefry2x32')``),
      so that what is drawn for an example does not depend on how a batch is
      split; or ``None``. Without ``train_apply`` training is as ``apply``.
    calibrate: ``calibrate(params, inputs) -> evaluated``: what ``apply`` takes
      in place of ``params``, for batch normalisation (see :func:`resnet20`).
      Without it ``apply`` takes the parameters themselves.
    stages: A tree like ``params`` of ints from 0: how deep a leaf's layer
      is, counted from the input. ``jax.tree.map(delay_of_stage, stages)`` are
      the delays of a pipeline, for :func:`gsgd_jax.delayed`. Or ``None``.
    needs_keys: Whether ``train_apply`` cannot do without keys.
  """

  init: Callable[[jax.Array], Any]
  apply: Callable[[Any, jax.Array], jax.Array]
  train_apply: Callable[[Any, jax.Array, Any], jax.Array] | None = None
  calibrate: Callable[[Any, jax.Array], Any] | None = None
  stages: Any = None
  needs_keys: bool = False


def functions_of(
  make: Callable[[nnx.Rngs], Any], dropout: float = 0.0
) -> Model:
  """`make(rngs)`, a network, as pure functions of its parameters."""
  network = nnx.eval_shape(lambda key: make(nnx.Rngs(key)), jax.random.key(0))
  structure, params, statistics = nnx.split(network, nnx.Param, nnx.BatchStat)
  network.eval()
  evaluating = nnx.graphdef(network)
  normalizes = bool(jax.tree.leaves(statistics))

  def trained(params, inputs, keys):
    unset = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), statistics)
    network = nnx.merge(structure, params, unset)
    return network, network(inputs, keys)

  def train_apply(params, inputs, keys):
    if dropout and keys is None:
      raise ValueError(
        f'a model with dropout={dropout} is trained with keys, got none; give '
        'batches (inputs, labels, keys), a key for each example'
      )
    return trained(params, inputs, keys)[1]

  def apply(params, inputs):
    if normalizes and len(jax.tree.leaves(params)) == leaves:
      raise ValueError(
        'a model with batch normalization is evaluated with statistics, got '
        'parameters alone; pass apply what calibrate(params, inputs) returns'
      )
    return nnx.merge(evaluating, params)(inputs)

  leaves = len(jax.tree.leaves(params))
  return Model(
    init=lambda key: nnx.state(make(nnx.Rngs(key)), nnx.Param),
    apply=apply,
    train_apply=train_apply if dropout or normalizes else None,
    calibrate=(
      (lambda params, inputs: nnx.state(trained(params, inputs, None)[0]))
      if normalizes
      else None
    ),
    stages=jax.tree_util.tree_map_with_path(_stage, params),
    needs_keys=dropout > 0,
  )


def _stage(path, _):
  """Layer i of a network is `layers[i]`."""
  return path[1].key
