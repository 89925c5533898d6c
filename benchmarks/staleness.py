"""What a step of `asynchronous` costs, and that it does not grow with workers.

  python -m benchmarks.staleness

First table: training steps of an MLP of a million parameters (10,000 under
vmap) on batches of 64, as plain SGD, with 2 and with 256 asynchronous workers.
The step at 256 workers over the step at 2 is to be at most 1.15.

Second table: bare steps (the gradient is the parameters themselves), so that
nothing hides the ring's memory traffic, in parameter-sized passes over main
memory. The ring's floor is two passes more than plain SGD: a slot is written,
a slot is read. With a million parameters 2 workers' ring fits into the cache
of many machines and 256 workers' fits into none; with four million neither
does, so there 256 over 2 compares like with like.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

import gsgd_jax
from benchmarks import mlp, timing

_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Rounds that are timed.')
_STEPS = flags.DEFINE_integer('steps', 30, 'Steps in a round.')

FEW, MANY = 2, 256
SEEDS = 8
MILLION = (1000, 908, 100)  # 999,808 parameters.
SMALL = (64, 134, 10)  # 10,060 parameters.


def transformation(workers, worker_transform=None):
  if workers == 0:
    return optax.sgd(1e-3)
  return gsgd_jax.asynchronous(
    optax.sgd(1e-3), workers, worker_transform=worker_transform
  )


def problem(sizes):
  """Parameters of an MLP, and its gradient on a batch."""
  params, batch = mlp.problem(sizes)
  return params, jax.grad(lambda params: mlp.loss_fn(params, batch))


def step(tx, gradient, carry):
  params, state = carry
  updates, state = tx.update(gradient(params), state, params)
  return optax.apply_updates(params, updates), state


def scanned(tx, gradient, steps):
  def program(carry):
    body = lambda carry, _: (step(tx, gradient, carry), None)
    return jax.lax.scan(body, carry, length=steps)[0]

  return jax.jit(program, donate_argnums=0)


def called(tx, gradient, steps):
  one = jax.jit(functools.partial(step, tx, gradient), donate_argnums=0)

  def program(carry):
    for _ in range(steps):
      carry = one(carry)
    return carry

  return program


def vmapped(tx, gradient, steps):
  """A scan under vmap; the state is made inside, as in an experiment."""

  def program(params):
    def one(params):
      body = lambda carry, _: (step(tx, gradient, carry), None)
      carry = (params, tx.init(params))
      return jax.lax.scan(body, carry, length=steps)[0][0]

    return jax.vmap(one)(params)

  return jax.jit(program, donate_argnums=0)


def measure(make, params, gradient, steps, worker_transform=None):
  """Median seconds a step of plain SGD, FEW and MANY workers."""
  programs, carries = {}, {}
  for workers in (0, FEW, MANY):
    tx = transformation(workers, worker_transform)
    programs[workers] = make(tx, gradient, steps)
    own = jax.tree.map(jnp.copy, params)
    if make is vmapped:
      carries[workers] = jax.tree.map(lambda p: jnp.stack([p] * SEEDS), own)
    else:
      carries[workers] = (own, jax.jit(tx.init)(own))
  filling = -(-MANY // steps)
  seconds = timing.medians(programs, carries, _ROUNDS.value, 1 + filling)
  return {workers: s / steps for workers, s in seconds.items()}


def training_table():
  rows = []
  for name, make, sizes, worker_transform in (
    ('in scan', scanned, MILLION, None),
    ('donated calls', called, MILLION, None),
    (f'vmap of {SEEDS}, 10,000 parameters', vmapped, SMALL, None),
    ('in scan, optax.trace(0.9) a worker', scanned, MILLION, optax.trace(0.9)),
    ('calls, optax.trace(0.9) a worker', called, MILLION, optax.trace(0.9)),
  ):
    params, gradient = problem(sizes)
    steps = _STEPS.value * (50 if make is vmapped else 1)
    seconds = measure(make, params, gradient, steps, worker_transform)
    rows.append(
      [
        name,
        *(f'{seconds[n] * 1e3:.2f}' for n in (0, FEW, MANY)),
        f'{seconds[FEW] / seconds[0]:.2f}',
        f'{seconds[MANY] / seconds[FEW]:.2f}',
      ]
    )
  timing.print_table(
    [
      'training step, ms',
      'plain SGD',
      f'N={FEW}',
      f'N={MANY}',
      f'{FEW} over plain',
      f'{MANY} over {FEW}',
    ],
    rows,
  )


def seconds_a_byte():
  """Of main memory: a copy of 512 MB reads and writes each byte once."""
  array = jnp.ones([2**27])
  copy = jax.jit(lambda x: x + 1, donate_argnums=0)
  seconds = timing.medians({'copy': copy}, {'copy': array}, _ROUNDS.value)
  return seconds['copy'] / (2 * 4 * 2**27)


def bare_table():
  byte = seconds_a_byte()
  rows = []
  for size in (1_000_000, 4_000_000):
    seconds = measure(scanned, jnp.ones([size]), lambda params: params, 30)
    one_pass = 4 * size * byte
    rows.append(
      [
        f'{size:,} parameters',
        *(f'{seconds[n] / one_pass:.2f}' for n in (0, FEW, MANY)),
        f'{(seconds[MANY] - seconds[0]) / one_pass:.2f} (floor 2)',
        f'{seconds[MANY] / seconds[FEW]:.2f}',
      ]
    )
  timing.print_table(
    [
      'bare step, passes over memory',
      'plain SGD',
      f'N={FEW}',
      f'N={MANY}',
      f'N={MANY} less plain',
      f'{MANY} over {FEW}',
    ],
    rows,
  )


def main(argv):
  del argv
  device = jax.devices()[0]
  print(f'jax {jax.__version__} on {device.platform} ({device.device_kind})\n')
  training_table()
  print()
  bare_table()


if __name__ == '__main__':
  app.run(main)
