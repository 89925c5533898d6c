"""Arrivals as they were recorded: traces, and the files that hold them."""

import csv
import json
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsgd_jax import _protocol, clock
from gsgd_jax.arrivals import ArrivalProcess
from gsgd_jax.clock import Time


class Trace(NamedTuple):
  """Who arrived when, in order.

  Attributes:
    workers: Whose gradient arrived, int64, shape ``(arrivals,)``.
    times: When, float64, shape ``(arrivals,)``, or None.
    entries: What an error calls each arrival, say ``'trace.csv, line 7'``.

  Examples:
    >>> import numpy as np
    >>> import gsgd_jax
    >>> trace = gsgd_jax.Trace(
    ...     np.array([0, 1, 0]), None, ['the first', 'the second', 'the third'])
    >>> gsgd_jax.recorded_arrivals(trace).length
    3
  """

  workers: np.ndarray
  times: np.ndarray | None
  entries: Sequence[str]


class Recording(NamedTuple):
  """A trace's times by worker: worker i's begin at `start[i]`."""

  start: jax.Array  # shape=(workers + 1,), int32.
  times: Time  # shape=(arrivals,).


def recorded_arrivals(
  workers: Sequence[int] | np.ndarray | Trace | str | os.PathLike,
  times: Sequence[float] | np.ndarray | None = None,
  *,
  unit: float | None = None,
) -> ArrivalProcess:
  """Arrivals as they were recorded: a trace of (worker, time).

  The order is the trace's, whatever its times: of equal times the earlier
  entry comes first. After the last entry nobody arrives any more, and updates
  are zero.

  Args:
    workers: Who arrived, worker by worker, ints from 0; or a :class:`Trace`; or
      a file that :func:`read_trace` can read.
    times: When, not decreasing, of at least 0; None for arrivals that are 1 / N
      apart. Time 0 is when all workers began.
    unit: How long a gradient takes on average, in the unit of ``times``. None
      measures it in the trace: every worker's mean time between arrivals, and
      their mean over the workers.

  Returns:
    An :class:`ArrivalProcess` with a ``length``.

  Raises:
    OSError: The file cannot be read.
    ValueError: The trace is empty, a worker is not an int from 0 or (when the
      transformation is initialised) there is none of that number, times run
      backwards, are negative or not finite, or not as many as the workers, or
      the last one is 0.

  Examples:
    >>> import gsgd_jax, optax
    >>> arrivals = gsgd_jax.recorded_arrivals(
    ...     [0, 1, 0, 0], times=[0.9, 1.4, 1.8, 2.9])
    >>> tx = gsgd_jax.asynchronous(optax.sgd(0.1), workers=2, arrivals=arrivals)
  """
  trace = _as_trace(workers, times)
  check_trace(trace)
  if unit is not None and _protocol.real('unit', unit) == 0:
    raise ValueError('unit must be positive, got 0')

  def init(workers, key):
    del key
    for worker, entry in zip(trace.workers, trace.entries, strict=True):
      if worker >= workers:
        raise ValueError(
          f'{entry}: worker must be below the number of workers, {workers}, '
          f'got {worker}'
        )
    by_worker = np.argsort(trace.workers, kind='stable')
    start = jnp.searchsorted(
      jnp.asarray(trace.workers[by_worker], jnp.int32),
      jnp.arange(workers + 1, dtype=jnp.int32),
    )
    when = _when(trace, workers, unit)
    return Recording(
      start.astype(jnp.int32),
      clock.arrays(Time(when.whole[by_worker], when.ticks[by_worker])),
    )

  def duration(recording, worker, task, now):
    index = recording.start[worker] + task
    there = index < recording.start[worker + 1]
    # Beyond the end an index is clamped, and what it finds is not used.
    finish = clock.at(recording.times, index)
    return clock.where(there, clock.subtract(finish, now), clock.never())

  return ArrivalProcess(init, duration, length=len(trace.workers))


def _as_trace(workers, times):
  if isinstance(workers, str | os.PathLike):
    workers = read_trace(workers)
  if isinstance(workers, Trace):
    if times is not None:
      raise ValueError('times belong to the trace, got both')
    trace = _as_trace(workers.workers, workers.times)
    if len(workers.entries) != len(trace.workers):
      raise ValueError(
        f'a trace must have a name for each arrival, got '
        f'{len(workers.entries)} for {len(trace.workers)}'
      )
    return trace._replace(entries=workers.entries)
  try:
    workers = np.asarray(workers)
    times = None if times is None else np.asarray(times, np.float64)
    valid = workers.ndim == 1 and (times is None or times.ndim == 1)
    valid &= not workers.size or np.issubdtype(workers.dtype, np.integer)
  except (TypeError, ValueError):
    valid = False
  if not valid:
    raise ValueError(
      'a trace must be a sequence of ints and one of numbers, got workers='
      f'{_protocol.in_a_line(workers)} and times={_protocol.in_a_line(times)}'
    )
  entries = [f'entry {i} of the trace' for i in range(len(workers))]
  return Trace(workers.astype(np.int64), times, entries)


def check_trace(trace: Trace) -> None:
  """Raises a ValueError that says which entry of a trace cannot be."""
  workers, times, entries = trace
  if not len(workers):
    raise ValueError('a trace must hold at least one arrival, got none')
  if times is not None and len(times) != len(workers):
    raise ValueError(
      f'a trace must hold a time for each arrival, got {len(times)} for '
      f'{len(workers)}'
    )
  for i, (worker, entry) in enumerate(zip(workers, entries, strict=True)):
    if worker < 0:
      raise ValueError(f'{entry}: worker must be at least 0, got {worker}')
    if times is None:
      continue
    if not 0 <= times[i] < np.inf:
      raise ValueError(
        f'{entry}: time must be finite and at least 0, got {times[i]:g}'
      )
    if i and times[i] < times[i - 1]:
      raise ValueError(
        f'{entry}: time runs backwards, from {times[i - 1]:g} to {times[i]:g}'
      )
  if times is not None and times[-1] == 0:
    raise ValueError(f'{entries[-1]}: the last time must be above 0')


def _when(trace, workers, unit):
  """The times in units, strictly increasing, tick by tick where they tie."""
  if trace.times is None:
    units = np.arange(1, len(trace.workers) + 1) / workers
  else:
    units = trace.times / (_mean_task_time(trace) if unit is None else unit)
  if units[-1] >= 2**31 - 2:
    raise ValueError(
      f'{trace.entries[-1]}: the clock reaches 2^31 units, got {units[-1]:g}'
    )
  whole, ticks = clock.of_float64(units)
  total = whole.astype(np.int64) * clock.TICKS + ticks
  steps = np.arange(len(total))
  # The least increasing sequence that is nowhere below.
  total = np.maximum.accumulate(total - steps) + steps
  whole, ticks = np.divmod(total, clock.TICKS)
  return Time(whole.astype(np.int32), ticks.astype(np.int32))


def _mean_task_time(trace):
  last = np.zeros(trace.workers.max() + 1)
  np.maximum.at(last, trace.workers, trace.times)
  counts = np.bincount(trace.workers)
  return (last[counts > 0] / counts[counts > 0]).mean()


def read_trace(path: str | os.PathLike) -> Trace:
  """Reads a trace: a line for each arrival, in order.

  A CSV file holds the worker and, if it is known, the time, in columns of
  these names or, without a header, in this order::

    worker,time
    0,0.93
    2,0.97

  A file of JSON lines holds objects, ``{"worker": 0, "time": 0.93}``. Other
  columns and fields are ignored, and so are empty lines.

  Args:
    path: The file, in UTF-8.

  Returns:
    A :class:`Trace`, for :func:`recorded_arrivals`.

  Raises:
    OSError: The file cannot be read.
    ValueError: It holds no arrival, or a line is malformed, has another worker
      than an int from 0, or a time that is not finite, negative or runs
      backwards; the sentence has the line's number.

  Examples:
    >>> import pathlib, tempfile
    >>> import gsgd_jax
    >>> path = pathlib.Path(tempfile.mkdtemp(), 'trace.csv')
    >>> _ = path.write_text('worker,time\\n0,0.9\\n1,1.1\\n')
    >>> print(*gsgd_jax.read_trace(path)[:2])
    [0 1] [0.9 1.1]
  """
  lines = _lines(path)
  if not lines:
    raise ValueError(f'{path} is empty: a trace holds a line for each arrival')
  read = _json_row
  if not lines[0][1].lstrip().startswith('{'):
    lines, columns = _header(path, lines)
    read = lambda text: _csv_row(text, columns)
  workers, times, entries = [], [], []
  for number, text in lines:
    entry = f'{path}, line {number}'
    try:
      worker, time = read(text)
    except ValueError as e:
      raise ValueError(f'{entry}: {e}') from None
    if times and (time is None) != (times[0] is None):
      raise ValueError(f'{entry}: either every arrival has a time, or none')
    workers.append(worker)
    times.append(time)
    entries.append(entry)
  if not entries:
    raise ValueError(f'{path} holds a header, but no arrival')
  timed = times[0] is not None
  trace = Trace(
    np.array(workers, np.int64),
    np.array(times, np.float64) if timed else None,
    entries,
  )
  check_trace(trace)
  return trace


def _lines(path):
  """(Number, text) of every line that is not empty."""
  try:
    with open(path, encoding='utf-8-sig', newline='') as file:
      text = file.read()
  except UnicodeDecodeError:
    raise ValueError(f'{path} is not a text file in UTF-8') from None
  lines = text.replace('\r\n', '\n').replace('\r', '\n').split('\n')
  return [(i, line) for i, line in enumerate(lines, 1) if line.strip()]


def _cells(text):
  try:
    return [cell.strip() for cell in next(csv.reader([text]))]
  except csv.Error as e:
    raise ValueError(f'not comma-separated values: {e}') from None


def _header(path, lines):
  """The lines below the header, if there is one; columns of worker and time."""
  number, text = lines[0]
  if text.lstrip()[0] in '+-.0123456789':
    return lines, None
  try:
    cells = _cells(text)
    if 'worker' not in cells:
      raise ValueError(
        'a header must name a column worker, and time if it is known, got '
        + _protocol.in_a_line(text.strip())
      )
  except ValueError as e:
    raise ValueError(f'{path}, line {number}: {e}') from None
  time = cells.index('time') if 'time' in cells else None
  return lines[1:], (cells.index('worker'), time, len(cells))


def _csv_row(text, columns):
  cells = _cells(text)
  if columns is None:
    if len(cells) > 2:
      raise ValueError(
        f'worker and time expected, got {len(cells)} values; name the columns '
        'in a header'
      )
    columns = (0, 1 if len(cells) == 2 else None, len(cells))
  worker, time, width = columns
  if len(cells) != width:
    raise ValueError(
      f'{width} comma-separated values expected, got '
      f'{_protocol.in_a_line(text)}'
    )
  return (
    _worker(_number(int, 'worker', cells[worker])),
    None if time is None else _number(float, 'time', cells[time]),
  )


def _worker(number):
  if number >= 2**31:
    raise ValueError(f'worker must be below 2^31, got {number}')
  return number


def _number(kind, name, given):
  try:
    return kind(given)
  except ValueError:
    what = 'an integer' if kind is int else 'a number'
    shown = _protocol.in_a_line(given)
    raise ValueError(f'{name} must be {what}, got {shown}') from None


def _json_row(text):
  try:
    row = json.loads(text)
  except ValueError:
    raise ValueError(
      f'a JSON object expected, got {_protocol.in_a_line(text.strip())}'
    ) from None
  if not isinstance(row, dict) or 'worker' not in row:
    raise ValueError(
      f'an object with a worker expected, got '
      f'{_protocol.in_a_line(text.strip())}'
    )
  worker, time = row['worker'], row.get('time')
  if type(worker) is not int:
    shown = _protocol.in_a_line(worker)
    raise ValueError(f'worker must be an integer, got {shown}')
  if time is not None and type(time) not in (int, float):
    raise ValueError(f'time must be a number, got {_protocol.in_a_line(time)}')
  try:
    return _worker(worker), None if time is None else float(time)
  except OverflowError:
    raise ValueError('time must be finite, got an integer too large') from None
