"""What the transformations say to one another.

A *packet* is a gradient and what is known about it. The gradient travels as
`updates`, the rest as extra arguments, each with one meaning everywhere:

| extra          | meaning                                                   |
|----------------|-----------------------------------------------------------|
| `value`        | loss of the batch where its gradient was taken, a scalar  |
| `batch`        | the batch itself, any pytree of arrays                    |
| `staleness`    | updates applied since the worker read (int32 scalar)      |
| `worker`       | whose gradient it is (int32 scalar)                       |
| `stale_params` | the parameters that the worker read                       |
| `verification` | a batch on which the average error is measured            |

A transformation that changes where a worker *reads* says so in its state, by
`ReadOffset` or `ReadPoint`; `worker_params` finds them. State that no worker
reads through (a second optimizer's, a worker's own) is wrapped in `Unread`.
"""

import contextlib
import functools
import math
import operator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax


class ReadOffset(NamedTuple):
  """A worker reads `params + scale * tree`."""

  scale: jax.Array  # shape=(), the dtype of a learning rate.
  tree: optax.Params  # Like the parameters.


class ReadPoint(NamedTuple):
  """While `active`, a worker reads `params` itself, offsets included."""

  active: jax.Array  # shape=(), dtype=bool.
  params: optax.Params


class Clock(NamedTuple):
  """The workers' clock, and what costs time on it beside their tasks."""

  time: Any  # A `clock.Time`: when the last gradient arrived.
  workers: jax.Array  # shape=(), dtype=int32.
  unit: Any  # A `clock.Time`: of one worker's gradient of a packet's batch.
  sync_cost: Any  # A `clock.Time`.


class Applied(NamedTuple):
  """Whose gradients were applied."""

  by_worker: jax.Array  # shape=(workers,), dtype=int32: how many of each.


class Replays(NamedTuple):
  """Replays that cost time on the clock; int32, shape=() or as said."""

  serial: jax.Array  # Replays that the server took itself.
  # shape=(replays,): windows whose i + 1 replays were taken at once.
  parallel: jax.Array
  shared: jax.Array  # Replays that all workers took together.
  batch_size: jax.Array  # Examples in a batch.
  batches: jax.Array  # How many workers' batches a replay is of.


class Acceptance(NamedTuple):
  """State of a transformation that may refuse gradients."""

  applied: jax.Array  # shape=(), dtype=int32: updates of what is inside so far.
  refused: jax.Array  # shape=(), dtype=int32: gradients so far.
  kept: Any  # Gradients that wait to be applied together; None for none.
  inner_state: optax.OptState


class PerWorker(NamedTuple):
  """State of each worker at the server: leaves with an axis of workers."""

  tree: Any


class ServerGradients(NamedTuple):
  """Gradients that the server takes itself, replays aside; int32, shape=()."""

  count: jax.Array
  batches: jax.Array  # How many workers' batches each is of.


Tree = TypeVar('Tree')
# States may hold None, which `optax.OptState` does not know.
State = Any

PACKET = ('value', 'batch', 'staleness', 'worker', 'stale_params')


class Unread(NamedTuple):
  """State in which `worker_params` does not look."""

  state: Any


def worker_params(params: Tree, state: optax.OptState) -> Tree:
  r"""The parameters at which a worker takes its next gradient.

  .. math::

    w^{read}_t = w_t + \sum_i c_i d_i

  over the offsets :math:`c_i d_i` that the transformations in ``state``
  announce (:math:`c_i` a scalar, :math:`d_i` shaped like the parameters);
  within a round of :func:`synchronous`, the parameters that its workers read
  when the round began. Where ``state`` announces nothing, ``params`` itself.

  Args:
    params: The server's parameters, any pytree of arrays.
    state: The state of any transformation or chain around any of this
      package's transformations.

  Returns:
    A pytree like ``params``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> tx = gsgd_jax.synchronous(optax.sgd(0.5), workers=2)
    >>> params = jnp.array([1.0])
    >>> state = tx.init(params)
    >>> updates, state = tx.update(jnp.array([1.0]), state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> print(params, gsgd_jax.worker_params(params, state))
    [0.5] [1.]
  """
  read = params
  for offset in announced(state, ReadOffset):
    read = _where_announced(
      functools.partial(_offset_by, offset.scale), read, offset.tree
    )
  # The outermost point wins, so it comes last.
  for point in reversed(announced(state, ReadPoint)):
    read = _where_announced(
      lambda p, q, active=point.active: jnp.where(active, q, p),
      read,
      point.params,
    )
  return read


def _offset_by(scale, params, offset):
  dtype = wide(params.dtype)
  read = params.astype(dtype) + scale.astype(dtype) * offset.astype(dtype)
  return read.astype(params.dtype)


def wide(dtype: Any) -> Any:
  """The dtype of sums: at least float32."""
  return jnp.float32 if dtype.itemsize < 4 else dtype


def announced(state: optax.OptState, kind: type) -> list[Any]:
  """What a state announces of a kind, from the outermost to the innermost."""
  leaf = lambda x: isinstance(x, (kind, Unread))
  found = jax.tree.leaves(state, is_leaf=leaf)
  return [x for x in found if isinstance(x, kind)]


def _where_announced(fn, params, announced):
  """`fn(params, announced)`, and `params` alone where a mask hides leaves."""
  masked = lambda x: isinstance(x, optax.MaskedNode)
  return jax.tree.map(
    lambda a, p: p if masked(a) else fn(p, a), announced, params, is_leaf=masked
  )


def accepted(
  before: optax.OptState, after: optax.OptState
) -> tuple[jax.Array | int, jax.Array | int]:
  """What became of a gradient that was handed to an inner transformation.

  Args:
    before: The inner transformation's state before it,
    after: and after it.

  Returns:
    Updates that were applied (0 or 1), and gradients refused (0 or 1).
  """
  pairs = list(
    zip(
      announced(before, Acceptance), announced(after, Acceptance), strict=True
    )
  )
  if not pairs:
    return 1, 0
  applied = [new.applied - old.applied for old, new in pairs]
  refused = [new.refused - old.refused for old, new in pairs]
  # Where several stand side by side, each for some of the parameters.
  return (
    functools.reduce(jnp.maximum, applied),
    functools.reduce(jnp.minimum, refused),
  )


def of_joined_batches(state: optax.OptState, batches: int) -> optax.OptState:
  """A state whose gradients are of so many workers' batches as one."""
  kinds = (Replays, ServerGradients)

  def joined(x):
    return (
      x._replace(batches=x.batches * batches) if isinstance(x, kinds) else x
    )

  return jax.tree.map(joined, state, is_leaf=lambda x: isinstance(x, kinds))


def check_per_worker(
  who: str, workers: int, inner_state: optax.OptState
) -> None:
  """Raises where a server keeps the state of fewer workers than there are."""
  for kept in announced(inner_state, PerWorker):
    for leaf in jax.tree.leaves(kept.tree):
      if leaf.shape[0] < workers:
        raise ValueError(
          f'{who} has {workers} workers, but a transformation inside keeps the '
          f'momenta of {leaf.shape[0]}: give it workers={workers}'
        )


def positive_int(name: str, given: Any, minimum: int = 1) -> int:
  """Checks a number that decides shapes: a Python integer of a least size."""
  if isinstance(given, jax.core.Tracer):
    raise ValueError(
      f'{name} decides the shapes of the state and must be a Python int, got '
      f'a traced array; with optax.inject_hyperparams name it in static_args'
    )
  try:
    if isinstance(given, bool):
      raise TypeError
    result = operator.index(given)
  except TypeError:
    raise ValueError(f'{name} must be an int, got {given!r}') from None
  if result < minimum:
    raise ValueError(f'{name} must be at least {minimum}, got {result}')
  if result >= 2**31:
    raise ValueError(f'{name} must be below 2**31, got {result}')
  return result


def in_a_line(value: Any) -> str:
  """A value in an error's single line, not too long."""
  shown = ' '.join(repr(value).split())
  return shown if len(shown) <= 60 else shown[:57] + '...'


def real(name: str, given: Any) -> float:
  """Checks a number that is known in Python: finite, and not negative."""
  try:
    if isinstance(given, (bool, str, jax.core.Tracer)):
      raise TypeError
    result = float(given)
  except TypeError:
    raise ValueError(f'{name} must be a number, got {given!r}') from None
  if not 0 <= result < math.inf:
    raise ValueError(f'{name} must be finite and at least 0, got {given!r}')
  return result


def real_or_traced(name: str, given: Any) -> Any:
  """The same, but lets an injected hyperparameter through."""
  return given if isinstance(given, jax.core.Tracer) else real(name, given)


def count_or_traced(name: str, given: Any, minimum: int = 1) -> Any:
  """Checks a whole number that decides no shapes, or lets a traced one be."""
  if isinstance(given, jax.core.Tracer):
    return given
  if isinstance(given, jax.Array):  # An injected one, outside of jit.
    given = given.item()
  whole = isinstance(given, float) and given.is_integer()
  return positive_int(name, int(given) if whole else given, minimum)


def one_more(count: jax.Array) -> jax.Array:
  """A count of calls, an int32 that stays at its largest."""
  return jnp.asarray(optax.safe_increment(count))


def broadcast(name: str, prefix: Any, tree: Any) -> Any:
  """A value for each leaf, from a tree of the same structure or a prefix."""
  try:
    return jax.tree.broadcast(prefix, tree)
  except ValueError as e:
    raise ValueError(
      f'{name} must have the structure of the parameters or a prefix of it, '
      f'got {jax.tree.structure(prefix)} for {jax.tree.structure(tree)}'
    ) from e


def fraction(name: str, given: Any) -> Any:
  """Checks a decay rate: at least 0 and below 1, or traced."""
  given = real_or_traced(name, given)
  if not isinstance(given, jax.core.Tracer) and given >= 1:
    raise ValueError(f'{name} must be at least 0 and below 1, got {given!r}')
  return given


def one_of(
  name: str, given: Any, allowed: tuple[str, ...], *others: str
) -> str:
  """Checks a choice by name; `others` are words for what else there is."""
  if given not in allowed:
    listed = ', '.join([*map(repr, allowed), *others])
    raise ValueError(f'{name} must be one of {listed}, got {given!r}')
  return given


def missing(who: str, extra: str, remedy: str) -> ValueError:
  """The error for a required extra argument that nobody supplied."""
  return ValueError(
    f'{who} needs the extra argument `{extra}`, but was given none: {remedy}'
  )


def required_params(who: str, params: optax.Params | None) -> None:
  """Raises where the parameters are needed and missing."""
  if params is None:
    raise ValueError(
      f'{who} needs the parameters, but was given none: call '
      'update(grads, state, params, ...)'
    )


def other_extras(
  extra_args: dict[str, Any], gradient: optax.Updates
) -> dict[str, Any]:
  """The extras that do not belong to the packet they came with.

  optax's own `grad` does: where it is given it becomes this packet's gradient.
  """
  others = {k: v for k, v in extra_args.items() if k not in PACKET}
  return others | ({'grad': gradient} if 'grad' in others else {})


def one_staleness(who: str, extra_args: dict[str, Any]) -> jax.Array:
  """The extra `staleness`, an int32 scalar."""
  staleness = extra_args.get('staleness')
  if staleness is None:
    raise missing(
      who,
      'staleness',
      'put it inside asynchronous, delayed or synchronous, or pass '
      'staleness=... to update',
    )
  if jax.tree.structure(staleness) != jax.tree.structure(0):
    raise ValueError(
      f'{who} needs one staleness, got a tree of them: delayed with a tree of '
      'delays has one a leaf'
    )
  return jnp.asarray(staleness, jnp.int32)


def scalar_value(who: str, extra_args: dict[str, Any]) -> jax.Array | None:
  """The extra `value` in the dtype of scores, or None where it is absent."""
  value = extra_args.get('value')
  if value is None:
    return None
  given, got = None, repr(value)
  with contextlib.suppress(TypeError, ValueError):
    array = jnp.asarray(value)
    got = f'shape {array.shape} and dtype {array.dtype}'
    if any(
      jnp.issubdtype(array.dtype, kind) for kind in (jnp.integer, jnp.floating)
    ):
      given = array
  if given is None or given.shape != ():
    raise ValueError(
      f'{who} needs `value` to be a real scalar (the loss of the batch), got '
      f'{got}; pass value=loss to update'
    )
  return given.astype(score_dtype())


def score_dtype() -> np.dtype:
  """float32, or float64 where x64 is on."""
  return jnp.zeros(()).dtype


def abstract(tree: Any) -> Any:
  """Shapes and dtypes of a tree of arrays, as JAX will hold them."""
  try:
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(jnp.shape(x), _dtype_in_jax(x)), tree
    )
  except TypeError as e:
    raise ValueError(f'a batch must be a pytree of arrays, got {tree!r}') from e


def _dtype_in_jax(x):
  dtype = jnp.result_type(x)
  if jnp.issubdtype(dtype, jax.dtypes.extended):  # PRNG keys.
    return dtype
  return jax.dtypes.canonicalize_dtype(dtype)


def checked_batch(who: str, extra_args: dict[str, Any], batch_like: Any) -> Any:
  """The extra `batch`, which must look like `batch_like`."""
  batch = extra_args.get('batch')
  if batch is None:
    raise missing(
      who,
      'batch',
      'pass batch=... to update, and batch_like=... to every transformation '
      'around this one that delays gradients',
    )
  check_like(who, batch, batch_like)
  return jax.tree.map(jnp.asarray, batch)


def check_like(who: str, batch: Any, batch_like: Any) -> None:
  """Raises unless a batch has the structure, shapes and dtypes of another."""
  given, wanted = abstract(batch), abstract(batch_like)
  if jax.tree.structure(given) != jax.tree.structure(wanted):
    raise ValueError(
      f'{who} was given batch_like with structure '
      f'{jax.tree.structure(wanted)}, but a `batch` with structure '
      f'{jax.tree.structure(given)}; pass batches like batch_like'
    )
  paths = jax.tree_util.tree_leaves_with_path(given)
  for (path, g), w in zip(paths, jax.tree.leaves(wanted), strict=True):
    if (g.shape, g.dtype) != (w.shape, w.dtype):
      raise ValueError(
        f'{who} was given batch_like{jax.tree_util.keystr(path)} of shape '
        f'{w.shape} and dtype {w.dtype}, but a `batch` whose leaf has shape '
        f'{g.shape} and dtype {g.dtype}; pass batches like batch_like'
      )
