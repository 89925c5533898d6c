"""What `import gsgd_jax` offers, and that all of it is documented."""

import inspect
import operator
import pathlib
import re
import subprocess
import sys
import types

import pytest

import gsgd_jax

DEPENDENCIES = {'jax', 'jaxlib', 'numpy', 'optax'}


# What is public; `parallel` is a module of public functions.
OF_ALL = [name for name in gsgd_jax.__all__ if name != 'parallel']
OF_ALL += [f'parallel.{name}' for name in gsgd_jax.parallel.__all__]


def thing(name):
  return operator.attrgetter(name)(gsgd_jax)


def section(name, title):
  """The text of one section of a public docstring, or None."""
  doc = inspect.getdoc(thing(name))
  found = re.search(rf'^{title}:\n((?:  .*\n|\n)+)', doc + '\n', re.MULTILINE)
  return found and found[1]


def entries(text):
  """The names that a section of arguments or attributes explains."""
  return re.findall(r'^  (\w+): ', text, re.MULTILINE)


def functions():
  return [name for name in OF_ALL if inspect.isfunction(thing(name))]


def test_all_is_what_there_is():
  public = [
    name
    for name, thing in vars(gsgd_jax).items()
    if not name.startswith('_') and not isinstance(thing, types.ModuleType)
  ]
  public.append('parallel')  # A module that is public itself.
  assert sorted(public) == gsgd_jax.__all__


def test_version():
  assert re.fullmatch(r'\d+\.\d+\.\d+(\.?\w+)?', gsgd_jax.__version__)


def test_cited_papers():
  """What public docstrings refer to is in CITATION.cff."""
  root = pathlib.Path(gsgd_jax.__file__).parents[1]
  citation = (root / 'CITATION.cff').read_text()
  cited = {
    paper
    for name in OF_ALL
    for paper in re.findall(r'arXiv:\d+\.\d+', inspect.getdoc(thing(name)))
  }
  assert len(cited) > 10
  assert cited <= set(re.findall(r'value: (arXiv:\S+)', citation))


@pytest.mark.parametrize('name', OF_ALL)
def test_summary_and_example(name):
  summary, *_ = inspect.getdoc(thing(name)).splitlines()
  assert summary.endswith('.') or '...' in summary
  if name[9:] not in (
    'Program',
    'DelayedAllReduceState',
  ):  # See who makes them.
    assert '>>> ' in section(name, 'Examples')
    assert 'gsgd_jax.' in section(name, 'Examples')


@pytest.mark.parametrize('name', functions())
def test_arguments_and_results(name):
  parameters = list(inspect.signature(thing(name)).parameters)
  if parameters:
    assert entries(section(name, 'Args')) == parameters
  else:
    assert section(name, 'Args') is None
  assert section(name, 'Returns').strip()


@pytest.mark.parametrize('name', functions())
def test_signature_is_typed(name):
  signature = inspect.signature(thing(name))
  assert signature.return_annotation is not signature.empty
  for parameter in signature.parameters.values():
    assert parameter.annotation is not parameter.empty, parameter


@pytest.mark.parametrize('name', sorted({*OF_ALL} - {*functions()}))
def test_attributes(name):
  fields = thing(name)._fields
  assert entries(section(name, 'Attributes')) == list(fields)


def test_import_is_light():
  """Of flax, absl, matplotlib and the like it imports nothing itself."""
  program = (
    'import sys, jax, numpy, optax; before = set(sys.modules); '
    'import gsgd_jax; print(*(set(sys.modules) - before))'
  )
  run = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    check=True,
    cwd=pathlib.Path(gsgd_jax.__file__).parents[1],
    text=True,
  )
  imported = {name.partition('.')[0] for name in run.stdout.split()}
  assert 'gsgd_jax' in imported
  assert imported - sys.stdlib_module_names - DEPENDENCIES == {'gsgd_jax'}
