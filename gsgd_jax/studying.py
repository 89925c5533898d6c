"""A study run from the command line: its files, its progress, its report."""

import contextlib
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, TextIO

import ml_collections
import tqdm

from gsgd_jax import (
  application,
  crew,
  experiment,
  files,
  settings,
  study,
  study_report,
)

_CELLS, _TIMING = 'cells.jsonl', 'timing.jsonl'
_LINE_SECONDS = 30.0  # Between lines where there is no terminal.
_ONE_SIGNAL = 1.0  # Seconds within which several signals are one.


def check(config: ml_collections.ConfigDict) -> list[study.Cell]:
  """The cells of a study, looked at; nothing is computed.

  Raises:
    ValueError: Something is wrong with the config.
    OSError: Data cannot be read.
  """
  _check_own(config)
  found = study.cells(config)
  if not found:
    raise ValueError('the study has no cells: its axes hold no values')
  for cell in found:
    _check_cell(cell)
  seen = set()
  for group in study.groups(found):
    cell = group.cells[0]
    what = (cell.method.name, cell.config.optimizer, cell.config.model)
    if what not in seen:
      seen.add(what)
      experiment.check(_of_one(cell))
  return found


def _check_own(config):
  unknown = [n for n in config if n not in study.default_config()]
  if unknown:
    raise ValueError(
      f'unknown setting {unknown[0]}'
      + settings.nearest(unknown[0], study.default_config())
    )
  for name, least in (
    ('first_seed', 0),
    ('tuning_seeds', int(config.tune)),
    ('seeds', 1),
    ('lanes', 1),
  ):
    if isinstance(config[name], bool) or config[name] < least:
      raise ValueError(f'{name} must be at least {least}, got {config[name]!r}')
  if config.jobs is not None and config.jobs < 0:
    raise ValueError(f'jobs must be at least 0, got {config.jobs}')
  if config.time is not None and not config.time > 0:
    raise ValueError(f'time must be positive, got {config.time}')
  if not config.budgets:
    raise ValueError(f'budgets must name some of {", ".join(study.KINDS)}')
  if any(not price >= 0 for price in config.sync_costs):
    raise ValueError(
      f'sync_costs must be at least 0, got {tuple(config.sync_costs)}'
    )


def _check_cell(cell):
  """Raises a ValueError that says what of a cell is wrong, if anything."""
  config = cell.config
  if config.tune and not config.validation_share:
    raise ValueError(
      'learning rates are tuned on validation data, and validation_share is 0; '
      'give it a share, or say tune=False'
    )
  if config.tune and not config.learning_rate:
    raise ValueError(
      'tuning begins at learning_rate, which must be positive, got '
      f'{config.learning_rate}'
    )
  if config.dropout or config.augmentation is not None:
    raise ValueError('studies have no dropout and no augmentation')
  if not config.tune and config.learning_rate is None:
    raise ValueError(f'{study.shown(cell)} needs a learning_rate')
  experiment.check_sizes(config, study.load(config, 0))


def _of_one(cell):
  """The config of a cell, as an experiment of one seed."""
  config = settings.default_config()
  with config.ignore_type():
    for name in config:
      config[name] = cell.config[name]
  config.methods, config.seeds = (cell.method.name,), 1
  config.devices = 1
  return config


def run(
  config: ml_collections.ConfigDict,
  found: Sequence[study.Cell],
  workdir: pathlib.Path,
  bar: bool | None = None,
  tables: bool = True,
) -> int:
  """Computes what is missing of a study, and writes its report.

  Args:
    config: Its settings.
    found: What `check` has returned.
    workdir: Its folder; this process has locked it.
    bar: Whether progress is a bar; None: on a terminal.
    tables: Whether what was found, and where it is written, is printed as well.

  Returns:
    The exit code.
  """
  with _listening():
    return _run(config, found, workdir, bar, tables)


def _run(config, found, workdir, bar, tables):
  lines = finished(workdir) if config.resume else {}
  missing = list({c.key: c for c in found if c.key not in lines}.values())
  whole = len({c.key for c in found})
  files.write_json(workdir / 'config.json', _plain(config))
  if missing:
    said = 'going on: ' if lines else ''
    application.say(
      f'{said}{len(missing)} of {whole} cells to compute', sys.stderr
    )
  progress = _Progress(whole, whole - len(missing), sys.stderr, bar)
  mend(workdir)
  code = _compute(config, missing, workdir, progress, lines)
  _report(config, found, lines, workdir, tables)
  if code == application.INTERRUPTED:
    application.warn(f'interrupted; --workdir={workdir} goes on')
  return code


def _compute(config, missing, workdir, progress, lines):
  """Computes cells; each is written, and added to `lines`, when finished."""
  code = application.DONE
  store = files.Lines(workdir / _CELLS, more=True)
  timing = files.Lines(workdir / _TIMING, more=True)
  try:
    for key, line, seconds in _computed(config, missing):
      progress.add(line['values'])
      if 'error' in line:
        code = application.FAILED
        what = ', '.join(line['values'].values())
        progress.note(f'train.py: {what}: {line["error"]}')
        continue
      store.write(line)
      timing.write({'cell': key, 'seconds': seconds})
      lines[key] = line
  except KeyboardInterrupt:
    code = application.INTERRUPTED
  except crew.Failed as e:
    code = application.FAILED
    application.warn(f'cannot go on: a process that computes has ended: {e}')
  finally:
    progress.close()
    store.close()
    timing.close()
  return code


def _computed(config, missing):
  """(Key, line, seconds since the start) of every cell, as it is finished."""
  began = time.perf_counter()
  groups = sorted(study.groups(missing), key=lambda group: -len(group.cells))
  for key, line in crew.computed(groups, crew.number(config.jobs, len(groups))):
    yield key, line, round(time.perf_counter() - began, 3)


@contextlib.contextmanager
def _listening():
  """Lets a signal end what is computed, with what there is; a second, all."""
  began = []

  def interrupted(number, frame):
    del number, frame
    now = time.monotonic()
    if began and now - began[0] >= _ONE_SIGNAL:
      os._exit(application.INTERRUPTED)
    if not began:
      began.append(now)
      raise KeyboardInterrupt

  before = {}
  if threading.current_thread() is threading.main_thread():
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
      number = getattr(signal, name, None)
      if number and signal.getsignal(number) != signal.SIG_IGN:
        before[number] = signal.signal(number, interrupted)
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def finished(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
  """By key, the lines about the cells that a folder holds; torn ones aside."""
  path = workdir / _CELLS
  if not path.exists():
    return {}
  return {said['cell']: said for _, said in files.whole_lines(path, 'cell')}


def mend(workdir: pathlib.Path) -> None:
  """Takes a torn last line away, so that the next one is whole."""
  for name in (_CELLS, _TIMING):
    path = workdir / name
    content = path.read_bytes() if path.exists() else b''
    whole = content[: content.rfind(b'\n') + 1]
    if whole != content:
      files.write_whole(path, lambda aside, w=whole: aside.write_bytes(w))


def _plain(config):
  plain = {k: v for k, v in config.to_dict().items() if k != 'axes'}
  return files.plain(plain | {'axes': dict(config.axes)})


def _report(config, found, lines, workdir, tables):
  results = study.outcomes_of(found, lines)
  done = sum(c.key in lines for c in found)
  progress = 'finished'
  if done < len(found):
    progress = f'{done} of {len(found)} cells'
  if not results:
    return
  written = study_report.write(
    workdir, config.title, config.description, results, progress
  )
  if tables:
    application.say(study_report.text(results))
    application.say('\n' + '\n'.join(str(workdir / name) for name in written))


class _Progress:
  """A bar of cells on a terminal, elsewhere a line now and then."""

  def __init__(
    self, total: int, done: int, stream: TextIO, bar: bool | None = None
  ):
    self._total = total
    self._done = self._before = done
    self._stream = stream
    self._began = self._said = time.perf_counter()
    self._bar = None
    if stream.isatty() if bar is None else bar:
      self._bar = tqdm.tqdm(
        total=self._total,
        initial=done,
        file=stream,
        dynamic_ncols=True,
        unit='cell',
        smoothing=0.05,
      )

  def add(self, values: dict[str, str]) -> None:
    """A cell is finished."""
    self._done += 1
    what = ', '.join(values.values())
    if self._bar is not None:
      self._bar.set_postfix_str(what, refresh=False)
      self._bar.update()
      return
    now = time.perf_counter()
    if now - self._said >= _LINE_SECONDS or self._done == self._total:
      self._said = now
      rate = (now - self._began) / (self._done - self._before)
      left = tqdm.tqdm.format_interval(rate * (self._total - self._done))
      elapsed = tqdm.tqdm.format_interval(now - self._began)
      application.say(
        f'[{elapsed}] {self._done} of {self._total} cells, {left} left: {what}',
        self._stream,
      )

  def note(self, text: str) -> None:
    """Shows a line of its own."""
    if self._bar is None:
      application.say(text, self._stream)
    else:
      self._bar.write(text, file=self._stream)

  def close(self) -> None:
    """Leaves the terminal tidy."""
    if self._bar is not None:
      self._bar.close()
