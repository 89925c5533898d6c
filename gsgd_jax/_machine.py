"""The machine that this runs on."""

import contextlib
import os
import pathlib

# What a container may take on Linux, by either version of control groups.
_LIMITS = (
  pathlib.Path('/sys/fs/cgroup/memory.max'),
  pathlib.Path('/sys/fs/cgroup/memory/memory.limit_in_bytes'),
)


def memory() -> int | None:
  """Bytes of memory that a process may take, or None where unknown."""
  try:
    there = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  except (AttributeError, ValueError, OSError):  # Not everywhere.
    return None
  for limit in _LIMITS:
    with contextlib.suppress(OSError, ValueError):  # 'max' is no limit.
      there = min(there, int(limit.read_text()))
  return there
