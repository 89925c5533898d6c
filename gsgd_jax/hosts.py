"""Several processes, on one host or on many, that train together.

JAX's distributed runtime lets them find one another. When one of them dies the
others cannot go on; what tells them is either a collective that fails, or that
runtime, which then aborts the process from within C++. So the process that the
user starts only keeps watch: training runs in a child of it, and however that
ends there is a sentence and an exit code.
"""

import faulthandler
import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import ml_collections
import numpy as np

if TYPE_CHECKING:
  from gsgd_jax import data

# A process that says nothing for so long is dead; one that has not come yet is
# not waited for any longer.
SILENCE_SECONDS = 20
MEETING_SECONDS = 120
LOST = 75  # A child's exit code: a collective has found another one gone.
_WATCHED = 'GSGD_JAX_WATCHED'  # In a child's environment.
_WAKE_SECONDS = 0.2  # Signals wait so long.


def is_watched() -> bool:
  """Whether this process is the child that trains."""
  return _WATCHED in os.environ


def watch(arguments: list[str]) -> int:
  """Runs a program again, as a child, until it ends.

  Signals are handed on to it; it ends when this process does.

  Args:
    arguments: The program's command line.

  Returns:
    Its exit code; 1, after a sentence, if it did not end by itself.
  """
  environment = {**os.environ, _WATCHED: '1'}
  if environment.get('TF_CPP_MIN_LOG_LEVEL') in (None, '1'):  # JAX's default.
    # What the runtime says about its own end is for its developers.
    environment['TF_CPP_MIN_LOG_LEVEL'] = '4'
  child = subprocess.Popen(
    [sys.executable, *arguments], stdin=subprocess.PIPE, env=environment
  )
  asked = []

  def hand_on(number, frame):
    del frame
    asked.append(number)
    child.send_signal(number if len(asked) == 1 else signal.SIGKILL)

  for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
    number = getattr(signal, name, None)  # Windows lacks some.
    if number and signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, hand_on)
  while True:
    try:
      code = child.wait(timeout=_WAKE_SECONDS)
      break
    except subprocess.TimeoutExpired:
      continue
  if asked and code < 0:
    say(f'interrupted ({signal.Signals(asked[0]).name})')
    return 130
  if code >= 0 and code != LOST:
    return code
  if code == LOST or -code == getattr(signal, 'SIGABRT', None):
    say(
      'another process of this run has gone, did not answer for '
      f'{SILENCE_SECONDS} seconds, or did not come within {MEETING_SECONDS} '
      '(each process_id once?); this one ends too'
    )
  else:
    say(f'the process that trains was killed ({signal.Signals(-code).name})')
  return 1


def is_loss(error: BaseException) -> bool:
  """Whether an error is that of a collective that found a process gone."""
  words = ('Gloo', 'NCCL', 'DEADLINE_EXCEEDED', 'UNAVAILABLE')
  return any(word in str(error) for word in words)


def say(sentence: str) -> None:
  """Says why this process ends, even while others write."""
  os.write(2, f'train.py: {sentence}\n'.encode())


def end_with_parent() -> None:
  """Ends this process, a watched one, as soon as the one that watches ends."""
  faulthandler.disable()  # How it ends is told by a sentence.

  def wait():
    while os.read(0, 1):
      pass
    os._exit(1)

  threading.Thread(target=wait, name='parent', daemon=True).start()


def join(config: ml_collections.ConfigDict) -> None:
  """Waits for the other processes; before anything is computed.

  Raises:
    ValueError: The coordinator or the numbers are missing or wrong, or settings
      differ.
  """
  import jax

  # Else SIGTERM would be the runtime's.
  jax.config.update('jax_enable_preemption_service', False)
  if config.coordinator is not None:
    say(f'meeting the other processes at {config.coordinator}')
  # It is C++ that waits: Python's own handlers would not be called.
  before = {
    number: signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM)
    if signal.getsignal(number) != signal.SIG_IGN
  }
  try:
    jax.distributed.initialize(
      config.coordinator,
      config.processes,
      config.process_id,
      initialization_timeout=MEETING_SECONDS,
      heartbeat_timeout_seconds=SILENCE_SECONDS,
      shutdown_timeout_seconds=MEETING_SECONDS,
    )
  except RuntimeError as e:
    raise ValueError(
      f'process {config.process_id} cannot meet the others at '
      f'{config.coordinator} (is the port free?): {str(e).splitlines()[0]}'
    ) from e
  except (TypeError, ValueError) as e:
    raise ValueError(
      'distributed needs --config.coordinator=HOST:PORT, --config.processes '
      'and --config.process_id, unless it runs on a cluster that says them: '
      + str(e).splitlines()[0]
    ) from e
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  if config.processes not in (None, jax.process_count()):
    raise ValueError(
      f'processes={config.processes} here, but {jax.process_count()} elsewhere'
    )
  _check_same(config)


def _check_same(config):
  """Raises unless all processes have the same settings and versions."""
  import jax

  from gsgd_jax import __version__

  same = {k: v for k, v in config.to_dict().items() if k != 'process_id'}
  same = (sorted(same.items()), __version__, jax.__version__)
  if not _agreed(repr(same)):
    raise ValueError(
      'the processes of a run must have the same settings, process_id aside, '
      'and the same versions of gsgd_jax and jax'
    )


def check_same_data(dataset: 'data.Dataset') -> None:
  """Raises unless all processes have read the same data, as far as sizes say.

  Whether a set streams depends on a machine's memory, which version is read on
  what is prepared there.
  """
  streams = dataset.stream is not None
  same = (dataset.shape, dataset.classes, dataset.examples, streams)
  sizes = [dataset.count(s) for s in dataset[2:5] if s is not None]
  if not _agreed(repr((same, sizes, dataset.scale))):
    raise ValueError(
      f'the processes of a run must read the same data, and {dataset.name} is '
      'not the same here: give all the same files, version and '
      '--config.stream=True or False'
    )


def shared_folder(
  workdir: pathlib.Path | None, config: ml_collections.ConfigDict
) -> pathlib.Path:
  """The folder of the first process, in all processes.

  Args:
    workdir: It; None in the other processes.
    config: The run's settings.

  Raises:
    ValueError: A process does not see it, and all are to write checkpoints.
  """
  from gsgd_jax import parallel

  told = told_by_the_first('' if workdir is None else str(workdir.absolute()))
  seen = pathlib.Path(told).is_dir()
  if config.checkpoints and not parallel.true_on_all_hosts(seen):
    raise ValueError(
      f'all processes write checkpoints, and not all see the folder {told}; '
      'give a --workdir that they share, or --config.checkpoints=0'
    )
  return pathlib.Path(told)


def told_by_the_first(text: str) -> str:
  """The first process's text, in all processes."""
  from gsgd_jax import parallel

  data = np.frombuffer(text.encode(), np.uint8)
  size = int(parallel.of_first_host(np.int32(data.size)))
  padded = np.zeros(size, np.uint8)
  if is_first():
    padded[:] = data
  return parallel.of_first_host(padded).tobytes().decode()


def _agreed(text):
  """Whether all processes call this with the same text."""
  from gsgd_jax import parallel

  digest = hashlib.sha256(text.encode()).digest()[:4]
  return parallel.same_on_all_hosts(np.frombuffer(digest, np.uint8))


def leave() -> None:
  """Waits until all have come to their end, and parts."""
  import jax

  jax.distributed.shutdown()


def is_first() -> bool:
  """Whether this process writes the files and shows progress."""
  import jax

  return jax.process_index() == 0
