"""What each setting of guided SGD's dial costs over the plain step.

  python -m benchmarks.guided

An MLP 64-512-10 on batches of 64, window 10, at most 4 replays, a verification
sample of 100. A forward pass of a batch is counted as F, a gradient as 3 F: so
a plain window costs 3 F window; re-scoring adds F for every batch scored anew,
verification 100 / 64 F an update, a replay 3 F. The replays that happened are
the ones counted. The measured ratio is to be at most 1.25 times the count, and
with stored gradients, where nothing is computed, at most 1.15.
"""

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

import gsgd_jax
from benchmarks import timing

_ROUNDS = flags.DEFINE_integer('rounds', 25, 'Rounds that are timed.')
_STEPS = flags.DEFINE_integer('steps', 300, 'Steps in a round.')

BATCH, WINDOW, REPLAYS, VERIFICATION = 64, 10, 4, 100
SIZES = (64, 512, 10)

# Settings, and whether a verification sample is given.
DIAL = {
  'exact': (dict(revisit=None), True),
  'exact re-scoring, running mean': (dict(revisit=None), False),
  'revisit 2': (dict(revisit=2), True),
  'convolutional variant': (
    dict(revisit=2, average_scores=True, replays=WINDOW // 2),
    True,
  ),
  'verification, no re-scoring': (dict(), True),
  'free scoring': (dict(), False),
  'free scoring, random replays': (dict(select='random'), False),
  'stored gradients': (dict(stored=True), False),
}


def make_data():
  """4,096 examples in 10 classes that overlap."""
  keys = jax.random.split(jax.random.key(0), 3)
  y = jax.random.randint(keys[0], (4096,), 0, SIZES[-1])
  centres = jax.random.normal(keys[1], (SIZES[-1], SIZES[0]))
  return 0.5 * centres[y] + jax.random.normal(keys[2], (4096, SIZES[0])), y


def make_params():
  keys = jax.random.split(jax.random.key(1), 2)
  inputs, hidden, classes = SIZES
  return {
    'w1': jax.random.normal(keys[0], (inputs, hidden)) / inputs**0.5,
    'b1': jnp.zeros([hidden]),
    'w2': jax.random.normal(keys[1], (hidden, classes)) / hidden**0.5,
    'b2': jnp.zeros([classes]),
  }


def loss_fn(params, batch):
  x, y = batch
  hidden = jax.nn.relu(x @ params['w1'] + params['b1'])
  logits = hidden @ params['w2'] + params['b2']
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def rows_of(data, start, size):
  return jax.tree.map(
    lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), data
  )


def program_of(tx, data, verified, steps):
  def step(carry, _):
    params, state, t = carry
    batch = rows_of(data, t * BATCH % (4096 - VERIFICATION), BATCH)
    value, grads = jax.value_and_grad(loss_fn)(params, batch)
    extra = dict(value=value, batch=batch)
    if verified:
      start = t * 37 % (4096 - VERIFICATION)
      extra['verification'] = rows_of(data, start, VERIFICATION)
    updates, state = tx.update(grads, state, params, **extra)
    return (optax.apply_updates(params, updates), state, t + 1), None

  return jax.jit(
    lambda carry: jax.lax.scan(step, carry, length=steps)[0], donate_argnums=0
  )


def guided(inner, data, stored=False, **setting):
  if stored:
    return gsgd_jax.guided(inner, window=WINDOW, **setting)
  return gsgd_jax.guided(
    inner, loss_fn, window=WINDOW, batch_like=rows_of(data, 0, BATCH), **setting
  )


def count(setting, verified, replays):
  """Operations over the plain step's, given the replays a window had."""
  if 'stored' in setting:
    return 1.0
  revisit = setting.get('revisit', 0)
  scored = sum(p if revisit is None else min(p, revisit) for p in range(WINDOW))
  forward = scored + 3 * replays
  if verified:
    again = 'average_scores' in setting
    forward += VERIFICATION / BATCH * (WINDOW + again)
  return 1 + forward / (3 * WINDOW)


def main(argv):
  del argv
  device = jax.devices()[0]
  print(f'jax {jax.__version__} on {device.platform} ({device.device_kind})\n')
  data = make_data()
  sgd = optax.with_extra_args_support(optax.sgd(0.05))
  txs = {'plain': (sgd, False)} | {
    name: (guided(sgd, data, **setting), verified)
    for name, (setting, verified) in DIAL.items()
  }
  programs, carries = {}, {}
  for name, (tx, verified) in txs.items():
    programs[name] = program_of(tx, data, verified, _STEPS.value)
    params = make_params()
    carries[name] = (params, tx.init(params), jnp.zeros([], jnp.int32))
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
        '-' if 'stored' in setting else f'{float(replays):.2f}',
        f'{counted:.2f}',
        f'{ratio:.2f}',
        f'{ratio / counted:.2f}',
      ]
    )
  plain = seconds['plain'] / _STEPS.value * 1e3
  print(f'plain step: {plain:.3f} ms')
  timing.print_table(
    ['setting', 'replays a window', 'count', 'measured', 'over count'], rows
  )


if __name__ == '__main__':
  app.run(main)
