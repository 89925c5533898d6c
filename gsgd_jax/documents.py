"""Documents of tables and pictures, as Markdown and as one page of HTML.

A document is a list of *blocks* of plain text: what they are rendered as is
decided here alone.
"""

import base64
import html
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --back: #ffffff;
  --line: #d8d8d8; --soft: #f4f4f4; --better: #00694d;
  --worse: #a34700; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e4e4;
  --back: #17191c; --line: #3a3d42; --soft: #212429; --better: #5fd0a8;
  --worse: #f0a060; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--back); max-width: 78rem; margin: 0 auto;
  padding: 1rem clamp(0.8rem, 3vw, 2.5rem) 4rem; }
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
h3 { margin-top: 2.2rem; }
p, nav, figcaption { max-width: 48rem; }
nav ul { padding-left: 1.2rem; margin: 0.2rem 0; }
a { color: inherit; }
.box { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line);
  max-height: 85vh; }
table { border-collapse: collapse; font-size: 0.82rem; min-width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; vertical-align: top;
  white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { position: sticky; top: 0; background: var(--soft); z-index: 1;
  vertical-align: bottom; white-space: normal; }
th:first-child { text-align: left; position: sticky; left: 0; z-index: 2;
  background: var(--back); font-weight: normal; max-width: 16rem;
  min-width: min(12rem, 25vw);
  white-space: normal; }
thead th:first-child { z-index: 3; background: var(--soft);
  font-weight: bold; }
td small { opacity: 0.75; }
td.better { font-weight: bold; color: var(--better); }
td.worse { font-weight: bold; color: var(--worse); }
td small { font-weight: normal; }
figure { margin: 1.2rem 0; }
figure img { max-width: 100%; height: auto; background: #ffffff; }
figcaption { font-size: 0.85rem; opacity: 0.85; }
details { margin: 0.8rem 0; }
summary { cursor: pointer; }
"""


class Heading(NamedTuple):
  """Of a section; level 1 is the title."""

  level: int
  text: str


class Paragraph(NamedTuple):
  """Some sentences."""

  text: str


class Table(NamedTuple):
  """Rows of cells, the first is the head; lines of a cell end with newlines."""

  rows: list[list[str]]


class Picture(NamedTuple):
  """A file beside the report."""

  name: str
  caption: str
  draw: Callable[[pathlib.Path], None]

  @property
  def alt(self) -> str:
    """What stands for it where it is not seen: its first sentence."""
    return self.caption.split('. ')[0]


class Folded(NamedTuple):
  """What is read by those who ask for it."""

  summary: str
  blocks: list
  unfolded: bool = False


Block = Heading | Paragraph | Table | Picture | Folded


def markdown(blocks: list[Block]) -> str:
  """Blocks as GitHub's Markdown.

  Args:
    blocks: What a document says.

  Returns:
    Text; characters of labels that Markdown has a use for are escaped.

  Examples:
    >>> from gsgd_jax import documents
    >>> blocks = [documents.Heading(2, 'a_b'), documents.Paragraph('1 < 2')]
    >>> print(documents.markdown(blocks), end='')
    ## a\\_b
    <BLANKLINE>
    1 &lt; 2
  """
  return '\n\n'.join(map(_markdown, blocks)) + '\n'


def _markdown(block):
  if isinstance(block, Heading):
    return f'{"#" * block.level} {_escaped(block.text)}'
  if isinstance(block, Paragraph):
    return _escaped(block.text)
  if isinstance(block, Picture):
    caption = _escaped(block.caption)
    return f'![{_escaped(block.alt)}]({block.name})\n\n{caption}'
  if isinstance(block, Folded):
    inside = '\n\n'.join(map(_markdown, block.blocks))
    summary = html.escape(block.summary)
    tag = 'details open' if block.unfolded else 'details'
    return f'<{tag}><summary>{summary}</summary>\n\n{inside}\n\n</details>'
  rows = [f'| {" | ".join(map(_escaped_cell, row))} |' for row in block.rows]
  rule = '|' + '|'.join([' --- ', *(' ---: ' for _ in block.rows[0][1:])]) + '|'
  return '\n'.join([rows[0], rule, *rows[1:]])


def _escaped(said):
  """Text that means itself in Markdown."""
  said = said.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
  return re.sub(r'([\\`*_\[\]|#~$])', r'\\\1', said)


def _escaped_cell(cell):
  return '<br>'.join(_escaped(line) for line in cell.split('\n'))


def page(title: str, blocks: list[Block], workdir: pathlib.Path) -> str:
  """Blocks as one page of HTML that needs no other file.

  Args:
    title: Of the page.
    blocks: What it says.
    workdir: Where the pictures are.

  Returns:
    HTML.
  """
  body = list(_body(blocks, workdir))
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n'
    f'<body>\n{"".join(body)}</body>\n</html>\n'
  )


def _body(blocks, workdir) -> Iterator[str]:
  """The blocks, and after the title and what follows it, what is where."""
  sections = [b for b in blocks if isinstance(b, Heading) and b.level > 1]
  listed = False
  for block in blocks:
    if isinstance(block, Heading) and block.level > 1:
      if not listed:
        yield _contents(sections)
        listed = True
      place = next(i for i, b in enumerate(sections) if b is block)
      said = html.escape(block.text)
      tag = f'h{block.level}'
      yield f'<{tag} id="section-{place}">{said}</{tag}>\n'
    else:
      yield _html(block, workdir)


def _contents(sections):
  items = [
    f'<li style="margin-left: {1.2 * (s.level - 2):.1f}rem">'
    f'<a href="#section-{i}">{html.escape(s.text)}</a></li>\n'
    for i, s in enumerate(sections)
  ]
  return f'<nav><ul>\n{"".join(items)}</ul></nav>\n'


def _html(block, workdir):
  if isinstance(block, Heading):
    return f'<h{block.level}>{html.escape(block.text)}</h{block.level}>\n'
  if isinstance(block, Paragraph):
    return f'<p>{html.escape(block.text)}</p>\n'
  if isinstance(block, Picture):
    return _html_picture(block, workdir)
  if isinstance(block, Folded):
    inside = ''.join(_html(b, workdir) for b in block.blocks)
    summary = html.escape(block.summary)
    tag = 'details open' if block.unfolded else 'details'
    return f'<{tag}><summary>{summary}</summary>\n{inside}</details>\n'
  return _html_table(block)


def _html_picture(picture, workdir):
  data = base64.b64encode((workdir / picture.name).read_bytes()).decode()
  caption = html.escape(picture.caption)
  alt = html.escape(picture.alt)
  return (
    f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">\n'
    f'<figcaption>{caption}</figcaption></figure>\n'
  )


def _html_table(table):
  head, *rows = table.rows
  names = ''.join(f'<th>{html.escape(cell)}</th>' for cell in head)
  lines = [
    f'<tr><th scope="row">{html.escape(row[0])}</th>'
    f'{"".join(map(_html_cell, row[1:]))}</tr>\n'
    for row in rows
  ]
  return (
    f'<div class="box" tabindex="0"><table>\n<thead><tr>{names}</tr></thead>\n'
    f'<tbody>\n{"".join(lines)}</tbody></table></div>\n'
  )


def _html_cell(cell):
  first, *rest = map(html.escape, cell.split('\n'))
  more = ''.join(f'<br><small>{line}</small>' for line in rest)
  shown = ''
  if first.endswith(' *'):
    shown = f' class="{"worse" if first.startswith("-") else "better"}"'
  return f'<td{shown}>{first}{more}</td>'
