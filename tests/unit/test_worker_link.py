"""A rank's connections: what comes is seen at once, whatever another thread sends meanwhile."""

import os
import queue
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import zmq

from protocol.control import (
    Hello,
    StepPlan,
    StepResult,
    Stop,
    from_worker_codec,
    rank_identity,
    to_worker_codec,
)
from worker.control import Link
from worker.parent import Parent

ROUNDS = 1500
ANSWER_MS = 2000


def test_no_plan_lies_unread_while_results_go_out(tmp_path: Path) -> None:
    """Two plans are in flight; the second comes about when the first one's result goes out."""
    address = f"ipc://{tmp_path}/s"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        router.bind(address)
        thread = threading.Thread(target=_rank, args=(address,))
        thread.start()
        assert router.poll(ANSWER_MS)
        identity, frame = router.recv_multipart()
        assert identity == rank_identity(0)
        assert from_worker_codec().decode(frame) == Hello(1, 0, 7)
        plan = to_worker_codec().encode(StepPlan(1, 0, [], [], []))
        for count in range(ROUNDS):
            router.send_multipart([identity, plan])
            time.sleep(0.0001 + count % 40 * 0.00001)
            router.send_multipart([identity, plan])
            for _ in range(2):
                assert router.poll(ANSWER_MS), f"round {count} is not answered"
                assert router.recv_multipart()[0] == rank_identity(0, is_answering=True)
        router.send_multipart([identity, to_worker_codec().encode(Stop(1))])
        thread.join(5.0)
        assert not thread.is_alive()


def _rank(address: str) -> None:
    lives = os.eventfd(0)  # Readable when the parent's end comes: never.
    parent = cast("Parent", SimpleNamespace(fd=lives))
    link = Link(address, 0, parent)
    waiting: queue.SimpleQueue[StepResult | None] = queue.SimpleQueue()

    def answer() -> None:
        while (result := waiting.get()) is not None:
            time.sleep(0.0002)
            link.answer(result)

    answering = threading.Thread(target=answer)
    answering.start()
    link.greet(Hello(1, 0, 7))
    while not isinstance(link.receive(10.0), Stop):
        waiting.put(StepResult(1, 0, []))
    waiting.put(None)
    answering.join()
    link.close()
    os.close(lives)
