"""Runs that go on: as if they had never been stopped."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import optax
import pytest

import gsgd_jax
from gsgd_jax import (
  _methods,
  application,
  evaluation,
  events,
  experiment,
  files,
  parallel,
  programs,
  resuming,
  tasks,
  training,
)
from tests import runs, test_devices, test_train
from tests.runs import Stop, broken, pair, short

forked = test_train.forked
DIVERGES, STOPS_EARLY, ENDS = (
  'delayed+delay_compensation',
  'sequential',
  'asynchronous+random',
)


@pytest.fixture(autouse=True)
def prepared(strict, monkeypatch):
  del strict
  runs.prepare(monkeypatch)


def eventful(**changes):
  """One method diverges; seeds of another stop at different times."""
  return runs.config_of(
    DIVERGES,
    STOPS_EARLY,
    ENDS,
    **dict(
      patience=1,
      learning_rate=10.0,
      updates=60,
      compensation_kwargs=dict(lam=1e30),
      checkpoint_every=15,
    )
    | changes,
  )


def moving(**changes):
  """A cluster with clocks and momenta; saved whenever that is possible."""
  return runs.config_of(
    'asynchronous+dana+consistent',
    **dict(
      arrivals='gamma',
      machine_cv=0.5,
      compensation_kwargs=dict(learning_rate=0.01),
      checkpoint_every=None,
      checkpoint_minutes=0.0,
    )
    | changes,
  )


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  return runs.once(tmp_path_factory)


@pytest.mark.parametrize(
  'make, stops',
  [
    (eventful, [Stop('breaks', DIVERGES, 0)]),
    (eventful, [Stop('breaks', STOPS_EARLY, 40)]),  # A seed has stopped.
    (
      eventful,
      [
        Stop('leaves', STOPS_EARLY, 10),
        Stop('leaves', ENDS, 10),
        Stop('breaks', ENDS, 30),
      ],
    ),
    (
      moving,
      [
        Stop('leaves', 'asynchronous+dana+consistent', 10),
        Stop('breaks', 'asynchronous+dana+consistent', 30),
      ],
    ),
  ],
)
def test_it_ends_as_if_it_had_never_been_stopped(tmp_path, whole, make, stops):
  expected = whole(make)
  for stop in stops:
    done = runs.go(make(), tmp_path, stop)
    broken = stop.how == 'breaks'
    interrupted = application.FAILED if broken else application.INTERRUPTED
    assert done.code == interrupted
    assert f'--workdir={tmp_path} go on' in done.err
    last = runs.lines_of(tmp_path)[-1]
    assert last['method'] == stop.method and last['step'] >= stop.step
  done = runs.go(make(), tmp_path)
  assert done.code == application.DONE
  nothing_yet = stops == [Stop('breaks', DIVERGES, 0)]
  assert ('begins again' in done.err) == nothing_yet
  assert 'may differ' not in done.err
  runs.assert_same_run(tmp_path, expected)


def test_what_that_run_is_about(whole):
  result = json.loads((whole(eventful) / 'result.json').read_text())
  statuses = {name: m['status'] for name, m in result['methods'].items()}
  assert statuses[DIVERGES] == 'diverged'
  assert statuses[STOPS_EARLY] == 'stopped_early'
  last = runs.last_of(whole(eventful), STOPS_EARLY)
  assert last.position['best_step'] == [40, 20]


def test_a_complete_run_stays_as_it_is(tmp_path, whole):
  folder = runs.copy_of(whole(pair), tmp_path / 'copy')
  of = lambda: {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
  before = of()
  done = runs.go(pair(), folder)
  assert done.code == application.DONE
  assert f'{folder} holds this run, and it is complete' in done.out
  assert 'sequential' in done.out  # The table.
  assert of() == before


def edited(change):
  def spoil(folder):
    for name in ('metrics.jsonl', 'timing.jsonl'):
      path = folder / name
      path.write_bytes(change(path.read_bytes()))

  return spoil


def first_lines(number):
  return lambda text: b''.join(text.splitlines(keepends=True)[:number])


@pytest.mark.parametrize(
  'spoil, goes_on, sentence',
  [
    (edited(lambda text: text + b'{"method": "sequ'), 28, None),
    (edited(lambda text: text + b'{"method": "sequential", "s\xff'), 28, None),
    (edited(first_lines(3)), 28, None),  # Those of 0, 10 and 20.
    (
      edited(first_lines(2)),
      14,
      'sequential/28 cannot be used: metrics.jsonl lacks lines of sequential '
      'that were measured before it',
    ),
    # The torn one is that of 20.
    (edited(lambda text: first_lines(3)(text)[:-9]), 14, '28 cannot be used'),
  ],
)
def test_lines_that_are_lost(tmp_path, whole, spoil, goes_on, sentence):
  folder = broken(whole(short), tmp_path / 'copy', 28)
  spoil(folder)
  done = runs.go(short(), folder)
  assert done.code == application.DONE
  assert (
    f'going on from {folder}/checkpoints/sequential/{goes_on}\n' in done.out
  )
  if sentence is None:
    assert 'train.py' not in done.err
  else:
    assert sentence in done.err
  runs.assert_same_run(folder, whole(short))


def test_nothing_is_thrown_away(tmp_path, whole):
  """What would be lost if the run began again."""
  spoiled = broken(whole(short), tmp_path / 'spoiled', 28)
  (spoiled / 'metrics.jsonl').unlink()
  complete = runs.copy_of(whole(short), tmp_path / 'complete')
  shutil.rmtree(complete / 'checkpoints')
  for folder, config, sentence in (
    (spoiled, short(), 'holds checkpoints, and metrics.jsonl lacks'),
    (complete, short(updates=60), 'complete, and no checkpoint to go on from'),
  ):
    before = sorted(folder.rglob('*'))
    with pytest.raises(ValueError, match=sentence):
      runs.go(config, folder)
    assert sorted(folder.rglob('*')) == before


def test_other_data_are_refused(tmp_path, whole):
  folder = broken(whole(short), tmp_path / 'copy', 28)
  dataset = experiment.load_all(short(), 1)[0]
  assert resuming.plan(short(), folder, pytest.fail, dataset).starts
  train = dataset.train
  others = train._replace(labels=train.labels[::-1])
  with pytest.raises(
    ValueError, match='28 is of a run on other data than iris'
  ):
    resuming.plan(short(), folder, pytest.fail, dataset._replace(train=others))


def test_a_longer_run_is_stopped_in_its_first_method(tmp_path, whole):
  """The other one waits for its turn, where it is."""
  folder = runs.copy_of(whole(pair), tmp_path / 'copy')
  longer = pair(updates=60)
  runs.go(longer, folder, Stop('breaks', 'sequential', 50))
  done = runs.go(longer, folder)
  assert f'going on from {folder}/checkpoints/delayed/40\n' in done.out
  runs.go(longer, tmp_path / 'at_once')
  of = lambda folder: sorted(
    (folder / 'metrics.jsonl').read_text().splitlines()
  )
  assert of(folder) == of(tmp_path / 'at_once')


def test_a_longer_run_with_another_method_extends(tmp_path, whole):
  folder = runs.copy_of(whole(pair), tmp_path / 'copy')
  before = (folder / 'metrics.jsonl').read_text()
  longer = dict(updates=60)
  config = short('sequential', 'delayed', 'asynchronous', **longer)
  done = runs.go(config, folder)
  assert done.code == application.DONE
  lines = (folder / 'metrics.jsonl').read_text()
  assert lines.startswith(before)
  runs.go(config, tmp_path / 'at_once')
  at_once = tmp_path / 'at_once'
  of = lambda folder: sorted(
    (folder / 'metrics.jsonl').read_text().splitlines()
  )
  assert of(folder) == of(at_once)
  name = 'result.json'
  assert runs.text_of(folder, name) == runs.text_of(at_once, name)
  for method in ('sequential', 'delayed', 'asynchronous'):
    runs.assert_equal(
      *(runs.arrays_of(runs.last_of(f, method)) for f in (folder, at_once))
    )


def written(folder, **changes):
  """A folder with nothing but a config."""
  config = experiment.resolved(pair(**changes))
  files.write_json(folder / 'config.json', config.to_dict())


LINEAR = dict(schedule='linear')


@pytest.mark.parametrize(
  'before, now, sentence',
  [
    (
      {},
      dict(learning_rate=0.1),
      'with learning_rate=0.05, and this one has learning_rate=0.1; give',
    ),
    (
      {},
      dict(hidden=(8,)),
      r'with hidden=\[64\], and this one has hidden=\[8\]; give',
    ),
    (
      {},
      dict(updates=39),
      r'=40, and .*=39 \(a run can become longer, not shorter',
    ),
    ({}, dict(methods=('delayed', 'sequential')), r'added at the end alone\)'),
    ({}, dict(methods=('sequential',)), r'added at the end alone\)'),
    (
      {},
      dict(updates=50, seeds=3),
      'with seeds=2, updates=40, and this one has seeds=3, updates=50; give',
    ),
    (
      {},
      dict(seeds=3, delay=4, workers=8, patience=2, batch_size=8),
      r'with (\w+=\S+, ){3}and this one has [^;]* \(2 more differ\); ',
    ),
    (
      dict(schedule='cosine_decay'),
      dict(schedule='cosine_decay', updates=50),
      'the learning rate would have been another from the start',
    ),
    (LINEAR, LINEAR | dict(updates=50), 'would have been another'),
    ({}, dict(optimizer_kwargs=dict(momentum=0.5)), 'with optimizer_kwargs='),
  ],
)
def test_another_run_is_refused(tmp_path, before, now, sentence):
  written(tmp_path, **before)
  refused = f'^{re.escape(str(tmp_path))} holds a run .*{sentence}'
  with pytest.raises(ValueError, match=refused) as raised:
    resuming.check(experiment.resolved(pair(**now)), tmp_path)
  assert str(raised.value).endswith('give another --workdir')


@pytest.mark.parametrize(
  'before, now',
  [
    ({}, {}),
    ({}, dict(devices=4, compilation_cache='cache', data_dir='data')),
    ({}, dict(checkpoints=0, checkpoint_every=3, checkpoint_minutes=5.0)),
    ({}, dict(tensorboard=True, profile=True, round_size=2)),
    ({}, dict(updates=50)),
    ({}, dict(methods=('sequential,delayed', 'asynchronous'), updates=50)),
    (dict(methods=('delayed',)), dict(parallel='delayed')),
    (dict(updates=50), dict(epochs=10, updates=50)),  # 90 // 16 = 5 an epoch.
    (
      LINEAR | dict(schedule_kwargs=dict(transition_steps=20)),
      LINEAR | dict(schedule_kwargs=dict(transition_steps=20), updates=50),
    ),
  ],
)
def test_the_same_run_and_a_longer_one_go_on(tmp_path, before, now):
  written(tmp_path, **before)
  resuming.check(experiment.resolved(pair(**now)), tmp_path)


@pytest.mark.parametrize(
  'name, text, sentence',
  [
    ('metrics.jsonl', '', 'holds metrics.jsonl but no config.json'),
    ('config.json', '{"seeds": 2', 'config.json is damaged: it holds no JSON'),
    ('config.json', '\0\0\0\0', 'config.json is damaged: it holds no JSON'),
    ('config.json', '[1]', 'config.json is damaged: it holds no object'),
    ('config.json', '{"methods": 5}', 'config.json is damaged: methods must'),
    ('config.json', '{"seeds": "x"}', 'config.json is damaged: seeds must be'),
  ],
)
def test_what_is_no_run(tmp_path, name, text, sentence):
  (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=sentence):
    resuming.check(pair(), tmp_path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path, whole):
  folder = broken(whole(short), tmp_path / 'copy', 28)
  config = short(learning_rate=0.2)
  written(folder, methods=('sequential',), learning_rate=0.2)
  resuming.check(config, folder)
  sentence = (
    f'{folder}/checkpoints/sequential/28 is of a run with learning_rate=0.05, '
    'and this one has learning_rate=0.2; give another --workdir'
  )
  with pytest.raises(ValueError, match=f'^{re.escape(sentence)}$'):
    resuming.plan(config, folder, lambda said: None)


def test_other_processes_are_told_of_the_plan(tmp_path, whole):
  folder = broken(whole(short), tmp_path / 'copy', 28)
  plan = resuming.plan(short(), folder, lambda said: None)
  read = resuming.read(resuming.said(plan))
  assert read.starts == plan.starts and plan.starts['sequential'].step == 28
  assert read.ended == plan.ended == {}
  assert (read.serial, read.complete) == (plan.serial, plan.complete)
  complete = resuming.plan(pair(), whole(pair), lambda said: None)
  read = resuming.read(resuming.said(complete))
  assert read.complete and read.ended == complete.ended


def test_lines_that_stay(tmp_path):
  path = tmp_path / 'x.jsonl'
  assert files.keep_lines(path, {'a': 1}) is None and not path.exists()
  lines = [
    b'{"method": "a", "step": 0}\n',
    b'{"method": "b", "step": 0}\n',
    b'7\n',
    b'{"method": "a", "step": 1}\n',
    b'{"method": "a", "st\n',
    b'{"method": "a", "step": 2}',  # Torn, as there is no end.
  ]
  path.write_bytes(b''.join(lines))
  assert files.keep_lines(path, {'a': 3})['step'] == 1
  assert path.read_bytes() == lines[0] + lines[3]
  more = files.Lines(path, more=True)
  more.write({'method': 'a', 'step': 2})
  more.sync()
  more.close()
  assert [said['step'] for _, said in files.whole_lines(path)] == [0, 1, 2]


def test_a_folder_is_for_one_process(tmp_path, forked):
  workdir = tmp_path / 'out'
  workdir.mkdir()
  files.lock(workdir)
  done = forked(tmp_path, '--workdir=out')
  assert done.returncode == 2
  assert done.stderr == (
    'train.py: another process is training in out; give another --workdir\n'
  )
  assert list(workdir.iterdir()) == []


MEASURES = [
  f'{split}_{what}'
  for split in ('train', 'validation', 'test')
  for what in ('loss', 'accuracy')
]


def test_evaluation_is_what_was_measured(tmp_path, whole):
  folder = runs.copy_of(whole(pair), tmp_path / 'copy')
  config = evaluation.settings_of(folder, {})
  measured = evaluation.evaluate(config, folder)
  assert list(measured) == ['sequential', 'delayed']
  lines = runs.lines_of(folder)
  for name, of_method in measured.items():
    own = [line for line in lines if line['method'] == name]
    assert of_method['step'] == own[-1]['step'] == 40
    for field in MEASURES:
      assert of_method['last'][field].tolist() == own[-1][field]
      for seed, step in enumerate(of_method['best_step']):
        (then,) = (line for line in own if line['step'] == step)
        assert of_method['best'][field][seed] == then[field][seed]
  # The same from the command line.
  done = test_train.train(folder, '--mode=eval', '--workdir=.')
  assert done.returncode == 0, done.stderr
  assert done.stderr == ''
  assert done.stdout.startswith(evaluation.table(measured))
  said = json.loads((folder / 'evaluation.json').read_text())
  schema = {**test_train.SCHEMA, '$ref': '#/$defs/evaluation.json'}
  jsonschema.Draft202012Validator(schema).validate(said)
  assert said == files.plain(measured)


def test_evaluation_of_seeds_that_have_stopped(whole):
  """Also of that which trained on for the sake of the other."""
  folder = whole(eventful)
  config = evaluation.settings_of(folder, {})
  said = []
  measured = evaluation.evaluate(config, folder, said.append)
  assert list(measured) == [STOPS_EARLY, ENDS] and said == []
  for name, of_method in measured.items():
    last = [x for x in runs.lines_of(folder) if x['method'] == name][-1]
    for field in MEASURES:
      assert of_method['last'][field].tolist() == last[field]


def test_only_a_runs_own_checkpoints_are_evaluated(tmp_path, whole):
  folder = runs.copy_of(whole(short), tmp_path / 'copy')
  written(folder, methods=('sequential',), seeds=3)
  config = evaluation.settings_of(folder, {})
  with pytest.raises(
    ValueError, match='/40 is of a run with seeds=2, and this'
  ):
    evaluation.evaluate(config, folder)


@pytest.mark.parametrize(
  'arguments, sentence',
  [
    ((), '--mode=eval needs the --workdir of a run'),
    (('--workdir=nowhere',), 'nowhere holds no run: there is no config.json'),
    (
      ('--workdir=run', '--config=configs/default.py'),
      '--mode=eval takes the config that is in the workdir; leave out --config',
    ),
    (
      ('--workdir=run', '--config.seeds=1'),
      'seeds is a setting of the run in run, and stays as it is; an evaluation '
      'can change data_dir, measured, stream',
    ),
    (('--workdir=run',), 'run holds no checkpoint that can be used'),
    (('--workdir=torn',), 'torn/config.json is damaged: it holds no JSON'),
  ],
)
def test_evaluation_of_no_run_is_a_sentence(
  tmp_path, forked, arguments, sentence
):
  (tmp_path / 'run').mkdir()
  written(tmp_path / 'run')
  (tmp_path / 'torn').mkdir()
  (tmp_path / 'torn' / 'config.json').write_text('{')
  done = forked(tmp_path, '--mode=eval', *arguments)
  assert done.returncode == 2 and done.stdout == ''
  assert re.match(f'train.py: {sentence}', done.stderr), done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_what_is_saved_is_what_was_so_when_it_was_begun(tmp_path, monkeypatch):
  """However late orbax writes it down."""
  import orbax.checkpoint as ocp

  given = []

  def saving(item):
    given.append((item, json.dumps(item)))
    return original(item)

  original = ocp.args.JsonSave
  monkeypatch.setattr(ocp.args, 'JsonSave', saving)
  runs.go(short(), tmp_path)
  assert len(given) == 6
  for item, then in given:
    assert json.dumps(item) == then


def filled(state):
  """A state of these shapes, all of it different."""
  leaves, tree = jax.tree.flatten(state)
  rng = np.random.default_rng(0)

  def fill(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      return jnp.asarray(rng.normal(size=x.shape), x.dtype)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return x
    return jnp.asarray(rng.integers(4, size=x.shape), x.dtype)

  return jax.tree.unflatten(tree, map(fill, leaves))


def assert_close(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = map(jax.random.key_data, (x, y))
    np.testing.assert_allclose(x, y, rtol=1e-6)


PARAMS = {'w': np.zeros((3, 2), np.float32), 'b': np.zeros(2, np.float32)}
BATCH = jax.ShapeDtypeStruct((16, 3), jnp.float32)
STATES = {
  'asynchronous': gsgd_jax.asynchronous(
    optax.sgd(0.1, momentum=0.9),
    8,
    arrivals=gsgd_jax.gamma_arrivals(),
    worker_transform=optax.trace(0.9),
    batch_like=BATCH,
    keep_params=True,
  ),
  'delayed': gsgd_jax.delayed(
    optax.sgd(0.1, momentum=0.9), 3, batch_like=BATCH, keep_params=True
  ),
  'synchronous': gsgd_jax.synchronous(optax.sgd(0.1), 8, combine='mean'),
  'data_parallel': optax.adam(0.1),
}


@pytest.mark.parametrize('devices', [1, 2, 4])
@pytest.mark.parametrize('kind', STATES)
def test_a_state_moves_there_and_back(kind, devices):
  state = filled(STATES[kind].init(PARAMS))
  there = _methods.as_on(kind, state, devices)
  assert_close(_methods.as_on_one(kind, there, devices), state)
  # Of a delayed mean each device has its own part, which is lost; the mean not.
  if kind != 'delayed' or devices == 1:
    state = filled(there)
    back = _methods.as_on_one(kind, state, devices)
    assert_close(_methods.as_on(kind, back, devices), state)
  else:
    one = _methods.as_on_one(kind, filled(there), devices)
    again = _methods.as_on(kind, one, devices)
    assert_close(_methods.as_on_one(kind, again, devices), one)


@pytest.mark.parametrize('devices', [2, 4])
def test_where_workers_are(devices):
  """Worker w is on device w modulo the devices, behind those before it."""
  kind, workers = 'asynchronous', np.arange(8.0)
  state = STATES[kind].init(PARAMS)
  slots = state.in_flight._replace(value=workers)
  there = _methods.as_on(kind, state._replace(in_flight=slots), devices)
  expected = [workers[device::devices] for device in range(devices)]
  np.testing.assert_array_equal(there.in_flight.value, np.concatenate(expected))


def on(config, devices):
  """The programs of a config on so many devices."""
  (method,) = events.methods(config)
  datasets = experiment.load_all(config)
  task = tasks.make(config, datasets[0])
  mesh = parallel.make_mesh(devices)
  return programs.make(config, method, task, datasets, mesh)


@pytest.mark.parametrize(
  'name',
  [
    'data_parallel',
    'synchronous+dana_dc+consistent',
    'delayed',  # By 0.
  ],
)
def test_every_method_has_a_state_on_any_number_of_devices(name):
  """Traced alone; what comes out is what the other programs want."""
  config = test_devices.config_of(name, None, **test_devices.CASES[name])
  config.seeds = 1
  one, four = on(config, 1), on(config, 4)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  many = jax.eval_shape(lambda x: four.moved(x, 1), one.like(1))
  assert shapes(many) == shapes(one.like(4)) == shapes(four.like(4))
  alone = jax.eval_shape(lambda x: one.moved(x, 4), four.like(4))
  assert shapes(alone) == shapes(one.like(1)) == shapes(four.like(1))


# On several devices; 7 calls fill the queue.
EIGHT = dict(
  arrivals='gamma',
  workers=8,
  updates=200,
  evaluate_every=100,
  checkpoint_every=70,
)


@pytest.mark.parametrize(
  'name, given, left',
  [('asynchronous', EIGHT, 140), ('delayed', {}, 21)],
)
@pytest.mark.parametrize('before, after', [(1, 4), (4, 1)])
def test_runs_move_between_numbers_of_devices(
  tmp_path, name, given, left, before, after
):
  config = lambda devices: short(name, devices=devices, **given)
  expected = tmp_path / 'expected'
  runs.go(config(before), expected)
  folder = broken(expected, tmp_path / 'moved', left, name)
  done = runs.go(config(after), folder)
  assert done.code == application.DONE
  assert (
    f'numbers may differ in their last bits: devices {before} before, {after} '
    'now\n' in done.err
  )
  then, now = runs.lines_of(expected), runs.lines_of(folder)
  for a, b in zip(then, now, strict=True):
    if a['step'] <= left:
      assert a == b
    for field in events.MEASURED:
      a_b = (np.array(x[field], float) for x in (a, b))
      np.testing.assert_allclose(*a_b, rtol=1e-5, err_msg=field)


def test_chunks_on_several_devices_change_nothing(monkeypatch):
  """To the last bit, however long they are by the clock."""
  name = 'asynchronous'
  config = short(name, devices=4, **EIGHT)
  lengths, measured = [], []
  finished = training._Pace.finished

  def noted(pace, chunk):
    lengths[-1].append(chunk.length)
    finished(pace, chunk)

  monkeypatch.setattr(training._Pace, 'finished', noted)
  for seconds in (0.001, 10.0):
    monkeypatch.setattr(training, '_CHUNK_SECONDS', seconds)
    lengths.append([])
    history = experiment.run(config)[name]
    measured.append({f: getattr(history, f) for f in events.MEASURED})
  runs.assert_equal(*measured)
  assert lengths == [[0, 64, 43, 64, 36]] * 2
