"""The documentation builds without a warning, and what it says is so."""

import inspect
import pathlib
import re
import subprocess
import sys
import zlib

import pytest

import gsgd_jax
from gsgd_jax import parallel
from tests.helpers import printed_by

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'


def page(name):
  return (DOCS / name).read_text()


def sphinx(source, built):
  """The command that `index.md` says, with other folders."""
  for needed in ('sphinx', 'myst_parser', 'furo'):
    pytest.importorskip(needed, reason="needs pip install 'gsgd_jax[docs]'")
  command = ['sphinx', '-W', '--keep-going', '-q', '-c', DOCS, source, built]
  return subprocess.run(
    [sys.executable, '-m', *command], cwd=ROOT, capture_output=True, text=True
  )


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """The site's folder."""
  folder = tmp_path_factory.mktemp('docs')
  done = sphinx(DOCS, folder)
  assert (done.returncode, done.stderr) == (0, '')
  return folder


def documented(folder):
  """The Python names of the site's inventory."""
  inventory = (folder / 'objects.inv').read_bytes()
  *_, packed = inventory.split(b'\n', 4)
  lines = zlib.decompress(packed).decode().splitlines()
  return {line.split()[0] for line in lines if ' py:' in line}


def test_every_public_name_is_in_the_api(built):
  names = {f'gsgd_jax.{name}' for name in gsgd_jax.__all__}
  names |= {f'gsgd_jax.parallel.{name}' for name in parallel.__all__}
  of_notebooks = ('train', 'compute', 'prepared', 'Run', 'Report')
  names |= {f'gsgd_jax.notebook.{name}' for name in of_notebooks}
  assert names <= documented(built)


def test_links_that_lead_nowhere_are_errors(tmp_path):
  links = ('no_page.md', '#no-heading', '../no_file.py', 'index.md#no-anchor')
  text = ''.join(f'[a link]({link})\n' for link in links)
  pages = tmp_path / 'pages'
  pages.mkdir()
  (pages / 'index.md').write_text(f'# A page\n\n{text}')
  done = sphinx(pages, tmp_path / 'built')
  assert done.returncode == 1
  assert done.stderr.count('[myst.xref_missing]') == len(links)


def test_every_page_is_in_the_contents():
  contents = page('index.md').partition('{toctree}')[2]
  for path in DOCS.glob('*.md'):
    assert path.stem == 'index' or re.search(rf'\b{path.stem}\b', contents)


def test_the_command_is_the_documented_one():
  assert 'python -m sphinx -W --keep-going docs build/docs' in page('index.md')


def test_the_first_example_runs():
  printed = printed_by(page('index.md'), 'index.md')
  assert printed == '193 updates in 24.1 units\n'


def test_the_loop_before_and_after_runs():
  printed = printed_by(page('optax_loop.md'), 'optax_loop.md')
  losses = re.findall(r'(.*): loss (\S+)\n', printed)
  assert [name for name, _ in losses] == ['before', 'after']
  for name, loss in losses:
    assert float(loss) < 0.1, name  # From 5.25.


def test_the_difference_is_five_lines():
  (difference,) = re.findall(
    r'```diff\n(.*?)```', page('optax_loop.md'), re.DOTALL
  )
  added = re.findall(r'^\+', difference, re.MULTILINE)
  assert len(added) == 5


def test_the_guide_to_memory_prints_what_it_shows():
  text = page('cost.md')
  (shown,) = re.findall(r'```text\n(.*?)```', text, re.DOTALL)
  assert printed_by(text, 'cost.md') == shown


def test_the_guide_to_extensions_runs():
  printed = printed_by(page('extending.md'), 'extending.md')
  losses = re.findall(r'(.*): loss (\S+)\n', printed)
  assert len(losses) == 4
  for name, loss in losses:
    assert float(loss) < 0.1, name  # From 5.25.
  applied = re.search(r'(\d+) updates of 393 arrivals', printed)[1]
  assert 0 < int(applied) < 393


def test_the_choice_rests_on_figures_that_are_reported():
  """What it says was measured stands among the evidence."""
  told = page('evidence.md') + page('training.md')
  text, told = (' '.join(t.split()) for t in (page('choosing.md'), told))
  figures = re.findall(r'[+-]?\d+\.\d\d ± \d\.\d\d', text)
  assert len(figures) > 20
  for figure in (*figures, '88.2, guided 81.8', '152 comparisons'):
    assert figure in text and figure in told


def test_the_algorithms_know_every_rule():
  modules = 'staleness rounds guided presets corrections acceptance predictors'
  modules = [f'gsgd_jax.{name}' for name in f'{modules} momenta'.split()]
  things = {name: getattr(gsgd_jax, name) for name in gsgd_jax.__all__}
  rules = [
    name
    for name, thing in things.items()
    if inspect.isfunction(thing) and thing.__module__ in modules
  ]
  assert len(rules) == 18
  for name in rules:
    assert f'`{name}`' in page('algorithms.md')
