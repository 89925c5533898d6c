"""The emulator does what a real server does: threads, replayed by their trace.

Who arrives when is up to the machine, so no two runs of these tests are alike.
"""

import importlib.util
import pathlib
import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gsgd_jax

PROGRAM = pathlib.Path(__file__).parents[1] / 'examples' / 'parameter_server.py'
WORKERS = 4
UPDATES = 60
PAUSE = 0.001


def _loaded():
  spec = importlib.util.spec_from_file_location('parameter_server', PROGRAM)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


example = _loaded()


def loss_fn(params, batch):
  """Of a small net, so that no gradient is right elsewhere."""
  x, y = batch
  hidden = jnp.tanh(x @ params['in'])
  return jnp.mean((hidden @ params['out'] - y) ** 2)


def batch_of(number):
  random = np.random.default_rng(number)
  x = random.normal(size=(8, 5))
  y = np.sin(x[:, 0]) + x[:, 1] * x[:, 2] + 0.1 * random.normal(size=8)
  return jnp.asarray(x), jnp.asarray(y)


def begin():
  random = np.random.default_rng(1)
  return {
    'in': jnp.asarray(random.normal(size=(5, 4))) / 2,
    'out': jnp.asarray(random.normal(size=4)) / 2,
  }


def guided(inner, batches=1, **options):
  """Guided SGD; its batches are so many of `batch_of`'s, joined."""
  like = jax.tree.map(lambda x: jnp.concatenate([x] * batches), batch_of(0))
  options = {'window': 6, **options}
  return gsgd_jax.guided(inner, loss_fn, batch_like=like, **options)


def verified(tx):
  """The server's own addition: a batch on which the average error is taken."""

  def update_fn(updates, state, params=None, **extra_args):
    extra_args['verification'] = batch_of(10_000)
    return tx.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def momentum():
  return optax.sgd(0.01, momentum=0.9)


def dana():
  return gsgd_jax.dana(0.01, WORKERS)


TRANSFORMATIONS = {
  'sgd': lambda: optax.sgd(0.05),
  'adam': lambda: optax.adam(0.01),
  'delay compensation': lambda: optax.chain(
    gsgd_jax.delay_compensation(1.0), momentum()
  ),
  'adaptive delay compensation': lambda: optax.chain(
    gsgd_jax.delay_compensation(adaptive=True), momentum()
  ),
  'exact delay compensation': lambda: optax.chain(
    gsgd_jax.exact_delay_compensation(loss_fn), momentum()
  ),
  'scaled by staleness': lambda: optax.chain(
    gsgd_jax.scale_by_staleness(), momentum()
  ),
  'spike compensation': lambda: gsgd_jax.spike_compensation(0.01, WORKERS - 1),
  'adaptive braking': lambda: gsgd_jax.adaptive_braking(0.01),
  'dana': dana,
  'dana, delay compensation': lambda: optax.chain(
    gsgd_jax.delay_compensation(1.0), dana()
  ),
  'smega2': lambda: gsgd_jax.smega2(0.01, WORKERS),
  'predict': lambda: gsgd_jax.predict(momentum(), WORKERS - 1),
  'delayed nesterov': lambda: gsgd_jax.delayed_nesterov(0.05, WORKERS),
  'asynchronous nesterov': lambda: gsgd_jax.asynchronous_nesterov(0.1, 0.9),
  'guided': lambda: guided(optax.sgd(0.05)),
  'guided, exact': lambda: verified(guided(optax.sgd(0.05), revisit=None)),
  'guided, delay compensation': lambda: guided(
    optax.chain(gsgd_jax.delay_compensation(1.0), momentum())
  ),
  'guided, dana, replays beside': lambda: guided(
    dana(), replay_with=optax.sgd(0.05)
  ),
  'drop stale, guided': lambda: gsgd_jax.drop_stale(
    guided(optax.sgd(0.05)), max_staleness=WORKERS // 2
  ),
  'rennala': lambda: gsgd_jax.rennala(optax.sgd(0.05), 3),
  'rennala, guided': lambda: gsgd_jax.rennala(
    guided(optax.sgd(0.05), batches=2), 2, batch_like=batch_of(0)
  ),
  'drop stale, rennala': lambda: gsgd_jax.drop_stale(
    gsgd_jax.rennala(optax.sgd(0.05), 2), max_staleness=1
  ),
}


class Straggling:
  """`batch_of`, where one batch comes only after many later ones were drawn.

  So whoever waits for it is late, however busy the machine is.
  """

  def __init__(self, late=8, until=40):
    self._late, self._until = late, until
    self._drawn = threading.Condition()
    self._latest = -1

  def __call__(self, number):
    with self._drawn:
      self._latest = max(self._latest, number)
      self._drawn.notify_all()
      if number == self._late:
        self._drawn.wait_for(lambda: self._latest >= self._until, timeout=60)
    return batch_of(number)


def serve(tx, workers=WORKERS, updates=UPDATES, batch_of=batch_of):
  return example.serve(
    tx, loss_fn, begin(), batch_of, workers, updates, pause=PAUSE
  )


def emulate(tx, arrivals, workers=WORKERS):
  return example.emulate(tx, loss_fn, begin(), batch_of, workers, arrivals)


def assert_same(server, params):
  assert example.difference(server.params, params) < 1e-9
  assert example.difference(server.params, begin()) > 1e-3


@pytest.mark.parametrize('name', TRANSFORMATIONS)
def test_the_emulator_repeats_the_server(name):
  if name == 'adam':  # Of optax, which is not that strict. Threads see this.
    jax.config.update('jax_numpy_dtype_promotion', 'standard')
  tx = gsgd_jax.record_staleness(TRANSFORMATIONS[name]())
  server = serve(tx, batch_of=Straggling())
  arrivals = gsgd_jax.recorded_arrivals(*zip(*server.trace, strict=True))
  assert arrivals.length == UPDATES
  params, state = emulate(tx, arrivals)
  assert_same(server, params)
  for stated, emulated in zip(
    jax.tree.leaves(server.state),
    jax.tree.leaves(state.inner_state),
    strict=True,
  ):
    np.testing.assert_allclose(stated, emulated, rtol=1e-9, atol=1e-9)
  assert server.version == state.version
  seen = gsgd_jax.staleness_summary(server.state)
  np.testing.assert_array_equal(
    seen.histogram, gsgd_jax.staleness_summary(state).histogram
  )
  assert seen.count == UPDATES
  # Where all were equally late this would prove little.
  assert np.count_nonzero(seen.histogram) >= 3
  assert len(np.unique([worker for worker, _ in server.trace])) == WORKERS


def test_a_trace_file_holds_all_that_the_emulator_needs(tmp_path):
  tx = guided(momentum())
  server = serve(tx)
  path = tmp_path / 'trace.csv'
  example.write_trace(path, server.trace)
  trace = gsgd_jax.read_trace(path)
  assert list(zip(trace.workers, trace.times, strict=True)) == server.trace
  params, state = emulate(tx, gsgd_jax.recorded_arrivals(path))
  assert_same(server, params)
  assert gsgd_jax.simulated_time(state) > 0


def test_another_order_gives_other_parameters():
  """The comparison can fail."""
  server = serve(optax.sgd(0.05))
  who = [worker for worker, _ in server.trace]
  params, _ = emulate(optax.sgd(0.05), gsgd_jax.recorded_arrivals(who[::-1]))
  assert example.difference(server.params, params) > 1e-6


def test_one_worker_is_never_late():
  tx = gsgd_jax.record_staleness(momentum())
  server = serve(tx, workers=1, updates=10)
  assert gsgd_jax.staleness_summary(server.state).maximum == 0
  params, _ = emulate(tx, gsgd_jax.recorded_arrivals([0] * 10), workers=1)
  assert_same(server, params)


def test_more_workers_than_arrivals():
  server = serve(optax.sgd(0.05), workers=6, updates=3)
  arrivals = gsgd_jax.recorded_arrivals(*zip(*server.trace, strict=True))
  params, _ = emulate(optax.sgd(0.05), arrivals, workers=6)
  assert len(server.trace) == 3
  assert_same(server, params)


def test_what_a_worker_raises_ends_the_run():
  def fails(number):
    if number == 20:
      raise OSError('the disk is gone')
    return batch_of(number)

  before = threading.active_count()
  with pytest.raises(OSError, match='the disk is gone'):
    serve(optax.sgd(0.05), updates=10**9, batch_of=fails)
  assert threading.active_count() == before


def test_what_the_update_raises_ends_the_run():
  def shrinks(number):
    x, y = batch_of(number)
    return (x, y) if number < 20 else (x[:4], y[:4])

  before = threading.active_count()
  with pytest.raises(ValueError, match='pass batches like batch_like'):
    serve(guided(optax.sgd(0.05)), updates=10**9, batch_of=shrinks)
  assert threading.active_count() == before


def run(directory, *arguments):
  return subprocess.run(
    [sys.executable, str(PROGRAM), *arguments],
    cwd=directory,
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_the_program(tmp_path):
  done = run(tmp_path, '--workers=3', '--updates=50', '--trace=trace.csv')
  assert done.returncode == 0, done.stderr
  assert not done.stderr
  assert '50 arrivals, loss' in done.stdout
  before, after = re.search(
    r'loss of all digits: (\S+) before, (\S+) after', done.stdout
  ).groups()
  assert float(before) > float(after)
  shares = re.search('arrivals of each worker: (.*)', done.stdout)[1].split()
  assert len(shares) == 3 and sum(map(int, shares)) == 50
  assert re.search(r'staleness: \S+ on average, \d+ at most', done.stdout)
  differs = re.search(r'the emulator differs by (\S+) at most', done.stdout)
  assert float(differs[1]) < 1e-9
  assert [path.name for path in tmp_path.iterdir()] == ['trace.csv']
  trace = gsgd_jax.read_trace(tmp_path / 'trace.csv')
  assert np.bincount(trace.workers).tolist() == list(map(int, shares))


@pytest.mark.parametrize(
  ('flag', 'sentence'),
  [
    (
      '--workers=0',
      'flag --workers=0: an integer from 1 on expected, of workers 500 at most',
    ),
    ('--trace=no/t.csv', 'cannot write no/t.csv: No such file or directory'),
  ],
)
def test_bad_flags(tmp_path, flag, sentence):
  done = run(tmp_path, flag)
  assert done.returncode == 2
  assert done.stderr == f'parameter_server.py: {sentence}\n'
  assert not done.stdout and not list(tmp_path.iterdir())
