"""Sphinx settings: `python -m sphinx -W --keep-going docs build/docs`."""

import pathlib
import re

import gsgd_jax

_ROOT = pathlib.Path(__file__).parents[1]

project = 'gsgd_jax'
author = 'The gsgd_jax authors'
copyright = author
version = release = gsgd_jax.__version__

extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.autosummary',
  'sphinx.ext.mathjax',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
]

# Pages are Markdown as GitHub shows it: its headings' anchors, $maths$, and
# blocks of ```math.
myst_enable_extensions = ['dollarmath']
myst_fence_as_directive = ['math']
myst_heading_anchors = 3

autosummary_generate = False  # The pages of the API hold the functions too.
autodoc_preserve_defaults = True
autodoc_typehints = 'none'  # What may be given is said in words.
python_maximum_signature_line_length = 60
napoleon_attr_annotations = False  # Likewise.
napoleon_use_ivar = True
napoleon_use_rtype = False

nitpicky = True  # Every reference has to lead somewhere.

html_theme = 'furo'
pygments_style = 'default'  # Furo's own shows no difference in diffs.
html_title = f'gsgd_jax {release}'
html_show_sphinx = False
html_copy_source = False


def _readme(title=None):
  """The README, or a section of it, with links as from this folder."""
  text = (_ROOT / 'README.md').read_text()
  if title is not None:
    text = re.search(rf'^## {title}\n(.*?)(?=^## |\Z)', text, re.M | re.S)[1]
  return re.sub(r'\]\((?!https?:|#)', '](../', text).replace('](../docs/', '](')


def _with_readme(app, docname, content):
  """Parts of the README, where a page says so, and links to it.

  The page `overview` is all of it; `<!-- README: Licence -->` in any page is
  that section.
  """
  app.env.note_dependency(str(_ROOT / 'README.md'))
  text = content[0]
  if docname == 'overview':
    text = _readme().replace('# gsgd_jax', '# Overview', 1)
  text = re.sub('<!-- README: (.*?) -->', lambda m: _readme(m[1]), text)
  text = text.replace('](../README.md', '](overview.md')
  content[0] = text.replace(' ± ', '\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}')


def _in_rest(app, what, name, obj, options, lines):
  """Docstrings as reST: every reference a paragraph, with a link."""
  text = '\n'.join(lines)
  text = re.sub(r'`` s\b', r'``\\ s', text)  # The plural of code.
  text, heading, references = text.partition('\nReferences:\n')
  references = re.sub(r'(, \d{4}\.)\n(?=\s*\w)', r'\1\n\n', references)
  references = re.sub(
    r'arXiv:(\d{4}\.\d{5})',
    r'`arXiv:\1 <https://arxiv.org/abs/\1>`__',
    references,
  )
  lines[:] = (text + heading + references).split('\n')


def setup(app):
  app.connect('source-read', _with_readme)
  app.connect('autodoc-process-docstring', _in_rest, priority=400)
