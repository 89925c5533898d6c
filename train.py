"""Trains the methods of a config side by side.

  python train.py
  python train.py --config=configs/breast_cancer.py --workdir=runs/paper
  python train.py --config.workers=32 --config.learning_rate=0.1

Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import contextlib
import datetime
import os
import pathlib
import sys

import tqdm
from absl import app, flags, logging
from ml_collections import config_flags

_DEFAULT = pathlib.Path(__file__).resolve().parent / 'configs' / 'default.py'


@contextlib.contextmanager
def _bad_input():
  """Turns what a user can mend into one sentence and exit code 2."""
  try:
    yield
  except OSError as e:
    reason = f'{e.filename}: {e.strerror}' if e.filename else str(e)
    _fail(reason.strip().splitlines()[-1])
  except (flags.Error, TypeError, ValueError) as e:
    _fail(str(e).strip().splitlines()[0])


@contextlib.contextmanager
def _bad_config():
  """The same where a config file, any Python, is loaded."""
  try:
    with _bad_input():
      yield
  except AttributeError as e:
    if isinstance(e.args[0], KeyError):  # How ml_collections says it.
      reason = '. '.join(e.args[0].args[0].splitlines())
      _fail(f'the config has no setting {reason}')
    _fail(f'cannot load the config: {e}')
  except Exception as e:
    _fail(f'cannot load the config: {type(e).__name__}: {e}')


def _fail(sentence):
  print(f'train.py: {sentence.strip()}', file=sys.stderr)
  sys.exit(2)


with _bad_config():  # ml_collections reads the command line here.
  _CONFIG = config_flags.DEFINE_config_file(
    'config',
    str(_DEFAULT),
    'The experiment; --config.NAME=VALUE changes a setting.',
  )
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Folder for result.json and curves.png. Without it every run makes a fresh '
  'one in runs/.',
)


def main(argv):
  from gsgd_jax import experiment, report  # Late: --help needs no JAX.

  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  with _bad_input():
    if len(argv) > 1:
      raise ValueError(f'unexpected argument {argv[1]!r}; options begin with -')
    experiment.check(config)
    workdir, fresh = _make_workdir(report)
  print(f'writing to {workdir}', flush=True)
  try:
    histories = _train(experiment, config)
  except BaseException:
    if fresh:
      workdir.rmdir()  # Nothing was written.
    raise
  print('\n' + report.table(histories) + '\n')
  print('\n'.join(report.sentences(config, histories)))
  with _bad_input():
    report.write(workdir, config, histories)
  print(f'\n{workdir / "curves.png"}\n{workdir / "result.json"}')


def _train(experiment, config):
  total = config.updates * len(config.methods)
  # Silent where nobody watches.
  with tqdm.tqdm(total=total, unit=' updates', disable=None) as bar:

    def progress(label, updates):
      bar.set_description(label)
      bar.update(updates)

    return experiment.run(config, progress)


def _make_workdir(report):
  if _WORKDIR.value is None:
    now = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
    config_file = config_flags.get_config_filename(flags.FLAGS['config'])
    name = pathlib.Path(config_file).stem
    return report.new_workdir(pathlib.Path('runs'), name, now), True
  if not _WORKDIR.value:
    raise ValueError('workdir must name a folder, got an empty name')
  workdir = pathlib.Path(_WORKDIR.value)
  if (workdir / 'result.json').exists():
    raise ValueError(
      f'{workdir} already holds a run (result.json); give another --workdir'
    )
  fresh = not workdir.exists()
  workdir.mkdir(parents=True, exist_ok=True)
  return workdir, fresh


def _parse(argv):
  with _bad_config():
    return flags.FLAGS(argv)


def _run(argv):
  try:
    main(argv)
  except KeyboardInterrupt:
    print('train.py: interrupted', file=sys.stderr, flush=True)
    os._exit(130)  # An ordinary exit may crash on what XLA still runs.


if __name__ == '__main__':
  app.run(_run, flags_parser=_parse)
