"""Trains the methods of a config side by side.

  python train.py
  python train.py --config.dataset=mine.csv --config.target=species
  python train.py --config.optimizer=adamw --config.learning_rate=0.003 \\
    --config.optimizer_kwargs.weight_decay=1e-4
  python train.py --config=configs/breast_cancer.py --workdir=runs/paper

gsgd_jax/settings.py lists every setting; --config.NAME=VALUE changes one.

Exit codes: 0 done; 1 every method diverged, or a file could not be written, or
memory ran out, or another process of the run has gone; 2 bad input; 130
interrupted, with what was measured so far in the files.
"""

# ruff: noqa: E402 (a signal may come while the later imports still run)

import os
import signal
import sys
import time

_BEGAN = time.perf_counter()


def _interrupted(number, frame):
  del number, frame
  os.write(2, b'train.py: interrupted before training began\n')
  os._exit(130)


if __name__ == '__main__':
  for _name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
    _number = getattr(signal, _name, None)  # Windows lacks some.
    if _number and signal.getsignal(_number) != signal.SIG_IGN:
      signal.signal(_number, _interrupted)

import contextlib
import datetime
import pathlib
import re

from absl import app, flags, logging
from ml_collections import config_flags

_DEFAULT = pathlib.Path(__file__).resolve().parent / 'configs' / 'default.py'
# How flags say what is wrong with a value, and how we do.
_WANTED = {
  'invalid literal for int': 'an integer',
  'could not convert string to float': 'a number',
  'Non-boolean argument': 'True or False',
  'Error while parsing string': 'values with commas between them',
  'Failed to parse': 'a dict of arguments',
}
_HELP = {'?', 'help', 'helpfull', 'helpshort', 'helpxml'}  # absl's flags.


@contextlib.contextmanager
def _bad_input():
  """Turns what a user can mend into one sentence and exit code 2."""
  try:
    yield
  except OSError as e:
    reason = _of_file(e).strip().splitlines()[-1]
    _fail(reason.rpartition('earlier failure to load: ')[2])
  except flags.IllegalFlagValueError as e:
    _fail(_illegal_value(str(e)))
  except flags.UnrecognizedFlagError as e:
    sentence = str(e).strip().splitlines()[0]
    _fail(f'{sentence}; settings are flags as --config.NAME=VALUE')
  except (flags.Error, TypeError, ValueError) as e:
    _fail(str(e).strip().splitlines()[0])


@contextlib.contextmanager
def _once_begun():
  """The same once training has begun: it is no longer the input."""
  try:
    yield
  except OSError as e:
    _fail(f'cannot go on: {_of_file(e)}', code=1)


def _of_file(e):
  return f'{e.filename}: {e.strerror}' if e.filename else str(e)


def _illegal_value(text):
  found = re.match(r'flag --(?:config\.)?(\S+?)=(.*?): (.*)', text, re.DOTALL)
  if found:
    name, given, reason = found.groups()
    for how, wanted in _WANTED.items():
      if how in reason:
        return f'{name} must be {wanted}, got {given!r}'
  lines = text.strip().splitlines()
  if 'Error whilst parsing config file' in text:
    return f'cannot load the config: {lines[-1]}'
  return lines[0]


@contextlib.contextmanager
def _bad_config():
  """The same where a config file, any Python, is loaded."""
  try:
    with _bad_input():
      yield
  except KeyError as e:  # --config.nosuch.name=1
    _fail(f'the config has no setting {str(e.args[0]).splitlines()[0]}')
  except BaseException as e:  # A config file may even exit.
    reason = str(e).strip().splitlines()
    _fail(
      f'cannot load the config: {type(e).__name__}: '
      f'{reason[-1] if reason else ""}'
    )


def _fail(sentence, code=2):
  with contextlib.suppress(OSError):  # Nobody may read it any more.
    print(f'train.py: {sentence.strip()}', file=sys.stderr, flush=True)
  os._exit(code)  # Whatever a config file, or XLA, still has in hand.


logging.set_verbosity(logging.ERROR)
with _bad_config():  # ml_collections reads the command line here.
  _CONFIG = config_flags.DEFINE_config_file(
    'config',
    str(_DEFAULT),
    'The experiment; --config.NAME=VALUE changes a setting.',
    lock_config=False,
    accept_new_attributes=True,  # optimizer_kwargs; `check` refuses the rest.
  )
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Folder for the files of the run. Without it every run makes a fresh one in '
  'runs/.',
)


_MODE = flags.DEFINE_enum(
  'mode',
  'train',
  ['train', 'eval'],
  'eval measures the checkpoints in --workdir instead, with its config.',
)


def main(argv):
  """Checks the input, then trains, or evaluates."""
  # --help needs no JAX.
  from gsgd_jax import (
    application,
    evaluation,
    experiment,
    files,
    hosts,
    parallel,
    resuming,
    settings,
  )

  with _bad_input():
    if len(argv) > 1:
      raise ValueError(f'unexpected argument {argv[1]!r}; options begin with -')
    if _MODE.value == 'eval':
      _evaluate(application, evaluation, files)
      return
    config = _CONFIG.value
    hasattr(config, 'to_dict')  # Raises where the file could not be loaded.
    if 'axes' in config:
      _study(config, application, files)
    settings.check(config)
    if config.distributed:
      if not hosts.is_watched():
        os._exit(hosts.watch(sys.argv))
      hosts.end_with_parent()
      hosts.join(config)
    experiment.check(config)
    if config.compilation_cache is not None:
      pathlib.Path(config.compilation_cache).mkdir(parents=True, exist_ok=True)
    workdir: pathlib.Path | None = None
    if not config.distributed or hosts.is_first():
      workdir = _make_workdir(config, experiment, files, resuming)
      number = parallel.make_mesh(config.devices).size
      on = f', training on {number} devices' if number > 1 else ''
      application.say(f'writing to {workdir}{on}')
    if config.distributed:
      workdir = hosts.shared_folder(workdir, config)
    assert workdir is not None  # Who runs alone is the first.
    done = application.done_before(config, workdir)
  with _once_begun():
    code = application.run(config, workdir, _BEGAN, done)
  if code:
    os._exit(code)  # An ordinary exit may crash on what XLA still runs.


def _study(config, application, files):
  """Computes a study, and leaves."""
  from gsgd_jax import studying

  found = studying.check(config)
  workdir = _folder(files)
  if (workdir / 'metrics.jsonl').exists():
    raise ValueError(f'{workdir} holds a run; give another --workdir')
  _take(workdir, files)
  application.say(f'writing to {workdir}')
  with _once_begun():
    code = studying.run(config, found, workdir)
  os._exit(code)


def _evaluate(application, evaluation, files):
  """Measures a run's checkpoints, prints it and writes it down."""
  if not _WORKDIR.value:
    raise ValueError('--mode=eval needs the --workdir of a run')
  config_flag = flags.FLAGS['config']
  if any(re.match('--?config(=|$)', a) for a in sys.argv[1:]):
    raise ValueError(
      '--mode=eval takes the config that is in the workdir; leave out --config'
    )
  workdir = pathlib.Path(_WORKDIR.value)
  given = config_flags.get_override_values(config_flag)
  config = evaluation.settings_of(workdir, given)
  measured = evaluation.evaluate(config, workdir, application.warn)
  application.say(evaluation.table(measured, losses=config.model == 'gpt'))
  path = workdir / 'evaluation.json'
  files.write_json(path, measured)  # Or a sentence, where nothing can be.
  application.say(f'\n{path}')


def _make_workdir(config, experiment, files, resuming):
  workdir = _folder(files)
  if _WORKDIR.value is None:
    return workdir
  if files.of_a_run(workdir) is not None:
    resuming.check(experiment.resolved(config), workdir)
  _take(workdir, files)
  return workdir


def _folder(files):
  """The folder of the run; a fresh one where none is given."""
  if _WORKDIR.value is None:
    now = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
    config_file = config_flags.get_config_filename(flags.FLAGS['config'])
    name = pathlib.Path(config_file).stem
    return files.fresh_folder(pathlib.Path('runs'), name, now)
  if not _WORKDIR.value:
    raise ValueError('workdir must name a folder, got an empty name')
  return pathlib.Path(_WORKDIR.value)


def _take(workdir, files):
  """Makes a folder, for this process alone."""
  workdir.mkdir(parents=True, exist_ok=True)
  if not os.access(workdir, os.W_OK | os.X_OK):
    raise ValueError(f'{workdir} cannot be written to')
  files.lock(workdir)


def _parse(argv):
  argv = ['--help' if argument == '-h' else argument for argument in argv]
  names = {argument.lstrip('-') for argument in argv[1:]}
  with _bad_config():
    try:
      return flags.FLAGS(argv)
    except SystemExit:
      if not names & _HELP:
        raise
  sys.exit(0)  # What was asked for has been printed; absl says 1.


if __name__ == '__main__':
  app.run(main, flags_parser=_parse)
