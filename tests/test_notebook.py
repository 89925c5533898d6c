"""Notebooks show what runs and studies come to."""

import html
import io
import re
import signal
import urllib.error

import numpy as np
import pytest
import tensorflow_datasets as tfds

from gsgd_jax import experiment, notebook, report, settings, study, studying

pytestmark = pytest.mark.usefixtures('as_users_run_it')


def config_of(**changes):
  config = settings.default_config()
  config.update(
    dict(dataset='iris', model='softmax_regression', workers=4, seeds=2)
  )
  config.update(dict(updates=24, evaluate_every=12, **changes))
  return config


def pictures(page):
  return re.findall(r'src="data:image/png;base64,iVBORw0KGgo', page)


def test_a_run_is_a_bar_a_table_and_pictures(capsys):
  config = config_of(methods=('sequential', 'asynchronous'))
  run = notebook.train(config)
  bar = capsys.readouterr().err
  assert '100%|' in bar and 'asynchronous' in bar
  expected = experiment.run(config)
  for name, history in expected.items():
    np.testing.assert_array_equal(
      run.histories[name].test_accuracy, history.test_accuracy
    )
  page = run._repr_html_()
  assert html.escape(report.table(run.histories)) in page
  assert repr(run) == str(run) == report.table(run.histories)
  assert len(pictures(page)) == len(set(re.findall('alt="[^"]+"', page))) == 2
  alone = notebook.Run(run.config, {'sequential': run.histories['sequential']})
  assert len(pictures(alone._repr_html_())) == 1


def test_a_bad_config_shows_no_bar(capsys):
  with pytest.raises(ValueError, match='workers must be'):
    notebook.train(config_of(methods=('asynchronous',), workers=0))
  config = config_of(methods=('asynchronous',))
  config.compensation_kwargs.dana.learning_rate = 0.1
  with pytest.raises(ValueError, match='no method has it'):
    notebook.train(config)
  assert not capsys.readouterr().err


def study_of(**changes):
  config = study.default_config()
  config.update(
    dict(dataset='iris', model='softmax_regression', workers=4, jobs=0)
  )
  config.update(dict(updates=24, evaluate_every=12, seeds=2, lanes=2))
  config.update(dict(tune=False, tuning_seeds=0) | changes)
  config.axes.method = {'ASGD': {'method': 'asynchronous'}}
  return config


def test_a_study_shows_its_report_and_goes_on(tmp_path, capsys, monkeypatch):
  before = signal.getsignal(signal.SIGINT)
  found = notebook.compute(study_of(), str(tmp_path / 'study'))
  shown = capsys.readouterr()
  assert '1/1' in shown.err and not shown.out
  assert signal.getsignal(signal.SIGINT) is before
  page = html.unescape(re.search('srcdoc="([^"]*)"', found._repr_html_())[1])
  assert page == (tmp_path / 'study' / 'report.html').read_text()
  assert str(found) == (tmp_path / 'study' / 'report.md').read_text()
  # Once more in the same kernel: nothing is computed.
  monkeypatch.setattr(study, 'compute', None)
  assert notebook.compute(study_of(), str(tmp_path / 'study')) == found


def test_a_study_that_fails_says_so(tmp_path, monkeypatch):
  def fails(sweep, cell):
    raise ValueError('it cannot be')

  monkeypatch.setattr(study, '_computed', fails)
  with pytest.raises(RuntimeError, match='some cells could not be computed'):
    notebook.compute(study_of(), str(tmp_path))


def test_an_interrupted_study_is_one(tmp_path, monkeypatch):
  def interrupted(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(studying, '_computed', interrupted)
  with pytest.raises(KeyboardInterrupt):
    notebook.compute(study_of(), str(tmp_path))
  with pytest.raises(ValueError, match='axes'):
    notebook.compute(study.default_config(), str(tmp_path / 'none'))
  assert not (tmp_path / 'none').exists()


class Builder:
  """What prepares an image set, or does not."""

  def __init__(self, raises=None):
    self.raises = raises
    self.prepares = 0

  def download_and_prepare(self):
    self.prepares += 1
    if self.raises is not None:
      raise self.raises


@pytest.fixture
def answers(monkeypatch):
  """What asking for a network comes to, to be changed."""
  found = {'answer': io.BytesIO()}

  def urlopen(*args, **kwargs):
    if isinstance(found['answer'], Exception):
      raise found['answer']
    return found['answer']

  monkeypatch.setattr(notebook.urllib.request, 'urlopen', urlopen)
  return found


def test_an_image_set_that_is_prepared_needs_no_network(
  digits_dir, answers, monkeypatch, capsys
):
  monkeypatch.setenv('TFDS_DATA_DIR', str(digits_dir))
  answers['answer'] = urllib.error.URLError('no network')
  assert notebook.prepared('digits', 'iris') == 'tfds:digits'
  assert notebook.prepared(None, 'iris') == 'iris'
  assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize(
  'answer, raises, prepares, said',
  [
    (urllib.error.URLError('?'), None, 0, notebook._HOST),
    (TimeoutError('?'), None, 0, notebook._HOST),
    (io.BytesIO(), ImportError("No module named 'x'.\nIt"), 1, "named 'x'"),
    (io.BytesIO(), KeyError(), 1, 'KeyError'),
    # An error is an answer; then the set is not where it should be.
    (urllib.error.HTTPError('', 400, '', {}, None), None, 1, 'is not prepared'),
  ],
)
def test_an_image_set_that_cannot_be_prepared(
  tmp_path, answers, monkeypatch, capsys, answer, raises, prepares, said
):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  builder = Builder(raises)
  monkeypatch.setattr(tfds, 'builder', lambda name, file_format: builder)
  answers['answer'] = answer
  assert notebook.prepared('mnist', 'digits') == 'digits'
  line = capsys.readouterr().out
  assert line.startswith('mnist cannot be prepared (') and said in line
  assert line.endswith('); digits instead\n') and line.count('\n') == 1
  assert builder.prepares == prepares


def test_an_image_set_is_prepared(
  digits_dir, tmp_path, answers, monkeypatch, capsys
):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'sets'))
  builder = Builder()
  builder.download_and_prepare = lambda: (tmp_path / 'sets').symlink_to(
    digits_dir
  )
  monkeypatch.setattr(tfds, 'builder', lambda name, file_format: builder)
  assert notebook.prepared('digits', 'iris') == 'tfds:digits'
  assert capsys.readouterr() == ('', '')
