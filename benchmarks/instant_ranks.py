"""Ranks that answer at once: ``python -P -m benchmarks.instant_ranks --ranks N --vocabulary V …``.

All of them in one process without torch: each has the control socket of a real rank and decodes every
plan, and the sampling rank answers with tokens of the vocabulary. What they cost is nobody's figure.
"""

import argparse
import os
import random

import zmq

from protocol.control import (
    Boot,
    Hello,
    Ready,
    StepPlan,
    StepResult,
    Stop,
    from_worker_codec,
    to_worker_codec,
)

STEP_S = 10.0
"""What they predict for a step: on a busy machine nobody shall count as hung."""


def main() -> None:
    """Play the ranks until told to stop, or until the orchestrator is gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--connect", required=True)
    parser.add_argument("--epoch", type=int, required=True)
    options = parser.parse_args()
    context = zmq.Context()
    sockets = []
    for rank in range(options.ranks):
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, str(rank).encode())
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(options.connect)
        sockets.append(socket)
    _play(sockets, options.epoch, options.vocabulary)
    for socket in sockets:
        socket.close()
    context.term()


def _play(sockets: "list[zmq.Socket[bytes]]", epoch: int, vocabulary: int) -> None:
    encode, decode = from_worker_codec().encode, to_worker_codec().decode
    draw = random.Random(0)
    tokens = [draw.randrange(3, vocabulary) for _ in range(4096)]
    for rank, socket in enumerate(sockets):
        socket.send(encode(Hello(epoch, rank, os.getpid())))
    parent = os.getppid()
    poller = zmq.Poller()
    for socket in sockets:
        poller.register(socket, zmq.POLLIN)
    while os.getppid() == parent:
        for socket, _ in poller.poll(1000):
            match decode(socket.recv()):
                case Boot() as boot:
                    sampling_rank = boot.topology.sampling_rank
                    socket.send(encode(Ready(epoch, boot.rank, [], [], 0.0, STEP_S, boot.num_blocks)))
                case StepPlan() as plan if socket is sockets[sampling_rank]:
                    sampled = [
                        [tokens[(plan.step * 31 + advance.slot) % len(tokens)]]
                        for advance in plan.advances
                        if advance.wants_logits
                    ]
                    socket.send(encode(StepResult(epoch, plan.step, sampled)))
                case Stop():
                    return


if __name__ == "__main__":
    main()
