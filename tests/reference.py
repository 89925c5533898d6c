"""Every algorithm as plain NumPy loops: the oracle of the fast code.

Nothing here imports JAX or the package. A *server* owns the optimizer and has
two methods: `apply(params, packet)` returns the parameters after a packet has
arrived, `read(params)` the parameters that a worker reads. Optimizers are
servers, guided SGD is a server around a server, and the functions at the end
(`asynchronous`, `delayed_leaves`, `synchronous`) feed packets to a server.

Parameters are one flat float64 vector.
"""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass
class Packet:
  """What arrives at the server."""

  gradient: np.ndarray
  value: float
  batch: object
  staleness: int = 0
  worker: int = 0
  stale_params: np.ndarray | None = None


# Problems: loss and gradient of a batch.


def quadratic_loss(params, batch):
  centres, curvatures = batch
  return float(np.mean(0.5 * curvatures * (params - centres) ** 2))


def quadratic_gradient(params, batch):
  centres, curvatures = batch
  gradient = np.zeros_like(params)
  for centre, curvature in zip(centres, curvatures, strict=True):
    gradient += curvature * (params - centre)
  return gradient / centres.size


def quadratic_hessian_product(params, batch, direction):
  centres, curvatures = batch
  del params
  product = np.zeros_like(direction)
  for curvature in curvatures:
    product += curvature * direction
  return product / centres.size


def logistic_loss(params, batch):
  inputs, labels = batch  # Labels are -1 or 1.
  total = 0.0
  for x, y in zip(inputs, labels, strict=True):
    total += np.logaddexp(0.0, -y * float(x @ params))
  return total / len(labels)


def logistic_gradient(params, batch):
  inputs, labels = batch
  gradient = np.zeros_like(params)
  for x, y in zip(inputs, labels, strict=True):
    gradient += -y * x / (1.0 + math.exp(y * float(x @ params)))
  return gradient / len(labels)


def logistic_hessian_product(params, batch, direction):
  inputs, labels = batch
  product = np.zeros_like(direction)
  for x in inputs:  # A label's square is 1.
    p = 1.0 / (1.0 + math.exp(-float(x @ params)))
    product += p * (1 - p) * float(x @ direction) * x
  return product / len(labels)


# Optimizers.


class Sgd:
  """SGD with optional heavy-ball or Nesterov momentum."""

  def __init__(self, learning_rate, momentum=0.0, nesterov=False):
    self.learning_rate = learning_rate
    self.momentum = momentum
    self.nesterov = nesterov
    self.velocity = 0.0

  def read(self, params):
    return params

  def apply(self, params, packet):
    g = packet.gradient
    self.velocity = self.momentum * self.velocity + g
    step = self.momentum * self.velocity + g if self.nesterov else self.velocity
    return params - self.learning_rate * step


class Adam:
  """Adam with bias correction, epsilon outside the root."""

  def __init__(self, learning_rate, b1=0.9, b2=0.999, epsilon=1e-8):
    self.learning_rate = learning_rate
    self.b1, self.b2, self.epsilon = b1, b2, epsilon
    self.first, self.second, self.count = 0.0, 0.0, 0

  def read(self, params):
    return params

  def apply(self, params, packet):
    g = packet.gradient
    self.count += 1
    self.first = self.b1 * self.first + (1 - self.b1) * g
    self.second = self.b2 * self.second + (1 - self.b2) * g * g
    first = self.first / (1 - self.b1**self.count)
    second = self.second / (1 - self.b2**self.count)
    return params - self.learning_rate * first / (
      np.sqrt(second) + self.epsilon
    )


class LookAhead:
  """SGD whose workers read `horizon` updates ahead of the server."""

  def __init__(self, learning_rate, horizon):
    self.learning_rate = learning_rate
    self.horizon = horizon
    self.last_step = 0.0

  def read(self, params):
    return params + self.horizon * self.last_step

  def apply(self, params, packet):
    self.last_step = -self.learning_rate * packet.gradient
    return params + self.last_step


class Correction:
  """A server that changes an arriving gradient for the server inside it."""

  def __init__(self, inner):
    self.inner = inner

  def read(self, params):
    return self.inner.read(params)

  def apply(self, params, packet):
    corrected = self.correct(params, packet)
    return self.inner.apply(
      params, dataclasses.replace(packet, gradient=corrected)
    )


class DelayCompensation(Correction):
  """DC-ASGD-c; `batch_size` for the batch-scaled form."""

  def __init__(self, inner, lam, batch_size=1):
    super().__init__(inner)
    self.lam = lam * batch_size

  def correct(self, params, packet):
    g = packet.gradient
    return g + self.lam * g * g * (params - packet.stale_params)


class AdaptiveDelayCompensation(Correction):
  """DC-ASGD-a."""

  def __init__(self, inner, lam, decay):
    super().__init__(inner)
    self.lam, self.decay = lam, decay
    self.mean_square = 0.0

  def correct(self, params, packet):
    g = packet.gradient
    r = self.decay
    self.mean_square = r * self.mean_square + (1 - r) * g * g
    lam = self.lam / np.sqrt(self.mean_square + 1e-7)
    return g + lam * g * g * (params - packet.stale_params)


class ExactDelayCompensation(Correction):
  """The arriving batch's own Hessian; `trust` None does not clip."""

  def __init__(self, inner, hessian_product, trust):
    super().__init__(inner)
    self.hessian_product, self.trust = hessian_product, trust
    self.products = 0

  def correct(self, params, packet):
    d = params - packet.stale_params
    if not d.any():
      return packet.gradient
    self.products += 1
    correction = self.hessian_product(packet.stale_params, packet.batch, d)
    if self.trust is not None:
      most = self.trust * np.linalg.norm(packet.gradient)
      size = np.linalg.norm(correction)
      if size > most:
        correction = correction * (most / size)
    return packet.gradient + correction


class ScaleByStaleness(Correction):
  """`rule` is 'inverse', 'adaptive' or 'polynomial'."""

  def __init__(self, inner, rule, workers=None, exponent=None):
    super().__init__(inner)
    self.rule, self.workers, self.exponent = rule, workers, exponent

  def correct(self, params, packet):
    tau = packet.staleness
    if self.rule == 'inverse':
      return packet.gradient / max(tau, 1)
    if self.rule == 'adaptive':
      return packet.gradient * self.workers / max(self.workers, tau)
    return packet.gradient * (1 + tau) ** -self.exponent


class SpikeCompensation:
  """Momentum that gives a late gradient at once what it has missed."""

  def __init__(self, learning_rate, delay, momentum):
    self.learning_rate, self.delay = learning_rate, delay
    self.momentum = momentum
    self.velocity = 0.0

  def read(self, params):
    return params

  def apply(self, params, packet):
    m, g = self.momentum, packet.gradient
    self.velocity = m * self.velocity + g
    share = m**self.delay
    # (1 - m^D) / (1 - m); D may be one for each element.
    spike = sum(m**i * (i < self.delay) for i in range(np.max(self.delay)))
    step = share * self.velocity + spike * g
    return params - self.learning_rate * step


class AdaptiveBraking:
  """Momentum that brakes gradients that agree with it."""

  def __init__(self, learning_rate, momentum, strength):
    self.learning_rate, self.momentum = learning_rate, momentum
    self.strength = strength
    self.velocity = None

  def read(self, params):
    return params

  def apply(self, params, packet):
    g = packet.gradient
    if self.velocity is None:
      self.velocity = np.zeros_like(g)
    size = np.linalg.norm(g) * np.linalg.norm(self.velocity)
    cosine = float(g @ self.velocity) / size if size > 0 else 0.0
    self.velocity = self.momentum * self.velocity
    self.velocity = self.velocity + (1 - self.strength * cosine) * g
    return params - self.learning_rate * self.velocity


# Acceptance: `updated` and `refused` say what became of the last gradient.


class DropStale:
  """Refuses what is older than `max_staleness`."""

  def __init__(self, inner, max_staleness):
    self.inner = inner
    self.max_staleness = max_staleness
    self.updated = self.refused = False

  def read(self, params):
    return self.inner.read(params)

  def apply(self, params, packet):
    self.refused = packet.staleness > self.max_staleness
    self.updated = not self.refused
    return params if self.refused else self.inner.apply(params, packet)


class Rennala:
  """The mean of every `size` gradients of the current parameters."""

  def __init__(self, inner, size):
    self.inner = inner
    self.size = size
    self.kept = []
    self.updated = self.refused = False

  def read(self, params):
    return self.inner.read(params)

  def apply(self, params, packet):
    self.refused, self.updated = packet.staleness > 0, False
    if self.refused:
      return params
    self.kept.append(packet)
    if len(self.kept) < self.size:
      return params
    self.updated = True
    kept, self.kept = self.kept, []
    return self.inner.apply(
      params,
      dataclasses.replace(
        packet,
        gradient=sum(p.gradient for p in kept) / self.size,
        value=sum(p.value for p in kept) / self.size,
        batch=tuple(
          np.concatenate([p.batch[i] for p in kept])
          for i in range(len(packet.batch))
        ),
      ),
    )


# Predictors.


class Dana:
  """A momentum for each worker, which reads ahead of all of them."""

  def __init__(self, learning_rate, workers, momentum):
    self.learning_rate, self.momentum = learning_rate, momentum
    self.velocities = [0.0] * workers

  def read(self, params):
    return params - self.learning_rate * self.momentum * sum(self.velocities)

  def apply(self, params, packet):
    i = packet.worker
    self.velocities[i] = self.momentum * self.velocities[i] + packet.gradient
    return params - self.learning_rate * self.velocities[i]


class Smega2:
  """One momentum for all workers, which read a round ahead."""

  def __init__(self, learning_rate, workers, momentum):
    self.learning_rate, self.workers = learning_rate, workers
    self.momentum = momentum
    self.velocity, self.gradients, self.collected = 0.0, 0.0, 0

  def read(self, params):
    ahead = Smega2(self.learning_rate, self.workers, self.momentum)
    ahead.velocity, ahead.gradients = self.velocity, self.gradients
    ahead.collected = self.collected
    for _ in range(self.workers):
      params = ahead.apply(params, Packet(0.0, 0.0, None))
    return params

  def apply(self, params, packet):
    g = packet.gradient
    params = params - self.learning_rate * (g + self.momentum * self.velocity)
    self.gradients = self.gradients + g
    self.collected += 1
    if self.collected == self.workers:
      mean = self.gradients / self.workers
      self.velocity = self.momentum * self.velocity + mean
      self.gradients, self.collected = 0.0, 0
    return params


class Predict:
  """Workers read ahead along the last update of any server."""

  def __init__(self, inner, horizon):
    self.inner, self.horizon = inner, horizon
    self.last_step = 0.0

  def read(self, params):
    return params + self.horizon * self.last_step

  def apply(self, params, packet):
    after = self.inner.apply(params, packet)
    self.last_step = after - params
    return after


class DelayedNesterov:
  """Plain steps, and momentum once a round."""

  def __init__(self, learning_rate, workers, momentum):
    self.learning_rate, self.workers = learning_rate, workers
    self.momentum = momentum
    self.velocity, self.collected = 0.0, []

  def read(self, params):
    return params

  def apply(self, params, packet):
    n, b, g = self.workers, self.momentum, packet.gradient
    self.collected.append(g)
    step = g / n
    if len(self.collected) == n:
      self.velocity = b * self.velocity + sum(self.collected) / n
      self.collected = []
      step = b * self.velocity + g / n
    return params - self.learning_rate * step


class AsynchronousNesterov:
  """As published: with a look-ahead, which is where workers read."""

  def __init__(self, learning_rate, momentum):
    self.learning_rate, self.momentum = learning_rate, momentum
    self.last_step = 0.0

  def read(self, params):
    return params + self.momentum * self.last_step

  def apply(self, params, packet):
    c = self.momentum
    gradient = self.learning_rate * (1 - c) * packet.gradient
    self.last_step = c * self.last_step - gradient
    return params + self.last_step


class StalenessScaled:
  """Divides by `1 + staleness + worker`; shows what a packet carries."""

  def __init__(self, inner):
    self.inner = inner

  def read(self, params):
    return self.inner.read(params)

  def apply(self, params, packet):
    scale = 1.0 + packet.staleness + packet.worker
    return self.inner.apply(
      params, dataclasses.replace(packet, gradient=packet.gradient / scale)
    )


# Guided SGD.


@dataclasses.dataclass
class Entry:
  """A batch in the window, with what is known about it."""

  packet: Packet
  position: int
  score: float
  loss: float
  surprise: float
  collected: list[float]


class Guided:
  """Guided SGD around a server.

  Args:
    inner: the server that applies gradients.
    loss, gradient: functions of (params, batch), or None for both: then the
      stored gradients are replayed.
    verification: a function of the update's number that gives a verification
      batch, or None for the running mean of the values.
    select: how batches are preferred, by name; or a function of an entry and
      its number from `draw`, where -inf is not replayed.
    draw: a function of the window's number that gives a number for each
      position; `select='random'` replays the highest.
  """

  def __init__(
    self,
    inner,
    loss=None,
    gradient=None,
    *,
    window=10,
    replays=None,
    revisit=0,
    select='consistent',
    average_scores=False,
    replay_with=None,
    replay_model='serial',
    verification=None,
    draw=None,
  ):
    self.inner = inner
    self.loss, self.gradient = loss, gradient
    self.window = window
    self.replays = min(4, window // 2) if replays is None else replays
    self.revisit = revisit
    self.select = select
    self.average_scores = average_scores
    self.replay_with = replay_with
    self.replay_model = replay_model
    self.replay_units = 0  # What serial and parallel replays took.
    self.shared_replays = 0
    self.verification = verification
    self.draw = draw
    self.entries: list[Entry] = []
    self.previous = math.inf
    self.count = 0
    self.gradient_evaluations = 0
    self.replayed: list[list[int]] = []  # Of every window, in order.
    self.margins: list[float] = []  # How nearly the selections were tied.

  def read(self, params):
    return self.inner.read(params)

  def apply(self, params, packet):
    params = self.inner.apply(params, packet)
    self.gradient_evaluations += 1
    sample = None
    if self.verification is not None:
      sample = self.verification(self.count)
      average = self.loss(params, sample)
    elif self.count == 0:
      average = packet.value
    else:
      average = 0.9 * self.previous + 0.1 * packet.value
    known = self.previous < math.inf
    sign = 1.0 if average < self.previous else -1.0
    if known:
      self.margins.append(abs(average - self.previous))
    for entry in self._revisited():
      if self.revisit != 0:
        entry.loss = self.loss(params, entry.packet.batch)
      if known:
        self._collect(entry, sign * (self.previous - entry.loss))
    arriving = Entry(
      packet=packet,
      position=len(self.entries),
      score=0.0,
      loss=packet.value,
      surprise=abs(self.previous - packet.value) if known else 0.0,
      collected=[],
    )
    if self.average_scores and known:
      self._collect(arriving, self.previous - average)
    self.entries.append(arriving)
    self.previous = average
    self.count += 1
    if len(self.entries) == self.window:
      params = self._replay(params)
      if self.average_scores and sample is not None:
        self.previous = self.loss(params, sample)
      self.entries = []
    return params

  def _revisited(self):
    if self.revisit in (None, 0):
      return self.entries
    return self.entries[-self.revisit :]

  def _collect(self, entry, gain):
    entry.collected.append(gain)
    if self.average_scores:
      entry.score = sum(entry.collected) / len(entry.collected)
    else:
      entry.score = sum(entry.collected)

  def _preference(self, entry, numbers):
    if callable(self.select):
      return self.select(entry, numbers[entry.position])
    return {
      'consistent': entry.score,
      'inconsistent': -entry.score,
      'hardest': entry.loss,
      'surprise': entry.surprise,
      'random': numbers[entry.position],
    }[self.select]

  def _replay(self, params):
    numbers = [0.0] * self.window
    if self.select == 'random' or callable(self.select):
      numbers = self.draw(self.count // self.window - 1)
    if callable(self.select):
      eligible = [
        e for e in self.entries if self._preference(e, numbers) > -math.inf
      ]
    else:
      eligible = [e for e in self.entries if e.score > 0]
    chosen_count = min(self.replays, len(eligible))
    # Python's sort is stable: of equal ones the earlier batch comes first.
    ranked = sorted(
      self.entries, key=lambda e: self._preference(e, numbers), reverse=True
    )
    chosen = ranked[:chosen_count]
    self._note_margins(ranked, numbers)
    server = self.inner if self.replay_with is None else self.replay_with
    shared = None
    if self.replay_model == 'parallel':
      # All at once, at the parameters at the window's end.
      shared = params if self.replay_with is not None else server.read(params)
    for i, entry in enumerate(chosen):
      params = self._replay_one(params, entry, i, shared)
    if self.gradient is not None:
      if self.replay_model == 'serial':
        self.replay_units += len(chosen)
      elif self.replay_model == 'parallel':
        self.replay_units += 1 if chosen else 0
      else:
        self.shared_replays += len(chosen)
    self.replayed.append([e.position for e in chosen])
    return params

  def _note_margins(self, ranked, numbers):
    preferences = [self._preference(e, numbers) for e in ranked]
    self.margins += [
      a - b for a, b in itertools.pairwise(preferences) if a != b
    ]
    self.margins += [abs(e.score) for e in self.entries if e.score != 0]

  def _replay_one(self, params, entry, number, shared):
    server = self.inner if self.replay_with is None else self.replay_with
    if self.gradient is None:
      age = self.window - entry.position
      packet = dataclasses.replace(
        entry.packet,
        staleness=entry.packet.staleness + age,
        stale_params=None,
      )
    else:
      point = params if self.replay_with is not None else server.read(params)
      point = point if shared is None else shared
      self.gradient_evaluations += 1
      packet = dataclasses.replace(
        entry.packet,
        gradient=self.gradient(point, entry.packet.batch),
        value=self.loss(point, entry.packet.batch),
        staleness=0 if shared is None else number,
        stale_params=point,
      )
    return server.apply(params, packet)


# Staleness. Times are whole numbers of ticks, 2^30 of them a unit.

UNIT = 2**30


def ticks(units: float) -> int:
  return round(units * UNIT)


class RoundRobin:
  """How long tasks take: workers arrive in turn, 1 / workers apart."""

  def __init__(self, workers):
    self.workers = workers

  def duration(self, worker, task, now):
    if task == 0:  # A head start.
      return ticks((worker + 1) / self.workers)
    return UNIT

  def lost(self, worker, task, now):
    return False


class Table(RoundRobin):
  """Tasks take what a table says, `durations[worker][task]`."""

  def __init__(self, durations):
    self.durations = durations

  def duration(self, worker, task, now):
    return int(self.durations[worker][task])


class Failing:
  """A worker fails at a time, and comes back at another, or never (None)."""

  def __init__(self, inner, worker, at, back):
    self.inner = inner
    self.worker, self.at, self.back = worker, at, back

  def _fails(self, worker, task, now):
    if worker != self.worker or (self.back is not None and now >= self.back):
      return False
    return now + self.inner.duration(worker, task, now) > self.at

  def duration(self, worker, task, now):
    if not self._fails(worker, task, now):
      return self.inner.duration(worker, task, now)
    return math.inf if self.back is None else self.back - now

  def lost(self, worker, task, now):
    return self._fails(worker, task, now) or self.inner.lost(worker, task, now)


class Recorded(RoundRobin):
  """Workers arrive when they were recorded."""

  def __init__(self, workers, times):
    self.times = {}
    for worker, time in zip(workers, times, strict=True):
      self.times.setdefault(worker, []).append(time)

  def duration(self, worker, task, now):
    times = self.times.get(worker, [])
    return times[task] - now if task < len(times) else math.inf


@dataclasses.dataclass
class Worker:
  """A worker, and the gradient it is computing."""

  batch: object
  params: np.ndarray  # What it read.
  version: int  # How many updates the server had applied when it read.
  velocity: np.ndarray | float = 0.0
  tasks: int = 0  # How many it has finished.
  lost: bool = False  # Whether nothing comes of the one it is at.


@dataclasses.dataclass
class Run:
  """What `asynchronous` did."""

  trajectory: list  # The parameters before every batch is taken but the first N
  clock: list  # and when that was.
  packets: list  # What reached the server.
  arrivals: list  # (time, worker, 'applied', 'refused', 'lost', 'overwritten').
  crew: list  # The workers at the end.


def asynchronous(
  params,
  server,
  loss: Callable,
  gradient: Callable,
  workers: int,
  batches: Sequence[object],
  cluster=None,
  worker_momentum: float | None = None,
  worker_nesterov: bool = False,
  overwrite_within: int | None = None,
  max_ahead: int | None = None,
) -> Run:
  """A parameter server and its workers: a heap of finish times.

  Batch `i` goes to worker `i` for the first `workers` batches; afterwards
  every batch goes to the worker that reads next. It ends when a worker wants a
  batch and there is none.
  """
  cluster = RoundRobin(workers) if cluster is None else cluster
  run = Run([], [], [], [], [None] * workers)
  batches = list(batches)
  heap, waiting = [], list(range(workers))
  now = version = taken = 0

  def may_read():
    slowest = min((w.tasks for w in run.crew if w is not None), default=0)
    return [
      i
      for i in waiting
      if run.crew[i] is None
      or max_ahead is None
      or run.crew[i].tasks - slowest <= max_ahead
    ]

  while True:
    # Whoever may read reads, in the order of their numbers.
    for index in may_read():
      if taken >= workers:
        run.trajectory.append(params)
        run.clock.append(now)
      if taken == len(batches):
        return run
      old = run.crew[index] or Worker(None, None, 0)
      worker = Worker(
        batches[taken],
        server.read(params),
        version,
        old.velocity,
        old.tasks,
        cluster.lost(index, old.tasks, now),
      )
      finish = now + cluster.duration(index, old.tasks, now)
      heapq.heappush(heap, (finish, index))
      run.crew[index] = worker
      waiting.remove(index)
      taken += 1
    if min(heap)[0] == math.inf:
      return run
    # The next one arrives.
    now, index = heapq.heappop(heap)
    worker = run.crew[index]
    worker.tasks += 1
    waiting.append(index)
    waiting.sort()
    packet = _packet(
      worker, index, version, loss, gradient, worker_momentum, worker_nesterov
    )
    fate = 'lost' if worker.lost else 'applied'
    if fate == 'applied' and overwrite_within is not None:
      following = [t for t, i in heap if not run.crew[i].lost]
      for i in may_read():  # They begin their next tasks at once.
        task = (i, run.crew[i].tasks, now)
        if not cluster.lost(*task):
          following.append(now + cluster.duration(*task))
      if following and min(following) - now <= overwrite_within:
        fate = 'overwritten'
    run.arrivals.append((now, index, fate))
    if fate == 'applied':
      params = server.apply(params, packet)
      run.packets.append(packet)
      # Of what may refuse gradients; who refuses or only keeps ages nobody.
      if getattr(server, 'refused', False):
        run.arrivals[-1] = (now, index, 'refused')
      version += getattr(server, 'updated', True)


def _packet(worker, index, version, loss, gradient, momentum, nesterov):
  """What a worker brings; with a momentum of its own if it has one."""
  g = gradient(worker.params, worker.batch)
  if momentum is not None:
    velocity = worker.velocity = momentum * worker.velocity + g
    g = momentum * velocity + g if nesterov else velocity
  return Packet(
    gradient=g,
    value=loss(worker.params, worker.batch),
    batch=worker.batch,
    staleness=version - worker.version,
    worker=index,
    stale_params=worker.params,
  )


def delayed_leaves(params, server, gradient, delays, batches):
  """Every element of the parameters has a delay of its own.

  Args:
    delays: a delay for each element of `params`.

  Returns:
    The parameters after every call, and the elements' stalenesses at every
    call at which the server applied something (else None).
  """
  delays = list(delays)
  first = min(delays)
  gradients, reads, versions = [], [], []
  version = 0
  trajectory, stalenesses = [], []
  for t, batch in enumerate(batches):
    reads.append(server.read(params))
    gradients.append(gradient(reads[-1], batch))
    versions.append(version)
    if t < first:
      trajectory.append(params)
      stalenesses.append(None)
      continue
    arrived = np.zeros_like(params)
    stale = np.array(params)
    staleness = []
    for i, delay in enumerate(delays):
      if t >= delay:
        arrived[i] = gradients[t - delay][i]
        stale[i] = reads[t - delay][i]
        staleness.append(version - versions[t - delay])
      else:
        stale[i] = reads[0][i]
        staleness.append(version)
    after = server.apply(
      params,
      Packet(arrived, math.nan, None, staleness=staleness, stale_params=stale),
    )
    filling = np.array([t < delay for delay in delays])
    params = np.where(filling, params, after)
    version += 1
    trajectory.append(params)
    stalenesses.append(staleness)
  return trajectory, stalenesses


def synchronous(
  params,
  server,
  loss,
  gradient,
  workers,
  batches,
  combine='sequential',
  wait_for=None,
  durations=None,
  sync_cost=0,
):
  """Rounds at shared parameters.

  Args:
    durations: what each worker's task takes in each round,
      `durations[worker][round]`; None for one unit.

  Returns:
    The parameters after every call (one gradient each), the packets that were
    applied, and the clock after every round.
  """
  wait_for = workers if wait_for is None else wait_for
  trajectory, packets, clock, now = [], [], [], 0
  for start in range(0, len(batches) - wait_for + 1, wait_for):
    number = start // wait_for
    times = [
      UNIT if durations is None else int(durations[i][number])
      for i in range(workers)
    ]
    # Python's sort is stable: of equal ones the lower number comes first.
    fastest = sorted(range(workers), key=lambda i: times[i])[:wait_for]
    now += times[fastest[-1]] + (sync_cost if workers > 1 else 0)
    clock.append(now)
    read = server.read(params)
    crew = batches[start : start + wait_for]
    gradients = [gradient(read, batch) for batch in crew]
    values = [loss(read, batch) for batch in crew]
    if combine == 'mean' and workers > 1:
      trajectory += [params] * (wait_for - 1)
      packet = Packet(
        gradient=sum(gradients) / wait_for,
        value=sum(values) / wait_for,
        batch=tuple(
          np.concatenate([batch[i] for batch in crew])
          for i in range(len(crew[0]))
        ),
        stale_params=read,
      )
      params = server.apply(params, packet)
      trajectory.append(params)
      packets.append(packet)
      continue
    updates = 0
    for index, worker in enumerate(fastest):
      packet = Packet(
        gradient=gradients[index],
        value=values[index],
        batch=crew[index],
        staleness=updates,
        worker=worker,
        stale_params=read,
      )
      params = server.apply(params, packet)
      updates += getattr(server, 'updated', True)
      trajectory.append(params)
      packets.append(packet)
  return trajectory, packets, clock
