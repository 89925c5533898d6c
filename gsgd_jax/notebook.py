"""Experiments and studies in a notebook: a bar, then tables and pictures.

from gsgd_jax import notebook, settings

config = settings.default_config()
config.workers = 64
notebook.train(config)
"""

import base64
import contextlib
import html
import pathlib
import sys
import tempfile
import time
import urllib.error
import urllib.request
from typing import NamedTuple

import ml_collections

from gsgd_jax import (
  _prepared,
  application,
  events,
  experiment,
  files,
  report,
  settings,
  studying,
)

_HEIGHT = 1000  # Pixels, of a report within a notebook.
# A narrow screen shows a part of them, which is moved, rather than them small.
_TABLE = (
  'font: 12px/1.4 monospace; white-space: pre; overflow-x: auto; padding: 0'
)
_PICTURES = 'overflow-x: auto'
_PICTURE = 'width: 100%; min-width: 44rem; max-width: 72rem; background: white'
# Whether it answers tells whether there is a network.
_HOST = 'https://storage.googleapis.com'
_ANSWERS_SECONDS = 10


class Run(NamedTuple):
  """What an experiment came to; a notebook shows its table and pictures.

  Attributes:
    config: Its settings, lengths in updates.
    histories: By a method's name, how it went.
  """

  config: ml_collections.ConfigDict
  histories: dict[str, events.History]

  def __str__(self) -> str:
    return report.table(self.histories, losses=self.config.model == 'gpt')

  def __repr__(self) -> str:
    return str(self)  # What is shown where there is no HTML.

  def _repr_html_(self):
    """The table, and the pictures that `train.py` draws."""
    drawn = {'Accuracy and loss, by updates and by time': report.draw}
    if any(report.has_workers(h) for h in self.histories.values()):
      alt = 'How stale gradients were, and which workers they were of'
      drawn[alt] = report.draw_staleness
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'picture.png'
      pictures = [self._picture(alt, drawn[alt], path) for alt in drawn]
    return (
      f'<pre style="{_TABLE}">{html.escape(str(self))}</pre>\n'
      f'<div style="{_PICTURES}">\n{"".join(pictures)}</div>'
    )

  def _picture(self, alt, draw, path):
    draw(path, self.config, self.histories)
    text = base64.b64encode(path.read_bytes()).decode()
    return (
      f'<img src="data:image/png;base64,{text}" alt="{alt}" '
      f'style="{_PICTURE}">\n'
    )


class Report(NamedTuple):
  """The report of a study; a notebook shows it, to be scrolled through.

  Attributes:
    workdir: The folder that holds it, and its pictures.
  """

  workdir: pathlib.Path

  def __str__(self) -> str:
    return (self.workdir / 'report.md').read_text(encoding='utf-8')

  def _repr_html_(self):
    page = (self.workdir / 'report.html').read_text(encoding='utf-8')
    return (
      f'<iframe srcdoc="{html.escape(page)}" '
      f'style="width: 100%; height: {_HEIGHT}px; border: 1px solid #999999">'
      '</iframe>'
    )


def train(config: ml_collections.ConfigDict) -> Run:
  """Trains every method of a config, as `train.py` does, but writes no files.

  Args:
    config: Like that of ``settings.default_config()``.

  Returns:
    A `Run`, which a notebook shows.

  Raises:
    ValueError: The config is bad.
    OSError: The data cannot be read.
  """
  settings.check(config)
  resolved = experiment.resolved(config)
  watch = None

  def tell(event):
    nonlocal watch
    if watch is None:  # The config was found to be good.
      watch = application.Watch(resolved, sys.stderr, bar=True)
    watch.add(event, time.perf_counter())

  try:
    histories = experiment.run(config, tell)
  finally:
    if watch is not None:
      watch.close()
  return Run(resolved, histories)


def compute(config: ml_collections.ConfigDict, workdir: str) -> Report:
  """Computes a study, as `train.py` does; it goes on in a folder that has one.

  Args:
    config: Like that of ``study.default_config()``.
    workdir: A folder for its cells, its report and its pictures.

  Returns:
    A `Report`, which a notebook shows.

  Raises:
    ValueError: The config is bad.
    OSError: Data cannot be read, or files not written.
    KeyboardInterrupt: It was interrupted; the report is of what there is.
    RuntimeError: Some cells could not be computed; it was said why.
  """
  found = studying.check(config)
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    stack.callback(files.lock(folder))
    # The report has the tables that a terminal is shown.
    code = studying.run(config, found, folder, bar=True, tables=False)
  if code == application.INTERRUPTED:
    raise KeyboardInterrupt
  if code != application.DONE:
    raise RuntimeError('some cells could not be computed')
  return Report(folder)


def prepared(name: str | None, otherwise: str) -> str:
  """The dataset that an image set is, which is prepared if it is not yet.

  Args:
    name: As tensorflow-datasets has it; None: no image set.
    otherwise: The dataset where there is none, or it cannot be prepared, for
      want of a network or of TensorFlow; then a line says why.

  Returns:
    For the setting ``dataset``.
  """
  if name is None:
    return otherwise
  dataset = f'{_prepared.PREFIX}{name}'
  try:
    _prepare(name, dataset)
  except Exception as e:  # What tfds raises may be anything.
    why = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip('.')
    print(f'{name} cannot be prepared ({why}); {otherwise} instead')
    return otherwise
  return dataset


def _prepare(name, dataset):
  with contextlib.suppress(ValueError):
    _prepared.open_set(dataset, None)
    return  # It was prepared before.
  import tensorflow_datasets as tfds

  builder = tfds.builder(name, file_format='array_record')
  _check_online()
  with _prepared.quiet():
    builder.download_and_prepare()
  _prepared.open_set(dataset, None)


def _check_online():
  """Raises an OSError where there is no network; tfds would try for minutes."""
  try:
    urllib.request.urlopen(_HOST, timeout=_ANSWERS_SECONDS).close()
  except urllib.error.HTTPError as e:
    e.close()  # It does answer.
  except OSError as e:
    raise OSError(f'{_HOST} cannot be reached') from e
