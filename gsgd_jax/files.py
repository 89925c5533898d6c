"""The files of a run, each whole at any moment.

| file            | holds                                                     |
|-----------------|-----------------------------------------------------------|
| `config.json`   | every setting, written before training begins             |
| `metrics.jsonl` | a line for each evaluation of each method, as it happens  |
| `timing.jsonl`  | when each of these lines was measured                     |
| `result.json`   | test accuracies, status, versions; written at the end     |
| `curves.png`    | the picture of them, by updates and by simulated time     |
| `staleness.png` | how stale gradients were, and whose; where workers are    |
| `checkpoints/`  | where the run can go on; see `gsgd_jax.checkpoints`       |
| `evaluation.json` | what `--mode=eval` has measured of these                |

`docs/files.schema.json` describes every field. Only `timing.jsonl` depends on
the clock: the other files of two equal runs on one machine are equal. JSON has
no word for NaN or infinity: they are null.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections
import numpy as np

from gsgd_jax import events

NAMES = (
  'config.json',
  'metrics.jsonl',
  'timing.jsonl',
  'result.json',
  'curves.png',
  'staleness.png',
  'checkpoints',
)
# In a line of metrics; `result.json` has every worker.
_MOST_SHARES = 64


def of_a_run(workdir: pathlib.Path) -> str | None:
  """The name of a run's file that a folder already holds, or None."""
  return next((name for name in NAMES if (workdir / name).exists()), None)


def fresh_folder(parent: pathlib.Path, name: str, now: str) -> pathlib.Path:
  """Makes a fresh folder that sorts by time; never one that exists."""
  for attempt in range(1000):
    suffix = f'-{attempt + 1}' if attempt else ''
    folder = parent / f'{now}{suffix}-{name}'
    try:
      folder.mkdir(parents=True)
    except FileExistsError:
      continue
    return folder
  raise FileExistsError(f'no fresh folder for {now} in {parent}')


def lock(workdir: pathlib.Path) -> Callable[[], Any]:
  """Keeps a folder for this process, until it ends, however it does.

  Returns:
    A function of nothing that lets go of it before that.

  Raises:
    ValueError: Another process has it.
  """
  try:
    import fcntl
  except ImportError:  # Windows.
    return lambda: None
  folder = os.open(workdir, os.O_RDONLY)
  try:
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as e:
    os.close(folder)
    raise ValueError(
      f'another process is training in {workdir}; give another --workdir'
    ) from e
  except OSError:  # Not every file system has locks.
    pass
  return functools.partial(os.close, folder)


def write_whole(
  path: pathlib.Path, make: Callable[[pathlib.Path], Any]
) -> None:
  """Lets `make` write a file aside and renames it: all of it or nothing."""
  aside = path.with_name(f'.{path.stem}.partial{path.suffix}')
  try:
    make(aside)
    with open(aside, 'rb') as file:
      os.fsync(file.fileno())  # Its bytes are there before its name is.
    os.replace(aside, path)
  except OSError as e:
    raise named(e, path) from e
  finally:
    aside.unlink(missing_ok=True)


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a JSON file whole."""
  text = json.dumps(plain(content), indent=2, allow_nan=False)
  write_whole(path, lambda aside: aside.write_text(text + '\n'))


def plain(value: Any) -> Any:
  """What JSON can say of a value: lists, numbers, and null for NaN.

  Examples:
    >>> import numpy as np
    >>> from gsgd_jax import files
    >>> files.plain({'a': np.array([1.5, np.nan]), 'b': (1, None)})
    {'a': [1.5, None], 'b': [1, None]}
  """
  if isinstance(value, np.ndarray | np.generic):
    value = value.tolist()
  if isinstance(value, dict):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


class Lines:
  """A file of JSON lines that grows by whole lines."""

  def __init__(self, path: pathlib.Path, more: bool = False) -> None:
    """Makes the file, which may only exist where there is to be more of it."""
    self._path = path
    try:
      mode = 'ab' if more else 'xb'
      self._file = open(path, mode, buffering=0)  # noqa: SIM115
    except OSError as e:
      raise named(e, path) from e

  def write(self, content: dict[str, Any]) -> None:
    """Appends a line; where only a part of it finds room, none of it."""
    line = json.dumps(plain(content), allow_nan=False).encode() + b'\n'
    end = self._file.tell()
    try:
      while line:
        line = line[self._file.write(line) :]
    except OSError as e:
      with contextlib.suppress(OSError):
        self._file.truncate(end)
      raise named(e, self._path) from e

  def sync(self) -> None:
    """Returns when what was written is on the disk."""
    try:
      os.fsync(self._file.fileno())
    except OSError as e:
      raise named(e, self._path) from e

  def close(self) -> None:
    """No more lines."""
    self._file.close()


def keep_lines(path: pathlib.Path, kept: dict[str, int]) -> dict | None:
  """Drops all lines of a file but the first ones of each method.

  Args:
    path: A file of JSON lines, each with a ``method``, or none.
    kept: How many of which method.

  Returns:
    The last that stays, if any.
  """
  if not path.exists():
    return None
  left, lines, last = dict(kept), [], None
  for line, said in whole_lines(path):
    if left.get(said['method'], 0) > 0:
      left[said['method']] -= 1
      lines.append(line)
      last = said
  whole = b''.join(lines)
  if whole != path.read_bytes():
    write_whole(path, lambda aside: aside.write_bytes(whole))
  return last


def whole_lines(
  path: pathlib.Path, named: str = 'method'
) -> Iterator[tuple[bytes, dict[str, Any]]]:
  """The lines of such a file, each `named`, and what they say; none torn."""
  for line in path.read_bytes().splitlines(keepends=True):
    try:
      said = json.loads(line)
    except ValueError:
      continue
    if line.endswith(b'\n') and isinstance(said, dict) and named in said:
      yield line, said


def named(error: OSError, path: pathlib.Path) -> OSError:
  """The same error, that names the file it happened to."""
  if error.errno is None:
    return error
  return OSError(error.errno, os.strerror(error.errno), str(path))


class Log:
  """Writes a run's `config.json`, `metrics.jsonl` and `timing.jsonl`.

  Args:
    workdir: A folder that holds no run, or one that goes on.
    config: The run's settings.
    began: When the program began, by ``time.perf_counter()``.
    kept: Of a run that goes on: how many lines of which method stay.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    began: float,
    kept: dict[str, int] | None = None,
  ) -> None:
    metrics, timing = (
      workdir / f'{name}.jsonl' for name in ('metrics', 'timing')
    )
    self._began = began
    goes_on = kept is not None
    if goes_on:
      keep_lines(metrics, kept)
      last = keep_lines(timing, kept)
      self._began -= last['seconds'] if last else 0.0
    # First what makes this a folder where a run can go on.
    write_json(workdir / 'config.json', config.to_dict())
    self._metrics = Lines(metrics, more=goes_on)
    self._timing = Lines(timing, more=goes_on)
    self._last = None  # When, and at which step, of which method.

  def add(self, event: events.Event, when: float) -> None:
    """Writes what there is to write about an event at a time."""
    if not isinstance(event, events.Evaluation):
      return
    line = {'method': event.method.name, 'step': event.step}
    fields = ('epoch', *events.MEASURED)
    measured = {f: getattr(event, f) for f in fields}
    self._metrics.write(line | measured | _arrivals(event.arrivals))
    rate = None
    if self._last is not None and self._last[2] == event.method:
      before, step, _ = self._last
      rate = (event.step - step) / (when - before)
    self._last = (when, event.step, event.method)
    self._timing.write(
      line | {'seconds': when - self._began, 'updates_per_second': rate}
    )

  def sync(self) -> None:
    """Returns when every line is on the disk."""
    self._metrics.sync()
    self._timing.sync()

  def close(self) -> None:
    """Closes the files."""
    self._metrics.close()
    self._timing.close()


def _arrivals(arrivals):
  """A histogram without the empty bins at its end; shares, not too many."""
  shares = arrivals.shares
  if len(shares) > _MOST_SHARES:
    shares = np.quantile(shares, np.linspace(0, 1, _MOST_SHARES))
  return {
    'staleness_histogram': np.trim_zeros(arrivals.histogram, 'b'),
    'worker_shares': shares,
  }
