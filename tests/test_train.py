"""The command line as a user runs it: a subprocess, an empty directory."""

import fcntl
import json
import os
import pathlib
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import jsonschema
import numpy as np
import pytest

from gsgd_jax import checkpoints
from tests import openml_cache, quick

ROOT = pathlib.Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / 'docs' / 'files.schema.json').read_text())
SHORT = ('--config.updates=20', '--config.evaluate_every=10')
SMALL = (*SHORT, '--config.seeds=2', '--config.workers=3')
FILES = {
  'config.json',
  'metrics.jsonl',
  'timing.jsonl',
  'result.json',
  'curves.png',
  'staleness.png',
  'checkpoints',
}


# What compiles as users do says `env=os.environ`.
def start(directory, *arguments, before=(), **options):
  pipe = subprocess.PIPE
  return subprocess.Popen(
    [*before, sys.executable, str(ROOT / 'train.py'), *arguments],
    cwd=directory,
    text=True,
    **{'stdout': pipe, 'stderr': pipe, 'env': quick.environment(), **options},
  )


def train(directory, *arguments, **options):
  run = start(directory, *arguments, **options)
  stdout, stderr = run.communicate(timeout=300)
  return subprocess.CompletedProcess(
    arguments, run.returncode, stdout or '', stderr or ''
  )


# A program that has imported what takes long, and forks for every run.
FORKING = """
import json, os, runpy, sys, traceback
from absl import app
from ml_collections import config_flags
from gsgd_jax import application, experiment, hosts
import sklearn.datasets  # That of the data sets is imported late.

for line in sys.stdin:
  program, arguments, directory, files, environment = json.loads(line)
  child = os.fork()
  if child:
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
    continue
  try:
    for number, name in enumerate([os.devnull, *files]):
      os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    os.chdir(directory)
    os.environ.update(environment)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name='__main__')
  except BaseException:
    traceback.print_exc()
  sys.stderr.flush()
  os._exit(1)
"""


@pytest.fixture(scope='module')
def forked(tmp_path_factory):
  """`train` for what ends before any training does."""
  files = [str(tmp_path_factory.mktemp('said') / name) for name in 'oe']
  with subprocess.Popen(
    [sys.executable, '-c', FORKING],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    text=True,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
  ) as server:

    def run(directory, *arguments, env=None):
      for name in files:
        pathlib.Path(name).write_text('')
      program = str(ROOT / 'train.py')
      request = (program, arguments, str(directory), files, env or {})
      print(json.dumps(request), file=server.stdin, flush=True)
      code = int(server.stdout.readline())
      said = (pathlib.Path(name).read_text() for name in files)
      return subprocess.CompletedProcess(arguments, code, *said)

    yield run
    server.stdin.close()


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def assert_schema(workdir):
  """Every file is as documented; returns the result."""
  resolver = lambda name: jsonschema.Draft202012Validator(
    {**SCHEMA, '$ref': f'#/$defs/{name}'}
  )
  for name in ('config.json', 'result.json'):
    resolver(name).validate(json.loads((workdir / name).read_text()))
  for name in ('metrics.jsonl', 'timing.jsonl'):
    for line in lines(workdir / name):
      resolver(name).validate(line)
  metrics, timing = (
    lines(workdir / f'{n}.jsonl') for n in ('metrics', 'timing')
  )
  key = lambda line: (line['method'], line['step'])
  assert list(map(key, metrics)) == list(map(key, timing))
  result = json.loads((workdir / 'result.json').read_text())
  assert result['config'] == json.loads((workdir / 'config.json').read_text())
  return result


def test_the_main_job(tmp_path):
  done = train(tmp_path, *SMALL, env=os.environ)
  assert done.returncode == 0, done.stderr
  for label in ('sequential', 'asynchronous, guided', 'random replays'):
    assert label in done.stdout
  assert 'delay of 3 workers changes test accuracy' in done.stdout
  assert 'Traceback' not in done.stderr
  # Not a terminal: a line a method, no bar.
  assert '\r' not in done.stderr and 'it/s' not in done.stderr
  assert re.search(r'\[\d\d:\d\d\] sequential: completed\n', done.stderr)
  (workdir,) = (tmp_path / 'runs').iterdir()
  assert re.fullmatch(r'\d{8}-\d{6}-default', workdir.name)
  assert {p.name for p in workdir.iterdir()} == FILES
  result = assert_schema(workdir)
  assert result['status'] == 'completed'
  assert result['config']['updates'] == 20
  assert list(result['methods']) == [
    'sequential',
    'asynchronous',
    'asynchronous+consistent',
    'asynchronous+random',
  ]
  spent = {k: m['gradient_evaluations'] for k, m in result['methods'].items()}
  # 20 applied, 2 more in flight; replays come on top.
  assert spent['sequential'] == [20, 20]
  assert spent['asynchronous'] == [22, 22]
  assert min(spent['asynchronous+consistent']) > 22
  metrics = lines(workdir / 'metrics.jsonl')
  assert [m['step'] for m in metrics] == [0, 10, 20] * 4
  for name, method in result['methods'].items():
    # The printed table is the file's content, which is the metrics'.
    last = method['test_accuracy']['last']
    assert f'{100 * last["mean"]:.2f}' in done.stdout
    (line,) = [m for m in metrics if (m['method'], m['step']) == (name, 20)]
    assert line['test_accuracy'] == last['values']
    best = [m['test_accuracy'] for m in metrics if m['method'] == name][1:]
    values = method['test_accuracy']['best_over_epochs']['values']
    assert values == np.max(best, axis=0).tolist()
  asynchronous = [m for m in metrics if m['method'] == 'asynchronous']
  # Ages 0, 1, then 2 for good.
  assert [m['staleness'][0] for m in asynchronous] == [None, 1.7, 2.0]


@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help_is_no_error(tmp_path, flag):
  run = train(tmp_path, flag)
  assert (run.returncode, run.stderr) == (0, '')
  assert '--config.optimizer=adamw' in run.stdout and '--mode' in run.stdout


def test_config_and_workdir_and_that_no_run_is_overwritten(tmp_path, forked):
  arguments = (
    f'--config={ROOT}/configs/breast_cancer.py',
    '--workdir=here/x',
    '--config.methods=sequential,delayed',
    '--config.delay=3',
    *SMALL,
  )
  done = train(tmp_path, *arguments, env=os.environ)
  assert done.returncode == 0, done.stderr
  workdir = tmp_path / 'here' / 'x'
  contents = lambda: {
    p.relative_to(workdir): (p.read_bytes(), p.stat().st_mtime_ns)
    for p in workdir.rglob('*')
    if p.is_file()
  }
  before = contents()
  result = assert_schema(workdir)
  assert result['config']['dataset'] == 'breast_cancer'
  assert list(result['methods']) == ['sequential', 'delayed']
  again = train(tmp_path, *arguments, env=os.environ)
  assert again.returncode == 0 and again.stderr == ''
  assert 'here/x holds this run, and it is complete' in again.stdout
  assert again.stdout.splitlines()[3:] == done.stdout.splitlines()[2:-4]
  another = forked(tmp_path, *arguments, '--config.delay=4')
  assert another.returncode == 2
  assert another.stderr == (
    'train.py: here/x holds a run with delay=3, and this one has delay=4; give '
    'another --workdir\n'
  )
  assert contents() == before
  # The same run again: all but the clock is the same.
  twin = train(tmp_path, *arguments, '--workdir=twin', env=os.environ)
  assert twin.returncode == 0
  for name in FILES - {'timing.jsonl', 'checkpoints'}:
    assert (tmp_path / 'twin' / name).read_bytes() == before[
      pathlib.Path(name)
    ][0]


@pytest.fixture
def own_files(tmp_path):
  """A newcomer's directory."""
  rng = np.random.default_rng(0)
  with open(tmp_path / 'mine.csv', 'w') as file:
    file.write('width,species,height\n')
    for i in range(60):
      species = ('gentoo', 'adelie', 'chinstrap')[i % 3]
      x, y = rng.normal(size=2) + i % 3
      file.write(f'{x},{species},{y}\n')
  with open(tmp_path / 'author.data', 'w') as file:
    file.write('3\n\n')
    for i in range(60):
      x, y = rng.normal(size=2) + i % 2
      file.write(f'{x},{y},{2 * (i % 2) - 1}\n')
  return tmp_path


@pytest.mark.parametrize(
  'arguments',
  [
    (
      '--config.dataset=mine.csv',
      '--config.target=species',
      '--config.optimizer=adamw',
      '--config.optimizer_kwargs.weight_decay=1e-4',
      '--config.learning_rate=0.003',
      '--config.schedule=cosine_decay',
      '--config.warmup=5',
      '--config.parallel=delayed',
      '--config.guidance=hardest',
      '--config.tensorboard',
      '--config.profile',
      '--config.compilation_cache=cache',
    ),
    (
      '--config.dataset=author.data',
      '--config.preprocessing=author',
      '--config.validation_share=0',
      '--config.label_noise=0.1',
      '--config.optimizer=nesterov',
      '--config.parallel=synchronous',
    ),
  ],
  ids=['csv', 'author'],
)
def test_own_data_any_optimizer(own_files, arguments):
  done = train(own_files, *SMALL, '--workdir=out', *arguments)
  assert done.returncode == 0, done.stderr
  workdir = own_files / 'out'
  result = assert_schema(workdir)
  kept = {p.name for p in workdir.iterdir()}
  if '--config.tensorboard' in arguments:
    assert kept == FILES | {'tensorboard', 'profile'}
    assert result['config']['optimizer_kwargs'] == {'weight_decay': 1e-4}
    (events,) = (workdir / 'tensorboard').rglob('events.out.tfevents.*')
    assert events.stat().st_size > 500
    assert list((workdir / 'profile').rglob('*.xplane.pb'))
    assert list((own_files / 'cache').iterdir())
  else:
    assert kept == FILES
    (method,) = result['methods'].values()
    assert method['test_accuracy']['validation_chosen'] is None
    assert lines(workdir / 'metrics.jsonl')[0]['validation_loss'] == [None] * 2


def test_compensations_side_by_side(tmp_path):
  done = train(
    tmp_path,
    *SMALL,
    '--workdir=out',
    '--config.methods=asynchronous+drop_stale,asynchronous+dana+random',
    '--config.compensation_kwargs.drop_stale.max_staleness=1',
    '--config.compensation_kwargs.dana.learning_rate=0.01',
    '--config.arrivals=gamma',
  )
  assert done.returncode == 0, done.stderr
  assert 'asynchronous, DANA, random replays' in done.stdout
  assert 'of the gradients were refused as too stale' in done.stdout
  methods = assert_schema(tmp_path / 'out')['methods']
  ringmaster, dana = methods.values()
  assert (dana['compensation'], dana['guidance']) == ('dana', 'random')
  for refused, applied in zip(
    ringmaster['refused'], ringmaster['applied'], strict=True
  ):
    assert refused > 0 and refused + applied == 20
  assert max(ringmaster['staleness']['maximum']) == 1
  assert dana['refused'] == [0, 0]


def test_openml_from_its_cache(tmp_path):
  rows = '\n'.join(f'{i % 7},{i % 5},{"ab"[i % 2]}' for i in range(60))
  openml_cache.write(
    tmp_path / 'cache',
    'tiny',
    '@relation tiny\n@attribute x numeric\n@attribute y numeric\n'
    f'@attribute class {{a,b}}\n@data\n{rows}\n',
    {'x': 'numeric', 'y': 'numeric', 'class': 'nominal'},
    'class',
  )
  done = train(
    tmp_path,
    '--config.dataset=openml:tiny',
    '--config.parallel=sequential',
    '--workdir=out',
    *SMALL,
    env=quick.environment(SCIKIT_LEARN_DATA=str(tmp_path / 'cache')),
  )
  assert done.returncode == 0, done.stderr
  assert assert_schema(tmp_path / 'out')['config']['dataset'] == 'openml:tiny'


BAD_FILES = {
  'ragged.data': '3\n1,2,1\n1,2\n',
  'words.data': '3\n1,2,1\n1,two,-1\n',
  'infinite.data': '3\n1,2,1\n1,inf,-1\n',
  'missing.data': '3\n1,2,1\n\n1,?,-1\n',
  'one_class.data': '3\n1,2,1\n3,4,1\n',
  'few.data': '3\n1,2,1\n3,4,-1\n5,6,1\n',
  'empty.data': '',
  'header.csv': 'a,b,c\n1,2,x\n',
  'nan.csv': 'a,c\n1,x\nnan,y\n',
  'semicolons.csv': 'a;c\n1;x\n',
  'ragged.csv': 'a,c\n1,x\n2,y,3\n',
  'empty_trace.csv': '',
  'short_trace.csv': 'worker,time\n' + '0,1\n' * 30,
  'unknown_worker.csv': 'worker,time\n0,1\n16,2\n',
  'backwards.csv': 'worker,time\n0,1\n1,2\n2,1.5\n',
  'malformed.jsonl': '{"worker": 0}\n{"worker": one}\n',
}


def trace(name):
  return ('--config.arrivals=recorded', f'--config.trace={name}')


BAD_INPUT = [
  (('--config.workers=0',), 'workers must be at least 1'),
  (('--config.workers=many',), "workers must be an integer, got 'many'"),
  (
    ('--config.learning_rate=fast',),
    "learning_rate must be a number, .*'fast'",
  ),
  (
    ('--config.learning_rate=-0.1',),
    'learning_rate must be finite and not neg',
  ),
  (('--config.learning_rate=nan',), 'learning_rate must be finite'),
  (('--config.verification=7',), "verification must be True or False, got '7'"),
  (('--config.learning_rte=1',), 'no setting learning_rte; did you mean learn'),
  (('--config.nosuch.deep=1',), 'no setting'),
  (('--config.batch_size=0',), 'batch_size must be at least 1'),
  (('--config.batch_size=2000',), 'at most the 1078 training examples'),
  (('--config.seeds=-3',), 'seeds must be at least 1'),
  (('--config.updates=0',), 'updates must be at least 1'),
  (('--config.delay=deep',), "delay must be an integer or by_depth, .*'deep'"),
  (('--config.drop_epochs=8,4',), 'drop_epochs must ascend'),
  (('--config.hidden=0',), 'hidden must hold positive integers'),
  (('--config.model=cnn',), 'model must be one of cnn_large, cnn_small'),
  (('--config.train_share=1.5',), 'train_share must be from 0 to 1, got 1.5'),
  (('--config.label_noise=2',), 'label_noise must be from 0 to 1'),
  (('--config.dataset=digts',), 'did you mean digits'),
  (('--config.dataset=nowhere.data',), 'nowhere.data: No such file'),
  (('--config.dataset=.',), 'Is a directory'),
  (('--config.dataset=ragged.data',), 'ragged.data, line 3: 3 comma-separated'),
  (('--config.dataset=words.data',), "words.data, line 3, column 2: .*'two'"),
  (('--config.dataset=infinite.data',), "line 3, column 2: a finite .*'inf'"),
  (('--config.dataset=missing.data',), r"line 4, column 2: .*got '\?'"),
  (('--config.dataset=one_class.data',), 'holds one class only'),
  (('--config.dataset=few.data',), 'leave none for validation'),
  (('--config.dataset=empty.data',), 'empty.data is empty'),
  (('--config.dataset=header.csv',), 'needs --config.target=COLUMN'),
  (('--config.dataset=header.csv', '--config.target=d'), 'has no column d'),
  (
    ('--config.dataset=nan.csv', '--config.target=c'),
    'line 3, column a: a fin',
  ),
  (('--config.dataset=ragged.csv', '--config.target=c'), 'line 3: 2 comma-sep'),
  (('--config.dataset=openml:nowhere',), 'a network connection is needed'),
  (('--config.optimizer=adamm',), 'did you mean adam'),
  (
    ('--config.optimizer_kwargs.momentun=1',),
    'no argument momentun; .*momentum',
  ),
  (
    ('--config.optimizer_kwargs.momentum=x',),
    "with momentum='x' cannot be",
  ),
  (('--config.optimizer=dpsgd',), 'needs the argument l2_norm_clip'),
  (('--config.schedule=cosine',), 'did you mean cosine_'),
  (('--config.warmup=5000',), 'warmup must be less than updates'),
  (
    ('--config.methods=asynchronous+guided',),
    'what follows . in asynchronous.guided',
  ),
  (('--config.compensation=smegaa2',), 'did you mean smega2'),
  (
    ('--config.compensation=dana', '--config.compensation_kwargs.mom=0.9'),
    'compensation dana has no argument mom',
  ),
  (
    ('--config.compensation_kwargs.momentum=0.9',),
    'belongs to a compensation',
  ),
  (('--config.methods=async',), 'a method must be one of asynchronous'),
  (('--config.guidance=random',), 'guidance belongs to parallel'),
  (('--config.combine=median',), 'combine must be one of'),
  (('--config.methods=a,,b',), 'methods must be values with commas between'),
  (('--config.optimizer_kwargs=5',), 'optimizer_kwargs must be a dict'),
  (('--config.optimizer_kwargs.momentum=1e999',), 'momentum must be a finite'),
  (('--config.workers=100000000',), 'GiB of memory for 10 seeds'),
  (('--config.window=5000',), "the server's 1680 updates, got 5000"),
  (('--config.compilation_cache=a_file',), 'a_file: File exists'),
  (('--config.dataset=semicolons.csv', '--config.target=c'), 'by commas'),
  (('--config.replays=11',), 'replays must be from 0 to window=10'),
  (('--config.arrivals=gama',), "got 'gama'; did you mean gamma"),
  (('--config.arrivals=gamma', '--config.cv=3'), 'cv must be from 0 to 2'),
  (('--config.machine_cv=0.6',), 'machine_cv .* needs --config.arrivals=gam'),
  (('--config.trace=short_trace.csv',), 'arrivals=recorded and --config.trace'),
  (trace('nowhere.csv'), 'nowhere.csv: No such file'),
  (trace('empty_trace.csv'), 'empty_trace.csv is empty'),
  (trace('short_trace.csv'), 'line 31: the trace is too short: .* 30 arrivals'),
  (trace('unknown_worker.csv'), 'line 3: worker must be below .* 16, got 16'),
  (trace('backwards.csv'), 'line 4: time runs backwards, from 2 to 1.5'),
  (trace('malformed.jsonl'), 'malformed.jsonl, line 2: a JSON object expected'),
  (('--config.speeds=1.0,2.0',), 'arrivals=speeds and --config.speeds belong'),
  (
    ('--config.arrivals=speeds', '--config.speeds=1.0,2.0'),
    'as many as the workers, got 2 for 16',
  ),
  (('--config.wait_for=17',), 'wait_for must be at most workers=16'),
  (('--config.straggler=0',), 'straggler must be positive, got 0'),
  (
    ('--config.methods=synchronous', '--config.fails_at=3'),
    'would wait for ever: .* wait_for=15 would not',
  ),
  (('--config.dataset=tfds:mnst',), 'did you mean .*mnist'),
  (
    ('--config.dataset=tfds:mnist', '--config.data_dir=.'),
    'tfds build mnist --file_format=array_record',
  ),
  (('--config.model=gpt',), 'gpt learns the characters of a text file'),
  (
    ('--config.model=gpt', '--config.dataset=short_trace.csv'),
    'is too short: .* context=128 needs 129',
  ),
  (('--config.model=cnn_smal',), 'did you mean cnn_small'),
  (('--config.model=cnn_small', '--config.dropout=1'), 'dropout must be below'),
  (('--config=nowhere.py',), "No such file or directory: 'nowhere.py'"),
  (('--nosuch=1',), 'Unknown command line flag'),
  (('more',), 'unexpected argument'),
  (('--workdir=/dev/null/x',), '/dev/null'),
  (('--workdir=',), 'workdir must name a folder'),
  (('--workdir=a_file',), 'a_file: File exists'),
]


# As users start it: one where flags are read, one where settings are.
ALONE = ('--nosuch=1',), ('--config.workers=0',)


@pytest.mark.parametrize(
  'arguments, sentence', BAD_INPUT, ids=[' '.join(a) for a, _ in BAD_INPUT]
)
def test_bad_input_is_one_sentence(tmp_path, forked, arguments, sentence):
  for name, text in BAD_FILES.items():
    (tmp_path / name).write_text(text)
  (tmp_path / 'a_file').touch()
  before = sorted(tmp_path.iterdir())
  environment = {
    **os.environ,
    'SCIKIT_LEARN_DATA': str(tmp_path.parent / 'empty_cache'),
    # Nobody answers there: never a network in tests.
    'https_proxy': 'http://127.0.0.1:9',
  }
  run = train if arguments in ALONE else forked
  done = run(tmp_path, *arguments, env=environment)
  assert done.returncode == 2
  assert re.search(sentence, done.stderr), done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert done.stderr.startswith('train.py: ')
  assert done.stdout == ''
  assert sorted(tmp_path.iterdir()) == before


def test_training_as_papers_do_it(tmp_path):
  """Lengths in epochs are numbers of updates in the files."""
  done = train(
    tmp_path,
    '--workdir=out',
    '--config.seeds=2',
    '--config.parallel=delayed',
    '--config.delay=by_depth',
    '--config.epochs=2',
    '--config.evaluate_epochs=1',
    '--config.warmup_epochs=0.5',
    '--config.warmup_start=0.1',
    '--config.drop_epochs=1,1.5',
    '--config.weight_decay=1e-4',
    '--config.clip_norm=1',
    '--config.accumulate=2',
  )
  assert done.returncode == 0, done.stderr
  assert_schema(tmp_path / 'out')
  # 1078 training examples, in batches of 16.
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['delay'] == 'by_depth'
  assert (config['updates'], config['evaluate_every']) == (134, 67)
  assert (config['warmup'], config['drops']) == (34, [67, 100])
  metrics = lines(tmp_path / 'out' / 'metrics.jsonl')
  assert [m['step'] for m in metrics] == [0, 67, 134]
  assert [m['maximal_staleness'] for m in metrics] == [[0] * 2, *[[2] * 2] * 2]


@pytest.mark.parametrize(
  'source, sentence',
  [
    ('def get_config(:', 'cannot load the config: SyntaxError'),
    ('def get_config(): return 1 / 0', 'ZeroDivisionError: division by zero'),
    ('x = 1', 'cannot load the config: .*get_config'),
    (
      'import ml_collections\n'
      'def get_config(): return ml_collections.ConfigDict()',
      'the config lacks the setting ',
    ),
    (
      'from gsgd_jax import settings\n'
      'def get_config():\n'
      '  config = settings.default_config()\n'
      '  config.wrokers = 3\n'
      '  return config',
      'no setting wrokers; did you mean workers',
    ),
    (
      'from gsgd_jax import settings\n'
      'def get_config(): return settings.default_config().to_dict()',
      'get_config must return an ml_collections.ConfigDict, got dict',
    ),
    (
      'from gsgd_jax import settings\n'
      'def get_config():\n'
      '  config = settings.default_config()\n'
      '  config.workers = "x"\n'
      '  return config',
      'cannot load the config: TypeError.*workers',
    ),
    (
      'from gsgd_jax import settings\n'
      'def get_config():\n'
      '  config = settings.default_config()\n'
      '  config.optimizer_kwargs.mask = lambda params: True\n'
      '  return config',
      'optimizer_kwargs.mask must be a finite number',
    ),
    ('def get_config(): return None', 'Unexpected None value for flag config'),
    ('import sys\ndef get_config(): sys.exit(0)', 'SystemExit'),
  ],
)
def test_bad_config_files_are_one_sentence(tmp_path, forked, source, sentence):
  (tmp_path / 'mine.py').write_text(source)
  done = forked(tmp_path, '--config=mine.py')
  assert done.returncode == 2
  assert re.search(sentence, done.stderr), done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert {p.name for p in tmp_path.iterdir()} <= {'mine.py', '__pycache__'}


def wait_for(condition, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'it never happened'
    time.sleep(0.05)


@pytest.mark.parametrize(
  'numbers', [(signal.SIGINT,), (signal.SIGTERM, signal.SIGINT)]
)
def test_interrupted_in_training_everything_is_kept(tmp_path, numbers):
  run = start(tmp_path, '--workdir=mine', '--config.updates=10000000')
  metrics = tmp_path / 'mine' / 'metrics.jsonl'
  wait_for(lambda: metrics.exists() and metrics.read_text().count('\n') > 3)
  for number in numbers:  # To a process and to its group, say.
    run.send_signal(number)
    time.sleep(0.2)
  number, *_ = numbers
  stdout, stderr = run.communicate(timeout=60)
  assert run.returncode == 130
  assert 'the same settings with --workdir=mine go on\n' in stderr
  assert f'train.py: interrupted ({number.name})\n' in stderr
  assert 'Traceback' not in stderr
  assert stdout.startswith('writing to mine\n') and 'interrupted' in stdout
  result = assert_schema(tmp_path / 'mine')
  assert result['status'] == 'interrupted'
  statuses = [m['status'] for m in result['methods'].values()]
  assert statuses == ['interrupted'] + ['not_started'] * 3
  assert result['methods']['sequential']['step'] == lines(metrics)[-1]['step']
  # Sequential training has no workers to draw.
  kept = {p.name for p in (tmp_path / 'mine').iterdir()}
  assert kept == FILES - {'staleness.png'}
  folder = tmp_path / 'mine' / 'checkpoints'
  last = next(checkpoints.usable(folder, pytest.fail))
  # No evaluation is lost, nor will one be measured twice.
  assert last.position['lines'] == {'sequential': len(lines(metrics))}
  assert last.step >= lines(metrics)[-1]['step']


def test_interrupted_while_compiling(tmp_path):
  run = start(tmp_path, '--workdir=mine')
  wait_for((tmp_path / 'mine' / 'timing.jsonl').exists)
  run.send_signal(signal.SIGINT)
  _, stderr = run.communicate(timeout=60)
  assert run.returncode == 130 and 'Traceback' not in stderr
  result = json.loads((tmp_path / 'mine' / 'result.json').read_text())
  assert result['status'] == 'interrupted'


def test_interrupted_before_training_nothing_is_written(tmp_path):
  run = start(tmp_path, '--workdir=mine')
  time.sleep(0.5)  # Somewhere in the imports.
  run.send_signal(signal.SIGINT)
  stdout, stderr = run.communicate(timeout=60)
  assert run.returncode == 130
  assert stderr == 'train.py: interrupted before training began\n'
  assert stdout == '' and list(tmp_path.iterdir()) == []


def test_divergence(tmp_path):
  """Where every method diverges the exit code is 1; metrics are kept."""
  done = train(
    tmp_path,
    '--workdir=mine',
    '--config.methods=sequential,delayed',
    '--config.learning_rate=1e30',
    *SMALL,
  )
  assert done.returncode == 1
  said = (
    r'sequential diverged: the loss of seed \d is (NaN|infinite) at step \d'
  )
  assert re.search(said, done.stderr) and re.search(said, done.stdout)
  assert 'Traceback' not in done.stderr
  result = assert_schema(tmp_path / 'mine')
  assert result['status'] == 'diverged'
  for method in result['methods'].values():
    assert method['status'] == 'diverged'
    assert method['message'] in done.stdout
  assert len(lines(tmp_path / 'mine' / 'metrics.jsonl')) == 2  # Step 0 each.


@pytest.mark.parametrize(
  'limit, whole',
  [
    (300, set()),  # Not even config.json.
    (3_000, {'config.json'}),  # Some lines.
    (30_000, {'config.json', 'result.json'}),  # No picture.
  ],
)
def test_a_full_disk_is_a_sentence(tmp_path, limit, whole):
  """A limit on the size of files stands in for a disk without room."""
  limited = (
    'import os, resource, sys\n'
    'limit = int(sys.argv[1])\n'
    'resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n'
    'os.execv(sys.argv[2], sys.argv[2:])'
  )
  done = train(
    tmp_path,
    '--workdir=mine',
    '--config.parallel=sequential',
    '--config.updates=400',
    '--config.evaluate_every=10',
    '--config.seeds=2',
    before=(sys.executable, '-c', limited, str(limit)),
  )
  assert done.returncode == 1
  assert 'Traceback' not in done.stderr
  assert re.search(
    r'train.py: cannot go on: mine/\S+: File too large\n', done.stderr
  )
  assert not list(tmp_path.glob('mine/checkpoints/**/*'))
  held = {p.name for p in (tmp_path / 'mine').iterdir()} - {'checkpoints'}
  assert whole <= held <= whole | {'metrics.jsonl', 'timing.jsonl'}
  for name in held:  # Nothing half-written.
    text = (tmp_path / 'mine' / name).read_text()
    if name.endswith('.json'):
      json.loads(text)
    else:
      assert text == '' or text.endswith('\n')
      lines(tmp_path / 'mine' / name)


def test_a_reader_that_leaves_stops_nothing(tmp_path):
  run = start(
    tmp_path, '--workdir=mine', '--config.parallel=sequential', *SMALL
  )
  run.stdout.close()
  run.stderr.close()
  assert run.wait(timeout=120) == 0
  assert_schema(tmp_path / 'mine')


def test_on_a_terminal_there_is_a_bar(tmp_path):
  ours, theirs = pty.openpty()
  size = struct.pack('HHHH', 24, 120, 0, 0)  # Rows and columns.
  fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
  arguments = (
    '--workdir=mine',
    '--config.parallel=delayed',
    '--config.delay=2',
  )
  run = start(
    tmp_path,
    *arguments,
    # Seconds of training, however fast the machine is.
    '--config.updates=60000',
    '--config.evaluate_every=2000',
    '--config.seeds=2',
    stderr=theirs,
    env=os.environ,
  )
  os.close(theirs)
  shown = b''
  while True:
    try:
      piece = os.read(ours, 4096)
    except OSError:  # How a closed terminal reads.
      break
    if not piece:
      break
    shown += piece
  os.close(ours)
  run.communicate(timeout=60)
  assert run.returncode == 0
  shown = shown.decode()
  assert 'delayed (compiling)' in shown and '100%' in shown
  assert re.search(
    r'delayed +\d+%.*loss [\d.e-]+, validation [\d.]+%, staleness 2\.0, '
    r'[\d,]+ updates/s, \d\d:\d\d left',
    shown,
  )
