"""What convolutions cost on this device, in and out of loops, and replayed.

  python -m benchmarks.convolution

The small network (3 by 3 convolutions of 32 and 64 channels) on images of
28 by 28 and batches of 64, trained by plain SGD. First, a step by how
convolutions are computed: inside `scan`, and as one compiled call a step. The
floor is a step's floating-point operations at the rate of a large matrix
product that is timed in the same rounds.

Then, guided steps over the plain step, and over what they are counted as: as
in `benchmarks.guided` a forward pass of a batch is F and a gradient 3 F, and
the replays that happened are counted. The quotient is to be at most 1.5.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import gsgd_jax
from benchmarks import timing
from gsgd_jax import models

_ROUNDS = flags.DEFINE_integer('rounds', 7, 'Rounds that are timed.')
_WINDOWS = flags.DEFINE_integer('windows', 2, 'Windows in a guided round.')
_SLOW = flags.DEFINE_bool('slow', True, 'Time `lax` inside scan, too.')

BATCH, WINDOW, VERIFICATION, EXAMPLES, CLASSES = 64, 10, 100, 1024, 10
SHAPE = (28, 28, 1)
SIDE = 2048  # Of the matrices that are multiplied.
STEPS = 5  # A call, where a step's time is measured.

# Settings of `guided`, and whether a verification sample is given.
DIAL: dict[str, tuple[dict[str, Any], bool]] = {
  'free scoring': (dict(), False),
  'exact': (dict(revisit=None), True),
}


def make_data():
  """Blurred prototypes of 10 classes under noise."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, CLASSES, EXAMPLES)
  prototypes = rng.normal(size=(CLASSES, *SHAPE))
  images = prototypes[labels] + 2 * rng.normal(size=(EXAMPLES, *SHAPE))
  return jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)


def rows_of(data, start, size):
  start = start % (EXAMPLES - size)
  return jax.tree.map(
    lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), data
  )


def step_of(tx, loss_fn, data, verified=False):
  """`carry -> carry`, one step of training."""

  def step(carry):
    params, state, t = carry
    batch = rows_of(data, t * BATCH, BATCH)
    value, grads = jax.value_and_grad(loss_fn)(params, batch)
    extra = dict(value=value, batch=batch)
    if verified:
      extra['verification'] = rows_of(data, t * 37, VERIFICATION)
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state, t + 1

  return step


def scanned(step, steps):
  return jax.jit(
    lambda carry: jax.lax.scan(
      lambda carry, _: (step(carry), None), carry, length=steps
    )[0],
    donate_argnums=0,
  )


def called(step, steps):
  step = jax.jit(step, donate_argnums=0)

  def program(carry):
    for _ in range(steps):
      carry = step(carry)
    return carry

  return program


def start_of(model, tx):
  params = model.init(jax.random.key(0))
  return params, tx.init(params), jnp.zeros([], jnp.int32)


def flops_a_step():
  """Of the products of one step: forward pass and gradient."""
  height, width, channels = SHAPE
  first = height * width * 9 * channels * 32
  second = height // 2 * (width // 2) * 9 * 32 * 64
  dense = height // 4 * (width // 4) * 64 * CLASSES
  # No gradient for the images.
  return 2 * BATCH * (2 * first + 3 * second + 3 * dense)


def step_times(data, sgd):
  """Seconds a step by how it is computed, and of the matrix product."""
  programs, carries, steps = {}, {}, {}
  kinds = [
    ('patches', scanned, STEPS),
    ('patches', called, STEPS),
    ('lax', called, STEPS),
  ]
  if _SLOW.value:
    kinds.append(('lax', scanned, 1))
  for method, run, number in kinds:
    model = models.cnn(SHAPE, CLASSES, convolution=method)
    name = f'{method}, {"in scan" if run is scanned else "one call a step"}'
    step = step_of(sgd, models.cross_entropy(model), data)
    programs[name] = run(step, number)
    carries[name], steps[name] = start_of(model, sgd), number
  programs['product'] = jax.jit(lambda a: a @ a / SIDE)
  carries['product'], steps['product'] = jnp.ones([SIDE, SIDE]), 1
  seconds = timing.medians(programs, carries, _ROUNDS.value)
  return {name: seconds[name] / steps[name] for name in programs}


def print_steps(seconds):
  rate = 2 * SIDE**3 / seconds.pop('product')
  floor = flops_a_step() / rate
  base = seconds['patches, in scan']
  print(
    f'product: {rate / 1e9:.0f} GFLOP/s; a step is '
    f'{flops_a_step() / 1e9:.2f} GFLOP, at least {floor * 1e3:.1f} ms\n'
  )
  rows = [
    [
      name,
      f'{s * 1e3:.1f}',
      f'{1 / s:.1f}',
      f'{s / base:.2f}',
      f'{s / floor:.1f}',
    ]
    for name, s in seconds.items()
  ]
  timing.print_table(
    ['convolution', 'ms', 'steps a second', 'over patches in scan', 'floors'],
    rows,
  )


def count(setting, verified, replays):
  """Operations over the plain step's, given the replays a window had."""
  revisit = setting.get('revisit', 0)
  scored = sum(p if revisit is None else min(p, revisit) for p in range(WINDOW))
  forward = scored + 3 * replays
  if verified:
    forward += VERIFICATION / BATCH * WINDOW
  return 1 + forward / (3 * WINDOW)


def print_guided(data, sgd):
  model = models.cnn(SHAPE, CLASSES)
  loss_fn = models.cross_entropy(model)
  txs = {'plain': (sgd, False)} | {
    name: (
      gsgd_jax.guided(
        sgd,
        loss_fn,
        window=WINDOW,
        batch_like=rows_of(data, 0, BATCH),
        **setting,
      ),
      verified,
    )
    for name, (setting, verified) in DIAL.items()
  }
  programs, carries = {}, {}
  steps = _WINDOWS.value * WINDOW
  for name, (tx, verified) in txs.items():
    programs[name] = scanned(step_of(tx, loss_fn, data, verified), steps)
    carries[name] = start_of(model, tx)
  seconds = timing.medians(programs, carries, _ROUNDS.value)
  rows = []
  for name, (setting, verified) in DIAL.items():
    state = carries[name][1]
    replays = (state.gradient_evaluations - state.count) / state.count * WINDOW
    ratio = seconds[name] / seconds['plain']
    counted = count(setting, verified, float(replays))
    rows.append(
      [
        name,
        f'{float(replays):.2f}',
        f'{counted:.2f}',
        f'{ratio:.2f}',
        f'{ratio / counted:.2f}',
      ]
    )
  print(f'\nplain step: {seconds["plain"] / steps * 1e3:.1f} ms')
  timing.print_table(
    ['guided', 'replays a window', 'count', 'measured', 'over count'], rows
  )


def main(argv):
  del argv
  device = jax.devices()[0]
  print(f'jax {jax.__version__} on {device.platform} ({device.device_kind})')
  data = make_data()
  sgd = optax.with_extra_args_support(optax.sgd(0.01))
  print_steps(step_times(data, sgd))
  print_guided(data, sgd)


if __name__ == '__main__':
  app.run(main)
