"""Writes a text to learn from, the same at every call.

  python examples/write_text.py > text.txt
  python train.py --config=configs/gpt.py:adamw --config.dataset=text.txt

Sentences of a small random grammar, half a million characters: words, clauses
within clauses, sums that are right. A model has letters to learn first, then
words, then who does what, then to add.
"""

import random
import signal
import sys

_CHARACTERS = 500_000
_NUMBERS = (
  'zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|'
  'thirteen|fourteen|fifteen|sixteen|seventeen|eighteen'
)
_NUMBERS = _NUMBERS.split('|')
_WHO = [
  'worker',
  'server',
  'student',
  'baker',
  'sailor',
  'doctor',
  'neighbour',
  'painter',
]
_HOW = [
  'old',
  'young',
  'quick',
  'patient',
  'tired',
  'clever',
  'quiet',
  'stubborn',
]
_DOES = [
  'waits for',
  'asks',
  'overtakes',
  'remembers',
  'answers',
  'leaves',
  'follows',
]
_SAYS = ['thinks', 'says', 'doubts', 'knows', 'hopes', 'fears']
_WHEN = ['today', 'at noon', 'after the rain', 'every morning', 'once more']


def _someone(pick):
  article = pick(['the', 'a', 'every', 'no'])
  someone = f'{pick(_HOW)} {pick(_WHO)}' if pick([0, 1]) else pick(_WHO)
  if article == 'a' and someone[0] in 'aeiou':
    article = 'an'
  if pick(range(4)) == 0:
    someone += f' who {pick(_DOES)} {pick(["the", "every"])} {pick(_WHO)}'
  return f'{article} {someone}'


def _clause(pick, depth=0):
  if depth < 2 and pick(range(3)) == 0:
    return f'{_someone(pick)} {pick(_SAYS)} that {_clause(pick, depth + 1)}'
  return f'{_someone(pick)} {pick(_DOES)} {_someone(pick)}'


def _sum(pick):
  one, other = pick(range(10)), pick(range(10))
  return f'{_NUMBERS[one]} and {_NUMBERS[other]} make {_NUMBERS[one + other]}'


def _sentence(pick):
  what = _sum(pick) if pick(range(5)) == 0 else _clause(pick)
  if pick(range(3)) == 0:
    what = f'{pick(_WHEN)}, {what}'
  return f'{what[0].upper()}{what[1:]}{pick([".", ".", ".", "!"])}'


def main():
  """Writes paragraphs until there is enough."""
  if len(sys.argv) > 1:
    print(
      f'write_text.py: unexpected argument {sys.argv[1]!r}', file=sys.stderr
    )
    sys.exit(2)
  if hasattr(signal, 'SIGPIPE'):  # A reader that has enough.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
  pick = random.Random(0).choice
  written = 0
  while written < _CHARACTERS:
    sentences = [_sentence(pick) for _ in range(pick(range(2, 7)))]
    paragraph = ' '.join(sentences) + '\n'
    written += len(paragraph)
    print(paragraph, end='')


if __name__ == '__main__':
  main()
