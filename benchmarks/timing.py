"""Timing that survives a noisy machine: interleaved rounds, medians, ratios.

Every figure is a ratio of two programs measured in the same run: each round
times every program once, so that what slows the machine slows all of them.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import tqdm

Name = TypeVar('Name', bound=Hashable)


def medians(
  programs: Mapping[Name, Callable[[Any], Any]],
  carries: dict[Name, Any],
  rounds: int,
  warmup: int = 1,
) -> dict[Name, float]:
  """Median seconds a call of each program, its carry fed back to it.

  Args:
    programs: Compiled `carry -> carry` functions; they may donate.
    carries: What each one starts from. Consumed.
    rounds: How often each is timed,
    warmup: after so many calls that are not. A ring's first calls only fill it.

  Returns:
    A name's median time in seconds.
  """
  times: dict[Name, list[float]] = {name: [] for name in programs}
  for i in tqdm.trange(rounds + warmup, leave=False, desc='rounds'):
    for name, program in programs.items():
      start = time.perf_counter()
      carries[name] = jax.block_until_ready(program(carries[name]))
      if i >= warmup:
        times[name].append(time.perf_counter() - start)
  return {name: statistics.median(t) for name, t in times.items()}


def print_table(head: Sequence[str], rows: list[list[str]]) -> None:
  """A table in Markdown."""
  widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
  for row in [head, ['-' * w for w in widths], *rows]:
    cells = (c.ljust(w) for c, w in zip(row, widths, strict=True))
    print('| ' + ' | '.join(cells) + ' |')
