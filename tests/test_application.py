"""A run that is supervised: what happens to it, and what it leaves."""

import io
import json
import queue
import signal

import jax
import numpy as np
import pytest

from gsgd_jax import application, events, experiment, settings


def config_of(**changes):
  config = settings.default_config()
  config.update(methods=('sequential', 'delayed'), seeds=2, **changes)
  return config


def happened(config):
  """Events of a first method, and of a second up to its first evaluation."""
  first, second = events.methods(config)
  measured = {f: np.array([0.5, 0.25]) for f in events.MEASURED}
  measured['arrivals'] = events.Arrivals(
    np.zeros(2), np.array([3, 1]), np.array([0.5, 1.5])
  )
  yield events.Started(first)
  for step in (0, 10):
    spent = dict(gradient_evaluations=np.array([step, step]))
    yield events.Evaluation(first, step, step / 5, **{**measured, **spent})
  yield events.Finished(first, 'completed', None)
  yield events.Started(second)
  yield events.Evaluation(second, 0, 0.0, **measured)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
  """Runs a config whose training ends as it is told to."""

  def run(end):
    def stream(config, *others):
      yield from happened(config)
      end()

    monkeypatch.setattr(experiment, 'stream', stream)
    monkeypatch.setattr(application, '_LEAVE_SECONDS', 1.0)
    before = [signal.getsignal(n) for n in application._SIGNALS]
    try:
      return application.run(config_of(), tmp_path, 0.0), capsys.readouterr()
    finally:
      assert [signal.getsignal(n) for n in application._SIGNALS] == before

  return run


def result(folder):
  content = json.loads((folder / 'result.json').read_text())
  methods = content['methods'].values()
  return content['status'], [(m['status'], m['step']) for m in methods]


@pytest.mark.parametrize(
  'error, sentence',
  [
    (MemoryError(), 'MemoryError'),
    (OSError(28, 'No space left on device'), 'No space left on device'),
    (
      jax.errors.JaxRuntimeError('RESOURCE: no\nmore'),
      'RESOURCE: no',
    ),
  ],
)
def test_what_finished_survives_a_failure(run, tmp_path, error, sentence):
  def end():
    raise error

  code, printed = run(end)
  assert code == application.FAILED
  assert result(tmp_path) == ('failed', [('completed', 10), ('failed', 0)])
  assert 'train.py: cannot go on: ' in printed.err and sentence in printed.err
  assert 'Traceback' not in printed.err
  assert 'delayed failed: ' in printed.out
  assert (tmp_path / 'curves.png').exists()
  assert (tmp_path / 'metrics.jsonl').read_text().count('\n') == 3


def test_our_own_mistakes_are_not_hidden(run, tmp_path):
  with pytest.raises(ZeroDivisionError):
    run(lambda: 1 / 0)
  assert result(tmp_path)[0] == 'failed'


def test_a_signal_ends_it(run, tmp_path):
  def end():
    signal.raise_signal(signal.SIGTERM)
    signal.pause()  # Training would go on for ever.

  code, printed = run(end)
  assert code == application.INTERRUPTED
  assert result(tmp_path) == (
    'interrupted',
    [('completed', 10), ('interrupted', 0)],
  )
  assert 'train.py: interrupted (SIGTERM)' in printed.err


def watched(stream):
  watch = application.Watch(config_of(updates=100), stream)
  first, second = events.methods(config_of())
  measured = {f: np.array([0.5, 0.25]) for f in events.MEASURED}
  measured['arrivals'] = events.Arrivals(
    np.zeros(2), np.array([3, 1]), np.array([0.5, 1.5])
  )
  for event, when in (
    (events.Started(first), 0.0),
    (events.Evaluation(first, 0, 0.0, **measured), 1.0),
    (events.Progress(first, 1, 2.0, np.nan), 2.0),
    (events.Progress(first, 21, 2.5, 3.0), 4.0),
    (events.Progress(first, 41, 0.125, 3.0), 12.0),
    (events.Finished(first, 'stopped_early', None), 15.0),
    (events.Started(second), 15.0),
    (events.Finished(second, 'diverged', 'delayed diverged: so'), 16.0),
  ):
    watch.add(event, watch._began + when)
  watch.close()


def test_a_line_now_and_then():
  stream = io.StringIO()
  watched(stream)
  assert stream.getvalue().splitlines() == [
    # 40 updates in 10 seconds, 159 of 200 to go.
    '[00:12] sequential: update 41, loss 0.125, validation 37.5%, '
    'staleness 3.0, 4 updates/s, 00:39 left',
    '[00:15] sequential: stopped early',
    '[00:16] delayed diverged: so',
  ]


def test_a_bar_on_a_terminal():
  stream = io.StringIO()
  stream.isatty = lambda: True
  watched(stream)
  shown = stream.getvalue()
  assert 'sequential (compiling)   0%' in shown
  assert '100%' in shown and 'stopped early' not in shown
  assert 'delayed diverged: so\n' in shown


class Hung:
  """A terminal that has been closed."""

  encoding = 'utf-8'

  def isatty(self):
    return True

  def fileno(self):
    raise OSError(5, 'Input/output error')

  def write(self, text):
    if self.closed:
      raise OSError(5, 'Input/output error')

  def flush(self):
    self.write('')


def test_a_terminal_that_is_closed_stops_nothing(monkeypatch):
  monkeypatch.setattr(application, 'say', lambda text, stream: None)
  terminal = Hung()
  terminal.closed = False
  watch = application.Watch(config_of(updates=100), terminal)
  terminal.closed = True
  watch.note('something')
  for event in happened(config_of()):
    watch.add(event, 1.0)
  watch.close()


def test_a_second_signal_does_not_wait_for_a_checkpoint(monkeypatch):
  monkeypatch.setattr(application, '_AGAIN_SECONDS', 0.0)

  class Writer:
    writes = True

  inbox = queue.SimpleQueue()
  for item in ('an event', application._Interrupted(signal.SIGINT)):
    inbox.put(item)
  application._until_written(inbox, Writer)  # Else it would be for ever.
  assert inbox.empty()
