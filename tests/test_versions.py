"""What `pyproject.toml` claims of versions is what is said to be tested."""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
SECTION = re.search(
  r'^## Supported versions\n(.*?)^## ',
  (ROOT / 'CONTRIBUTING.md').read_text(),
  re.MULTILINE | re.DOTALL,
)[1]
# One row an end: lowest and newest, each with its Python and its JAX.
ENDS = re.findall(
  r'^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|', SECTION, re.MULTILINE
)


def numbers(version):
  return [int(part) for part in version.split('.')]


def requirements():
  everything = [PROJECT['dependencies']]
  everything += PROJECT['optional-dependencies'].values()
  return [
    requirement
    for some in everything
    for requirement in some
    if not requirement.startswith('gsgd_jax[')
  ]


def test_both_ends_are_named():
  assert [end for end, _, _ in ENDS] == ['lowest', 'newest']


def test_pythons():
  pythons = [python for _, python, _ in ENDS]
  assert PROJECT['requires-python'] == f'>={pythons[0]}'
  classified = re.findall(
    r'Python :: (\d+\.\d+)$', '\n'.join(PROJECT['classifiers']), re.MULTILINE
  )
  assert sorted(classified, key=numbers) == pythons
  assert re.findall(r'uv venv --python (\S+)', SECTION) == pythons
  for name in ('README.md', 'CONTRIBUTING.md', 'docs/index.md'):
    assert f'Python {pythons[0]} or newer' in (ROOT / name).read_text()


def test_jax():
  (bound,) = (
    requirement.removeprefix('jax>=')
    for requirement in requirements()
    if requirement.startswith('jax>=')
  )
  lowest, newest = (numbers(jax) for _, _, jax in ENDS)
  assert numbers(bound) == lowest[: len(numbers(bound))]
  assert not any(lowest[len(numbers(bound)) :])
  assert lowest < newest


def test_everything_has_a_lower_bound():
  for requirement in requirements():
    assert re.match(r'[\w-]+>=\d', requirement), requirement
