"""The files of a run: whole, or absent."""

import errno
import json
import os

import ml_collections
import numpy as np
import pytest

from gsgd_jax import events, files, settings


def test_written_aside_and_renamed(tmp_path):
  path = tmp_path / 'x.json'
  files.write_json(path, {'a': np.float32(np.inf), 'b': np.arange(2)})
  assert json.loads(path.read_text()) == {'a': None, 'b': [0, 1]}

  def fails(aside):
    assert aside.suffix == path.suffix and aside != path
    aside.write_text('half')
    raise OSError(errno.ENOSPC, 'No space left on device')

  before = path.read_text()
  with pytest.raises(OSError, match='No space left on device') as raised:
    files.write_whole(path, fails)
  assert raised.value.filename == str(path)
  assert path.read_text() == before
  assert list(tmp_path.iterdir()) == [path]


def test_lines_are_whole_or_absent(tmp_path):
  lines = files.Lines(tmp_path / 'x.jsonl')
  lines.write({'a': 1})

  class Full:
    """A disk with room for three more bytes."""

    def __init__(self, file):
      self.file, self.room = file, 3

    def tell(self):
      return self.file.tell()

    def truncate(self, size):
      return self.file.truncate(size)

    def write(self, data):
      if not self.room:
        raise OSError(errno.ENOSPC, 'No space left on device')
      written = self.file.write(data[: self.room])
      self.room -= written
      return written

  real, lines._file = lines._file, Full(lines._file)
  with pytest.raises(OSError, match='No space') as raised:
    lines.write({'b': 2})
  assert raised.value.filename == str(tmp_path / 'x.jsonl')
  assert (tmp_path / 'x.jsonl').read_text() == '{"a": 1}\n'
  real.seek(0, os.SEEK_END)
  lines._file = real
  lines.write({'c': np.array([np.nan, 1.0])})
  lines.close()
  assert (tmp_path / 'x.jsonl').read_text() == '{"a": 1}\n{"c": [null, 1.0]}\n'


def test_lines_never_write_over_a_file(tmp_path):
  (tmp_path / 'x.jsonl').write_text('precious')
  with pytest.raises(FileExistsError):
    files.Lines(tmp_path / 'x.jsonl')
  assert (tmp_path / 'x.jsonl').read_text() == 'precious'


def test_any_file_of_a_run_marks_its_folder(tmp_path):
  assert files.of_a_run(tmp_path) is None
  assert files.of_a_run(tmp_path / 'absent') is None
  for name in files.NAMES:
    (tmp_path / name).touch()
    assert files.of_a_run(tmp_path) == name
    (tmp_path / name).unlink()


def test_fresh_folders_never_collide(tmp_path):
  made = [files.fresh_folder(tmp_path / 'runs', 'x', 'now') for _ in range(3)]
  assert [m.name for m in made] == ['now-x', 'now-2-x', 'now-3-x']
  (tmp_path / 'file').touch()
  with pytest.raises(NotADirectoryError, match='file'):
    files.fresh_folder(tmp_path / 'file', 'x', 'now')


def test_the_log_keeps_the_clock_apart(tmp_path):
  method, other = events.methods(settings.default_config())[:2]
  measured = {f: np.array([0.25, np.nan]) for f in events.MEASURED}
  measured['arrivals'] = events.Arrivals(
    np.zeros(2), np.array([3, 0, 1, 0]), np.arange(101) / 50
  )
  log = files.Log(
    tmp_path, ml_collections.ConfigDict({'seeds': 2}), began=100.0
  )
  log.add(events.Started(method), 101.0)
  log.add(events.Evaluation(method, 0, 0.0, **measured), 102.0)
  log.add(events.Progress(method, 30, 0.5, 1.0), 103.0)
  log.add(events.Evaluation(method, 40, 0.5, **measured), 104.0)
  log.add(events.Finished(method, 'completed', None), 105.0)
  log.add(events.Evaluation(other, 0, 0.0, **measured), 110.0)
  log.close()
  read = lambda name: [
    json.loads(line) for line in (tmp_path / name).read_text().splitlines()
  ]
  metrics, timing = read('metrics.jsonl'), read('timing.jsonl')
  assert [(m['method'], m['step'], m['epoch']) for m in metrics] == [
    ('sequential', 0, 0.0),
    ('sequential', 40, 0.5),
    ('asynchronous', 0, 0.0),
  ]
  assert metrics[1]['test_loss'] == [0.25, None]
  assert metrics[1]['staleness_histogram'] == [3, 0, 1]
  shares = metrics[1]['worker_shares']
  assert len(shares) == 64 and (shares[0], shares[-1]) == (0, 2)
  assert timing == [
    dict(method='sequential', step=0, seconds=2.0, updates_per_second=None),
    dict(method='sequential', step=40, seconds=4.0, updates_per_second=20.0),
    dict(method='asynchronous', step=0, seconds=10.0, updates_per_second=None),
  ]
