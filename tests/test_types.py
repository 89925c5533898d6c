"""Types: a checker passes on the package, and finds what users get wrong."""

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted((ROOT / 'gsgd_jax').glob('*.py'))

needs_pyrefly = pytest.mark.skipif(
  importlib.util.find_spec('pyrefly') is None,
  reason="needs pyrefly: pip install 'gsgd_jax[test]'",
)

# What users write; `assert_type` holds where annotations say so.
PROGRAM = """
from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gsgd_jax


def loss_fn(params: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
  return jnp.mean((batch @ params['w']) ** 2)


def init(workers: int, key: jax.Array) -> jax.Array:
  return jax.random.uniform(key, [workers])


def duration(
  machines: jax.Array, worker: jax.Array, task: jax.Array, now: gsgd_jax.Time
) -> jax.Array:
  return 0.5 + machines[worker]


batch = jnp.ones([8, 2])
arrivals = gsgd_jax.straggler(gsgd_jax.ArrivalProcess(init, duration), 4.0)
assert_type(arrivals, gsgd_jax.ArrivalProcess)
inner = optax.chain(gsgd_jax.delay_compensation(2.0), optax.sgd(0.1))
guided = gsgd_jax.guided(inner, loss_fn, window=4, batch_like=batch)
tx = gsgd_jax.asynchronous(
  gsgd_jax.record_staleness(guided),
  workers=4,
  arrivals=arrivals,
  batch_like=batch,
  keep_params=True,
)
assert_type(tx, optax.GradientTransformationExtraArgs)
start = {'w': jnp.ones([2])}
state = tx.init(start)
assert_type(gsgd_jax.worker_params(start, state), dict[str, jax.Array])


@jax.jit
def step(
  params: optax.Params, state: optax.OptState
) -> tuple[optax.Params, optax.OptState]:
  read = gsgd_jax.worker_params(params, state)
  value, grads = jax.value_and_grad(loss_fn)(read, batch)
  updates, state = tx.update(grads, state, params, value=value, batch=batch)
  return optax.apply_updates(params, updates), state


params: optax.Params = start
for _ in range(12):
  params, state = step(params, state)
now = gsgd_jax.simulated_time(state)
assert_type(now, jax.Array | np.ndarray | np.floating)
summary = gsgd_jax.staleness_summary(state)
assert_type(summary, gsgd_jax.StalenessSummary)
assert_type(gsgd_jax.state_memory(tx, params), dict[str, int])
print(float(now), summary.mean, gsgd_jax.worker_shares(state))
"""

# Every line is wrong, in the way that it says.
MISTAKES = """
gsgd_jax.asynchronous(inner, workers='four')  # bad-argument-type
gsgd_jax.asynchronous(inner)  # missing-argument
gsgd_jax.asynchronous(guided, 4, arrivals=init)  # bad-argument-type
gsgd_jax.guided(inner, loss_fn, windows=4)  # unexpected-keyword
gsgd_jax.guided(optax.sgd, loss_fn)  # bad-argument-type
gsgd_jax.ArrivalProcess(init, 1.5)  # bad-argument-type
gsgd_jax.dana(0.1, workers=None)  # bad-argument-type
gsgd_jax.worker_params(params)  # missing-argument
gsgd_jax.simulated_time(state).seconds  # missing-attribute
"""


def check(*arguments, cwd=ROOT):
  """The checker's exit code, and (file, line, kind, text) of what it finds."""
  command = [sys.executable, '-m', 'pyrefly', 'check', '--threads=1']
  command += ['--output-format=min-text', '--summary=none']
  command += [f'--python-interpreter-path={sys.executable}', *arguments]
  run = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
  found = re.findall(
    r'^ERROR (\S+?):(\d+):\S+: (.*) \[([\w-]+)\]$', run.stdout, re.MULTILINE
  )
  assert bool(found) == (run.returncode != 0), run.stdout + run.stderr
  return [(name, int(line), kind, text) for name, line, text, kind in found]


@needs_pyrefly
def test_the_package():
  """By the settings in pyproject.toml."""
  assert check() == []


@needs_pyrefly
def test_a_users_program(tmp_path):
  """Is found right, and a line that is wrong is found wrong."""
  (tmp_path / 'program.py').write_text(PROGRAM)
  (tmp_path / 'mistakes.py').write_text(PROGRAM + MISTAKES)
  found = check(
    '--preset=default',
    f'--search-path={ROOT}',
    'program.py',
    'mistakes.py',
    cwd=tmp_path,
  )
  lines = (PROGRAM + MISTAKES).split('\n')
  wanted = [
    ('mistakes.py', number, line.rpartition('# ')[2])
    for number, line in enumerate(lines, 1)
    if line in MISTAKES.split('\n') and line
  ]
  assert sorted(finding[:3] for finding in found) == wanted, found


def test_the_users_program_runs(capsys):
  exec(compile(PROGRAM, 'program.py', 'exec'), {})
  assert float(capsys.readouterr().out.split()[0]) > 0


@pytest.mark.parametrize('path', MODULES, ids=lambda path: path.stem)
def test_what_can_be_imported_is_annotated(path):
  """All arguments and results of functions and methods without underscore."""
  bare = [
    f'{name}: {missing}'
    for name, function in public_functions(ast.parse(path.read_text()))
    for missing in unannotated(function)
  ]
  assert bare == []


def public_functions(module):
  """(Name, definition) of functions, of methods and of what makes objects."""
  for thing in module.body:
    if isinstance(thing, ast.FunctionDef) and not thing.name.startswith('_'):
      yield thing.name, thing
    if isinstance(thing, ast.ClassDef) and not thing.name.startswith('_'):
      for part in thing.body:
        if isinstance(part, ast.FunctionDef) and (
          not part.name.startswith('_') or part.name in ('__init__', '__call__')
        ):
          yield f'{thing.name}.{part.name}', part


def unannotated(function):
  given = function.args
  every = given.posonlyargs + given.args + given.kwonlyargs
  every += [given.vararg, given.kwarg]
  for argument in filter(None, every):
    if argument.annotation is None and argument.arg not in ('self', 'cls'):
      yield argument.arg
  if function.returns is None:
    yield 'the result'


def test_it_says_that_it_is_typed():
  assert (ROOT / 'gsgd_jax' / 'py.typed').is_file()
