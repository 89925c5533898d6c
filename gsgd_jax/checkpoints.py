"""Checkpoints: written by orbax while training goes on, verified when read.

A checkpoint is a folder, `WORKDIR/checkpoints/METHOD/STEP`, with

* `params`: the parameters that an evaluation would measure (of a seed that has
  stopped early those of when it did), and `best`: each seed's where its
  validation accuracy was highest (absent without a validation split); leading
  axis of seeds, the tree of the model;
* `state`: all that training needs (parameters, optimizer, rings, clocks, keys,
  scores), by name, as it lies on its devices;
* `position`: where the run is, JSON: the config, the method, its step and
  calls (batches are a function of the seed and the call: so this is where the
  data are), the evaluations that are in `metrics.jsonl` by then;
* `digests.json`: size and SHA-256 of every other file, written last. What lacks
  it was never finished; what differs from it is damaged.
"""

import contextlib
import copy
import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from gsgd_jax import data, files, models, settings, tasks

FOLDER = 'checkpoints'
_DIGESTS = 'digests.json'
_ASIDE = '.orbax-checkpoint-tmp'  # In the names of what is being written.
_MORE_BYTES = 2**16  # Beside the arrays: what says what they are.
_MOST_TRIED = 2**31
# For how long threads may still make files of what has failed.
_STRAY_SECONDS = 0.2
# What reading JSON of any content may raise.
_UNREADABLE = (
  OSError,
  ValueError,
  LookupError,
  TypeError,
  AttributeError,
  ArithmeticError,
  RecursionError,
)
_TIMEOUT_SECONDS = 600  # For the slowest of several processes to write.


class Damaged(OSError):
  """A checkpoint cannot be used; the message says which and why."""


class Found(NamedTuple):
  """A checkpoint that is there, whole as far as its digests say."""

  folder: pathlib.Path
  serial: int  # Of several the last written has the highest.
  position: dict[str, Any]

  @property
  def method(self) -> str:
    """The method's name."""
    return self.folder.parent.name

  @property
  def step(self) -> int:
    """Arriving gradients so far."""
    return int(self.folder.name)


class Trained(NamedTuple):
  """What training has made; see :func:`load`.

  Attributes:
    params: The parameters, NumPy arrays in the tree of the model.
    model: The model; ``model.apply(params, inputs)`` are its outputs.
    step: Arriving gradients that it learned from: an int; of all seeds at their
      best shape=(seeds,).
    config: The run's settings.
  """

  params: Any
  model: models.Model
  step: int | np.ndarray
  config: ml_collections.ConfigDict


def load(
  workdir: str | os.PathLike,
  method: str | None = None,
  *,
  seed: int | None = 0,
  which: str = 'last',
) -> Trained:
  """The trained parameters of a run, for use in code of one's own.

  Args:
    workdir: The folder that ``train.py`` wrote to.
    method: The method's name, such as ``'asynchronous+consistent'``; None where
      there is only one.
    seed: Which seed's; None are those of all seeds, along a leading axis.
    which: ``'last'``: the last that were saved. ``'best'``: those of the
      evaluation at which the seed's validation accuracy was highest (of equal
      ones that of lower validation loss, of equal ones the first), among those
      before the last checkpoint.

  Returns:
    A :class:`Trained`. Inputs are to be prepared as in training, as
    :func:`gsgd_jax.data.load` prepares them.

  Raises:
    ValueError: There is no such method or seed, or no validation split to
      choose by.
    OSError: There is no checkpoint, or none that is whole.

  Examples:
    >>> from gsgd_jax import checkpoints
    >>> checkpoints.load('absent')
    Traceback (most recent call last):
      ...
    FileNotFoundError: absent holds no checkpoints
  """
  root = pathlib.Path(workdir) / FOLDER
  settings.one_of('which', which, ('best', 'last'))
  names = methods(root)
  if not names:
    raise FileNotFoundError(f'{workdir} holds no checkpoints')
  if method is None:
    if len(names) > 1:
      raise ValueError(f'method must be one of {", ".join(names)}, got None')
    method = names[0]
  settings.one_of('method', method, names)
  complaints = []
  found = next(usable(root, complaints.append, method), None)
  if found is None:
    raise FileNotFoundError(
      '; '.join(complaints) or f'{workdir} holds no checkpoint of {method}'
    )
  return _trained(found, seed, which)


def _trained(found, seed, which):
  position = found.position
  config = config_of(position)
  seeds = config.seeds
  if seed is not None and seed not in range(seeds):
    raise ValueError(f'seed must be from 0 to {seeds - 1}, got {seed!r}')
  item, step = 'params', found.step
  if which == 'best':
    item, step = 'best', position['best_step']
    if step is None:
      raise ValueError(
        f'{found.folder} has no best parameters: there was no evaluation yet, '
        "or no validation split; use which='last'"
      )
    step = np.array(step) if seed is None else step[seed]
  learned = position['learned']
  model = tasks.make_model(
    config, data.Learned(tuple(learned['shape']), tuple(learned['classes']))
  )
  one = jax.eval_shape(model.init, jax.random.key(0))
  like = jax.tree.map(lambda x: np.empty((seeds, *x.shape), x.dtype), one)
  (params,) = restore(found, {item: like}).values()
  if seed is not None:
    params = jax.tree.map(lambda x: x[seed], params)
  return Trained(params, model, step, config)


def config_of(position: dict[str, Any]) -> ml_collections.ConfigDict:
  """The config that a checkpoint is of."""
  return from_plain(position['config'])


def from_plain(config: dict[str, Any]) -> ml_collections.ConfigDict:
  """A config from what JSON says of it."""
  made = settings.default_config()
  with made.ignore_type():
    for name, value in config.items():
      made[name] = tuple(value) if isinstance(value, list) else value
  return made


def methods(root: pathlib.Path) -> list[str]:
  """The methods that have checkpoints, by name."""
  if not root.is_dir():
    return []
  return sorted(m.name for m in root.iterdir() if _steps(m))


def usable(
  root: pathlib.Path,
  say: Callable[[str], Any],
  method: str | None = None,
) -> Iterator[Found]:
  """The checkpoints that are whole, from the last that was written on.

  Args:
    root: The folder of checkpoints of a run.
    say: Called with a sentence for every checkpoint that is passed over.
    method: Of which method; None is any.

  Yields:
    A :class:`Found` each, its digests compared.
  """
  names = methods(root) if method is None else [method]
  there = [step for name in names for step in _steps(root / name)]
  there = [folder for folder in there if not _is_left_over(folder)]
  for folder in sorted(there, key=_newest, reverse=True):
    try:
      yield _verified(folder)
    except Damaged as e:
      say(str(e))


def _steps(folder):
  if not folder.is_dir():
    return []
  return [p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()]


def _is_left_over(folder):
  """Whether a checkpoint was being removed, as there is a later one."""
  return not _is_finished(folder) and any(
    _is_finished(p) and int(p.name) > int(folder.name)
    for p in _steps(folder.parent)
  )


def _is_finished(folder):
  return (folder / _DIGESTS).exists()


def _newest(folder):
  """What sorts checkpoints; those that do not say it are looked at first."""
  try:
    said = json.loads((folder / _DIGESTS).read_text())
    return int(said['serial']), 0
  except _UNREADABLE:
    return float('inf'), int(folder.name)


def _verified(folder):
  """The checkpoint in a folder, if every file of it is as it was written."""
  name = _DIGESTS
  try:
    said = json.loads((folder / _DIGESTS).read_text())
    digests, serial = said['files'], int(said['serial'])
    for name, (size, digest) in digests.items():
      if _digest(folder / name) != [size, digest]:
        raise Damaged(f'{folder} is damaged: {name} is not as it was written')
    return found_at(folder, serial)
  except FileNotFoundError as e:
    if pathlib.Path(e.filename).name == _DIGESTS:
      raise Damaged(f'{folder} was not finished') from e
    lost = os.path.relpath(e.filename, folder)
    raise Damaged(f'{folder} is damaged: {lost} is gone') from e
  except Damaged:
    raise
  except _UNREADABLE as e:
    at = name if isinstance(e, OSError) else _DIGESTS
    raise Damaged(f'{folder} is damaged: {at} cannot be read') from e


def found_at(folder: pathlib.Path, serial: int) -> Found:
  """A checkpoint that is known to be whole."""
  position = (folder / 'position' / 'metadata').read_text()
  return Found(folder, serial, json.loads(position))


def _digest(path):
  """Size and SHA-256 of a file."""
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return [file.tell(), digest]


def restore(found: Found, items: dict[str, Any]) -> dict[str, Any]:
  """Parts of a checkpoint.

  Args:
    found: The checkpoint.
    items: Trees of ``jax.ShapeDtypeStruct`` s with shardings, for arrays on
      devices, or of NumPy arrays, for such; by the item's name.

  Returns:
    The same, with values.

  Raises:
    Damaged: It cannot be read, or is not like this.
  """
  import orbax.checkpoint as ocp

  def args(item):
    how = ocp.checkpoint_utils.construct_restore_args(item)
    return ocp.args.PyTreeRestore(item=item, restore_args=how)

  with _quiet(), ocp.Checkpointer(_handler(items)) as checkpointer:
    try:
      composite = ocp.args.Composite(**{k: args(v) for k, v in items.items()})
      restored = checkpointer.restore(found.folder.absolute(), args=composite)
    except Exception as e:  # Of orbax, of tensorstore, of what they use.
      raise Damaged(
        f'{found.folder} cannot be restored: {_first_line(e)}'
      ) from e
  return {name: restored[name] for name in items}


def arrays(found: Found, item: str) -> Any:
  """A part of a checkpoint as NumPy arrays, whatever there is.

  Args:
    found: The checkpoint.
    item: 'params', 'best' or 'state'.

  Raises:
    Damaged: It cannot be read.
  """
  import orbax.checkpoint as ocp

  folder = found.folder.absolute() / item
  with _quiet(), ocp.PyTreeCheckpointer() as checkpointer:
    try:
      there = checkpointer.metadata(folder).item_metadata.tree
      how = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), there
      )
      return checkpointer.restore(folder, restore_args=how)
    except Exception as e:  # As above.
      raise Damaged(f'{folder} cannot be restored: {_first_line(e)}') from e


def named(tree: Any) -> dict[str, jax.Array]:
  """The leaves of a state by name, without those that are empty."""
  found = {}
  for number, (path, leaf) in enumerate(
    jax.tree_util.tree_leaves_with_path(tree)
  ):
    if leaf.size:
      name = jax.tree_util.keystr(path, simple=True, separator='.')
      found[f'{number:03d}.{name.replace("/", "_")}'] = leaf
  return found


def unnamed(like: Any, leaves: dict[str, jax.Array]) -> Any:
  """The state that `named` made leaves of; `like` has their shapes."""
  values = (leaves[name] for name in named(like))
  nothing = lambda x: np.zeros(x.shape, x.dtype)
  return jax.tree.map(lambda x: next(values) if x.size else nothing(x), like)


class Writer:
  """Writes a run's checkpoints, one at a time, while training goes on.

  Args:
    root: The folder of checkpoints; several processes share it.
    config: The run's settings.
    say: Called with sentences, from any thread.
    flush: Called before a checkpoint: returns when all that was measured until
      then is in its file.
    serial: The highest serial number so far.
    first: Whether this process is the one that speaks and keeps order.
  """

  def __init__(
    self,
    root: pathlib.Path,
    config: ml_collections.ConfigDict,
    say: Callable[[str], Any] = lambda sentence: None,
    flush: Callable[[], Any] = lambda: None,
    serial: int = 0,
    first: bool = True,
  ) -> None:
    self._root = root.absolute()
    self._keep = config.checkpoints
    minutes = config.checkpoint_minutes
    self._seconds = float('inf') if minutes is None else 60 * minutes
    self._every = config.checkpoint_every
    self._say = say
    self._flush = flush
    self._serial = serial
    self._first = first
    self._leaving = threading.Event()
    self._saved_at = time.monotonic()
    self._step = 0  # Of the last checkpoint.
    self._kept = []  # Folders of this method, from the oldest on.
    self._thread: threading.Thread | None = None
    self._checkpointer: Any = None  # Of orbax, loaded where it is needed.
    self._failed = False
    _never_heard()

  def begin(self, method: str, start: Found | None) -> None:
    """A method begins, or goes on from a checkpoint."""
    self.wait()  # The method before may still be tidied up.
    self._step = 0 if start is None else start.step
    self._kept = [] if start is None else [start.folder.absolute()]
    self._sweep()

  def next_stop(self, step: int) -> float:
    """The step after this one that must have a checkpoint."""
    if self._every is None:
      return float('inf')
    return (step // self._every + 1) * self._every

  def must(self, step: int) -> bool:
    """Whether there must be a checkpoint by a step: the same on all hosts."""
    return step >= self.next_stop(self._step)

  def wants(self, step: int) -> bool:
    """Whether there should be one, by this host's clock."""
    if step <= self._step:
      return False
    if self._leaving.is_set():
      return True
    # The one before may take longer than that.
    return not self.writes and self._elapsed() >= self._seconds

  def _elapsed(self):
    return time.monotonic() - self._saved_at

  def leave(self) -> None:
    """Asks for a last checkpoint as soon as there can be one."""
    self._leaving.set()

  @property
  def leaving(self) -> bool:
    """Whether `leave` was called."""
    return self._leaving.is_set()

  def save(
    self,
    method: str,
    step: int,
    position: dict[str, Any],
    items: dict[str, Any],
  ) -> None:
    """Begins to write a checkpoint; arrays may be donated when this returns.

    Where it cannot be written a sentence says so, and what was there stays.

    Args:
      method: The method's name.
      step: Arriving gradients so far.
      position: Where the run is; JSON can say it.
      items: Trees of arrays, by name.
    """
    import orbax.checkpoint as ocp

    self.wait()
    self._flush()
    folder = self._root / method / str(step)
    # It is written later, and what it is made of goes on changing.
    position = copy.deepcopy(position)
    arrays = {k: ocp.args.PyTreeSave(tree) for k, tree in items.items()}
    args = ocp.args.Composite(position=ocp.args.JsonSave(position), **arrays)
    self._saved_at = time.monotonic()
    self._step = step
    self._serial += 1
    try:
      self._check_room(items)
      if self._checkpointer is None:
        self._checkpointer = _checkpointer()
      self._checkpointer.save(folder, args=args, force=True)
    except Exception as e:  # As above: whatever it is, training goes on.
      self._fail(folder, e)
      return
    finish = functools.partial(self._finish, folder, self._serial)
    self._thread = threading.Thread(target=finish, name='checkpoint')
    self._thread.start()

  def wait(self) -> None:
    """Waits until nothing is being written; for any thread."""
    thread = self._thread
    if thread is not None:
      thread.join()

  def close(self) -> None:
    """Waits likewise; nothing follows."""
    self.wait()
    if self._checkpointer is not None:
      with contextlib.suppress(Exception):  # What has failed was told.
        self._checkpointer.close()
      self._checkpointer = None
    if self._failed:
      time.sleep(_STRAY_SECONDS)
    self._sweep()

  @property
  def writes(self) -> bool:
    """Whether a checkpoint is being written."""
    return self._thread is not None and self._thread.is_alive()

  def _check_room(self, items):
    """Raises where a disk will not do: it would be filled in vain."""
    self._root.mkdir(parents=True, exist_ok=True)
    if jax.process_count() > 1:  # All of them write, or none.
      return
    needed = _MORE_BYTES + sum(x.nbytes for x in jax.tree.leaves(items))
    there = shutil.disk_usage(self._root).free
    if needed > there:
      raise OSError(
        f'it takes {needed:,} bytes, and the disk has room for {there:,}'
      )
    # A quota shows when it is hit. (Some file systems are slow at that.)
    if hasattr(os, 'posix_fallocate') and needed < _MOST_TRIED:
      with tempfile.TemporaryFile(dir=self._root) as file:
        os.posix_fallocate(file.fileno(), 0, needed)

  def _finish(self, folder, serial):
    """Waits until orbax has written it all; makes it a checkpoint."""
    try:
      self._checkpointer.wait_until_finished()
      if not self._first:
        return
      written = {
        str(path.relative_to(folder)): _synced(path)
        for path in sorted(folder.rglob('*'))
        if path.is_file()
      }
      files.write_json(folder / _DIGESTS, {'serial': serial, 'files': written})
      self._tidy(folder)
    except Exception as e:
      self._fail(folder, e)

  def _tidy(self, folder):
    """Removes all checkpoints of a method but the last ones."""
    self._kept = [p for p in self._kept if p != folder] + [folder]
    self._kept = self._kept[-self._keep :]
    for path in _steps(folder.parent):
      if path not in self._kept:
        # What is half gone is no checkpoint any more.
        (path / _DIGESTS).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)

  def _sweep(self):
    """Removes what was never finished: of killed processes, of failures."""
    if not self._first or not self._root.is_dir():
      return
    for folder in self._root.iterdir():
      unfinished = [p for p in _steps(folder) if not _is_finished(p)]
      for path in (*unfinished, *folder.glob(f'*{_ASIDE}*')):
        shutil.rmtree(path, ignore_errors=True)

  def _fail(self, folder, error):
    self._checkpointer = None  # It may wait for what never comes.
    self._failed = True
    if not self._first:
      return
    for path in (folder, *folder.parent.glob(f'{folder.name}{_ASIDE}*')):
      if path not in self._kept:
        shutil.rmtree(path, ignore_errors=True)
    last = 'there is none'
    if self._kept:
      last = f'the last one is {self._kept[-1]}'
    self._say(
      f'the checkpoint {folder} could not be written ({_first_line(error)}); '
      f'training goes on, {last}'
    )


def _synced(path):
  """The digest of a file that is on its disk by then."""
  with open(path, 'rb') as file:
    os.fsync(file.fileno())
  return _digest(path)


def _checkpointer():
  import orbax.checkpoint as ocp

  return ocp.AsyncCheckpointer(
    _handler(('params', 'best', 'state')),
    async_options=ocp.options.AsyncOptions(
      timeout_secs=_TIMEOUT_SECONDS, create_directories_asynchronously=False
    ),
  )


def _handler(items):
  """How orbax writes: numbers that look random are not worth compressing."""
  import orbax.checkpoint as ocp

  arrays: dict[str, Any] = {
    n: ocp.PyTreeCheckpointHandler(use_compression=False) for n in items
  }
  return ocp.CompositeCheckpointHandler(
    position=ocp.JsonCheckpointHandler(), **arrays
  )


def _first_line(error):
  """An error of orbax's, in a line."""
  text = str(error)
  for known in ('No space left on device', 'File too large', 'Quota exceeded'):
    if known in text:
      return known
  lines = text.strip().splitlines() or [type(error).__name__]
  return lines[0] if len(lines[0]) <= 200 else lines[0][:197] + '...'


@contextlib.contextmanager
def _quiet():
  """Keeps what orbax logs about a failure to itself: the error is told."""
  logger = logging.getLogger('absl')
  there = _is_not_orbaxs in logger.filters
  logger.addFilter(_is_not_orbaxs)
  try:
    yield
  finally:
    if not there:
      logger.removeFilter(_is_not_orbaxs)


def _is_not_orbaxs(record):
  return 'orbax' not in pathlib.Path(record.pathname).parts


@functools.cache
def _never_heard():
  """Likewise for good: its threads may log, and raise, after they failed."""
  logging.getLogger('absl').addFilter(_is_not_orbaxs)
  logging.getLogger('asyncio').addFilter(
    lambda record: 'orbax' not in record.getMessage()
  )
  others = sys.unraisablehook

  def unraisablehook(what):
    if str(what.exc_value) != 'Event loop is closed':
      others(what)

  sys.unraisablehook = unraisablehook
