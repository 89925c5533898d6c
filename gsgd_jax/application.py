"""`train.py`'s work: an experiment with its files, watched and interruptible.

Training runs in a thread of its own and sends events; the main thread writes
them down. So a signal is answered at once, whatever XLA is compiling or
computing, and what has been measured is in the files by then.
"""

import contextlib
import functools
import math
import os
import pathlib
import queue
import signal
import sys
import threading
import time
from typing import NamedTuple, TextIO

import jax
import ml_collections
import tqdm

from gsgd_jax import events, experiment, files, hosts, report

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_SIGNALS = tuple(
  getattr(signal, name)
  for name in ('SIGINT', 'SIGTERM', 'SIGHUP')
  if hasattr(signal, name)
)
# A signal that another thread was given does not wake the main thread.
_WAKE_SECONDS = 0.2
_LINE_SECONDS = 10.0  # Between lines where nobody watches.
# What a machine runs out of: memory, room on the disk.
_RAN_OUT = (jax.errors.JaxRuntimeError, MemoryError, OSError)
_END = object()  # The last thing that the training thread sends.


class _Interrupted(NamedTuple):
  number: int


class _Failed(NamedTuple):
  error: BaseException


def run(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path | None,
  began: float,
) -> int:
  """Trains every method of a config, and leaves its files in a folder.

  Args:
    config: A config that ``experiment.check`` has passed.
    workdir: A folder that holds no run; None for one of several processes that
      only trains.
    began: When the program began, by ``time.perf_counter()``.

  Returns:
    The exit code: 0; 1 if every method diverged, or memory or the like ran
    out; 130 if a signal ended it; ``hosts.LOST`` if another process has gone.
    Unless it is 0, threads may still be at work: leave by ``os._exit``.

  Raises:
    OSError: A file could not be written, say to a full disk. The files are
      whole as far as they go.
  """
  config = experiment.resolved(config)
  if config.compilation_cache is not None:
    _keep_compiled(config.compilation_cache)
  inbox = queue.SimpleQueue()  # Its `put` may be called by a signal's handler.
  results = events.Results(config)
  with _signals_to(inbox):
    with contextlib.ExitStack() as stack:
      listeners = []
      if workdir is not None:
        listeners += [files.Log(workdir, config, began)]
        stack.callback(listeners[-1].close)
        listeners += [Watch(config, sys.stderr)]
        stack.callback(listeners[-1].close)
      if config.tensorboard and workdir is not None:
        listeners.append(_TensorBoard(workdir / 'tensorboard'))
        stack.callback(listeners[-1].close)
      enough = threading.Event()
      stack.callback(enough.set)
      _train_in_thread(config, workdir, inbox, enough)
      if workdir is not None:
        from matplotlib import pyplot  # noqa: F401 (while others compile)

      ended_by = _listen(inbox, results, listeners)
    # A signal that comes now is put into an inbox that nobody reads any more.
    code = _finish(config, workdir, results, ended_by)
  if config.distributed and ended_by is None:
    hosts.leave()
  return code


def _keep_compiled(folder):
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


@contextlib.contextmanager
def _signals_to(inbox):
  """Sends signals to the inbox, but for those that were ignored already."""
  before = {
    number: signal.getsignal(number)
    for number in _SIGNALS
    if signal.getsignal(number) != signal.SIG_IGN
  }
  for number in before:
    signal.signal(number, lambda n, frame: inbox.put(_Interrupted(n)))
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _train_in_thread(config, workdir, inbox, enough):
  profile_to = None
  if config.profile and workdir is not None:
    profile_to = workdir / 'profile'

  def train():
    try:
      for event in experiment.stream(config, profile_to):
        inbox.put((event, time.perf_counter()))
        if enough.is_set():
          return
      inbox.put(_END)
    except BaseException as e:  # For the main thread to raise.
      inbox.put(_Failed(e))

  threading.Thread(target=train, name='training', daemon=True).start()


def _listen(inbox, results, listeners):
  """Hands events on until training ends; returns what ended it, if not it."""
  while True:
    try:
      item = inbox.get(timeout=_WAKE_SECONDS)
    except queue.Empty:
      continue
    if item is _END:
      return None
    if isinstance(item, _Interrupted | _Failed):
      return item
    event, when = item
    results.add(event)
    for listener in listeners:
      listener.add(event, when)


def _finish(config, workdir, results, ended_by):
  """Writes and prints what came out; returns the exit code."""
  if isinstance(ended_by, _Failed):
    results.fail(_reason(ended_by.error))
  histories = results.histories()
  status, code = 'completed', DONE
  if isinstance(ended_by, _Interrupted):
    status, code = 'interrupted', INTERRUPTED
  elif isinstance(ended_by, _Failed):
    status, code = 'failed', FAILED
  elif all(h.status == 'diverged' for h in histories.values()):
    status, code = 'diverged', FAILED
  written = []
  if workdir is not None:
    written = _written(config, workdir, histories, status)
  if status == 'interrupted':
    name = signal.Signals(ended_by.number).name
    say(f'train.py: interrupted ({name})', sys.stderr)
  elif status == 'failed':
    if config.distributed and hosts.is_loss(ended_by.error):
      return hosts.LOST  # Whoever keeps watch says it.
    if not isinstance(ended_by.error, _RAN_OUT):
      raise ended_by.error  # A mistake of ours.
    say(f'train.py: cannot go on: {_reason(ended_by.error)}', sys.stderr)
  if workdir is None:
    return code
  say('\n' + report.table(histories, losses=config.model == 'gpt'))
  said = report.sentences(config, histories)
  if said:
    say('\n' + '\n'.join(said))
  say('\n' + '\n'.join(str(workdir / name) for name in written))
  return code


def _written(config, workdir, histories, status):
  """Writes what came out; returns the files' names."""
  files.write_json(
    workdir / 'result.json', report.result(config, histories, status)
  )
  drawings = {}
  if any(len(h.step) for h in histories.values()):
    drawings['curves.png'] = report.draw
    if any(map(report.has_workers, histories.values())):
      drawings['staleness.png'] = report.draw_staleness
  for name, draw in drawings.items():
    draw = functools.partial(draw, config=config, histories=histories)
    files.write_whole(workdir / name, draw)
  return ['result.json', *drawings]


def _reason(error):
  """An error in a line."""
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__


def say(text: str, stream: TextIO | None = None) -> None:
  """Prints; a reader that has gone away is no reason to stop a run."""
  stream = sys.stdout if stream is None else stream
  try:
    print(text, file=stream, flush=True)
  except OSError:
    # Else the interpreter, on its way out, would fail to flush it.
    with open(os.devnull, 'w') as nowhere:
      os.dup2(nowhere.fileno(), stream.fileno())


class Watch:
  """Progress: a bar on a terminal, elsewhere a line now and then.

  Args:
    config: The run's settings.
    stream: Where to show it.
  """

  def __init__(self, config: ml_collections.ConfigDict, stream: TextIO):
    self._updates = config.updates
    self._methods = [m.name for m in events.methods(config)]
    self._total = config.updates * len(self._methods)
    self._stream = stream
    self._began = self._said = time.perf_counter()
    self._accuracy = math.nan
    self._start = None  # Of the method: time and step of its first progress.
    self._bar = None
    if stream.isatty():
      self._bar = tqdm.tqdm(
        total=self._total,
        file=stream,
        dynamic_ncols=True,
        bar_format='{desc} {percentage:3.0f}%|{bar:10}| {elapsed}{postfix}',
      )

  def add(self, event: events.Event, when: float) -> None:
    """Shows an event."""
    label = event.method.label
    base = self._methods.index(event.method.name) * self._updates
    if isinstance(event, events.Started):
      self._accuracy, self._start = math.nan, None
      self._move(base, f'{label} (compiling)', '')
    elif isinstance(event, events.Evaluation):
      self._accuracy = event.validation_accuracy.mean()
    elif isinstance(event, events.Progress):
      self._start = self._start or (when, event.step)
      state = self._state(event, when, base + event.step)
      self._move(base + event.step, label, state)
      if when - self._said >= _LINE_SECONDS:
        self._say(f'{label}: update {event.step:,}, {state}', when)
    elif isinstance(event, events.Finished):
      self._move(base + self._updates, label, '')
      ended = event.message or f'{label}: {event.status.replace("_", " ")}'
      self._say(ended, when, always=event.message is not None)

  def _state(self, event, when, done):
    words = [f'loss {event.loss:.3g}']
    if not math.isnan(self._accuracy):
      words.append(f'validation {self._accuracy:.1%}')
    if not math.isnan(event.staleness):
      words.append(f'staleness {event.staleness:.1f}')
    began, step = self._start
    if when > began and event.step > step:
      rate = (event.step - step) / (when - began)
      left = tqdm.tqdm.format_interval((self._total - done) / rate)
      words += [f'{rate:,.0f} updates/s', f'{left} left']
    return ', '.join(words)

  def _move(self, done, label, state):
    if self._bar is not None:
      self._bar.set_description_str(label, refresh=False)
      self._bar.set_postfix_str(state, refresh=False)
      if not self._bar.update(done - self._bar.n) and not state:
        self._bar.refresh()

  def _say(self, text, when, always=False):
    """A line of its own; beside a bar only what must be said."""
    if self._bar is None:
      self._said = when
      elapsed = tqdm.tqdm.format_interval(when - self._began)
      say(f'[{elapsed}] {text}', self._stream)
    elif always:
      self._bar.write(text, file=self._stream)

  def close(self) -> None:
    """Leaves the terminal tidy."""
    if self._bar is not None:
      self._bar.close()


class _TensorBoard:
  """Means over the seeds, one run a method."""

  def __init__(self, folder):
    self._folder = folder
    self._writers = {}

  def add(self, event, when):
    """Writes an evaluation."""
    del when
    if not isinstance(event, events.Evaluation):
      return
    with self._named():
      writer = self._writer(event.method.name)
      for field in events.MEASURED:
        mean = getattr(event, field).mean()
        if not math.isnan(mean):
          writer.add_scalar(field, mean, event.step)

  def _writer(self, name):
    import tensorboardX

    if name not in self._writers:
      self._writers[name] = tensorboardX.SummaryWriter(str(self._folder / name))
    return self._writers[name]

  @contextlib.contextmanager
  def _named(self):
    try:
      yield
    except OSError as e:
      raise files.named(e, self._folder) from e

  def close(self):
    """Flushes what is written."""
    with self._named():
      for writer in self._writers.values():
        writer.close()
