"""Sphinx settings: `python -m sphinx -W --keep-going docs build/docs`."""

import re

import gsgd_jax

project = 'gsgd_jax'
author = 'The gsgd_jax developers'
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
html_static_path = ['narrow.css']
html_css_files = ['narrow.css']


def _intervals_in_one_line(app, docname, content):
  space = '\N{NO-BREAK SPACE}'
  content[0] = content[0].replace(' ± ', f'{space}±{space}')


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
  app.connect('source-read', _intervals_in_one_line)
  app.connect('autodoc-process-docstring', _in_rest, priority=400)
