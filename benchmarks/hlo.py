"""What compiled programs say: their collectives, and what those wait for."""

import math
import re
from typing import NamedTuple

SMALL = 1000  # Elements; collectives of fewer are of losses, not gradients.
LINE = r'\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*?)\)(?:, (.*))?$'
CALLED = r'(?:calls|to_apply|body|condition|\w+computations?)=({.*?}|%[\w.-]+)'
COLLECTIVE = r'(all-|reduce-scatter|collective-)(?!.*-done)'
LIBRARY = r'custom_call_target="[^"]*(matmul|gemm)'


class Instruction(NamedTuple):
  """``name = shape op(operands), attributes``."""

  name: str
  shape: str
  op: str
  operands: str
  attributes: str


class Work(NamedTuple):
  """What an instruction does, with all that it calls."""

  products: int
  flops: float
  elements: int  # Of its largest collective.


def names(texts):
  return re.findall(r'%([\w.-]+)', ' '.join(texts))


def called(one):
  """The computations that an instruction calls."""
  return names(re.findall(CALLED, one.attributes))


def sizes(shape):
  """Elements of each array."""
  dims = re.findall(r'\[([\d,]*)\]', shape)
  return [math.prod(int(n) for n in d.split(',') if n) for d in dims]


def read(text):
  """By computation, a program's instructions in their order."""
  computations, here = {}, []
  for line in text.splitlines():
    if head := re.match(r'(ENTRY )?%(\S+) \(.*\{$', line):
      here = computations['ENTRY' if head[1] else head[2]] = []
    elif found := re.match(LINE, line):
      here.append(Instruction(*found.groups('')))
  return computations


def work(computations, name):
  """What each instruction of a computation does; loops count as one trip."""
  shapes = {one.name: one.shape for one in computations[name]}
  found = []
  for one in computations[name]:
    products, flops, elements = 0, 0.0, 0
    if one.op in ('dot', 'convolution') or re.search(LIBRARY, one.attributes):
      arrays = [*(shapes[x] for x in names([one.operands])[:2]), one.shape]
      mk, kn, mn = (sizes(array)[0] for array in arrays)
      products, flops = 1, 2 * math.sqrt(mk * kn * mn)
    elif re.match(COLLECTIVE, one.op):
      elements = sum(sizes(one.shape))
    for inside in (w for c in called(one) for w in work(computations, c)):
      products += inside.products
      flops += inside.flops
      elements = max(elements, inside.elements)
    found.append(Work(products, flops, elements))
  return found


def done_of(entry, start):
  """Where a collective is waited for; None if it is not asynchronous."""
  begun = entry[start]
  if '-start' not in begun.name + begun.op:
    return None
  waits = lambda one: (
    one.op.endswith('-done') and begun.name in names([one.operands])
  )
  if begun.op == 'fusion':  # On TPUs: names are all that there is.
    name = begun.name.replace('-start', '-done')
    waits = lambda one: one.name == name
  return next(i for i, one in enumerate(entry) if waits(one))


def schedule(text):
  """The work of a program's instructions in their order, and its collectives.

  Of each collective: where it starts, where it is done (or None), and on how
  many products it depends.
  """
  if 'is_scheduled=true' not in text.partition('\n')[0]:
    raise ValueError('the program has no schedule')
  computations = read(text)
  entry, does = computations['ENTRY'], work(computations, 'ENTRY')
  place = {one.name: i for i, one in enumerate(entry)}
  before, collectives = [], []
  for i, one in enumerate(entry):
    control = re.findall(r'control-predecessors=({.*?})', one.attributes)
    direct = {place[x] for x in names([one.operands, *control])}
    before.append(direct.union(*(before[x] for x in direct)))
    # Products with steps of a collective, on TPUs; they do not begin it.
    steps = any(c.startswith('async_collective_fusion') for c in called(one))
    large = does[i].elements >= SMALL
    if large and not steps and '-done' not in one.name + one.op:
      needs = sum(does[x].products for x in (*before[i], i))
      collectives.append((i, done_of(entry, i), needs))
  return does, collectives


def products_before_collectives(text: str) -> list[int]:
  """For each large collective of a compiled program: products it depends on."""
  return [needs for _, _, needs in schedule(text)[1]]


def collectives(text: str) -> dict[str, int]:
  """Bytes that collectives bring, by the computation (a loop's body, say)."""
  found = {}
  for name, instructions in read(text).items():
    for one in instructions:
      if re.match(COLLECTIVE, one.op):
        arrays = re.findall(r'[a-z]+(\d+)\[([\d,]*)\]', one.shape)
        size = sum(
          math.prod(int(n) for n in dims.split(',') if n) * int(bits) // 8
          for bits, dims in arrays
        )
        if one.op.endswith('-start') and len(arrays) > 1:
          size //= 2  # It names its operands as well.
        found[name] = found.get(name, 0) + size
  return found
