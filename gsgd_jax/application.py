"""`train.py`'s work: an experiment with its files, watched and interruptible.

Training runs in a thread of its own and sends events; the main thread writes
them down. So a signal is answered at once, whatever XLA is compiling or
computing, and what has been measured is in the files by then.
"""

import contextlib
import dataclasses
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

from gsgd_jax import (
  checkpoints,
  events,
  experiment,
  files,
  hosts,
  report,
  resuming,
)

DONE: int = 0
FAILED: int = 1
BAD_INPUT: int = 2
INTERRUPTED: int = 130
_SIGNALS = tuple(
  getattr(signal, name)
  for name in ('SIGINT', 'SIGTERM', 'SIGHUP')
  if hasattr(signal, name)
)
# A signal that another thread was given does not wake the main thread.
_WAKE_SECONDS = 0.2
_LINE_SECONDS = 10.0  # Between lines where nobody watches.
# What is sent to a process, and to its group, is one signal, not two.
_AGAIN_SECONDS = 1.0
# For how long a chunk of training is waited for that has to be saved.
_LEAVE_SECONDS = 10.0
# What a machine runs out of: memory, room on the disk.
_RAN_OUT = (jax.errors.JaxRuntimeError, MemoryError, OSError)
_END = object()  # The last thing that the training thread sends.


class _Interrupted(NamedTuple):
  number: int


class _Said(NamedTuple):
  sentence: str


class _Sync(NamedTuple):
  done: threading.Event


class _Failed(NamedTuple):
  error: BaseException


def run(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  began: float,
  done: resuming.Plan | None = None,
) -> int:
  """Trains every method of a config, and leaves its files in a folder.

  Args:
    config: A config that ``experiment.check`` has passed, and
      ``resuming.check`` for a folder that holds a run.
    workdir: The folder; of several processes the first writes all but the
      checkpoints, which all write.
    began: When the program began, by ``time.perf_counter()``.
    done: What `done_before` has found.

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
  writes = not config.distributed or hosts.is_first()
  results = _results(config, done)
  if done is not None and done.complete:
    if writes:
      say(f'{workdir} holds this run, and it is complete')
    return _told(config, results, [], writes)
  writer = _writer(config, workdir, inbox, done, writes)
  with _signals_to(inbox):
    with contextlib.ExitStack() as stack:
      listeners = _Listeners()
      if writes:
        kept = None if done is None else done.kept
        listeners.log = files.Log(workdir, config, began, kept)
        stack.callback(listeners.log.close)
        listeners.watch = Watch(config, sys.stderr)
        stack.callback(listeners.watch.close)
      if config.tensorboard and writes:
        starts = {} if done is None else done.starts
        listeners.tensorboard = _TensorBoard(
          workdir / 'tensorboard',
          {name: start.step for name, start in starts.items()},
        )
        stack.callback(listeners.tensorboard.close)
      enough = threading.Event()
      stack.callback(enough.set)
      profile_to = workdir / 'profile' if config.profile and writes else None
      _train_in_thread(config, profile_to, inbox, enough, writer, done)
      if writes:  # While others compile.
        from matplotlib import pyplot  # noqa: F401
      if writer is not None:
        from orbax import checkpoint  # noqa: F401

      ended_by = _listen(config, inbox, results, listeners, writer)
    # A signal that comes now is put into an inbox that nobody reads any more.
    code = _finish(config, workdir, results, ended_by, writer, writes)
  if config.distributed and ended_by is None:
    hosts.leave()
  return code


def done_before(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> resuming.Plan | None:
  """What a folder holds of a run, to go on with; None where it holds none.

  Args:
    config: As in `run`; ``resuming.check`` has passed it.
    workdir: Likewise.

  Raises:
    ValueError: A checkpoint in it is of another run.
    OSError: A file cannot be read.
  """
  config = experiment.resolved(config)
  if config.distributed and not hosts.is_first():
    said = hosts.told_by_the_first('')
    return resuming.read(said) if said else None
  found = None
  if files.of_a_run(workdir) is not None:
    dataset = experiment.load_all(config, 1)[0]
    found = resuming.plan(config, workdir, warn, dataset)
    if not (found.complete or found.starts or found.ended):
      warn(f'{workdir} holds no checkpoint to go on from: the run begins again')
    for start in found.starts.values():
      say(f'going on from {start.folder}')
  if config.distributed:
    hosts.told_by_the_first('' if found is None else resuming.said(found))
  return found


def _results(config, done):
  """What was measured before."""
  results = events.Results(config)
  if done is not None:
    for evaluation in done.evaluations:
      results.add(evaluation)
    for method in events.methods(config):
      if method.name in done.ended:
        end = done.ended[method.name]
        results.add(events.Finished(method, end['status'], end['message']))
  return results


def _writer(config, workdir, inbox, done, writes):
  """What writes checkpoints, if any are to be."""
  if not config.checkpoints:
    return None

  def flush():
    """Waits until the main thread has written down what was sent to it."""
    written = threading.Event()
    inbox.put(_Sync(written))
    written.wait()

  return checkpoints.Writer(
    workdir / checkpoints.FOLDER,
    config,
    lambda sentence: inbox.put(_Said(sentence)),
    flush,
    serial=0 if done is None else done.serial,
    first=writes,
  )


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


def _train_in_thread(config, profile_to, inbox, enough, writer, done):
  def notice(sentence):
    inbox.put(_Said(sentence))

  def train():
    end = _END
    try:
      for event in experiment.stream(config, profile_to, writer, done, notice):
        inbox.put((event, time.perf_counter()))
        if enough.is_set():
          return
    except BaseException as e:  # For the main thread to raise.
      end = _Failed(e)
    if writer is not None:
      writer.close()
    inbox.put(end)

  threading.Thread(target=train, name='training', daemon=True).start()


@dataclasses.dataclass
class _Listeners:
  """Who is told of events; of several processes only the first's are there."""

  log: files.Log | None = None
  watch: 'Watch | None' = None
  tensorboard: '_TensorBoard | None' = None

  def add(self, event, when):
    """Tells of an event."""
    for listener in (self.log, self.watch, self.tensorboard):
      if listener is not None:
        listener.add(event, when)

  def sync(self):
    """Returns when what was told is on the disk."""
    if self.log is not None:
      self.log.sync()

  def note(self, sentence):
    """Says something in between."""
    if self.watch is not None:
      self.watch.note(f'train.py: {sentence}')


def _listen(config, inbox, results, listeners, writer):
  """Hands events on until training ends; returns what ended it, if not it."""
  trains = False  # Rather than compiles.
  interrupted, since = None, 0.0
  while True:
    try:
      item = inbox.get(timeout=_WAKE_SECONDS)
    except queue.Empty:
      late = time.perf_counter() - since > _LEAVE_SECONDS
      if interrupted and late and not writer.writes:
        return interrupted
      continue
    if item is _END:
      return None if results.complete else interrupted
    if isinstance(item, _Failed):
      return item
    if isinstance(item, _Interrupted):
      leaves_in_order = writer is not None and not config.distributed
      if interrupted is None and not (trains and leaves_in_order):
        _until_written(inbox, writer)
        return item
      if interrupted is not None:
        if time.perf_counter() - since < _AGAIN_SECONDS:
          continue
        return interrupted
      interrupted, since = item, time.perf_counter()
      writer.leave()
      listeners.note('writing a checkpoint; interrupt once more to leave now')
    elif isinstance(item, _Said):
      listeners.note(item.sentence)
    elif isinstance(item, _Sync):
      listeners.sync()
      item.done.set()
    else:
      event, when = item
      trains = isinstance(event, events.Progress | events.Evaluation)
      results.add(event)
      listeners.add(event, when)


def _until_written(inbox, writer):
  """Waits for a checkpoint that is being written, or the next signal."""
  since = time.perf_counter()
  while writer is not None and writer.writes:
    with contextlib.suppress(queue.Empty):
      item = inbox.get(timeout=_WAKE_SECONDS)
      again = time.perf_counter() - since >= _AGAIN_SECONDS
      if isinstance(item, _Interrupted) and again:
        return


def _finish(config, workdir, results, ended_by, writer, writes):
  """Writes and prints what came out; returns the exit code."""
  if isinstance(ended_by, _Failed):
    results.fail(_reason(ended_by.error))
  status = 'completed'
  if isinstance(ended_by, _Interrupted):
    status = 'interrupted'
  elif isinstance(ended_by, _Failed):
    status = 'failed'
  elif results.all_diverged:
    status = 'diverged'
  written = []
  if writes:
    written = _written(config, workdir, results.histories(), status)
  if status == 'interrupted':
    warn(f'interrupted ({signal.Signals(ended_by.number).name})')
  elif status == 'failed':
    if config.distributed and hosts.is_loss(ended_by.error):
      return hosts.LOST  # Whoever keeps watch says it.
    if not isinstance(ended_by.error, _RAN_OUT):
      raise ended_by.error  # A mistake of ours.
    warn(f'cannot go on: {_reason(ended_by.error)}')
  if writes and writer is not None and status in ('interrupted', 'failed'):
    warn(f'the same settings with --workdir={workdir} go on')
  code = _told(config, results, [workdir / name for name in written], writes)
  return {'interrupted': INTERRUPTED, 'failed': FAILED}.get(status, code)


def _told(config, results, written, writes):
  """Prints what came out; returns the exit code of a run that ended."""
  histories = results.histories()
  if writes:
    say('\n' + report.table(histories, losses=config.model == 'gpt'))
    said = report.sentences(config, histories)
    if said:
      say('\n' + '\n'.join(said))
    if written:
      say('\n' + '\n'.join(map(str, written)))
  return FAILED if results.all_diverged else DONE


def _written(config, workdir, histories, status):
  """Writes what came out; returns the files' names."""
  files.write_json(
    workdir / 'result.json', report.result(config, histories, status)
  )
  drawings = {}
  if any(len(h.step) for h in histories.values()):
    if any(map(report.has_workers, histories.values())):
      drawings['staleness.png'] = report.draw_staleness
    drawings['curves.png'] = report.draw  # The last: see `resuming`.
  for name, draw in drawings.items():
    draw = functools.partial(draw, config=config, histories=histories)
    files.write_whole(workdir / name, draw)
  return ['result.json', *sorted(drawings)]


def _reason(error):
  """An error in a line."""
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__


def warn(sentence: str) -> None:
  """Says something that is not a result."""
  say(f'train.py: {sentence}', sys.stderr)


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
    bar: Whether there is a bar; None: where `stream` is a terminal.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    stream: TextIO,
    bar: bool | None = None,
  ) -> None:
    self._updates = config.updates
    self._methods = [m.name for m in events.methods(config)]
    self._total = config.updates * len(self._methods)
    self._stream = stream
    self._began = self._said = time.perf_counter()
    self._accuracy = math.nan
    # Of the method: time and step of its first progress.
    self._start: tuple[float, int] | None = None
    self._bar: tqdm.tqdm | None = None
    if stream.isatty() if bar is None else bar:
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
    assert self._start is not None  # This is progress.
    began, step = self._start
    if when > began and event.step > step:
      rate = (event.step - step) / (when - began)
      left = tqdm.tqdm.format_interval((self._total - done) / rate)
      words += [f'{rate:,.0f} updates/s', f'{left} left']
    return ', '.join(words)

  def _move(self, done, label, state):
    with self._while_watched() as bar:
      if bar is not None:
        bar.set_description_str(label, refresh=False)
        bar.set_postfix_str(state, refresh=False)
        if not bar.update(done - bar.n) and not state:
          bar.refresh()

  def note(self, text: str) -> None:
    """Shows a line of its own."""
    if self._bar is None:
      say(text, self._stream)
    with self._while_watched() as bar:
      if bar is not None:
        bar.write(text, file=self._stream)

  @contextlib.contextmanager
  def _while_watched(self):
    """The bar, if there is one; a terminal that is closed has none."""
    try:
      yield self._bar
    except OSError:
      if self._bar is not None:
        self._bar.disable = True  # It says no more, not even that it ends.
      self._bar = None

  def _say(self, text, when, always=False):
    """A line of its own; beside a bar only what must be said."""
    if self._bar is None:
      self._said = when
      elapsed = tqdm.tqdm.format_interval(when - self._began)
      say(f'[{elapsed}] {text}', self._stream)
    elif always:
      self.note(text)

  def close(self) -> None:
    """Leaves the terminal tidy."""
    with self._while_watched() as bar:
      if bar is not None:
        bar.close()


class _TensorBoard:
  """Means over the seeds, one run a method."""

  def __init__(self, folder, steps):
    self._folder = folder
    self._steps = steps  # After which what an earlier run wrote is void.
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
      self._writers[name] = tensorboardX.SummaryWriter(
        str(self._folder / name), purge_step=self._steps.get(name, -1) + 1
      )
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
