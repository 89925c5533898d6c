"""What checkpoints cost: a step's time with one every 30 seconds, over without.

  python -m benchmarks.checkpointing

One run trains all the while, and writes a checkpoint every other 30 seconds:
the spans that begin with one are compared with those that hold none. Two tasks:
the default one, and an MLP of 10 million parameters with 16 workers, whose ring
alone is 640 MB. The quotient is to be at most 1.05.

The floor is what has to be done to the bytes: written once, and read once for
their digests. Both are timed, on as many bytes, while nothing else runs.
"""

import hashlib
import os
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks import timing
from gsgd_jax import checkpoints, events, experiment, settings

_SECONDS = flags.DEFINE_float('seconds', 30.0, 'Between two checkpoints.')
_PAIRS = flags.DEFINE_integer('pairs', 3, 'Spans with a checkpoint.')
_ONLY = flags.DEFINE_list('only', [], 'default, large')
_HIDDEN = flags.DEFINE_integer('hidden', 3080, "Of the large MLP's two layers.")


def config_of(name):
  """A run that does not end by itself; `name` is 'default' or 'large'."""
  config = settings.default_config()
  config.methods = ('asynchronous',)
  config.updates = 2**30
  # As often, by the clock, as the default run is evaluated.
  config.evaluate_every = 50_000
  if name == 'large':
    config.hidden = (_HIDDEN.value, _HIDDEN.value)
    config.seeds = 1
    config.evaluate_every = 500
    config.learning_rate = 0.01
  config.checkpoint_minutes = 2 * _SECONDS.value / 60
  return config


class Timed(checkpoints.Writer):
  """A writer that says when it was called, and how much it was given."""

  def __init__(self, *args):
    super().__init__(*args)
    self.began, self.blocked, self.bytes = [], [], 0

  def save(self, method, step, position, items):
    """Writes, and takes note."""
    self.began.append(time.perf_counter())
    self.bytes = sum(x.nbytes for x in jax.tree.leaves(items))
    super().save(method, step, position, items)
    self.blocked.append(time.perf_counter() - self.began[-1])


def measured(name, folder):
  """Quotients of times per step, seconds that training waited, bytes."""
  writer = Timed(folder, config_of(name))
  when, steps = [], []
  span = _SECONDS.value
  for event in experiment.stream(config_of(name), writer=writer):
    if isinstance(event, events.Progress):
      when.append(time.perf_counter())
      steps.append(event.step)
      needed = _PAIRS.value
      over = len(writer.began) >= needed and (
        when[-1] > writer.began[needed - 1] + 2 * span
      )
      if over:
        break
  writer.close()
  quotients = []
  for begun in writer.began[: _PAIRS.value]:
    edges = np.interp([begun, begun + span, begun + 2 * span], when, steps)
    with_one, without = np.diff(edges)
    quotients.append(without / with_one)
  return quotients, statistics.median(writer.blocked), writer.bytes


def floor(size, folder):
  """Seconds to write so many bytes, and to read them for a digest."""
  block = np.random.default_rng(0).bytes(2**24)
  path = folder / 'bytes'
  began = time.perf_counter()
  with open(path, 'wb') as file:
    for _ in range(-(-size // len(block))):
      file.write(block)
    file.flush()
    os.fsync(file.fileno())
  written = time.perf_counter()
  with open(path, 'rb') as file:
    hashlib.file_digest(file, 'sha256')
  return written - began, time.perf_counter() - written


def main(argv):
  """Prints the table."""
  del argv
  logging.set_verbosity(logging.ERROR)
  head = ['task', 'MB', 'with over without', 'waited, s']
  head += ['write and digest at least, s']
  rows = []
  for name in _ONLY.value or ('default', 'large'):
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      quotients, blocked, size = measured(name, folder / 'checkpoints')
      least = floor(size, folder)
    shown = ', '.join(f'{q:.3f}' for q in sorted(quotients))
    rows.append(
      [
        name,
        f'{size / 1e6:,.1f}',
        f'{statistics.median(quotients):.3f} ({shown})',
        f'{blocked:.3f}',
        ' + '.join(f'{seconds:.2f}' for seconds in least),
      ]
    )
  timing.print_table(head, rows)


if __name__ == '__main__':
  app.run(main)
