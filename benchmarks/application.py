"""What the application costs over the bare compiled scan.

  python -m benchmarks.application

Runs `train.py` on its default task, as a user does, and a bare compiled scan of
the same updates: the same methods, seeds, batches and verification samples, all
prepared beforehand, nothing evaluated, nothing written. The ratio of updates
per second is to be at least 0.9. The program's time is that of its training,
from a method's first update to its last evaluation, as `timing.jsonl` has it;
compilation is neither's. What comes before the first update is reported too,
without and with JAX's compilation cache.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks import timing
from gsgd_jax import (
  data,
  events,
  experiment,
  programs,
  settings,
  tasks,
  transformation,
  worker_params,
)

_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Rounds that are timed.')
_TRAIN = pathlib.Path(__file__).parents[1] / 'train.py'


def bare_scan(config, method, loss_fn, datasets):
  """A compiled `(seeds, params, arrays, rows) -> params`."""
  batch_like = transformation.batch_like_of(config, method, datasets[0])
  filling = transformation.filling_calls(config, method)

  def run(seed, params, arrays, rows):
    tx = transformation.make_transformation(
      config, method, loss_fn, batch_like, seed
    )
    train = arrays[0]

    def step(carry, rows):
      params, opt_state, call = carry
      take = lambda rows: jax.tree.map(lambda x: x[rows], train)
      batch = take(rows.batch)
      value, grads = jax.value_and_grad(loss_fn)(
        worker_params(params, opt_state), batch
      )
      extra = {}
      if rows.verification is not None:
        extra['verification'] = take(rows.verification)
      updates, opt_state = tx.update(
        grads,
        opt_state,
        params,
        value=value,
        batch=batch,
        arrival=jnp.maximum(call - filling, 0),
        **extra,
      )
      return (optax.apply_updates(params, updates), opt_state, call + 1), None

    carry = (params, tx.init(params), jnp.zeros([], jnp.int32))
    return jax.lax.scan(step, carry, rows)[0][0]

  return jax.jit(jax.vmap(run))


def all_rows(config, method, datasets):
  """Rows of every call of a run."""
  filling = transformation.filling_calls(config, method)
  calls = config.updates + filling
  feed = programs.Feed(config, method, datasets, keyed=False)
  room, pieces = programs.padded(config, datasets[0]), []
  for first in range(0, calls, room):
    length = min(room, calls - first)
    rows = feed.rows(first, length)
    pieces.append(jax.tree.map(lambda r, n=length: r[:, :n], rows))
  return jax.tree.map(lambda *r: np.concatenate(r, axis=1), *pieces)


def make_bare(config):
  """For each method, a function that trains it once and waits."""
  datasets = [experiment._load(config, s) for s in range(config.seeds)]
  task = tasks.make(config, datasets[0])
  arrays = data.stacked(datasets)
  params = experiment._initial_params(task.model, config.seeds)
  seeds = jnp.arange(config.seeds)
  out = {}
  for method in events.methods(config):
    run = bare_scan(config, method, task.loss_fn, datasets)
    rows = jax.device_put(all_rows(config, method, datasets))
    compiled = run.lower(seeds, params, arrays, rows).compile()
    out[method.name] = lambda f=compiled, r=rows: jax.block_until_ready(
      f(seeds, params, arrays, r)
    )
  return out


def train(folder, *arguments):
  """Runs the program; returns seconds of training and before, by method."""
  subprocess.run(
    [sys.executable, str(_TRAIN), f'--workdir={folder}', *arguments],
    check=True,
    capture_output=True,
  )
  training, first = {}, {}
  for line in (folder / 'timing.jsonl').read_text().splitlines():
    line = json.loads(line)
    first.setdefault(line['method'], line['seconds'])
    training[line['method']] = line['seconds'] - first[line['method']]
  return training, next(iter(first.values()))


def main(argv):
  del argv
  config = settings.default_config()
  bare = make_bare(config)
  times = {(who, name): [] for who in ('program', 'bare') for name in bare}
  with tempfile.TemporaryDirectory() as scratch:
    scratch = pathlib.Path(scratch)
    cache = f'--config.compilation_cache={scratch / "cache"}'
    _, cold = train(scratch / 'cold')
    train(scratch / 'fill', cache)
    warm = []
    for i in range(_ROUNDS.value):
      training, before = train(scratch / str(i), cache)
      warm.append(before)
      for name, run in bare.items():
        start = time.perf_counter()
        run()
        times['bare', name].append(time.perf_counter() - start)
        times['program', name].append(training[name])
  medians = {key: statistics.median(t) for key, t in times.items()}
  rows = []
  for name in (*bare, 'all'):
    names = list(bare) if name == 'all' else [name]
    seconds = {
      who: sum(medians[who, n] for n in names) for who in ('program', 'bare')
    }
    rate = {w: config.updates * len(names) / s for w, s in seconds.items()}
    rows.append(
      [
        name,
        f'{rate["program"]:,.0f}',
        f'{rate["bare"]:,.0f}',
        f'{rate["program"] / rate["bare"]:.2f}',
      ]
    )
  print(f'{config.seeds} seeds at once, on {jax.devices()[0].device_kind}\n')
  timing.print_table(
    ['method', 'program, updates/s', 'bare scan', 'program over bare'], rows
  )
  print(
    f'\nstart to first update: {cold:.1f} s, with a warm compilation cache '
    f'{statistics.median(warm):.1f} s'
  )


if __name__ == '__main__':
  app.run(main)
