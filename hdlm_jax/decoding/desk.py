"""Texts for many who ask at once: a thread that writes them in slots, kind by kind, a few calls in turn.

Texts of one kind (`slots.kind_of`) share a batch which they join and leave while others are being written. Processes
without levels (GIDD, autoregressive) have no such batch: what waits with the same settings is drawn together, start to
end.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from hdlm_jax.common.console import compiling
from hdlm_jax.config import GenerateConfig
from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.decoding import canvas as canvases
from hdlm_jax.decoding import slots
from hdlm_jax.decoding.sampler import Sampler
from hdlm_jax.decoding.texts import Asked

CALLS = 8  # of a kind's batch before the next kind's turn; 1 where somebody watches
KINDS = 4  # batches that are kept at once
FRAMES = 64  # of what is drawn start to end and watched


class Frame(NamedTuple):
    """What a row shows after `call` calls at time t: position, state, confidence in thousandths, position, ...; in the
    first one start, all its states."""

    call: int
    t: float
    changes: list[int]
    start: list[int] | None = None


class Written(NamedTuple):
    """A text that is done: reason "stop", at an end, or "length"; tokens that were written for it."""

    text: str
    reason: str
    tokens: int


class Failed(NamedTuple):
    """Why there will be no text: "late", "stopping" or "broken"."""

    why: str
    message: str


News: TypeAlias = "str | Frame | Written | Failed"  # a str is a piece of the text, in order


class Moment(NamedTuple):
    """A text after `call` calls, at time t: its states z int32 [n], and in sure float32 [n] the probability the model
    gave to each when it was drawn (0: not drawn). done: "", in the last one why it ends, "stop" or "length"; text: in
    the last one the text, "" before."""

    call: int
    t: float
    z: np.ndarray
    sure: np.ndarray
    text: str = ""
    done: str = ""


class Busy(Exception):
    """Too many texts wait."""


@dataclasses.dataclass(eq=False)
class Job:
    """A text somebody asks for.

    tell: called with the news in the desk's thread; the last one is Written or Failed. front: what the text begins with
    and is not shown. stops: texts that end it. deadline: of time.monotonic. left: set when nobody waits any more.
    """

    asked: Asked
    text: slots.Text
    g: GenerateConfig
    kind: tuple[Hashable, ...]
    tell: Callable[[News], None]
    front: str = ""
    stops: tuple[str, ...] = ()
    streams: bool = False
    watches: bool = False
    deadline: float = float("inf")
    left: bool = False
    sent: str = ""  # of the text so far
    shown: np.ndarray | None = None  # the states of the last frame


def jobs_of(draw: Sampler, asked: Asked, g: GenerateConfig, **more: Any) -> list[Job]:
    """A job for each of the texts that are asked for; `tell` is called with its number first.

    Raises:
      ConfigError: what this run cannot write so.
    """
    tell = more.pop("tell")
    if draw.process.unmasks:
        kind = (*slots.kind_of(draw, asked.canvas, g), more["watches"])
    else:
        draw.prepare(asked.canvas, g)
        kind = (dataclasses.replace(g, seed=0, num_samples=1), isinstance(asked.canvas, np.ndarray))
    return [Job(asked, text, g, kind, lambda news, i=i: tell(i, news), **more)  # type: ignore[misc]
            for i, text in enumerate(slots.texts_of(draw, asked.canvas, g))]


class _Batch:
    """The jobs of one kind, and the slots they are written in."""

    def __init__(self, desk: Desk, job: Job):
        self.desk, self.waiting, self.running = desk, collections.deque[Job](), dict[int, Job]()
        self.g, self.level_of = job.g, desk.draw.process.hierarchy.level_of
        self.slots: slots.Slots | None = None
        self.freed: list[int] = []  # slots that are half written, and whose text is done
        self.ready: concurrent.futures.Future[None] = desk.compiles.submit(self.prepare, job)

    def prepare(self, job: Job) -> None:
        if self.desk.draw.process.unmasks:
            with compiling("generate", aside=True):
                self.slots = slots.Slots(self.desk.draw, job.g, job.asked.canvas, self.desk.rows, job.watches)

    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def fail(self, why: str, message: str) -> None:
        for job in (*self.waiting, *self.running.values()):
            job.tell(Failed(why, message))
        self.waiting.clear()
        self.running.clear()

    def drop(self) -> list[int]:
        """Slots whose jobs nobody waits for any more; those who wait too long are told."""
        self.waiting = collections.deque(job for job in self.waiting if not self.desk.over(job))
        gone = [slot for slot, job in self.running.items() if self.desk.over(job)]
        for slot in gone:
            del self.running[slot]
        return gone

    def turn(self) -> None:
        """Lets jobs in and out, and writes on at all of them."""
        changed: dict[int, slots.Text | None] = dict.fromkeys([*self.drop(), *self.freed])
        self.freed = []
        if self.slots is None:
            return self.together()
        for slot in range(self.slots.rows):
            if slot not in self.running and self.waiting:
                self.running[slot] = self.waiting.popleft()
                changed[slot] = self.running[slot].text
        if changed:
            self.slots.put(changed)
        if not self.running:
            return
        if changed and any(job.watches and job.shown is None for job in self.running.values()):
            self.look(self.slots.advance(0))
        self.look(self.slots.advance(1 if any(job.watches for job in self.running.values()) else CALLS))

    def look(self, seen: slots.Seen) -> None:
        """Tells what was written in the slots; those that are done are free."""
        revises = self.slots is not None and self.slots.revises
        for slot, job in list(self.running.items()):
            z, n, busy = seen.z[slot], int(seen.length[slot]), bool(seen.busy[slot])
            if job.watches:
                self.show(job, z[:n], seen.sure[slot], int(seen.call[slot]), float(seen.t[slot]) if busy else 0.0)
            free = np.flatnonzero(self.level_of(z[:n]) > 0)
            known = 0 if busy and revises else int(free[0]) if busy and len(free) else n
            if self.written(job, z, n, known, busy):
                del self.running[slot]
                if busy:
                    self.freed.append(slot)

    def show(self, job: Job, z: np.ndarray, sure: np.ndarray, call: int, t: float) -> None:
        """A frame, where there is anything new."""
        z = z[: job.asked.keep or len(z)]
        if job.shown is None or len(job.shown) != len(z):
            job.shown = z
            return job.tell(Frame(call, t, [], z.tolist()))
        at = np.flatnonzero(z != job.shown)
        if len(at):
            job.shown = z
            thousandths = np.rint(1000 * sure[at]).astype(int)
            job.tell(Frame(call, t, np.stack([at, z[at], thousandths], 1).ravel().tolist()))

    def written(self, job: Job, z: np.ndarray, n: int, known: int, busy: bool) -> bool:
        """Whether the text is done, of which the first `known` tokens stay as they are; tells what is new in it."""
        asked, tokenizer = job.asked, self.desk.tokenizer
        end, whole = asked.end(z, known), min(asked.keep or n, n)
        done, reason = known >= whole or end < known, "stop" if end < known or asked.keep else "length"
        if asked.scaffold is not None and not done or not (done or job.streams or job.stops):
            return done
        text = asked.text(tokenizer, z, known).removeprefix(job.front)
        if cuts := [at for at in map(text.find, job.stops) if at >= 0]:
            text, done, reason = text[: min(cuts)], True, "stop"
        if not done:  # what may yet become another character, or the beginning of a stop
            text = text.rstrip("\ufffd")
            text = text[: max(0, len(text) - max(map(len, job.stops), default=1) + 1)]
        if job.streams and text.startswith(job.sent) and text != job.sent:
            job.tell(text[len(job.sent) :])
            job.sent = text
        if not done or busy and job.watches:
            return False
        tokens = int((~job.text.given[: end]).sum())
        self.desk.texts, self.desk.tokens = self.desk.texts + 1, self.desk.tokens + tokens
        job.tell(Written(text, reason, tokens))
        return True

    def together(self) -> None:
        """Draws what waits start to end."""
        jobs = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.desk.rows))]
        if not jobs:
            return
        self.running = dict(enumerate(jobs))
        asked = [(job.asked.canvas, job.text.number) for job in jobs]
        parts: list[Any] = [canvases.some(canvas, slice(i, i + 1)) for canvas, i in asked]
        canvas = np.concatenate(parts) if isinstance(parts[0], np.ndarray) else canvases.together(parts)
        g = dataclasses.replace(self.g, batch_size=self.desk.rows)
        frames = FRAMES if any(job.watches for job in jobs) else 0
        out = self.desk.draw(canvas, g, frames, names=[(job.text.seed, job.text.number) for job in jobs])
        for i, job in enumerate(jobs):
            n = int(out["length"][i])
            for frame in range(frames + 1 if job.watches else 0):
                self.show(job, out["z"][i, frame, :n], out["confidence"][i, frame], int(out["call"][i, frame]),
                          float(out["time"][i, frame]))
            self.written(job, out["tokens"][i], n, n, False)
        self.running = {}


class Desk:
    """Takes jobs, from any thread, and writes them in its own.

    rows: texts of a kind written at once. most: texts that may wait. texts, tokens: written so far.
    """

    def __init__(self, draw: Sampler, tokenizer: Tokenizer, rows: int, most: int):
        self.draw, self.tokenizer, self.most = draw, tokenizer, most
        self.rows = draw.batch_rows(GenerateConfig(batch_size=rows), rows)
        self.texts = self.tokens = 0
        self.compiles = concurrent.futures.ThreadPoolExecutor(1, "compile")
        self._new = threading.Condition()
        self._arrived: collections.deque[Job] = collections.deque()
        self._batches: dict[tuple[Hashable, ...], _Batch] = {}
        self._closed = self._news = False
        self._thread = threading.Thread(target=self._work, name="desk", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._arrived) + sum(len(batch.waiting) for batch in list(self._batches.values()))

    @property
    def running(self) -> int:
        return sum(len(batch.running) for batch in list(self._batches.values()))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def put(self, jobs: list[Job]) -> None:
        """Raises Busy where they would be too many to wait."""
        with self._new:
            if self._closed:
                raise Busy("the server is stopping")
            if self.waiting + len(jobs) > self.most:
                raise Busy(f"{self.waiting} texts wait already, at most {self.most} may; try again later")
            self._arrived.extend(jobs)
        self.wake()

    def wake(self) -> None:
        """There is news: jobs, somebody who left, a batch that is ready."""
        with self._new:
            self._news = True
            self._new.notify()

    def close(self) -> None:
        """Tells all jobs that there will be nothing more, and ends the thread."""
        self._closed = True
        self.wake()
        self._thread.join()
        self.compiles.shutdown(wait=False, cancel_futures=True)

    def over(self, job: Job) -> bool:
        """Whether nobody waits for it any more; who waited too long is told."""
        if not job.left and time.monotonic() > job.deadline:
            job.tell(Failed("late", "not done within the time limit"))
            return True
        return job.left

    def _sort(self) -> None:
        """What has arrived goes to the batch of its kind; where there is no room for another kind it waits."""
        stay: list[Job] = []
        for _ in range(len(self._arrived)):
            job = self._arrived.popleft()
            if self.over(job):
                continue
            if job.kind not in self._batches and len(self._batches) >= KINDS:
                idle = next((kind for kind, batch in self._batches.items() if not batch.busy()), None)
                if idle is None:
                    stay.append(job)
                    continue
                del self._batches[idle]
            batch = self._batches.pop(job.kind, None) or self._begin(job)
            self._batches[job.kind] = batch  # the last one used is the last to go
            batch.waiting.append(job)
        self._arrived.extendleft(reversed(stay))

    def _begin(self, job: Job) -> _Batch:
        batch = _Batch(self, job)
        batch.ready.add_done_callback(lambda _: self.wake())
        return batch

    def _work(self) -> None:
        while True:
            with self._new:
                if not self._news and not any(b.busy() and b.ready.done() for b in self._batches.values()):
                    self._new.wait(0.5 if self.waiting else None)  # now and then somebody has to be told it is late
                self._news = False
                if self._closed:
                    break
                self._sort()
            for kind, batch in list(self._batches.items()):
                if not batch.ready.done():
                    batch.drop()
                    continue
                try:
                    batch.ready.result()
                    if batch.busy():
                        batch.turn()
                except Exception as error:  # of this kind alone; the others go on
                    batch.fail("broken", " ".join(f"{type(error).__name__}: {error}".split())[:300])
                    self._batches.pop(kind, None)
        for job in self._arrived:
            job.tell(Failed("stopping", "the server is stopping"))
        for batch in self._batches.values():
            batch.fail("stopping", "the server is stopping")


def moments(draw: Sampler, tokenizer: Tokenizer, asked: Asked, g: GenerateConfig) -> Iterator[Moment]:
    """One text while it is written, call by call; it becomes what `draw` makes of it.

    Leaving the iteration early stops the writing. Of a process without levels all comes once it is written.

    Raises:
      ConfigError: what this run cannot write so, before the first one. RuntimeError: the batch failed.
    """
    news = queue.SimpleQueue[News]()
    jobs = jobs_of(draw, asked, g, tell=lambda _, what: news.put(what), watches=True)

    def follow() -> Iterator[Moment]:
        desk = Desk(draw, tokenizer, 1, 1)
        try:
            desk.put(jobs)
            now = Moment(0, 1.0, np.zeros(0, np.int32), np.zeros(0, np.float32))
            while not now.done:
                what = news.get()
                if isinstance(what, Failed):
                    raise RuntimeError(what.message)
                if isinstance(what, Frame):
                    z, sure = now.z.copy(), now.sure.copy()
                    if what.start is not None:
                        z, sure = np.array(what.start, np.int32), np.zeros(len(what.start), np.float32)
                    z[what.changes[::3]] = what.changes[1::3]
                    sure[what.changes[::3]] = np.array(what.changes[2::3], np.float32) / 1000
                    now = Moment(what.call, what.t, z, sure)
                elif isinstance(what, Written):
                    now = now._replace(text=what.text, done=what.reason)
                else:
                    continue
                yield now
        finally:
            for job in jobs:
                job.left = True
            desk.close()

    return follow()
