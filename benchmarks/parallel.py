"""Rounds of asynchronous workers: their speed, messages and memory.

  python -m benchmarks.parallel
  python -m benchmarks.parallel --cpu_devices=8

The first table: `parallel.asynchronous`, which takes a round's gradients at
once, over `asynchronous` in scan, which takes one after another; time a
gradient, batches of 64, 64 workers that arrive in turn or are as uneven as in
`configs/heterogeneous_cluster.py`. `at once` is `gradients_at_once`.

The second (with several devices): bytes in the compiled program's collectives
for an arriving gradient, over its size, which is the floor: it crosses once
(and with DC-ASGD the parameters that its worker read); and bytes of state on a
device over N / D of these.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import gsgd_jax
from benchmarks import hlo, mlp, timing
from gsgd_jax import parallel, worker_params

_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Rounds that are timed.')
_CALLS = flags.DEFINE_integer('calls', 512, 'Calls in a chunk.')
_WORKERS = flags.DEFINE_integer('workers', 64, 'Workers.')
_AT_ONCE = flags.DEFINE_list(
  'at_once', ['1', '4', '8', '16', '64'], 'Gradients of one vmap.'
)
_SIZES = flags.DEFINE_list(
  'sizes', ['64-64-10', '64-512-10'], 'Inputs, hidden units and classes.'
)
_CPU_DEVICES = flags.DEFINE_integer('cpu_devices', None, 'Devices of a CPU.')

ARRIVALS = {
  'in turn': gsgd_jax.round_robin,
  'uneven': lambda: gsgd_jax.gamma_arrivals(machine_cv=0.6),
}


def rounds_of(arrivals, workers, calls):
  """How many workers a round has on average."""
  tx = gsgd_jax.asynchronous(optax.identity(), workers, arrivals=arrivals)

  def step(state, _):
    state: Any = tx.update(jnp.zeros([1]), state)[1]
    return state, state.worker

  state = tx.init(jnp.zeros([1]))
  _, order = jax.jit(lambda s: jax.lax.scan(step, s, length=calls))(state)
  lengths, there = [], set()
  for worker in np.asarray(order)[workers - 1 :].tolist():
    if worker in there:
      lengths.append(len(there))
      there = set()
    there.add(worker)
  return np.mean(lengths)


def rows_of_batches(batch, calls):
  """Batches by number: a set of examples, and which of them each call takes."""
  rows = np.random.default_rng(0).integers(mlp.BATCH, size=(calls, mlp.BATCH))
  pick = lambda numbers: jax.tree.map(lambda x: x[numbers], batch)
  loss_fn = lambda params, numbers: mlp.loss_fn(params, pick(numbers))
  return jnp.asarray(rows, jnp.int32), loss_fn


def one_by_one(loss_fn, rows, arrivals):
  """`asynchronous` in scan."""
  tx = gsgd_jax.asynchronous(optax.sgd(1e-3), _WORKERS.value, arrivals=arrivals)

  def step(carry, numbers):
    params, state = carry
    grads = jax.grad(loss_fn)(worker_params(params, state), numbers)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  run = lambda carry: jax.lax.scan(step, carry, rows)[0]
  return jax.jit(run, donate_argnums=0), lambda p: (p, jax.jit(tx.init)(p))


def in_rounds(loss_fn, rows, arrivals, at_once):
  program = parallel.asynchronous(
    optax.sgd(1e-3),
    loss_fn,
    _WORKERS.value,
    arrivals=arrivals,
    gradients_at_once=at_once,
  )
  run = lambda carry: program.step(*carry, rows)[:2]
  return jax.jit(run, donate_argnums=0), program.init


def speeds(name, arrivals, at_once):
  sizes = tuple(map(int, name.split('-')))
  params, batch = mlp.problem(sizes)
  rows, loss_fn = rows_of_batches(batch, _CALLS.value)
  made: dict[Any, Any] = {'one by one': one_by_one(loss_fn, rows, arrivals)}
  for width in at_once:
    made[width] = in_rounds(loss_fn, rows, arrivals, width)
  programs = {key: run for key, (run, _) in made.items()}
  carries = {
    key: init(jax.tree.map(jnp.copy, params)) for key, (_, init) in made.items()
  }
  return timing.medians(programs, carries, _ROUNDS.value, warmup=2)


def messages(name, arrivals, keep_params):
  """(bytes for an arrival, of state on a device; of a gradient)."""
  params, batch = mlp.problem(tuple(map(int, name.split('-'))))
  rows, loss_fn = rows_of_batches(batch, _CALLS.value)
  correction = (
    gsgd_jax.delay_compensation() if keep_params else optax.identity()
  )
  program = parallel.asynchronous(
    optax.chain(correction, optax.sgd(1e-3)),
    loss_fn,
    _WORKERS.value,
    arrivals=arrivals,
    keep_params=keep_params,
  )
  params, state = program.init(params)
  lowered = jax.jit(program.step).lower(params, state, rows)
  found = hlo.collectives(lowered.compile().as_text() or '')
  gradient = sum(p.nbytes for p in jax.tree.leaves(params))
  # One loop sends arriving gradients; what it does not is the chunk's losses.
  sent = max(found.values())
  held = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(state)
    for shard in leaf.addressable_shards[:1]
  )
  return sent, held, gradient


def main(argv):
  del argv
  if _CPU_DEVICES.value is not None:
    jax.config.update('jax_num_cpu_devices', _CPU_DEVICES.value)
  device, number = jax.devices()[0], jax.device_count()
  print(
    f'jax {jax.__version__} on {number} x {device.platform} '
    f'({device.device_kind}), {_WORKERS.value} workers\n'
  )
  rows = []
  at_once = [int(w) for w in _AT_ONCE.value]
  at_once = [w for w in at_once if w <= _WORKERS.value // number]
  for name in _SIZES.value:
    for arrivals, process in ARRIVALS.items():
      seconds = speeds(name, process(), at_once)
      alone = seconds['one by one'] / _CALLS.value
      size = rounds_of(process(), _WORKERS.value, 20 * _WORKERS.value)
      rows.append(
        [
          name,
          arrivals,
          f'{size / _WORKERS.value:.2f} N',
          f'{alone * 1e6:.0f}',
          *(f'{seconds["one by one"] / seconds[w]:.2f}' for w in at_once),
        ]
      )
  timing.print_table(
    [
      'network',
      'arrivals',
      'a round',
      'one by one, µs',
      *(f'{w} at once, times as fast' for w in at_once),
    ],
    rows,
  )
  if number == 1:
    return
  rows = []
  for name in _SIZES.value:
    for keep_params in (False, True):
      sent, held, gradient = messages(name, gsgd_jax.round_robin(), keep_params)
      floor = gradient * (2 if keep_params else 1)
      rows.append(
        [
          name + (', DC-ASGD' if keep_params else ''),
          f'{gradient:,}',
          f'{sent:,}',
          f'{sent / floor:.4f}',
          f'{held:,}',
          f'{held / (floor * _WORKERS.value / number):.4f}',
        ]
      )
  print()
  timing.print_table(
    [
      'network',
      'gradient, bytes',
      'in collectives an arrival',
      'over floor',
      'state on a device',
      'over N / D',
    ],
    rows,
  )


if __name__ == '__main__':
  app.run(main)
