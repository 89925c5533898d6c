"""Asynchronous workers whose gradients are taken at once.

`asynchronous` takes one gradient a call. But nobody needs a gradient before its
worker arrives with it: so whoever reads parameters is *pending*, and the
gradients of all that are pending are taken together when the next to arrive is
one of them. Between two such moments lies a *round*: arrivals, of whom nobody
arrives twice. With round-robin arrivals rounds are of N workers, with others
shorter; each is as long as it can be, or as long as there is room.

The workers are spread over devices, worker w on device w mod D. A device keeps
the slots of its own workers and takes their gradients; when a worker arrives
its gradient is sent to all devices, and every device applies it to a copy of
the server. What the devices say to one another is `parallel`'s.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import custom_batching, lax

from gsgd_jax import _protocol, _ring, staleness


class Calls(NamedTuple):
  """What the calls of a chunk bring, by their number in it (traced)."""

  batch: Callable[[jax.Array], Any] | None  # The whole batch, if need be.
  share: Callable[[jax.Array], Any]  # This device's share of it.
  extras: Callable[[jax.Array], dict[str, Any]]  # Other extra arguments.


class Size(NamedTuple):
  """How much is done at once."""

  workers: int  # In a round, on a device.
  gradients: int  # By one `vmap`, at most.

  @property
  def widths(self) -> list[int]:
    """How many gradients are taken by one `vmap`, so that none is in vain."""
    widths = [self.gradients]
    while widths[-1] > 1:
      widths.append(widths[-1] // 2)
    return widths


class _Pending(NamedTuple):
  """Who has read and has no gradient yet, device by device."""

  number: jax.Array  # shape=(devices,), int32.
  worker: jax.Array  # shape=(devices, workers of a round), int32.
  call: jax.Array  # Likewise: whose batch is theirs.


class _Carry(NamedTuple):
  params: optax.Params
  state: staleness.AsynchronousState
  call: jax.Array  # shape=(), int32: calls that are done.
  pending: _Pending
  # What they read: a ring of places, and one for what nobody wants.
  reads: optax.Params
  values: jax.Array  # shape=(room,): losses by call, of this device's workers.


def advance(
  server: staleness.Server,
  devices: Any,
  loss_fn: Callable[[Any, Any], jax.Array],
  size: Size,
  params: optax.Params,
  state: staleness.AsynchronousState,
  calls: Calls,
  number: jax.Array,
  room: int,
) -> tuple[optax.Params, staleness.AsynchronousState, jax.Array]:
  """So many calls of `asynchronous`, round by round.

  Args:
    server: The settings; neither `alone` nor with `max_ahead`.
    devices: A `parallel.Devices`.
    loss_fn: The loss of a worker's batch.
    size: How much is done at once.
    params: The server's parameters, the same on every device.
    state: The state; the slots of its rings are this device's workers'.
    calls: What they bring.
    number: How many calls, at most `room`.
    room: Shape of the losses.

  Returns:
    Parameters, state, and losses by call, the same on every device.
  """
  none = jnp.zeros([devices.number, size.workers], jnp.int32)
  # What is read here has the dtypes of the parameters, whatever it announces.
  reads = devices.varying(_ring.stack(params, size.workers + 1))
  values = devices.varying(jnp.zeros([room], _protocol.score_dtype()))
  carry = _Carry(
    params,
    state,
    call=jnp.zeros([], jnp.int32),
    pending=_Pending(jnp.zeros([devices.number], jnp.int32), none, none),
    reads=reads,
    values=values,
  )
  carry = _reader_added(server, devices, size, calls, carry, number > 0)

  def arrives(carry):
    """Whether the next call's arrival needs no gradient that is not there."""
    worker, filled = staleness.next_arrival(server, carry.state)
    waits = filled & _is_pending(devices, size, carry.pending, worker)
    reader = jnp.where(filled, worker, carry.state.worker + 1)
    full = _ring.read(carry.pending.number, reader % devices.number)
    waits |= full >= size.workers
    return (carry.call < number) & ~_in_any_run(waits)

  def arrival(carry):
    state = carry.state
    updates, state = staleness.arrival(
      server,
      state,
      lambda worker: _arrived(devices, state, worker),
      carry.params,
      # Every packet has a value.
      dict(calls.extras(carry.call), value=0.0),
    )
    carry = carry._replace(
      params=optax.apply_updates(carry.params, updates),
      state=state,
      call=carry.call + 1,
    )
    more = carry.call < number
    return _reader_added(server, devices, size, calls, carry, more)

  def unfinished(carry):
    waiting = _in_any_run(jnp.any(carry.pending.number > 0))
    return (carry.call < number) | waiting

  def a_round(carry):
    carry = lax.while_loop(arrives, arrival, carry)
    return _gradients_taken(server, devices, loss_fn, size, calls, carry)

  carry = lax.while_loop(unfinished, a_round, carry)
  return carry.params, carry.state, devices.total(carry.values)


@custom_batching.custom_vmap
def _most_of_all_runs(number):
  """The largest of all runs under `vmap`, the same for all of them.

  So that they make their rounds together: a loop with a trip count for each
  would mask all that it carries.
  """
  return number


@_most_of_all_runs.def_vmap
def _(axis_size, in_batched, number):
  del axis_size
  return (jnp.max(number, axis=0) if in_batched[0] else number), False


def _in_any_run(condition):
  return _most_of_all_runs(condition.astype(jnp.int32)) > 0


def _is_pending(devices, size, pending, worker):
  device = worker % devices.number
  there = jnp.arange(size.workers, dtype=jnp.int32) < _ring.read(
    pending.number, device
  )
  return jnp.any(there & (_ring.read(pending.worker, device) == worker))


def _arrived(devices, state, worker):
  """A worker's packet, sent to all devices; of its batch each has a share."""
  slots = state.in_flight._replace(batch=None)
  slot = _ring.read(slots, worker // devices.number)
  packet = devices.sent_from(worker % devices.number, slot)
  return packet._replace(batch=_ring.read(state.in_flight.batch, worker))


def _reader_added(server, devices, size, calls, carry, active):
  """Whoever reads next is pending, if active; one by one, and it has room."""
  state, pending = carry.state, carry.pending
  worker = state.worker
  device = worker % devices.number
  place = _ring.read(pending.number, device)
  read = _protocol.worker_params(carry.params, state.inner_state)
  mine = active & (device == devices.this())
  reads = _ring.write(carry.reads, jnp.where(mine, place, size.workers), read)
  in_flight = state.in_flight
  if in_flight.batch is not None:

    def enters(batches):
      return _ring.write(batches, worker, calls.share(carry.call))

    batches = _ring.when(active, enters, in_flight.batch)
    in_flight = in_flight._replace(batch=batches)
  more = jnp.where(active, 1, 0)
  return carry._replace(
    state=state._replace(in_flight=in_flight),
    pending=_Pending(
      pending.number.at[device].add(more),
      # Beyond the number is what nobody reads.
      pending.worker.at[device, place].set(worker, mode='drop'),
      pending.call.at[device, place].set(carry.call, mode='drop'),
    ),
    reads=reads,
  )


def _gradients_taken(server, devices, loss_fn, size, calls, carry):
  """Every device takes its pending workers' gradients: nobody is pending."""
  pending = carry.pending
  number = _ring.read(pending.number, devices.this())
  workers = _ring.read(pending.worker, devices.this())
  call_of = _ring.read(pending.call, devices.this())

  def one(read, call, slot):
    batch = calls.batch(call)
    value, grads = jax.value_and_grad(loss_fn)(read, batch)
    value = jnp.asarray(value, _protocol.score_dtype())
    extras = dict(calls.extras(call), value=value, batch=batch)
    sent, slot = server.transform.update(grads, slot, read, **extras)
    return value, sent, slot

  def block(begin, width, k, carry):
    first = begin + k * width
    cut = lambda x: lax.dynamic_slice_in_dim(x, first, width)
    reads = jax.tree.map(cut, carry.reads)
    call, worker = cut(call_of), cut(workers)
    # A device may have fewer than others.
    there = first + jnp.arange(width, dtype=jnp.int32) < number
    state = carry.state
    slots = worker // devices.number
    slot = jax.tree.map(lambda x: x[slots], state.worker_state.state)
    value, sent, slot = jax.vmap(one)(reads, call, slot)
    # What is not there is written beyond the end, that is nowhere.
    at = jnp.where(there, slots, server.workers)

    def written(ring, new):
      return ring.at[at].set(new.astype(ring.dtype), mode='drop')

    in_flight = state.in_flight
    rings = in_flight._replace(batch=None)
    packet = in_flight._replace(
      updates=sent,
      value=value,
      batch=None,
      stale_params=reads if server.keep_params else None,
    )
    rings = jax.tree.map(written, rings, packet)
    worker_state = jax.tree.map(written, state.worker_state.state, slot)
    return carry._replace(
      state=state._replace(
        in_flight=rings._replace(batch=in_flight.batch),
        worker_state=_protocol.Unread(worker_state),
      ),
      values=carry.values.at[jnp.where(there, call, carry.values.size)].set(
        value, mode='drop'
      ),
    )

  most = _most_of_all_runs(jnp.max(pending.number))
  begin = jnp.zeros([], jnp.int32)
  for width in size.widths:
    blocks = (most - begin) // width
    take = functools.partial(block, begin, width)
    carry = lax.fori_loop(0, blocks, take, carry)
    begin += blocks * width
  return carry._replace(
    pending=pending._replace(number=jnp.zeros_like(pending.number))
  )
