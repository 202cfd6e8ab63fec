"""Results come back by themselves: a thread waits for each step's event and reads what it copied.

The control loop must take the next plan while the device works, and a plan and a finished step come in
no order. Waits block on the driver's event; nothing spins.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from protocol.control import StepResult
from worker.steps import Answer

_END = None


@dataclass(frozen=True, slots=True)
class Pending:
    """A step that the device is at."""

    event: torch.cuda.Event
    """Recorded behind its last copy."""
    read: Callable[[], StepResult | None]
    """Makes the result of what was copied; called once, after the event. None: nobody is answered."""
    answer: Answer


class Completions:
    """Owner of the thread. Answers come in the order of the steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tandem-results", daemon=True)
        self._thread.start()

    def put(self, pending: Pending) -> None:
        """Have a step waited for."""
        self._pending.put(pending)

    def close(self) -> None:
        """Return when every step that was put is answered."""
        self._pending.put(_END)
        self._thread.join()

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        while (pending := self._pending.get()) is not None:
            try:
                pending.event.synchronize()
                result = pending.read()
            except Exception as error:
                pending.answer(error)
                return
            if result is not None:
                pending.answer(result)
