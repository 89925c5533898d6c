"""Checkpoints: whole, or passed over in a sentence."""

import json
import pathlib
import re
import shutil
import sys

import jax
import numpy as np
import pytest

from gsgd_jax import application, checkpoints, data, settings
from tests import runs, test_train
from tests.runs import Stop, broken, pair, short


@pytest.fixture(autouse=True)
def prepared(strict, monkeypatch):
  del strict
  runs.prepare(monkeypatch)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  return runs.once(tmp_path_factory)


@pytest.fixture
def root(tmp_path, whole):
  """Checkpoints of a method at 28 and 35, which may be spoilt."""
  for step in ('28', '35'):
    shutil.copytree(
      whole(short) / 'checkpoints' / 'sequential' / step,
      tmp_path / 'checkpoints' / 'sequential' / step,
    )
  return tmp_path / 'checkpoints'


def found_in(root):
  """The steps that can be used, and what is said of the others."""
  said = []
  return [f.step for f in checkpoints.usable(root, said.append)], said


def test_the_last_is_found_first(root):
  assert found_in(root) == ([35, 28], [])
  assert found_in(root / 'nowhere') == ([], [])


def over(where):
  """Overwrites some bytes by others."""

  def spoil(path):
    content = bytearray(path.read_bytes())
    begin = int(where * (len(content) - 1))
    for i in range(begin, min(begin + 3, len(content))):
      content[i] ^= 0x41
    path.write_bytes(content)

  return spoil


def cut(number):
  """Leaves so many bytes."""
  return lambda path: path.write_bytes(path.read_bytes()[:number])


DAMAGE = {
  'first bytes': over(0.0),
  'middle bytes': over(0.5),
  'last byte': over(1.0),
  'emptied': cut(0),
  'truncated': cut(-1),
  'extended': lambda path: path.write_bytes(path.read_bytes() + b'\0'),
  'deleted': lambda path: path.unlink(),
  'a folder': lambda path: (path.unlink(), path.mkdir()),
}
FILES = (
  'params/d/*',
  'best/d/*',
  'state/d/*',
  'state/manifest.ocdbt',
  'state/_METADATA',
  'state/_sharding',
  'position/metadata',
  '_CHECKPOINT_METADATA',
)


@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('name', FILES)
def test_a_damaged_file_is_a_sentence(root, name, damage):
  folder = root / 'sequential' / '35'
  path = next(folder.glob(name))
  DAMAGE[damage](path)
  name = path.relative_to(folder)
  reason = {
    'deleted': f'{name} is gone',
    'a folder': f'{name} cannot be read',
  }.get(damage, f'{name} is not as it was written')
  assert found_in(root) == ([28], [f'{folder} is damaged: {reason}'])


UNREADABLE = 'is damaged: digests.json cannot be read'


@pytest.mark.parametrize(
  'text, reason',
  [
    ('', UNREADABLE),
    ('{"serial": 4', UNREADABLE),
    ('null', UNREADABLE),
    ('[]', UNREADABLE),
    ('\0' * 99, UNREADABLE),
    ('\xff', UNREADABLE),
    ('{"files": {}}', UNREADABLE),
    ('{"serial": "x", "files": {}}', UNREADABLE),
    ('{"serial": [], "files": {}}', UNREADABLE),
    ('{"serial": NaN, "files": {}}', UNREADABLE),
    ('{"serial": Infinity, "files": {}}', UNREADABLE),
    ('{"serial": 9, "files": []}', UNREADABLE),
    ('{"serial": 9, "files": {"_CHECKPOINT_METADATA": 3}}', UNREADABLE),
    (
      '{"serial": 9, "files": {"/nowhere/x": [1, ""]}}',
      r'is damaged: (\.\./)+nowhere/x is gone',
    ),
    ('[' * 100_000, UNREADABLE),
  ],
)
def test_damaged_digests_are_a_sentence(root, text, reason):
  folder = root / 'sequential' / '35'
  (folder / 'digests.json').write_bytes(text.encode('latin1'))
  steps, (said,) = found_in(root)
  assert steps == [28]
  assert re.fullmatch(f'{re.escape(str(folder))} {reason}', said)


def test_any_damage_of_digests_is_survived(root):
  """Whatever is found is as it was written."""
  path = root / 'sequential' / '35' / 'digests.json'
  whole = path.read_bytes()
  positions = {f.step: f.position for f in checkpoints.usable(root, print)}
  rng = np.random.default_rng(0)
  passed_over = 0
  for _ in range(150):
    begin = int(rng.integers(len(whole)))
    other = bytes(rng.integers(32, 127, size=rng.integers(1, 6)).tolist())
    path.write_bytes(whole[:begin] + other + whole[begin + len(other) :])
    said = []
    found = {f.step: f for f in checkpoints.usable(root, said.append)}
    assert 28 in found and len(found) + len(said) == 2
    assert all(positions[step] == f.position for step, f in found.items())
    passed_over += len(said)
  assert passed_over > 100


def test_what_was_never_finished(root):
  """Said of the last, and nothing of what was being removed."""
  folder = root / 'sequential'
  (folder / '35' / 'digests.json').unlink()
  assert found_in(root) == ([28], [f'{folder}/35 was not finished'])
  shutil.copytree(folder / '28', folder / '40')
  assert found_in(root) == ([40, 28], [])


def writer_for(root, **changes):
  said = []
  return checkpoints.Writer(root, short(**changes), said.append), said


def test_a_writer_clears_what_a_killed_one_has_left(root):
  folder = root / 'sequential'
  left = [
    folder / '35.orbax-checkpoint-tmp-1700000000',
    folder / '14',
    root / 'delayed' / '7.orbax-checkpoint-tmp-3',
    root / 'delayed' / '7',
  ]
  for path in left:
    (path / 'state').mkdir(parents=True)
    (path / 'state' / 'x').write_text('x')
  assert found_in(root)[0] == [35, 28]
  writer, said = writer_for(root)
  writer.begin('sequential', None)
  assert not any(path.exists() for path in left) and said == []
  assert found_in(root) == ([35, 28], [])


def test_another_process_of_a_run_clears_nothing(root):
  (root / 'sequential' / '40').mkdir()
  writer = checkpoints.Writer(root, short(), first=False)
  writer.begin('sequential', None)
  assert (root / 'sequential' / '40').exists()


@pytest.mark.parametrize('item', ['params', 'state'])
def test_what_cannot_be_restored_is_damaged(root, item):
  """Were it damaged between being found and being read."""
  found = next(checkpoints.usable(root, print))
  like = {item: {'other': np.zeros(3, np.float32)}}
  with pytest.raises(checkpoints.Damaged, match='35 cannot be restored: '):
    checkpoints.restore(found, like)
  shutil.rmtree(found.folder / item)
  with pytest.raises(checkpoints.Damaged, match='cannot be restored') as raised:
    checkpoints.arrays(found, item)
  assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
  'damaged, goes_on', [([35], 28), ([28, 35], None), ([28], 35)]
)
def test_a_run_goes_on_from_what_is_whole(tmp_path, whole, damaged, goes_on):
  """With nothing whole it begins again; it ends the same."""
  folder = broken(whole(short), tmp_path / 'copy', 35)
  there = folder / 'checkpoints' / 'sequential'
  for step in (7, 14, 21):
    shutil.rmtree(there / str(step))
  for step in damaged:
    over(0.5)(next((there / str(step) / 'state' / 'd').iterdir()))
  done = runs.go(short(), folder)
  assert done.code == application.DONE
  for step in damaged:
    said = done.err.count(f'{there}/{step} is damaged: ')
    assert said == (goes_on is None or step > goes_on)
  if goes_on is None:
    again = f'{folder} holds no checkpoint to go on from: the run begins again'
    assert again in done.err
  else:
    assert f'going on from {there}/{goes_on}\n' in done.out
  runs.assert_same_run(folder, whole(short))


@pytest.mark.parametrize(
  'changes, steps',
  [
    (dict(checkpoints=9), [7, 14, 21, 28, 35, 40]),
    (dict(checkpoints=2), [35, 40]),
    (dict(checkpoints=1), [40]),
    (dict(checkpoints=9, checkpoint_every=10), [10, 20, 30, 40]),
    (dict(checkpoints=9, checkpoint_every=100), [40]),
    (dict(checkpoints=9, checkpoint_every=None), [40]),
    (dict(checkpoints=0), None),
  ],
)
def test_which_are_kept(tmp_path, whole, changes, steps):
  """Of each method; also where arrivals come later than calls."""
  assert runs.go(pair(**changes), tmp_path).code == application.DONE
  assert (tmp_path / 'checkpoints').exists() == (steps is not None)
  for method in ('sequential', 'delayed'):
    if steps is not None:
      assert runs.steps_of(tmp_path, method) == steps
      assert runs.last_of(tmp_path, method).step == 40
  # What is kept changes nothing else.
  same = runs.text_of(tmp_path, 'metrics.jsonl')
  assert same == runs.text_of(whole(pair), 'metrics.jsonl')


@pytest.mark.parametrize(
  'every, steps', [(7, [35, 40]), (100, [21, 40])], ids=['often', 'once']
)
def test_a_resumed_run_keeps_as_many(
  tmp_path, whole, monkeypatch, every, steps
):
  """That which it went on from among them; of a relative workdir, too."""
  broken(whole(short), tmp_path / 'copy', 21)
  monkeypatch.chdir(tmp_path)
  folder = pathlib.Path('copy')
  runs.go(short(checkpoints=2, checkpoint_every=every), folder)
  assert runs.steps_of(folder, 'sequential') == steps


def test_as_often_as_can_be(tmp_path, monkeypatch):
  """By the clock: at every chunk's end, as none takes no time."""
  wants = []
  monkeypatch.setattr(checkpoints.Writer, '_elapsed', lambda writer: 60.0)
  monkeypatch.setattr(checkpoints.Writer, 'writes', False)
  for minutes in (1.0, 1.1):
    folder = tmp_path / str(minutes)
    config = short(checkpoint_every=None, checkpoint_minutes=minutes)
    runs.go(config, folder)
    wants.append(runs.steps_of(folder, 'sequential'))
  assert {10, 20, 30, 40} <= set(wants[0])
  assert wants[1] == [40]


FULL = OSError(28, 'No space left on device')


def failing(at, original, after=False):
  """A function that fails when it is called for so many times."""
  calls = []

  def fails(*args, **kwargs):
    calls.append(args)
    fails_now = len(calls) == at
    if after or not fails_now:
      returned = original(*args, **kwargs)
    if fails_now:
      raise FULL
    return returned

  return fails


@pytest.mark.parametrize('where', ['room', 'begin', 'end', 'sync'])
def test_no_room_is_a_sentence_and_training_goes_on(
  tmp_path, whole, monkeypatch, where
):
  import orbax.checkpoint as ocp

  of, name = {
    'room': (checkpoints.Writer, '_check_room'),
    'begin': (ocp.AsyncCheckpointer, 'save'),
    'end': (ocp.AsyncCheckpointer, 'wait_until_finished'),
    'sync': (checkpoints, '_synced'),
  }[where]
  # The second checkpoint's; the end is waited for before a new one, too.
  at = {'end': 4, 'sync': 60}.get(where, 2)
  monkeypatch.setattr(of, name, failing(at, getattr(of, name), where == 'end'))
  left, fail = [], checkpoints.Writer._fail

  def noted(writer, folder, error):
    fail(writer, folder, error)
    left.append([path.name for path in folder.parent.iterdir()])

  monkeypatch.setattr(checkpoints.Writer, '_fail', noted)
  done = runs.go(short(), tmp_path)
  assert done.code == application.DONE
  there = tmp_path / 'checkpoints' / 'sequential'
  assert [line for line in done.err.splitlines() if 'train.py' in line] == [
    f'train.py: the checkpoint {there}/14 could not be written (No space left '
    f'on device); training goes on, the last one is {there}/7'
  ]
  assert left == [['7']]  # At once: it takes room.
  steps = runs.steps_of(tmp_path, 'sequential')
  assert 14 not in steps and {7, 21, 28, 35, 40} <= set(steps)
  assert found_in(tmp_path / 'checkpoints') == (steps[::-1], [])
  assert runs.text_of(tmp_path) == runs.text_of(whole(short))


def test_a_disk_that_is_too_small_is_not_filled(tmp_path, whole, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=99)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  done = runs.go(short(), tmp_path)
  assert done.code == application.DONE
  said = re.findall(
    r'could not be written \(it takes [\d,]+ bytes, and the disk has room for '
    r'99\); training goes on, there is none\n',
    done.err,
  )
  assert said
  assert list((tmp_path / 'checkpoints').rglob('*')) == []
  assert runs.text_of(tmp_path) == runs.text_of(whole(short))


def test_writes_that_fail(tmp_path):
  """A limit on the size of files stands in for a disk without room."""
  config = settings.default_config()
  config.update(
    parallel='sequential',
    hidden=(512,),
    seeds=2,
    updates=20,
    evaluate_every=10,
    checkpoint_every=5,
  )
  workdir = tmp_path / 'mine'
  runs.go(config, workdir, Stop('breaks', 'sequential', 10))
  assert runs.steps_of(workdir, 'sequential') == [5]
  limited = (
    'import os, resource, signal, sys\n'
    'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
    'resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n'
    'os.execv(sys.argv[1], sys.argv[1:])'
  )
  done = test_train.train(
    tmp_path,
    '--workdir=mine',
    '--config.parallel=sequential',
    '--config.hidden=512',
    '--config.checkpoint_every=5',
    *test_train.SHORT,
    '--config.seeds=2',
    before=(sys.executable, '-c', limited),
  )
  assert done.returncode == 0, done.stderr
  assert 'Traceback' not in done.stderr
  said = [line for line in done.stderr.splitlines() if 'train.py' in line]
  for line, step in zip(said, (10, 15, 20), strict=True):
    assert line == (
      f'train.py: the checkpoint {workdir}/checkpoints/sequential/{step} could '
      'not be written (File too large); training goes on, the last one is '
      f'{workdir}/checkpoints/sequential/5'
    )
  assert runs.steps_of(workdir, 'sequential') == [5]
  assert runs.last_of(workdir).step == 5
  result = json.loads((workdir / 'result.json').read_text())
  assert result['status'] == 'completed'


def accuracy(trained, seed):
  test = data.load('iris', seed).test
  outputs = trained.model.apply(trained.params, test.inputs)
  return float(np.mean(np.argmax(outputs, axis=-1) == test.labels))


def jumpy():
  """Is best before the end."""
  return short(learning_rate=10.0, updates=50)


def test_parameters_are_those_that_were_measured(whole):
  folder = whole(jumpy)
  lines = runs.lines_of(folder)
  result = json.loads((folder / 'result.json').read_text())
  accuracies = result['methods']['sequential']['test_accuracy']
  chosen = accuracies['validation_chosen']['values']
  of_all = checkpoints.load(folder, seed=None)
  best_of_all = checkpoints.load(folder, seed=None, which='best')
  assert best_of_all.step.tolist() == [40, 20]
  for seed in (0, 1):
    last = checkpoints.load(folder, 'sequential', seed=seed)
    best = checkpoints.load(folder, 'sequential', seed=seed, which='best')
    measured = lines[-1]['test_accuracy'][seed]
    assert accuracy(last, seed) == pytest.approx(measured)
    assert accuracy(best, seed) == pytest.approx(chosen[seed])
    assert last.step == 50 and last.config.seeds == 2
    assert best.step == best_of_all.step[seed]
    for one, all_of in ((last, of_all), (best, best_of_all)):
      runs.assert_equal(
        one.params, jax.tree.map(lambda x, s=seed: x[s], all_of.params)
      )
  assert chosen != lines[-1]['test_accuracy']


@pytest.mark.parametrize(
  'given, sentence',
  [
    (dict(), 'method must be one of delayed, sequential, got None'),
    (dict(method='delay'), "method must be one of .*'delay'; did you mean del"),
    (dict(method='delayed', seed=2), 'seed must be from 0 to 1, got 2'),
    (dict(method='delayed', seed=-1), 'seed must be from 0 to 1, got -1'),
    (dict(method='delayed', which='first'), "which must be one of .*'first'"),
  ],
)
def test_what_cannot_be_loaded(whole, given, sentence):
  with pytest.raises(ValueError, match=f'^{sentence}'):
    checkpoints.load(whole(pair), **given)


def test_without_an_evaluation_nothing_is_best(tmp_path, whole):
  folder = broken(whole(short), tmp_path / 'copy', 7)
  assert checkpoints.load(folder).step == 7
  with pytest.raises(ValueError, match=r"no best parameters: .*which='last'$"):
    checkpoints.load(folder, which='best')


def test_nothing_to_load(tmp_path, root):
  with pytest.raises(FileNotFoundError, match=r'nowhere holds no checkpoints$'):
    checkpoints.load(tmp_path / 'nowhere')
  for step in ('28', '35'):
    cut(9)(root / 'sequential' / step / 'position' / 'metadata')
  damaged = 'sequential/35 is damaged: [^;]*; [^;]*sequential/28 is damaged: '
  with pytest.raises(OSError, match=damaged):
    checkpoints.load(tmp_path)


def test_names_of_leaves():
  tree = {'a/b': np.ones(2), 'c': (np.zeros((0, 3)), np.ones(1))}
  named = checkpoints.named(tree)
  assert list(named) == ['000.a_b', '002.c.1']
  runs.assert_equal(checkpoints.unnamed(tree, named), tree)
