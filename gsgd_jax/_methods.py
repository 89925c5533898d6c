"""How many devices train together: what runs under `shard_map`.

A method says what one device does, call by call, and what its part of the state
is. Its namesake on one device says what comes out. What the devices tell one
another goes through `parallel.Devices`: no mesh axis, no collective is named
here.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gsgd_jax import _mean, _protocol, _ring, _simultaneous, rounds, staleness

# Gradients of one `vmap`; see benchmarks.parallel.
_GRADIENTS_AT_ONCE = 8

# An optimizer, or what makes one from a loss function and a batch's shapes.
Inner = (
  optax.GradientTransformation
  | Callable[[Callable, Any], optax.GradientTransformation]
)


class Method(NamedTuple):
  """How devices train together: what runs under `shard_map`, and its state.

  Attributes:
    devices: The devices.
    init: The state, of whole batches and all workers, from parameters.
    local_init: The same as one device has it: where shapes differ it has its
      own part.
    advance: ``advance(params, state, calls, number, room)``: so many calls on a
      device. Returns parameters, state, and ``room`` losses, the same on all.
    room: Copies of the parameters that a device needs meanwhile.
    apart: Whether the losses are each device's own instead.
  """

  devices: Any  # A `parallel.Devices`.
  init: Callable[[optax.Params], Any]
  local_init: Callable[[optax.Params], Any]
  advance: Callable[..., tuple[optax.Params, Any, jax.Array]]
  room: int = 0
  apart: bool = False


class DelayedAllReduceState(NamedTuple):
  """State of :func:`delayed_all_reduce`.

  Of gradients and losses every device has its own, along the leading axis.

  Attributes:
    server: That of :func:`gsgd_jax.delayed`; in flight is what is older than
    latest: what the last step left, with a leading axis of 1 a device.
  """

  server: staleness.AsynchronousState
  latest: staleness.InFlight


def data_parallel(
  inner: Inner,
  loss_fn: Callable,
  devices: Any,
  batch_like: Any,
) -> Method:
  """The method of `data_parallel`."""
  whole, own = _whole_and_own(inner, loss_fn, devices, batch_like)
  mean_loss = _mean_loss(loss_fn, devices)

  def one(params, state, calls, call):
    share = calls.share(call)
    # The same everywhere are the parameters: their gradient is the whole one.
    value, grads = jax.value_and_grad(mean_loss)(
      _protocol.worker_params(params, state), share
    )
    updates, state = own.update(
      grads, state, params, value=value, batch=share, **calls.extras(call)
    )
    return optax.apply_updates(params, updates), state, value

  return Method(
    devices,
    whole.init,
    own.init,
    functools.partial(_one_by_one, one, lambda losses: losses),
  )


def _one_by_one(one, losses_typed, params, state, calls, number, room):
  """So many calls, each of which needs the one before."""
  if room == 1 and isinstance(number, int):  # No loop: see docs/networks.md.
    params, state, value = one(params, state, calls, jnp.zeros([], jnp.int32))
    return params, state, value[None].astype(_protocol.score_dtype())

  def body(call, carry):
    params, state, values = carry
    params, state, value = one(params, state, calls, call)
    return params, state, _ring.write(values, call, value)

  values = losses_typed(jnp.zeros([room], _protocol.score_dtype()))
  return lax.fori_loop(0, number, body, (params, state, values))


def synchronous(
  inner: Inner,
  loss_fn: Callable,
  devices: Any,
  batch_like: Any,
  workers: int,
  **options: Any,
) -> Method:
  """The method of `synchronous`."""
  make, own_loss, own_like = _making(inner, loss_fn, devices, batch_like)
  mean = options.get('combine') == 'mean' and workers > 1
  waited = options.get('wait_for') or workers
  _check_divides('a round waits for {} gradients', waited, devices)

  def settings(loss_fn, batch_like, gradients):
    inside = _joined(batch_like, gradients) if mean else batch_like
    return rounds.synchronous_rounds(
      make(loss_fn, inside), workers, batch_like=batch_like, **options
    )

  whole = settings(loss_fn, batch_like, waited)
  if mean:  # It is of whole batches, of which a device has its own.
    own = settings(own_loss, batch_like, waited // devices.number)
  else:
    own = settings(own_loss, own_like, waited)
  way = _Round(loss_fn, devices, own, waited // devices.number)
  return Method(
    devices,
    rounds.transformation(whole).init,
    way.local_init,
    way.advance,
    room=way.size,
  )


class _Round(NamedTuple):
  """Rounds of gradients, so many of each on a device."""

  loss_fn: Callable
  devices: Any
  settings: rounds.Rounds  # Those of the server.
  size: int

  def local_init(self, params):
    state: Any = rounds.transformation(self.settings).init(params)
    if not self.settings.collects:
      return state
    batches = jax.tree.map(lambda x: x[: self.size], state.sums.batch)
    return state._replace(sums=state.sums._replace(batch=batches))

  def advance(self, params, state, calls, number, room):
    number = jnp.asarray(number, jnp.int32)
    losses = jnp.zeros([room], _protocol.score_dtype())
    losses = self.devices.varying(losses)
    begin = jnp.zeros([], jnp.int32)
    _, params, state, losses = lax.while_loop(
      lambda carry: carry[0] < number,
      functools.partial(self._one_round, calls, number),
      (begin, params, state, losses),
    )
    return params, state, self.devices.total(losses)

  def _one_round(self, calls, number, carry):
    """A round, or as much of it as these calls are."""
    call, params, state, losses = carry
    first = state.count
    more = jnp.minimum(self.settings.wait_for - first, number - call)
    # This device's places in the round, and their calls, if it is their turn.
    places = self.devices.this() * self.size
    places += jnp.arange(self.size, dtype=jnp.int32)
    there = (first <= places) & (places < first + more)
    own = jnp.where(there, call + places - first, 0)
    read = _protocol.worker_params(params, state)
    gradient = jax.value_and_grad(self.loss_fn)
    values, grads = jax.vmap(
      lambda call: gradient(self.devices.varying(read), calls.batch(call))
    )(own)
    values = values.astype(losses.dtype)
    at = jnp.where(there, own, losses.size)
    losses = losses.at[at].set(values, mode='drop')
    if self.settings.collects:
      batches = None
      if state.sums.batch is not None:
        batches = jax.vmap(calls.batch)(own)
      last = calls.extras(call + more - 1)
      packets = _mean.Sums(grads, values, batches)
      params, state = self._collected(packets, there, more, last, params, state)
    else:
      params, state = self._in_turn(
        (grads, values), call, more, calls, params, state
      )
    return call + more, params, state, losses

  def _in_turn(self, packets, call, more, calls, params, state):
    """Applies the gradients one after another."""
    tx, first = rounds.transformation(self.settings), state.count

    def apply(i, carry):
      params, state = carry
      place = first + i
      mine = _ring.read(packets, place % self.size)
      grads, value = self.devices.sent_from(place // self.size, mine)
      extras = calls.extras(call + i)
      updates, state = tx.update(
        grads, state, params, value=value, batch=calls.share(call + i), **extras
      )
      return optax.apply_updates(params, updates), state

    return lax.fori_loop(0, more, apply, (params, state))

  def _collected(self, packets, there, more, extras, params, state):
    """Collects the gradients, and applies their mean if they are the last."""
    of_those = lambda x: there.reshape(-1, *[1] * (x.ndim - 1))

    def plus(total, x):
      x = jnp.where(of_those(x), x, jnp.zeros_like(x)).astype(total.dtype)
      total = jnp.where(state.count == 0, jnp.zeros_like(total), total)
      return total + self.devices.total(jnp.sum(x, axis=0))

    enter = lambda old, new: jnp.where(of_those(new), new, old)
    sums = state.sums
    sums = _mean.Sums(
      updates=jax.tree.map(plus, sums.updates, packets.updates),
      value=plus(sums.value, packets.value),
      batch=jax.tree.map(enter, sums.batch, packets.batch),
    )
    updates, state = rounds.collected(
      self.settings,
      state,
      sums,
      more,
      params,
      params,
      dict(extras, value=sums.value),
    )
    return optax.apply_updates(params, updates), state


def asynchronous(
  inner: Inner,
  loss_fn: Callable,
  devices: Any,
  batch_like: Any,
  workers: int,
  *,
  round_size: int | None = None,
  gradients_at_once: int | None = None,
  **options: Any,
) -> Method:
  """The method of `asynchronous`."""
  make, own_loss, own_like = _making(inner, loss_fn, devices, batch_like)
  whole = staleness.asynchronous_server(
    make(loss_fn, batch_like), workers, batch_like=batch_like, **options
  )
  own = staleness.asynchronous_server(
    make(own_loss, own_like), workers, batch_like=own_like, **options
  )
  if whole.alone:
    return data_parallel(
      lambda loss_fn, like: staleness.asynchronous(
        make(loss_fn, like), workers, batch_like=like, **options
      ),
      loss_fn,
      devices,
      batch_like,
    )
  _check_divides('there are {} workers', whole.workers, devices)
  per_device = whole.workers // devices.number
  size = _size(per_device, devices, round_size, gradients_at_once)

  def local_init(params):
    state = staleness.begin(own, params)
    assert state.in_flight is not None  # There are several workers.
    cut = lambda tree: jax.tree.map(lambda x: x[:per_device], tree)
    slots = cut(state.in_flight._replace(batch=None))
    return state._replace(
      in_flight=slots._replace(batch=state.in_flight.batch),
      worker_state=_protocol.Unread(cut(state.worker_state.state)),
    )

  def advance(params, state, calls, number, room):
    return _simultaneous.advance(
      own,
      devices,
      loss_fn,
      size,
      params,
      state,
      calls,
      jnp.asarray(number, jnp.int32),
      room,
    )

  return Method(
    devices,
    functools.partial(staleness.begin, whole),
    local_init,
    advance,
    room=size.workers + 1 + size.gradients,
  )


def _size(per_device, devices, round_size, gradients_at_once):
  workers = per_device
  if round_size is not None:
    round_size = _protocol.positive_int('round_size', round_size)
    workers = min(workers, max(1, round_size // devices.number))
  gradients = min(workers, _GRADIENTS_AT_ONCE)
  if gradients_at_once is not None:
    gradients = _protocol.positive_int('gradients_at_once', gradients_at_once)
  return _simultaneous.Size(workers, min(workers, gradients))


def delayed_all_reduce(
  inner: Inner,
  loss_fn: Callable,
  devices: Any,
  batch_like: Any,
  delay: int,
  **options: Any,
) -> Method:
  """The method of `delayed_all_reduce`."""
  make, own_loss, own_like = _making(inner, loss_fn, devices, batch_like)
  own = staleness.delayed_server(
    make(own_loss, own_like), delay, batch_like=own_like, **options
  )
  if own.alone:
    return data_parallel(
      lambda loss_fn, like: staleness.delayed(
        make(loss_fn, like), delay, batch_like=like, **options
      ),
      loss_fn,
      devices,
      batch_like,
    )
  whole = staleness.delayed_server(
    make(loss_fn, batch_like), delay, batch_like=batch_like, **options
  )

  def begin(server, params, copies):
    state = staleness.begin(server, params)
    assert state.in_flight is not None  # There is a delay.
    own_ones = lambda x: jnp.concatenate([x] * copies)
    latest = jax.tree.map(lambda x: x[0], state.in_flight)
    latest = latest._replace(
      updates=jax.tree.map(lambda x: own_ones(x[None]), latest.updates),
      value=own_ones(latest.value[None]),
    )
    rings = state.in_flight._replace(
      updates=jax.tree.map(own_ones, state.in_flight.updates),
      value=own_ones(state.in_flight.value),
    )
    return DelayedAllReduceState(state._replace(in_flight=rings), latest)

  def one(params, state, calls, call):
    server, latest = state
    latest = latest._replace(
      updates=jax.tree.map(lambda x: x[0], latest.updates),
      value=latest.value[0],
    )
    # What the step before left enters the rings, what arrives leaves them: all
    # of it is there when the step begins, and so is the sum over the devices.
    before = (server.worker - 1) % own.workers
    rings = _ring.write(server.in_flight, before, latest)

    def arrived_of(worker):
      arrived = _ring.read(rings, worker)
      return arrived._replace(
        updates=devices.mean(arrived.updates), value=devices.mean(arrived.value)
      )

    share, extras = calls.share(call), calls.extras(call)
    read = _protocol.worker_params(params, server.inner_state)
    value, grads = jax.value_and_grad(loss_fn)(devices.varying(read), share)
    updates, server = staleness.arrival(
      own, server, arrived_of, params, dict(extras, value=value)
    )
    latest = latest._replace(
      updates=jax.tree.map(lambda x: x[None], grads),
      value=value[None].astype(_protocol.score_dtype()),
      batch=None if latest.batch is None else share,
      stale_params=None if latest.stale_params is None else read,
    )
    state = DelayedAllReduceState(server._replace(in_flight=rings), latest)
    return optax.apply_updates(params, updates), state, value

  return Method(
    devices,
    lambda params: begin(whole, params, devices.number),
    lambda params: begin(own, params, 1),
    functools.partial(_one_by_one, one, devices.varying),
    apart=True,
  )


def as_on_one(kind: str, state: Any, devices: int) -> Any:
  """The state that one device would have, from that of so many.

  Args:
    kind: 'data_parallel', 'synchronous', 'asynchronous' or 'delayed'.
    state: A state of `kind`, whole.
    devices: How many devices it was of.
  """
  if devices == 1:
    return state
  if kind == 'asynchronous':
    workers = len(state.in_flight.value)
    worker = jnp.arange(workers, dtype=jnp.int32)
    row = worker % devices * (workers // devices) + worker // devices
    return _with_rows(state, row)
  if not isinstance(state, DelayedAllReduceState):
    return state
  server, latest = state
  assert server.in_flight is not None  # There is a delay.
  mean = lambda x: x.reshape(devices, -1, *x.shape[1:]).mean(axis=0)
  rings = server.in_flight._replace(
    updates=jax.tree.map(mean, server.in_flight.updates),
    value=mean(server.in_flight.value),
  )
  latest = latest._replace(
    updates=jax.tree.map(lambda x: x.mean(axis=0), latest.updates),
    value=latest.value.mean(axis=0),
  )
  before = (server.worker - 1) % len(rings.value)
  return server._replace(in_flight=_ring.write(rings, before, latest))


def as_on(kind: str, state: Any, devices: int) -> Any:
  """The inverse: the state of so many devices, from that of one.

  Of a delayed mean all devices have the mean, which has that mean.
  """
  if devices == 1:
    return state
  if kind == 'asynchronous':
    workers = len(state.in_flight.value)
    row = jnp.arange(workers, dtype=jnp.int32)
    each = workers // devices
    return _with_rows(state, row % each * devices + row // each)
  if kind != 'delayed' or state.in_flight is None:  # Without a delay.
    return state
  rings = state.in_flight
  latest = _ring.read(rings, (state.worker - 1) % len(rings.value))
  copies = lambda x: jnp.concatenate([x] * devices)
  own = lambda packet: packet._replace(
    updates=jax.tree.map(copies, packet.updates), value=copies(packet.value)
  )
  latest = latest._replace(
    updates=jax.tree.map(lambda x: x[None], latest.updates),
    value=latest.value[None],
  )
  return DelayedAllReduceState(
    state._replace(in_flight=own(rings)), own(latest)
  )


def _with_rows(state, rows):
  """An asynchronous state with other slots at the places of workers."""
  moved = lambda tree: jax.tree.map(lambda x: x[rows], tree)
  slots = moved(state.in_flight._replace(batch=None))
  return state._replace(
    in_flight=slots._replace(batch=state.in_flight.batch),
    worker_state=_protocol.Unread(moved(state.worker_state.state)),
  )


def _making(inner, loss_fn, devices, batch_like):
  """A function that makes the server's side; a device's loss and share."""
  make = inner
  if isinstance(inner, optax.GradientTransformation):
    plain = _without_batch(inner)
    make = lambda loss_fn, batch_like: plain
  like = None
  if batch_like is not None:
    like = share_like(_protocol.abstract(batch_like), devices)
  return make, _mean_loss(loss_fn, devices), like


def _without_batch(inner):
  """An optimizer that was given as it is, and has a loss of whole batches."""
  inner = optax.with_extra_args_support(inner)

  def update_fn(updates, state, params=None, *, batch=None, **extra_args):
    del batch  # A share.
    try:
      return inner.update(updates, state, params, **extra_args)
    except ValueError as e:
      if '`batch`' not in str(e):
        raise
      raise ValueError(
        'what keeps batches, or has a loss of its own, is to be given as a '
        'function inner(loss_fn, batch_like) that makes it: on several devices '
        'a batch is a share, and the loss a mean over the devices'
      ) from e

  return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _whole_and_own(inner, loss_fn, devices, batch_like):
  make, own_loss, own_like = _making(inner, loss_fn, devices, batch_like)
  return tuple(
    optax.with_extra_args_support(tx)
    for tx in (make(loss_fn, batch_like), make(own_loss, own_like))
  )


def _mean_loss(loss_fn, devices):
  """The loss of a batch of which every device has a share.

  Its gradient with respect to what is the same everywhere is the whole batch's.
  """
  return lambda params, share: devices.mean(loss_fn(params, share))


def share_like(batch_like: Any, devices: Any) -> Any:
  """Shapes of a device's share of a batch."""
  size = _examples(batch_like)
  if size is not None:
    _check_divides('a batch has {} examples', size, devices)

  def cut(x):
    shape = x.shape
    if is_split(x):
      shape = (shape[0] // devices.number, *shape[1:])
    return jax.ShapeDtypeStruct(shape, x.dtype)

  return jax.tree.map(cut, batch_like)


def _examples(batch_like):
  """How many examples a batch has; None if it has no such leaf."""
  sizes = {x.shape[0] for x in jax.tree.leaves(batch_like) if is_split(x)}
  if len(sizes) > 1:
    raise ValueError(
      'every array of a batch must have a leading axis of examples (scalars '
      'and typed PRNG keys, of jax.random.key, aside), got leading axes of '
      f'{sorted(sizes)}'
    )
  return next(iter(sizes), None)


def _joined(batch_like, batches):
  """Shapes of so many batches as one."""
  if batch_like is None:
    return None

  def join(x):
    shape = x.shape
    if is_split(x):
      shape = (batches * shape[0], *shape[1:])
    elif not x.ndim and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      shape = (batches,)
    return jax.ShapeDtypeStruct(shape, x.dtype)

  return jax.tree.map(join, _protocol.abstract(batch_like))


def _check_divides(what, number, devices):
  """Raises where a number is no multiple of the devices."""
  if number % devices.number:
    raise ValueError(
      f'{what.format(number)}, which {devices.number} devices cannot share '
      f'equally: {nearest_multiple(number, devices.number)} would do'
    )


def nearest_multiple(number: int, of: int) -> int:
  """The positive multiple nearest to a number; of two the larger."""
  below = number // of * of
  return below if below and number - below < below + of - number else below + of


def is_split(x: Any) -> bool:
  """Whether a batch's leaf has examples, unlike scalars and PRNG keys."""
  return bool(x.ndim) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
