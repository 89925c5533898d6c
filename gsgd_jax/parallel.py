"""Training on many devices, and on many hosts: everything under `shard_map`.

Four ways to use D devices, each with the trajectory of its namesake on one:

* `data_parallel`: every batch is split over the devices;
* `synchronous`: every device takes gradients of batches of its own, at shared
  parameters;
* `asynchronous`: emulated workers, spread over the devices;
* `delayed_all_reduce`: data-parallel, but the devices' mean gradient is applied
  a step or more later, so that communication need not be waited for.

Every device has a copy of the server (parameters, optimizer, clock) and makes
the same updates. Of every batch that the server keeps a device has a share, and
the server's own gradients (replays of `guided`, products of
`exact_delay_compensation`) are taken by all devices together.

No other file names a mesh axis or a collective.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import (
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
  SingleDeviceSharding,
)

from gsgd_jax import _methods, _protocol, _ring, memory
from gsgd_jax._methods import DelayedAllReduceState
from gsgd_jax._simultaneous import Calls
from gsgd_jax.arrivals import ArrivalProcess, round_robin

__all__ = [
  'DelayedAllReduceState',
  'Program',
  'asynchronous',
  'data_parallel',
  'delayed_all_reduce',
  'make_mesh',
  'synchronous',
]

EVERYWHERE = PartitionSpec()


class Devices(NamedTuple):
  """What devices say to one another, within `shard_map`.

  One device alone has nobody to talk to, and no `shard_map` around it.

  Attributes:
    axis: The mesh axis.
    number: How many devices.
  """

  axis: str
  number: int

  def this(self) -> jax.Array:
    """Which device this is."""
    if self.number == 1:
      return jnp.zeros([], jnp.int32)
    return lax.axis_index(self.axis)

  def varying(self, tree: Any) -> Any:
    """What is the same everywhere, typed as what each device has its own of.

    Gradients with respect to them are the device's own: those with respect to
    what is the same everywhere are sums over all devices.
    """
    if self.number == 1:
      return tree
    return lax.pcast(tree, self.axis, to='varying')

  def mean(self, tree: Any) -> Any:
    """Means over the devices."""
    return tree if self.number == 1 else lax.pmean(tree, self.axis)

  def total(self, tree: Any) -> Any:
    """Sums over the devices."""
    return tree if self.number == 1 else lax.psum(tree, self.axis)

  def sent_from(self, device: jax.Array, tree: Any) -> Any:
    """One device's values, on all."""
    if self.number == 1:
      return tree
    mine = self.this() == device
    return self.total(
      jax.tree.map(lambda x: jnp.where(mine, x, jnp.zeros_like(x)), tree)
    )

  def share(self, batch: Any) -> Any:
    """This device's examples of a batch that all have."""

    def cut(x):
      if not _methods.is_split(x):
        return x
      size = x.shape[0] // self.number
      return lax.dynamic_slice_in_dim(x, self.this() * size, size)

    return jax.tree.map(cut, batch)

  def spread(self, batches: Any) -> Any:
    """Shares of the batches of all devices, from whole batches of each."""
    if self.number == 1:
      return batches

    def gathered(x):
      """What is not shared: typed as the same everywhere."""
      there = jnp.zeros((self.number, *x.shape), x.dtype)
      there = _ring.write(self.varying(there), self.this(), x)
      return self.total(there).reshape(-1, *x.shape[1:])

    def one(x):
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = gathered(jax.random.key_data(x))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
      if x.ndim == 1:
        return gathered(x)
      return lax.all_to_all(x, self.axis, 1, 0, tiled=True)

    return jax.tree.map(one, batches)

  def least(self, tree: Any) -> Any:
    """The least of what each device has."""
    return tree if self.number == 1 else lax.pmin(tree, self.axis)

  def by_the_first(self, fn: Callable, *args: Any) -> Any:
    """`fn(*args)`, of arguments that are the same everywhere.

    One device alone computes it: all have the same, to the last bit.
    """
    if self.number == 1:
      return fn(*args)
    nothing = lambda: jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, *args)
    )
    mine = lambda: fn(*args)
    return self.total(
      lax.cond(
        self.this() == 0,
        lambda: self.varying(mine()),
        lambda: self.varying(nothing()),
      )
    )


class Program(NamedTuple):
  """A training program for all devices of a mesh.

  Attributes:
    init: ``init(params) -> (params, state)``: a copy of the parameters and the
      state, both on the devices. The state is that of the namesake on one
      device, but for the order of the workers' slots: go on with it on as many
      devices.
    step: ``step(params, state, batch, **extra_args) -> (params, state, loss)``;
      see who made it. To be called under ``jax.jit``, with parameters and state
      donated. Extra arguments are arrays; ``value`` and ``batch`` are the
      program's own.
    batch_sharding: ``batch_sharding(batch)``: where each of its arrays is
      expected, as ``jax.sharding.NamedSharding`` s. What is elsewhere is
      moved; on several hosts use ``jax.make_array_from_process_local_data``.
    memory: ``memory(params) -> dict``: bytes on each device, by name, as
      :func:`gsgd_jax.state_memory` has them; ``round`` are the copies of the
      parameters that a step needs beside the state.
  """

  init: Callable[[optax.Params], tuple[optax.Params, optax.OptState]]
  step: Callable[..., tuple[optax.Params, optax.OptState, jax.Array]]
  batch_sharding: Callable[[Any], Any]
  memory: Callable[[optax.Params], dict[str, int]]


def make_mesh(
  devices: int | Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh of one axis, ``'devices'``, for the programs of this module.

  Args:
    devices: How many, or which; None are all there are, on all hosts. Of
      several hosts each gives as many.

  Returns:
    A ``jax.sharding.Mesh`` with an Auto axis.

  Raises:
    ValueError: There are not so many, or they do not divide over the hosts.

  Examples:
    >>> import gsgd_jax
    >>> gsgd_jax.parallel.make_mesh(1).axis_names
    ('devices',)
  """
  if devices is None:
    devices = device_count()
  if isinstance(devices, np.ndarray):
    devices = devices.ravel().tolist()
  if not isinstance(devices, Sequence):
    devices = _first(_protocol.positive_int('devices', devices))
  if not devices:
    raise ValueError('devices must be at least one, got none')
  return Mesh(np.array(devices), ('devices',), axis_types=(AxisType.Auto,))


def device_count() -> int:
  """How many devices there are, on all hosts (tests say otherwise)."""
  return jax.device_count()


def _first(number):
  """So many devices, as many of each host."""
  there, hosts = jax.device_count(), jax.process_count()
  if number > there:
    raise ValueError(
      f'devices must be at most the {there} there are, got {number}'
    )
  if number % hosts:
    raise ValueError(
      f'devices must be as many on each of {hosts} processes, got {number}: '
      f'{_methods.nearest_multiple(number, hosts)} would do'
    )
  found = []
  for host in range(hosts):
    of_host = [d for d in jax.devices() if d.process_index == host]
    found += of_host[: number // hosts]
  if len(found) < number:
    raise ValueError(
      f'devices must be as many on each of {hosts} processes, and one has '
      f'fewer than {number // hosts}'
    )
  return found


def devices_of(mesh: Mesh | None) -> tuple[Mesh, Devices]:
  """A mesh, by default of all devices, and what its devices say."""
  mesh = make_mesh() if mesh is None else mesh
  if len(mesh.axis_names) != 1:
    raise ValueError(
      f'the mesh must have one axis, got {len(mesh.axis_names)}: '
      f'{", ".join(map(str, mesh.axis_names))}'
    )
  return mesh, Devices(mesh.axis_names[0], mesh.size)


def data_parallel(
  inner: _methods.Inner,
  loss_fn: Callable[[Any, Any], jax.Array],
  *,
  batch_like: Any = None,
  mesh: Mesh | None = None,
) -> Program:
  r"""One batch over all devices, for any transformation.

  .. math::

    w_{t+1} = w_t + \mathrm{inner}\left(
      \frac{1}{D} \sum_d \nabla f(w^{read}_t; \text{share}_d)\right)

  Everything is as on one device, :func:`gsgd_jax.guided` included: its batches
  are kept in shares, its scores and replays taken by all devices together.

  ``step(params, state, batch, **extra_args)`` returns the loss of the batch.

  Args:
    inner: Any optax transformation; or, where it has a loss function or keeps
      batches, a function ``inner(loss_fn, batch_like)`` that makes it: on D
      devices the loss is a mean over them, and a batch a device's share.
    loss_fn: ``loss_fn(params, batch) -> scalar``, a *mean* over the examples of
      the batch. (What it draws at random differs with the number of devices.)
    batch_like: A batch, or its ``jax.ShapeDtypeStruct`` s. Its arrays have a
      leading axis of examples, which must divide over the devices; scalars and
      typed PRNG keys are not divided.
    mesh: A mesh with one axis, Auto or Explicit; None is :func:`make_mesh`.

  Returns:
    A :class:`Program`.

  Raises:
    ValueError: The batch does not divide over the devices, or the mesh has more
      than one axis.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
    >>> batches = jax.random.normal(jax.random.key(0), (20, 8))
    >>> program = gsgd_jax.parallel.data_parallel(
    ...   lambda loss_fn, batch_like: gsgd_jax.guided(
    ...     optax.sgd(0.1), loss_fn, window=4, batch_like=batch_like),
    ...   loss_fn, batch_like=batches[0])
    >>> params, state = program.init(jnp.array(2.0))
    >>> step = jax.jit(program.step, donate_argnums=(0, 1))
    >>> for batch in batches:  # Waits for each step; see docs/devices.md.
    ...   params, state, value = jax.block_until_ready(
    ...     step(params, state, batch))
    >>> print(state.count, 'arrivals', state.gradient_evaluations, 'gradients')
    20 arrivals 30 gradients
  """
  mesh, devices = devices_of(mesh)
  method = _methods.data_parallel(inner, loss_fn, devices, batch_like)

  def check(batch, extras):
    del extras
    _check_like(batch, batch_like)

  return _program(mesh, method, check, _in_shares, _one_call)


def synchronous(
  inner: _methods.Inner,
  loss_fn: Callable[[Any, Any], jax.Array],
  workers: int | None = None,
  *,
  combine: str = 'sequential',
  wait_for: int | None = None,
  arrivals: ArrivalProcess = round_robin(),
  batch_like: Any = None,
  sync_cost: float = 0.1,
  seed: int | jax.Array = 0,
  mesh: Mesh | None = None,
) -> Program:
  """Devices as workers: rounds of gradients at shared parameters.

  Every device takes the gradients of its own batches, one a worker, at the
  parameters of the round's start. They are applied one after another (the
  paper's SSGD, and around :func:`gsgd_jax.guided` its gSSGD), or as their mean,
  as in :func:`gsgd_jax.synchronous`, whose trajectory this is. ``guided``
  scores and replays workers' batches; a replay's gradient is taken by all
  devices together.

  ``step(params, state, batches, **extra_args)`` is a whole round: every array
  of ``batches`` and of the extra arguments has a leading axis of gradients
  (``wait_for``, or ``workers``), in the order in which they are applied. It
  returns their losses.

  Args:
    inner: As in :func:`data_parallel`. With ``combine='mean'`` a batch is a
      round's batches joined.
    loss_fn: ``loss_fn(params, batch) -> scalar``, a mean over the examples.
    workers: How many workers; None is one a device.
    combine: As in :func:`gsgd_jax.synchronous`,
    wait_for: likewise; it must divide over the devices,
    arrivals: likewise.
    batch_like: A worker's batch, or its ``jax.ShapeDtypeStruct`` s. If given,
      batches are kept in shares, and must divide over the devices.
    sync_cost: As in :func:`gsgd_jax.synchronous`,
    seed: likewise.
    mesh: As in :func:`data_parallel`.

  Returns:
    A :class:`Program`.

  Raises:
    ValueError: A round's gradients or (with ``batch_like``) a batch do not
      divide over the devices; or what :func:`gsgd_jax.synchronous` raises.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
    >>> program = gsgd_jax.parallel.synchronous(optax.sgd(0.1), loss_fn)
    >>> params, state = program.init(jnp.array(2.0))
    >>> round_of_batches = jnp.zeros((jax.device_count(), 8))
    >>> params, state, losses = jax.jit(program.step)(
    ...   params, state, round_of_batches)
    >>> print(losses[0])
    4.0
  """
  mesh, devices = devices_of(mesh)
  method = _methods.synchronous(
    inner,
    loss_fn,
    devices,
    batch_like,
    devices.number if workers is None else workers,
    combine=combine,
    wait_for=wait_for,
    arrivals=arrivals,
    sync_cost=sync_cost,
    seed=seed,
  )
  spread = batch_like is not None and combine == 'sequential'

  waited = wait_for or workers or devices.number

  def check(batches, extras):
    _check_batches(batches, extras, batch_like)
    if _length(batches) != waited:
      raise ValueError(
        f'a step is a whole round of {waited} batches, got {_length(batches)}'
      )

  def calls_of(devices, batches, extras):
    return _own_calls(devices, batches, extras, spread), waited

  return _program(mesh, method, check, _by_call, calls_of)


def asynchronous(
  inner: _methods.Inner,
  loss_fn: Callable[[Any, Any], jax.Array],
  workers: int,
  *,
  round_size: int | None = None,
  gradients_at_once: int | None = None,
  arrivals: ArrivalProcess = round_robin(),
  worker_transform: optax.GradientTransformation | None = None,
  batch_like: Any = None,
  keep_params: bool = False,
  overwrite_within: float | None = None,
  sync_cost: float = 0.1,
  seed: int | jax.Array = 0,
  mesh: Mesh | None = None,
) -> Program:
  """An asynchronous server and its N workers, emulated on D devices.

  The trajectory is that of :func:`gsgd_jax.asynchronous`, however many devices
  there are: float64 agrees to rounding, and so does float32 where nothing is
  guided. Worker w lives on device w mod D, which alone keeps its slot: N / D
  gradients a device (with ``keep_params`` as many copies of the parameters).

  Gradients are taken in *rounds*: between two of them workers arrive and read,
  until the next to arrive is one of those that have just read; then all of
  their gradients are taken at once. Round-robin workers make rounds of N,
  uneven ones shorter ones. A round changes nothing but the time it takes.

  ``step(params, state, batches, **extra_args)`` makes as many calls as there
  are batches: every array of ``batches`` and of the extra arguments has a
  leading axis of calls. It returns the losses by call. A chunk of several times
  N calls wastes least. All devices are given all batches: where that is much,
  let them be the rows of examples that ``loss_fn`` gathers.

  Args:
    inner: As in :func:`data_parallel`.
    loss_fn: ``loss_fn(params, batch) -> scalar``, a mean over the examples.
    workers: How many workers, N; they must divide over the devices.
    round_size: The most workers in a round, shared equally by the devices; at
      least one a device. Each needs a copy of the parameters. None is N.
    gradients_at_once: How many gradients a device takes by one ``vmap``; None
      is 8, or as many as a round has on a device. (A convolution under ``vmap``
      over parameters is slow on CPUs: let it be 1 there.)
    arrivals: As in :func:`gsgd_jax.asynchronous`,
    worker_transform: likewise.
    batch_like: A batch, or its ``jax.ShapeDtypeStruct`` s. If given, batches
      travel with their gradients, in shares, and must divide over the devices.
    keep_params: As in :func:`gsgd_jax.asynchronous`,
    overwrite_within: likewise,
    sync_cost: likewise,
    seed: likewise.
    mesh: As in :func:`data_parallel`.

  Returns:
    A :class:`Program`. Row :math:`(w \\bmod D) N / D + \\lfloor w / D \\rfloor`
    of a ring in its state is worker w's.

  Raises:
    ValueError: Workers or (with ``batch_like``) batches do not divide over the
      devices, or what :func:`gsgd_jax.asynchronous` raises.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
    >>> program = gsgd_jax.parallel.asynchronous(
    ...   optax.sgd(0.1), loss_fn, workers=8)
    >>> params, state = program.init(jnp.array(2.0))
    >>> batches = jax.random.normal(jax.random.key(0), (40, 16))
    >>> params, state, losses = jax.jit(program.step)(params, state, batches)
    >>> print(state.version, 'updates after', state.count, 'gradients')
    33 updates after 40 gradients
  """
  mesh, devices = devices_of(mesh)
  method = _methods.asynchronous(
    inner,
    loss_fn,
    devices,
    batch_like,
    workers,
    round_size=round_size,
    gradients_at_once=gradients_at_once,
    arrivals=arrivals,
    worker_transform=worker_transform,
    keep_params=keep_params,
    overwrite_within=overwrite_within,
    sync_cost=sync_cost,
    seed=seed,
  )

  def calls_of(devices, batches, extras):
    share = lambda call: devices.share(_ring.read(batches, call))
    calls = Calls(
      batch=lambda call: _ring.read(batches, call),
      share=share,
      extras=lambda call: _ring.read(extras, call),
    )
    return calls, _length(batches)

  def check(batches, extras):
    _check_batches(batches, extras, batch_like)

  return _program(mesh, method, check, _everywhere, calls_of)


def delayed_all_reduce(
  inner: _methods.Inner,
  loss_fn: Callable[[Any, Any], jax.Array],
  delay: int = 1,
  *,
  batch_like: Any = None,
  keep_params: bool = False,
  sync_cost: float = 0.1,
  mesh: Mesh | None = None,
) -> Program:
  r"""Data-parallel, with gradients that are applied late, on purpose.

  .. math::

    w_{t+1} = w_t + \mathrm{inner}\left(\frac{1}{D} \sum_d g^d_{t-k}\right),
    \quad g^d_t = \nabla f(w^{read}_t; \text{share}_d)

  with k = ``delay``. A step sums over the devices what an earlier step left,
  while it takes its own gradients: neither waits for the other, so that
  communication may overlap with computation. What that costs is a staleness of
  k, and every compensation may stand inside: the trajectory is that of
  :func:`gsgd_jax.delayed` on one device.

  ``step(params, state, batch, **extra_args)`` returns each device's loss of its
  share, shape (D,): their mean would be one more sum to wait for.

  Args:
    inner: As in :func:`data_parallel`.
    loss_fn: ``loss_fn(params, batch) -> scalar``, a mean over the examples.
    delay: Steps of delay, k, an int of at least 0. With 0 nothing is late, and
      ``step`` and state are those of :func:`data_parallel` around
      :func:`gsgd_jax.delayed`.
    batch_like: As in :func:`data_parallel`; if given, batches are forwarded.
    keep_params: As in :func:`gsgd_jax.delayed`,
    sync_cost: likewise.
    mesh: As in :func:`data_parallel`.

  Returns:
    A :class:`Program`. A device keeps k + 2 gradients of its own; the state's
    ``server`` is that of :func:`gsgd_jax.delayed`.

  Raises:
    ValueError: ``delay`` is not an int or negative, or the batch does not
      divide over the devices.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import gsgd_jax, optax
    >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
    >>> program = gsgd_jax.parallel.delayed_all_reduce(
    ...   optax.chain(gsgd_jax.delay_compensation(), optax.sgd(0.1)), loss_fn,
    ...   keep_params=True)
    >>> params, state = program.init(jnp.array(2.0))
    >>> step = jax.jit(program.step, donate_argnums=(0, 1))
    >>> for _ in range(3):  # Waits for each step; see docs/devices.md.
    ...   params, state, values = jax.block_until_ready(
    ...     step(params, state, jnp.zeros(8)))
    >>> print(state.server.version, 'updates')
    2 updates

  References:
    Kosson et al., `Pipelined Backpropagation at Scale`, arXiv:2003.11666, 2021.
  """
  mesh, devices = devices_of(mesh)
  method = _methods.delayed_all_reduce(
    inner,
    loss_fn,
    devices,
    batch_like,
    delay,
    keep_params=keep_params,
    sync_cost=sync_cost,
  )

  def check(batch, extras):
    del extras
    _check_like(batch, batch_like)

  return _program(mesh, method, check, _in_shares, _one_call)


def _in_shares(devices, batch):
  """Every device has a share."""
  _methods.share_like(_protocol.abstract(batch), devices)  # Checks it.
  share = PartitionSpec(devices.axis)
  return jax.tree.map(
    lambda x: share if _methods.is_split(x) else EVERYWHERE, batch
  )


def _by_call(devices, batches):
  """Every device has some of the batches."""
  return jax.tree.map(lambda x: PartitionSpec(devices.axis), batches)


def _everywhere(devices, batches):
  del devices
  return jax.tree.map(lambda x: EVERYWHERE, batches)


def _one_call(devices, share, extras):
  """A batch of which every device has a share."""
  calls = Calls(None, lambda call: share, lambda call: extras)
  return calls, None


def _own_calls(devices, batches, extras, spread):
  """Batches of which every device has whole ones of its own."""
  first = devices.this() * _length(batches)
  shares = devices.spread(batches) if spread else None
  return Calls(
    batch=lambda call: _ring.read(batches, call - first),
    share=lambda call: None if shares is None else _ring.read(shares, call),
    extras=lambda call: _ring.read(extras, call),
  )


def _check_like(batch, batch_like):
  if batch_like is not None:
    _protocol.check_like('the program', batch, batch_like)


def _check_batches(batches, extras, batch_like):
  """Raises unless batches and extra arguments have one axis of calls."""
  number = _length(batches)
  one = lambda tree: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree
  )
  if batch_like is not None:
    _protocol.check_like('the program', one(batches), batch_like)
  for name, extra in extras.items():
    for x in jax.tree.leaves(extra):
      if not x.ndim or len(x) != number:
        raise ValueError(
          f'the extra argument {name} must have a leading axis of {number} '
          f'calls, as the batches have, got shape {x.shape}'
        )


def _length(batches):
  """How many calls batches are for."""
  shapes = [x.shape for x in jax.tree.leaves(batches)]
  lengths = {shape[0] if shape else 0 for shape in shapes}
  if len(lengths) != 1 or 0 in lengths:
    raise ValueError(
      'every array of batches must have the same leading axis, of at least one '
      f'call, got shapes {_protocol.in_a_line(shapes)}'
    )
  return lengths.pop()


def _program(mesh, method, check, specs_of, calls_of):
  """The program of a method.

  `check(batch, extras)` raises where they are not as they should be,
  `specs_of(devices, batch)` says where the arrays of a batch are expected,
  `calls_of(devices, batch, extras)` what calls it makes on a device and how
  many (None: one, without an axis).
  """
  devices = method.devices

  def init(params):
    specs = state_specs(method, params)
    # Copies: parameters are donated, and the caller's stay.
    params = placed(mesh, jax.tree.map(jnp.copy, params), EVERYWHERE)
    state = jax.jit(method.init, out_shardings=shardings(mesh, specs))(params)
    return params, state

  def step(params, state, batch, **extra_args):
    batch, extra_args = jax.tree.map(jnp.asarray, (batch, extra_args))
    check(batch, extra_args)
    specs = (
      EVERYWHERE,
      state_specs(method, params),
      specs_of(devices, batch),
      EVERYWHERE,
    )

    def on_device(params, state, batch, extra_args):
      calls, number = calls_of(devices, batch, extra_args)
      params, state, values = method.advance(
        params, state, calls, number or 1, number or 1
      )
      alone = number is None and not method.apart
      return params, state, values[0] if alone else values

    losses = PartitionSpec(devices.axis) if method.apart else EVERYWHERE
    run = shard_map(on_device, mesh, specs, (*specs[:2], losses))
    return run(
      *(
        placed(mesh, x, spec)
        for x, spec in zip(
          (params, state, batch, extra_args), specs, strict=True
        )
      )
    )

  def bytes_of(params):
    local = optax.GradientTransformation(
      method.local_init, optax.identity().update
    )
    sizes = memory.state_memory(local, params)
    leaves = jax.tree.leaves(params)
    copies = sum(x.size * x.dtype.itemsize for x in leaves)
    return sizes | ({'round': method.room * copies} if method.room else {})

  return Program(
    init,
    step,
    lambda batch: shardings(mesh, specs_of(devices, batch)),
    bytes_of,
  )


def state_specs(method: _methods.Method, params: optax.Params) -> Any:
  """Where a method's state is, from parameters or their shapes.

  A device has a part of what is smaller on a device than on the whole.
  """
  whole = jax.eval_shape(method.init, params)
  own = jax.eval_shape(method.local_init, params)

  def spec(x, y):
    pairs = zip(x.shape, y.shape, strict=True)
    return PartitionSpec(
      *(None if a == b else method.devices.axis for a, b in pairs)
    )

  return jax.tree.map(spec, whole, own)


def with_axes(specs: Any, axes: Any) -> Any:
  """The partition of a `vmap`'s output: its axes are 0, or None for none."""

  def one(spec, axis):
    return spec if axis is None else PartitionSpec(None, *spec)

  return jax.tree.map(
    one, specs, axes, is_leaf=lambda x: isinstance(x, PartitionSpec)
  )


def by_device(mesh: Mesh, axis: int = 0) -> PartitionSpec:
  """The partition of an array of which each device has a part along an axis."""
  return PartitionSpec(*[None] * axis, mesh.axis_names[0])


def of_host(mesh: Mesh, array: np.ndarray, spec: PartitionSpec) -> jax.Array:
  """An array that every host has: it puts its devices' parts on them."""
  return jax.make_array_from_callback(
    array.shape, NamedSharding(mesh, spec), lambda index: array[index]
  )


def same_on_all_hosts(values: np.ndarray) -> bool:
  """Whether all hosts call this with the same values."""
  try:
    multihost_utils.assert_equal(values)
  except AssertionError:
    return False
  return True


def true_on_all_hosts(here: bool) -> bool:
  """Whether something is true on every host."""
  return bool(multihost_utils.process_allgather(np.array(here)).all())


def of_first_host(values: np.ndarray | np.generic) -> np.ndarray:
  """The first host's values, on all hosts, which have as many."""
  return np.asarray(multihost_utils.broadcast_one_to_all(values))


def everywhere(mesh: Mesh, tree: Any) -> Any:
  """A tree on all devices, whole."""
  if mesh.size == 1:
    return tree
  # Hosts have arrays of their own, with the same values.
  return jax.tree.map(lambda x: of_host(mesh, np.asarray(x), EVERYWHERE), tree)


def shard_map(
  fn: Callable, mesh: Mesh, in_specs: Any, out_specs: Any
) -> Callable:
  """A function of whole arrays, from one of what a device has of them."""
  if mesh.size == 1:
    return fn
  return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def placed(mesh: Mesh, tree: Any, specs: Any) -> Any:
  """A tree where it is expected; `specs` may be a prefix of it."""
  return jax.device_put(tree, shardings(mesh, specs))


def shardings(mesh: Mesh, specs: Any) -> Any:
  """The partition as shardings."""

  def sharding(spec):
    if mesh.size == 1:
      return SingleDeviceSharding(mesh.devices.item())
    return NamedSharding(mesh, spec)

  return jax.tree.map(
    sharding, specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
  )
