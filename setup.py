"""What a package index shows: the README, whose links lead out of it."""

import pathlib
import re
import tomllib

import setuptools

ROOT = pathlib.Path(__file__).parent


def description():
  """The README, with links to the files of this version's tag."""
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  repository = project['urls']['Repository']
  version = (ROOT / 'gsgd_jax' / '_version.py').read_text().split("'")[1]
  tag = 'main' if 'dev' in version else f'v{version}'
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  for link, folder in ((r'\]\(', 'blob'), ('src="', 'raw')):
    there = f'{repository}/{folder}/{tag}/'
    text = re.sub(f'({link})(?!https:|#)', rf'\g<1>{there}', text)
  return text.replace('/blob/main/', f'/blob/{tag}/')  # The notebook's.


setuptools.setup(
  long_description=description(),
  long_description_content_type='text/markdown',
)
