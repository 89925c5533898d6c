"""Processes that compute the cells of a study, each on a core of its own.

A worker reads groups of cells as lines of JSON and answers with a line for each
cell. It has a core to itself: the operations of small models are too short to
be shared, and tracing holds Python's lock.
"""

import contextlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from gsgd_jax import checkpoints, events, files, study, sweeps

# Half of the compilation, at no cost where operations are small.
_FLAGS = '--xla_backend_optimization_level=1'


class Failed(RuntimeError):
  """A worker has come to an end before its work did."""


def number(wanted: int | None, groups: int) -> int:
  """How many processes are to compute; 0 is this one."""
  if wanted is None:
    if jax.default_backend() != 'cpu':
      return 0
    wanted = len(_cores())
  return min(wanted, groups)


def _cores():
  """The cores that this process may have."""
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def computed(
  groups: Sequence[study.Group], processes: int
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Computes groups of cells.

  Args:
    groups: Which.
    processes: How many compute; 0 is this one.

  Yields:
    A cell's key and the line about it, whenever a cell is finished; see
    `study.compute`.

  Raises:
    Failed: A process was killed, or ran out of memory.
  """
  if not processes:
    for group in groups:
      for cell, line in study.compute(group):
        yield cell.key, _as_json(line)
    return
  with contextlib.closing(_Crew(groups, processes)) as crew:
    yield from crew.lines()


def _as_json(line):
  """A line as a file would have it."""
  return json.loads(json.dumps(files.plain(line), allow_nan=False))


class _Crew:
  """Threads that give groups to processes, and take what they answer."""

  def __init__(self, groups, processes):
    self._groups = queue.SimpleQueue()
    self._size = processes
    for group in groups:
      self._groups.put(_told(group))
    self._answers = queue.Queue()
    cores = _cores()
    self._workers = [_started(cores[i % len(cores)]) for i in range(processes)]
    for worker in self._workers:
      threading.Thread(target=self._serve, args=[worker], daemon=True).start()

  def _serve(self, worker):
    """Gives one worker groups until none is left."""
    with contextlib.suppress(OSError, ValueError):
      while True:
        try:
          group = self._groups.get_nowait()
        except queue.Empty:
          self._answers.put(None)
          return
        worker.stdin.write(group + b'\n')
        worker.stdin.flush()
        for line in iter(worker.stdout.readline, b''):
          answer = json.loads(line)
          if answer is None:
            break
          self._answers.put(answer)
        else:
          break
    self._answers.put(Failed(f'exit code {worker.wait()}'))

  def lines(self):
    """(Key, line) of every cell."""
    idle = 0
    while idle < self._size:
      answer = self._answers.get()
      if answer is None:
        idle += 1
      elif isinstance(answer, Failed):
        raise answer
      else:
        yield answer['cell'], answer

  def close(self):
    """Ends all workers, whatever they are at."""
    for worker in self._workers:
      worker.kill()
      worker.wait()
      for stream in filter(None, (worker.stdin, worker.stdout)):
        with contextlib.suppress(OSError):  # What it no longer reads.
          stream.close()


def _started(core):
  """A worker process on a core."""
  here = str(pathlib.Path(__file__).resolve().parent.parent)
  paths = [here, *filter(None, [os.environ.get('PYTHONPATH')])]
  flags = f'{os.environ.get("XLA_FLAGS", "")} {_FLAGS}'.strip()
  return subprocess.Popen(
    [sys.executable, '-c', _PROGRAM, str(core)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env=os.environ | {'PYTHONPATH': os.pathsep.join(paths), 'XLA_FLAGS': flags},
    start_new_session=True,  # An interrupt is for who started it.
  )


# The core is taken before JAX counts them.
_PROGRAM = """
import os, sys
if hasattr(os, 'sched_setaffinity'):
  os.sched_setaffinity(0, {int(sys.argv[1])})
from gsgd_jax import crew
crew.work()
"""


def work() -> None:
  """Computes what comes on standard input; ends as soon as that ends."""
  answers = os.fdopen(os.dup(1), 'wb')
  os.dup2(2, 1)  # What else is printed is no answer.
  asked = queue.SimpleQueue()

  def read():
    for line in sys.stdin.buffer:
      asked.put(line)
    os._exit(1)  # Nobody is there to be answered, whatever is at work.

  threading.Thread(target=read, daemon=True).start()

  def answer(line):
    answers.write(json.dumps(line, allow_nan=False).encode() + b'\n')
    answers.flush()

  while True:
    for _, found in study.compute(_understood(asked.get())):
      answer(files.plain(found))
    answer(None)


def _told(group):
  """A group as a line of JSON."""
  cells = [
    [
      c.values,
      files.plain(c.config.to_dict()),
      c.method.name,
      [list(b) for b in c.budgets],
      c.key,
    ]
    for c in group.cells
  ]
  return json.dumps(cells, allow_nan=False).encode()


def _understood(line):
  cells = [
    study.Cell(
      values,
      checkpoints.from_plain(plain),
      events.method_named(name),
      tuple(sweeps.Budget(*b) for b in budgets),
      key,
    )
    for values, plain, name, budgets, key in json.loads(line)
  ]
  return study.Group(cells)
