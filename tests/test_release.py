"""What a release says of itself is the same everywhere."""

import pathlib
import re
import tomllib

import nbformat

import gsgd_jax

ROOT = pathlib.Path(__file__).parents[1]
CITATION = (ROOT / 'CITATION.cff').read_text()


def cited(name):
  (value,) = re.findall(rf'^{name}: (.*)$', CITATION, re.MULTILINE)
  return value


def test_the_version_is_one():
  changelog = (ROOT / 'CHANGELOG.md').read_text()
  released = re.findall(r'^## \[(\d.*)\] - (\S+)$', changelog, re.MULTILINE)
  assert released[0] == (cited('version'), cited('date-released'))
  # Between releases the package is on its way to the next one.
  numbers = lambda version: [int(part) for part in version.split('.')]
  ours, dev, rest = gsgd_jax.__version__.partition('.dev0')
  assert not rest
  ahead = numbers(ours) > numbers(cited('version'))
  assert ahead if dev else ours == cited('version')


def test_the_address_is_one():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  repository = project['urls']['Repository']
  assert cited('repository-code') == repository
  assert all(url.startswith(repository) for url in project['urls'].values())
  name = repository.removeprefix('https://github.com/')
  opened = f'https://colab.research.google.com/github/{name}/blob/main/colab/'
  notebook = nbformat.read(ROOT / 'colab' / 'gsgd_jax.ipynb', as_version=4)
  for text in ((ROOT / 'README.md').read_text(), notebook.cells[0].source):
    assert f'{opened}gsgd_jax.ipynb)' in text
  links = re.findall(
    r'\]\(https://github.com/(.*?)\)', notebook.cells[-1].source
  )
  for link in links:
    there, page = link.split('/blob/main/')
    assert there == name and (ROOT / page).is_file()
  assert len(links) == 3
