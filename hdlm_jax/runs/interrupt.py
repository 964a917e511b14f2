"""When a training saves without being told by its steps: by the clock, on SIGTERM and on Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

from hdlm_jax.common import processes
from hdlm_jax.common.console import say

RESUME_EXIT = 75  # leaving on SIGTERM or Ctrl-C with everything saved: run the same command again
INTERRUPTED = 130  # leaving on Ctrl-C at once


class Timer:
    """When checkpoint.minutes have gone since the last save.

    Of many processes the first one's clock counts. It tells the others at steps that all know, and each time the next
    of these steps as well: no exchange at every step, and none that waits for a device.
    """

    def __init__(self, minutes: float):
        self._seconds, self._next = 60 * minutes, 1
        self._began = self._since = time.monotonic()

    def restart(self) -> None:
        """A checkpoint has been saved."""
        self._since = time.monotonic()

    def due(self, step: int) -> bool:
        """To be asked by every process after every step, 1, 2, ... of this process's life."""
        if not self._seconds or step < self._next:
            return False

        def look() -> tuple[bool, int]:
            now = time.monotonic()
            left, pace = self._seconds - (now - self._since), max(now - self._began, 1e-9) / step
            return left <= 0, step + max(1, int(min(left / pace / 2, 100)))  # half the way, as steps may get slower

        due, self._next = processes.on_main_process(look)
        return due


class Stop:
    """Whether the run has been asked to stop (SIGTERM, preemption, a first Ctrl-C); a second Ctrl-C ends it at once.

    On many processes all say so at the same step. From `listen` on a thread hears the signals, as Python's own handlers
    wait for the end of a compilation or of a step.
    """

    def __init__(self) -> None:
        self._asked, self._pipe, self._wakeup = False, -1, -1
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        return self

    def listen(self) -> None:
        """In a thread that is not the main one it does nothing: whoever runs us decides."""
        if threading.current_thread() is not threading.main_thread():
            return
        # where processes are many JAX listens for SIGTERM itself; an ignored SIGINT is that of a job in the background
        numbers = [signal.SIGTERM] * (jax.process_count() == 1)
        numbers += [signal.SIGINT] * (signal.getsignal(signal.SIGINT) != signal.SIG_IGN)
        heard, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._wakeup = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, lambda *_: None) for number in numbers}
        threading.Thread(target=self._hear, args=(heard,), daemon=True).start()

    def _hear(self, heard: int) -> None:
        interrupted = False
        while number := os.read(heard, 1):
            if number[0] == signal.SIGINT:
                if interrupted:
                    os._exit(INTERRUPTED)
                interrupted = True
                say("train: Ctrl-C, saving after this step; once more leaves at once")
            if number[0] == signal.SIGINT and jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)  # JAX tells all of them
            self._asked |= number[0] in self._old
        os.close(heard)

    def at(self, step: int) -> bool:
        """To be asked by every process after every step, 1, 2, ... of this process's life.

        Many processes leave at the step after the last that any had asked about when the signal came, the first if it
        came before.
        """
        return self._asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_: Any) -> None:
        for number, old in self._old.items():
            if old is not None:
                signal.signal(number, old)
        if self._pipe >= 0:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._pipe)
