"""The notebook runs from end to end, without a network."""

import pathlib

import nbclient
import nbformat

from tests import quick

NOTEBOOK = pathlib.Path(__file__).parents[1] / 'colab' / 'gsgd_jax.ipynb'
QUICK = """
UPDATES, SEEDS = 64, 2
CNN_UPDATES = 16
STUDY_UPDATES, STUDY_SEEDS = 32, 2
CLUSTERS = (8,)
JOBS = 0
TFDS = 'no_such_set'
"""


def html_of(cell):
  return ''.join(
    output['data'].get('text/html', '')
    for output in cell.outputs
    if output.output_type == 'execute_result'
  )


def said(cell):
  return ''.join(o.get('text', '') for o in cell.outputs)


def test_it_runs_and_shows_pictures(tmp_path, monkeypatch):
  for name, value in quick.environment().items():
    monkeypatch.setenv(name, value)
  # Programs that come again, as the sequential one, are compiled once.
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'compiled'))
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  monkeypatch.setenv('PYTHONPATH', str(NOTEBOOK.parents[1]))
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  (settings,) = (
    c for c in notebook.cells if 'parameters' in c.metadata.get('tags', ())
  )
  names = lambda source: {
    name.strip()
    for line in source.splitlines()
    for name in line.partition('=')[0].split(',')
    if '=' in line
  }
  assert names(settings.source) == names(QUICK)
  settings.source = QUICK
  nbclient.NotebookClient(
    notebook,
    timeout=900,
    kernel_name='python3',
    resources={'metadata': {'path': str(tmp_path)}},
  ).execute()
  shown = [c for c in notebook.cells if c.cell_type == 'code']
  trained = [c for c in shown if 'notebook.train' in c.source]
  assert len(trained) == 5
  for cell in trained:
    assert 'data:image/png;base64,' in html_of(cell)
    assert '100%|' in said(cell)
  (studied,) = (c for c in shown if 'notebook.compute' in c.source)
  assert 'map of' in html_of(studied) or 'Every square' in html_of(studied)
  images = trained[-2]
  assert 'no_such_set cannot be prepared' in said(images)
  (loop,) = (c for c in shown if 'optax.chain' in c.source)
  assert float(said(loop).split()[1]) < 100


def test_it_is_kept_without_outputs():
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  nbformat.validate(notebook)
  for cell in notebook.cells:
    assert not cell.get('outputs') and cell.get('execution_count') is None
