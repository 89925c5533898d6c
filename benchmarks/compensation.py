"""What each compensation costs over plain `asynchronous`, in time and memory.

  python -m benchmarks.compensation

Training steps of an MLP of a million parameters on batches of 64, in scan: with
2 and with 256 workers, each compensation over plain `asynchronous` with SGD at
as many workers, and at 256 workers over itself at 2 (at most 1.2). Memory is
counted from the state, in copies of the parameters beyond what plain
`asynchronous` holds, which is one gradient a worker.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

import gsgd_jax
from benchmarks import mlp, timing

_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Rounds that are timed.')
_STEPS = flags.DEFINE_integer('steps', 30, 'Steps in a round.')
_SIZES = flags.DEFINE_list(
  'sizes', ['1000', '908', '100'], 'Inputs, hidden units and classes.'
)
_WORKERS = flags.DEFINE_list('workers', ['2', '256'], 'Few and many workers.')
_ONLY = flags.DEFINE_list('only', None, 'Names in the table; default: all.')
RATE = 1e-3


def correct(correction):
  return optax.chain(correction, optax.sgd(RATE))


# What stands at the server of N workers.
COMPENSATIONS = {
  'plain': lambda n: optax.sgd(RATE),
  'heavy ball': lambda n: optax.sgd(RATE, momentum=0.9),
  'delay_compensation': lambda n: correct(gsgd_jax.delay_compensation()),
  'delay_compensation, adaptive': lambda n: correct(
    gsgd_jax.delay_compensation(adaptive=True)
  ),
  'exact_delay_compensation': lambda n: correct(
    gsgd_jax.exact_delay_compensation(mlp.loss_fn)
  ),
  'scale_by_staleness': lambda n: correct(gsgd_jax.scale_by_staleness()),
  'drop_stale': lambda n: gsgd_jax.drop_stale(optax.sgd(RATE), n - 1),
  'rennala': lambda n: gsgd_jax.rennala(optax.sgd(RATE), n),
  'dana': lambda n: gsgd_jax.dana(RATE, n),
  'DANA-Slim': lambda n: optax.sgd(RATE),
  'DANA-DC': lambda n: optax.chain(
    gsgd_jax.delay_compensation(2.0), gsgd_jax.dana(RATE, n)
  ),
  'smega2': lambda n: gsgd_jax.smega2(RATE, n),
  'predict': lambda n: gsgd_jax.predict(optax.sgd(RATE), n - 1),
  'spike_compensation': lambda n: gsgd_jax.spike_compensation(RATE, n - 1),
  'adaptive_braking': lambda n: gsgd_jax.adaptive_braking(RATE),
  'asynchronous_nesterov': lambda n: gsgd_jax.asynchronous_nesterov(RATE),
  'delayed_nesterov': lambda n: gsgd_jax.delayed_nesterov(RATE, n),
}
NEED_STALE_PARAMS = (
  'delay_compensation',
  'delay_compensation, adaptive',
  'exact_delay_compensation',
  'DANA-DC',
)


def transformation(name, workers, batch):
  slim = name == 'DANA-Slim'
  return gsgd_jax.asynchronous(
    COMPENSATIONS[name](workers),
    workers,
    worker_transform=optax.trace(0.9, nesterov=True) if slim else None,
    keep_params=name in NEED_STALE_PARAMS,
    batch_like=batch if name == 'exact_delay_compensation' else None,
  )


def program(tx, batch, steps):
  def step(carry, _):
    params, state = carry
    at = gsgd_jax.worker_params(params, state)
    grads = jax.grad(mlp.loss_fn)(at, batch)
    updates, state = tx.update(grads, state, params, batch=batch)
    return (optax.apply_updates(params, updates), state), None

  run = lambda carry: jax.lax.scan(step, carry, length=steps)[0]
  return jax.jit(run, donate_argnums=0)


def measure(name, workers, params, batch):
  """Seconds a step of plain `asynchronous` and of one, of as many workers."""
  programs, carries = {}, {}
  for key in {'plain': 'plain', name: name}:
    for n in workers:
      tx = transformation(key, n, batch)
      own = jax.tree.map(jnp.copy, params)
      programs[key, n] = program(tx, batch, _STEPS.value)
      carries[key, n] = (own, jax.jit(tx.init)(own))
  filling = -(-workers[-1] // _STEPS.value)
  seconds = timing.medians(programs, carries, _ROUNDS.value, 1 + filling)
  return {key: s / _STEPS.value for key, s in seconds.items()}


def copies(name, workers, params, batch):
  """Copies of the parameters in the state, beyond the workers' gradients."""
  size = sum(math.prod(p.shape) * 4 for p in jax.tree.leaves(params))
  tx = transformation(name, workers, batch)
  memory = gsgd_jax.state_memory(tx, params)
  # A worker's batch is the user's, and not counted here.
  parts = (n for part, n in memory.items() if 'batch' not in part)
  return round(sum(parts) / size, 1) - workers


def main(argv):
  del argv
  device = jax.devices()[0]
  print(f'jax {jax.__version__} on {device.platform} ({device.device_kind})\n')
  sizes = tuple(map(int, _SIZES.value))
  few, many = map(int, _WORKERS.value)
  params, batch = mlp.problem(sizes)
  rows = []
  for name in _ONLY.value or COMPENSATIONS:
    seconds = measure(name, (few, many), params, batch)
    count = functools.partial(copies, name, params=params, batch=batch)
    rows.append(
      [
        name,
        f'{seconds[name, few] * 1e3:.2f}',
        f'{seconds[name, many] * 1e3:.2f}',
        f'{seconds[name, few] / seconds["plain", few]:.2f}',
        f'{seconds[name, many] / seconds["plain", many]:.2f}',
        f'{seconds[name, many] / seconds[name, few]:.2f}',
        f'{count(few):g}',
        f'{count(many):g}',
      ]
    )
  timing.print_table(
    [
      'compensation',
      f'N={few}, ms',
      f'N={many}, ms',
      f'over plain, N={few}',
      f'N={many}',
      f'{many} over {few}',
      f'copies, N={few}',
      f'N={many}',
    ],
    rows,
  )


if __name__ == '__main__':
  app.run(main)
