"""Flax models that bring model state, auxiliary outputs and randomness.

Under delay it has to be said which model state (running averages, dropout
counters) a gradient is taken with, and whose changes to it count. The rule:

* a batch carries the model state that its worker read, as it carries a key;
* the new state of a call is taken once, where its gradient is taken;
* a replay evaluates the loss with the state that its batch carries, and what
  it would write to it is dropped.

So neither how often a batch is replayed nor where moves the model state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from gsgd_jax import _protocol, _ring


class StatefulBatch(NamedTuple):
  """A batch and the model state that its worker read."""

  batch: Any
  model_state: Any


class Adapted(NamedTuple):
  """A Flax model as pure functions of parameters and batches with state.

  Attributes:
    init: ``init(key) -> (params, model_state)``, two pytrees of arrays.
    loss_fn: ``loss_fn(params, stateful_batch) -> scalar``, for
      :func:`gsgd_jax.guided` and whatever else evaluates losses: changes of
      the model state and auxiliary outputs are dropped.
    value_and_grad: ``value_and_grad(params, stateful_batch) ->
      ((value, aux, new_model_state), grads)``, for the training step; ``aux``
      is ``None`` where the loss returns none.
    merge: ``merge(params, model_state)``: what the model is evaluated with, an
      NNX module or Linen's variables.
  """

  init: Callable[[jax.Array], tuple[Any, Any]]
  loss_fn: Callable[[Any, StatefulBatch], jax.Array]
  value_and_grad: Callable[[Any, StatefulBatch], tuple[Any, Any]]
  merge: Callable[[Any, Any], Any]


def from_nnx(
  make: Callable[[nnx.Rngs], nnx.Module],
  loss: Callable[[nnx.Module, Any], Any],
) -> Adapted:
  """A Flax NNX module with state of its own, for training under delay.

  Parameters are its ``nnx.Param`` s. All other variables are model state:
  batch statistics, and the keys and counters of ``nnx.Rngs`` inside, which a
  batch carries too: a replay draws the masks that its worker drew. What is
  sown (``nnx.Intermediate``) is dropped.

  A worker packs its batch with the state that it reads and keeps the one that
  its gradient returns::

    packed = models.StatefulBatch(batch, model_state)
    (value, aux, model_state), grads = adapted.value_and_grad(params, packed)
    updates, state = tx.update(grads, state, params, value=value, batch=packed)

  :func:`gsgd_jax.guided` keeps a window of batches, and so ``window`` copies of
  the model state; :func:`gsgd_jax.asynchronous` one for every worker.

  Args:
    make: ``make(rngs)``, the module, in training mode.
    loss: ``loss(module, batch) -> scalar`` or ``(scalar, aux)``; it may change
      variables of the module.

  Returns:
    An ``Adapted``. ``merge`` returns a module; ``.eval()`` it to evaluate.

  Examples:
    >>> import gsgd_jax, jax, jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> from gsgd_jax import models
    >>> make = lambda rngs: nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
    >>> loss = lambda module, x: jnp.mean((module(x) - 1) ** 2)
    >>> adapted = models.from_nnx(make, loss)
    >>> params, model_state = adapted.init(jax.random.key(0))
    >>> packed = models.StatefulBatch(jnp.ones([4, 3]), model_state)
    >>> tx = gsgd_jax.guided(optax.sgd(0.1), adapted.loss_fn,
    ...                      batch_like=packed)
    >>> state = tx.init(params)
    >>> (value, aux, model_state), grads = adapted.value_and_grad(
    ...   params, packed)
    >>> updates, state = tx.update(grads, state, params, value=value,
    ...                            batch=packed)
    >>> print(adapted.merge(params, model_state).mean[...])
    [0.5 0.5 0.5]
  """

  def split(module):
    structure, params, _, rest = nnx.split(
      module, nnx.Param, nnx.Intermediate, ...
    )
    return structure, params, rest

  abstract = nnx.eval_shape(lambda key: make(nnx.Rngs(key)), jax.random.key(0))
  structure, _, state_like = split(abstract)

  def init(key):
    _, params, model_state = split(make(nnx.Rngs(key)))
    return params, _raw(model_state)

  def merge(params, model_state):
    return nnx.merge(structure, params, _typed(model_state, state_like))

  def run(params, packed):
    module = merge(params, packed.model_state)
    value, aux = _value_and_aux(loss(module, packed.batch))
    return value, (aux, _raw(split(module)[2]))

  return _adapted(init, run, merge)


def from_linen(
  module: linen.Module,
  loss: Callable[[linen.Module, Any], Any],
  batch_like: Any,
  rngs: Callable[[Any], dict[str, jax.Array]] | None = None,
) -> Adapted:
  """A Flax Linen module with state of its own, for training under delay.

  As :func:`from_nnx`. Parameters are the collection ``'params'``; the other
  collections that ``init`` makes are model state, and all of them may change.
  What is sown into ``'intermediates'`` is dropped.

  Args:
    module: The module.
    loss: ``loss(bound_module, batch) -> scalar`` or ``(scalar, aux)``; it
      calls the module in training mode.
    batch_like: A batch, or its ``jax.ShapeDtypeStruct`` s: the module is
      initialised by the loss of a batch of zeros.
    rngs: ``rngs(batch) -> {'dropout': key}``: the keys of a batch, from what it
      carries; a replay draws with the same. ``None`` for a module that draws
      nothing.

  Returns:
    An ``Adapted``. ``merge`` returns variables, for ``module.apply``.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen
    >>> from gsgd_jax import models
    >>> norm = linen.BatchNorm(use_running_average=False, momentum=0.5)
    >>> loss = lambda module, x: jnp.mean((module(x) - 1) ** 2)
    >>> adapted = models.from_linen(norm, loss, jnp.ones([4, 3]))
    >>> params, model_state = adapted.init(jax.random.key(0))
    >>> packed = models.StatefulBatch(jnp.ones([4, 3]), model_state)
    >>> (value, aux, model_state), grads = adapted.value_and_grad(
    ...   params, packed)
    >>> print(model_state['batch_stats']['mean'])
    [0.5 0.5 0.5]
  """
  batch_like = _protocol.abstract(batch_like)

  def init(key):
    zeros = jax.tree.map(lambda x: x[0], _ring.empty(batch_like, 1))
    variables = dict(linen.init(loss, module)(key, zeros))
    return variables.pop('params', {}), variables

  def merge(params, model_state):
    return {'params': params, **model_state}

  def run(params, packed):
    batch, model_state = packed
    out, model_state = linen.apply(loss, module, mutable=list(model_state))(
      merge(params, model_state),
      batch,
      rngs=None if rngs is None else rngs(batch),
    )
    value, aux = _value_and_aux(out)
    return value, (aux, dict(model_state))

  return _adapted(init, run, merge)


def _adapted(init, run, merge):
  """From `run(params, packed) -> (value, (aux, new_model_state))`."""

  def value_and_grad(params, packed):
    (value, (aux, model_state)), grads = jax.value_and_grad(run, has_aux=True)(
      params, packed
    )
    return (value, aux, model_state), grads

  loss_fn = lambda params, packed: run(params, packed)[0]
  return Adapted(init, loss_fn, value_and_grad, merge)


def _value_and_aux(out):
  return out if isinstance(out, tuple) else (out, None)


def _is_key(x):
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _raw(tree):
  """Keys as integers, which can be stored and donated."""
  return jax.tree.map(
    lambda x: jax.random.key_data(x) if _is_key(x) else x, tree
  )


def _typed(tree, like):
  """The integers as keys again, where `like` has them."""

  def typed(x, like):
    if not _is_key(like):
      return x
    return jax.random.wrap_key_data(x, impl=like.dtype)

  return jax.tree.map(typed, tree, like)
