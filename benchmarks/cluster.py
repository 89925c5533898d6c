"""What a step costs on clusters of 2 and of 4,096 emulated workers.

  python -m benchmarks.cluster

Training steps of an MLP of 10,060 parameters on batches of 64, plain and with
asynchronous workers under several arrival processes. The step at 4,096 workers
over the step at 2 is to be at most 1.3. What grows with the workers is a search
for the earliest of N finish times; what a ring of 160 MB costs is that its
slots lie in main memory and not in a cache: two slots of 40 KB a step.

Under vmap every seed has a cluster of its own, so that each seed reads and
writes another slot.
"""

import functools

import jax
import optax
from absl import app, flags

import gsgd_jax
from benchmarks import staleness, timing
from gsgd_jax import programs

_CLUSTER_ROUNDS = flags.DEFINE_integer('cluster_rounds', 15, 'Timed rounds.')

FEW, MANY = 2, 4096
SEEDS = 8
STEPS = 1000
PROCESSES = {
  'round robin': gsgd_jax.round_robin(),
  'gamma': gsgd_jax.gamma_arrivals(),
  'gamma, uneven machines': gsgd_jax.gamma_arrivals(machine_cv=0.6),
  'exponential': gsgd_jax.exponential_arrivals(),
}


def transformation(workers, arrivals, seed):
  tx = optax.sgd(1e-3)
  if workers == 0:
    return tx
  return gsgd_jax.asynchronous(tx, workers, arrivals=arrivals, seed=seed)


def scanned(workers, arrivals, params, gradient):
  """A program of many steps, and what it starts from."""
  tx = transformation(workers, arrivals, 0)
  params = jax.tree.map(lambda p: p.copy(), params)
  program = staleness.scanned(tx, gradient, STEPS)
  return program, (params, jax.jit(tx.init)(params))


def called(workers, arrivals, params, gradient):
  tx = transformation(workers, arrivals, 0)
  params = jax.tree.map(lambda p: p.copy(), params)
  program = staleness.called(tx, gradient, STEPS)
  return program, (params, jax.jit(tx.init)(params))


def vmapped(workers, arrivals, params, gradient):
  """A cluster for each seed; counters stay unbatched, as in train.py."""
  seeds = jax.numpy.arange(SEEDS)

  def begin(seed, params):
    return params, transformation(workers, arrivals, seed).init(params)

  def several(carry):
    step = functools.partial(
      staleness.step, transformation(workers, arrivals, 0), gradient
    )
    body = lambda carry, _: (step(carry), None)
    return jax.lax.scan(body, carry, length=STEPS)[0]

  both = lambda seed, params: several(begin(seed, params))
  axes = programs.batched_axes(both, seeds[0], params)
  many = jax.tree.map(lambda p: jax.numpy.stack([p] * SEEDS), params)
  start = jax.jit(jax.vmap(begin, out_axes=axes))(seeds, many)
  program = jax.jit(
    jax.vmap(several, in_axes=(axes,), out_axes=axes), donate_argnums=0
  )
  return program, start


def main(argv):
  del argv
  device = jax.devices()[0]
  print(f'jax {jax.__version__} on {device.platform} ({device.device_kind})\n')
  params, gradient = staleness.problem(staleness.SMALL)
  rows = []
  for name, arrivals in PROCESSES.items():
    for how, make in (
      ('scan', scanned),
      ('calls', called),
      (f'vmap of {SEEDS}', vmapped),
    ):
      programs, carries = {}, {}
      for workers in (0, FEW, MANY):
        programs[workers], carries[workers] = make(
          workers, arrivals, params, gradient
        )
      seconds = timing.medians(
        programs, carries, _CLUSTER_ROUNDS.value, 1 + MANY // STEPS
      )
      times = [seconds[workers] / STEPS * 1e6 for workers in (0, FEW, MANY)]
      rows.append(
        [
          name,
          how,
          *(f'{t:.0f}' for t in times),
          f'{times[1] / times[0]:.2f}',
          f'{times[2] / times[1]:.2f}',
        ]
      )
  timing.print_table(
    [
      'arrivals',
      'how',
      'plain, µs a step',
      f'N={FEW}',
      f'N={MANY}',
      f'{FEW} over plain',
      f'{MANY} over {FEW}',
    ],
    rows,
  )


if __name__ == '__main__':
  app.run(main)
