"""A real asynchronous parameter server, which the emulator then repeats.

  python examples/parameter_server.py
  python examples/parameter_server.py --workers=8 --updates=1000 --trace=t.csv

The workers are threads: each takes gradients of its own (compiled code runs
outside of Python's lock, so several at a time), and whoever arrives updates the
parameters under a lock. Given the same transformation, and the trace of who
arrived when, the emulator ends at the same parameters, to rounding.

Exit codes: 0 done, 1 the two differ, 2 bad input (one sentence).
"""

import pathlib
import sys
import threading
import time
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from sklearn import datasets

import gsgd_jax

_WORKERS = flags.DEFINE_integer('workers', 4, 'How many threads.', 1, 500)
_UPDATES = flags.DEFINE_integer('updates', 200, 'How many arrivals.', 1)
_TRACE = flags.DEFINE_string('trace', None, 'CSV file for who arrived when.')


class Server:
  """Parameters, a lock around them, and who arrived when."""

  def __init__(self, tx, params):
    self.params, self.state, self.version = params, tx.init(params), 0
    self.trace, self.began = [], time.perf_counter()
    self.lock, self.over = threading.Lock(), False
    # Nothing is donated: workers still hold what they have read.
    self.update = jax.jit(tx.update)

  def read(self):
    """Where a worker takes its next gradient, and updates applied so far."""
    return gsgd_jax.worker_params(self.params, self.state), self.version

  def arrive(self, worker, stale_params, version, batch, value, grads):
    """Applies a gradient. It is called under the lock, the clock included."""
    self.trace.append((worker, time.perf_counter() - self.began))
    updates, self.state = self.update(
      grads,
      self.state,
      self.params,
      value=value,
      batch=batch,
      staleness=np.int32(self.version - version),
      stale_params=stale_params,
      worker=np.int32(worker),
    )
    self.params = optax.apply_updates(self.params, updates)
    # What drop_stale or rennala refuse, or only keep, is no update. (Of one
    # inside another, the outer one is found first.)
    applied = optax.tree.get_all_with_path(self.state, 'applied')
    self.version = int(applied[0][1]) if applied else len(self.trace)


def serve(tx, loss_fn, params, batch_of, workers, updates, pause=0.002):
  """Trains on threads; returns the server once all of them have ended.

  So small a model lets nobody be late: workers pause before they send, for
  `pause` seconds on average, and the slowest for up to four times as long.
  """
  value_and_grad = jax.jit(jax.value_and_grad(loss_fn))

  def gradient(params, number):
    batch = batch_of(number)
    return batch, *jax.block_until_ready(value_and_grad(params, batch))

  def work(worker):
    (at, version), number = first, worker
    random = np.random.default_rng()
    while not server.over:
      computed = gradient(at, number)
      time.sleep(pause * (1 + 3 * worker / workers) * random.exponential())
      with server.lock:
        if server.over:
          return
        server.arrive(worker, at, version, *computed)
        arrivals = len(server.trace)
        server.over = arrivals >= updates
        if arrivals % 50 == 0:
          print(f'{arrivals} arrivals, loss {computed[1]:.3f}')
        (at, version), number = server.read(), workers - 1 + arrivals

  Server(tx, params).arrive(0, params, 0, *gradient(params, 0))  # Compiles.
  server = Server(tx, params)
  first = server.read()  # Everybody's.
  with futures.ThreadPoolExecutor(workers) as pool:
    try:
      with server.lock:  # Nobody arrives before everybody has begun.
        jobs = [pool.submit(work, worker) for worker in range(workers)]
      for job in futures.as_completed(jobs):
        job.result()  # Raises what its thread has raised.
    finally:
      server.over = True  # Whatever has happened, the others end too.
  return server


def emulate(tx, loss_fn, params, batch_of, workers, arrivals):
  """The same in the emulator; returns its parameters and its state."""
  tx = gsgd_jax.asynchronous(
    tx, workers, arrivals=arrivals, keep_params=True, batch_like=batch_of(0)
  )

  @jax.jit
  def step(params, state, batch):
    at = gsgd_jax.worker_params(params, state)
    value, grads = jax.value_and_grad(loss_fn)(at, batch)
    updates, state = tx.update(grads, state, params, value=value, batch=batch)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for number in range(workers - 1 + arrivals.length):  # First, N - 1 set out.
    params, state = step(params, state, batch_of(number))
  return params, state


def write_trace(path, trace):
  rows = [f'{worker},{seconds}\n' for worker, seconds in trace]
  pathlib.Path(path).write_text('worker,time\n' + ''.join(rows))


def difference(one, other):
  """The largest between any two parameters."""
  apart = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), one, other)
  return jnp.max(jnp.stack(jax.tree.leaves(apart)))


def loss_fn(params, batch):
  x, y = batch
  logits = x @ params['w'] + params['b']
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def main(_):
  """Softmax regression on digits: guided SGD with delay compensation."""
  x, y = datasets.load_digits(return_X_y=True)

  def batch_of(number):
    rows = np.random.default_rng(number).integers(len(x), size=16)
    return jnp.asarray(x[rows] / 16), jnp.asarray(y[rows])

  inner = optax.chain(gsgd_jax.delay_compensation(), optax.sgd(0.1))
  guided = gsgd_jax.guided(inner, loss_fn, batch_like=batch_of(0))
  tx = gsgd_jax.record_staleness(guided)
  params = {'w': jnp.zeros([64, 10]), 'b': jnp.zeros(10)}
  task = (tx, loss_fn, params, batch_of, _WORKERS.value)
  server = serve(*task, _UPDATES.value)
  losses = (loss_fn(w, (x / 16, y)) for w in (params, server.params))
  print('loss of all digits: {:.3f} before, {:.3f} after'.format(*losses))
  seen = gsgd_jax.staleness_summary(server.state)
  print(f'staleness: {seen.mean:.2f} on average, {seen.maximum} at most')
  who, when = zip(*server.trace, strict=True)
  print('arrivals of each worker:', *np.bincount(who, minlength=_WORKERS.value))
  arrivals = gsgd_jax.recorded_arrivals(who, when)
  if _TRACE.value is not None:
    write_trace(_TRACE.value, server.trace)
    arrivals = gsgd_jax.recorded_arrivals(_TRACE.value)
  apart = difference(server.params, emulate(*task, arrivals)[0])
  print(f'the emulator differs by {apart:.1e} at most')
  return int(not apart <= 1e-9)  # NaN is no agreement either.


def parse(argv):
  """Flags, or one sentence about a bad one."""
  try:
    rest = flags.FLAGS(argv)
    if rest[1:]:
      raise flags.Error(f'unexpected argument {rest[1]!r}')
    if _TRACE.value is not None:
      with open(_TRACE.value, 'a'):  # Before the work, not after.
        pass
    return rest
  except flags.IllegalFlagValueError as e:
    reason = (
      str(e).partition(': ')[0]
      + ': an integer from 1 on expected, of workers 500 at most'
    )
  except flags.Error as e:
    reason = str(e).splitlines()[0]
  except OSError as e:
    reason = f'cannot write {e.filename}: {e.strerror}'
  print(f'parameter_server.py: {reason}', file=sys.stderr)
  sys.exit(2)


if __name__ == '__main__':
  jax.config.update('jax_enable_x64', True)  # To compare them to rounding.
  logging.set_verbosity(logging.ERROR)  # JAX says which backends it lacks.
  app.run(main, flags_parser=parse)
