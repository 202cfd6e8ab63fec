"""The control loop: take a message, do it, answer.

A rank that catches an error and cannot answer for its step says so (``Fault``) and ends; it never
logs and goes on. Waits block in poll, on the socket and on the parent's end.
"""

import gc
import os
import threading
import time
import traceback

import setproctitle
import zmq

from protocol.control import (
    Boot,
    Fault,
    FaultKind,
    FromWorker,
    Hello,
    StepPlan,
    StepResult,
    Stop,
    ToWorker,
    from_worker_codec,
    rank_identity,
    to_worker_codec,
)
from protocol.errors import InvalidRequestError, ProtocolError, TandemError
from protocol.framing import MAX_CONTROL_FRAME_BYTES
from worker.boot import Booted, boot_rank
from worker.expert_load import LoadReports
from worker.parent import Parent, ParentDiedError

BOOT_WAIT_S = 60.0
"""An orchestrator that lives answers Hello at once; one that does not is no parent of ours."""
SEND_TIMEOUT_S = 10.0
_LINGER_MS = 1000
_QUEUE = 256
_MESSAGE_CHARS = 500


class Link:
    """Two connections to the orchestrator: one is taken from, one is sent through.

    The first is the loop's thread's alone. Any thread may send: through another socket, behind a lock. One
    that a thread sends through while another polls it loses wake-ups: the sending thread takes away what
    tells the poll of a message, and the message lies there until the next one comes.
    """

    def __init__(self, address: str, rank: int, parent: Parent) -> None:
        self._context = zmq.Context(io_threads=1)
        self._incoming = self._connect(address, rank_identity(rank))
        self._outgoing = self._connect(address, rank_identity(rank, is_answering=True))
        self._poller = zmq.Poller()
        self._poller.register(self._incoming, zmq.POLLIN)
        self._poller.register(parent.fd, zmq.POLLIN)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._error: Exception | None = None
        self._parent = parent
        self._lock = threading.Lock()
        self._encoder, self._decoder = from_worker_codec(), to_worker_codec()

    def _connect(self, address: str, identity: bytes) -> "zmq.Socket[bytes]":
        made: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        made.setsockopt(zmq.IDENTITY, identity)
        made.setsockopt(zmq.MAXMSGSIZE, MAX_CONTROL_FRAME_BYTES)
        made.setsockopt(zmq.SNDHWM, _QUEUE)
        made.setsockopt(zmq.RCVHWM, _QUEUE)
        made.setsockopt(zmq.SNDTIMEO, int(SEND_TIMEOUT_S * 1000))
        made.setsockopt(zmq.LINGER, _LINGER_MS)
        made.connect(address)
        return made

    def greet(self, hello: Hello) -> None:
        """Say who is here, on the connection that is answered on."""
        self._incoming.send(self._encoder.encode(hello))

    def send(self, message: FromWorker) -> None:
        """Send a message; waits while the queue is full, for ``SEND_TIMEOUT_S`` at most."""
        with self._lock:
            self._outgoing.send(self._encoder.encode(message))

    def receive(self, timeout_s: float | None = None) -> ToWorker:
        """Wait for a message.

        Errors: ``ParentDiedError``, ``TimeoutError``, those of a codec; what ``answer`` was given.
        """
        ready = dict(self._poller.poll(None if timeout_s is None else int(timeout_s * 1000)))
        if self._parent.fd in ready:
            raise ParentDiedError
        if self._error is not None:
            raise self._error
        if not ready:
            raise TimeoutError(f"no message in {timeout_s:g} s")
        return self._decoder.decode(self._incoming.recv())

    def answer(self, found: StepResult | Exception) -> None:
        """Send a step's result; an error is raised by the loop's ``receive`` instead."""
        if isinstance(found, Exception):
            self._error = found
            os.eventfd_write(self._wake_fd, 1)
        else:
            self.send(found)

    def close(self) -> None:
        """Close, after what was sent has gone out or ``LINGER`` has passed."""
        with self._lock:
            self._outgoing.close()
        self._incoming.close()
        self._context.term()
        os.close(self._wake_fd)


def run(link: Link, rank: int, epoch: int, pid: int) -> int:
    """Live as one rank until Stop; return the exit code. Closes the link."""
    kind = FaultKind.LOAD
    try:
        link.greet(Hello(epoch, rank, pid))
        booted = boot_rank(_await_boot(link, rank, epoch), link.send)
        # What a boot leaves stays: a collection that went through it would hold a step up for 0.1 s.
        gc.collect()
        gc.freeze()
        link.send(booted.ready)
        kind = FaultKind.STEP
        _serve(link, booted, epoch)
        booted.runner.close()
        booted.comm.close()
    except ParentDiedError:
        return 1
    except zmq.ZMQError:
        traceback.print_exc()
        return 1  # Nobody can be told.
    except Exception as error:
        return _fault(link, rank, epoch, kind, error)
    finally:
        # Before the communicator goes with this frame: peers that see it gone fault too, and the cause of
        # it all must be out by then.
        link.close()
    return 0


def _await_boot(link: Link, rank: int, epoch: int) -> Boot:
    deadline_s = time.monotonic() + BOOT_WAIT_S
    while True:
        message = link.receive(max(deadline_s - time.monotonic(), 0.0))
        if message.epoch != epoch:
            continue
        if not isinstance(message, Boot) or message.rank != rank:
            raise ProtocolError(f"rank {rank} expected its Boot, not {type(message).__name__}")
        setproctitle.setproctitle(
            f"tandem: {message.instance} worker {rank + 1}/{message.topology.world_size}"
        )
        return message


def _serve(link: Link, booted: Booted, epoch: int) -> None:
    loads = LoadReports(booted.runner.expert_loads(), booted.comm.topology, booted.comm.rank, epoch)
    while True:
        if (load := loads.take()) is not None:
            link.send(load)
        try:
            message = link.receive(loads.wait_s())
        except TimeoutError:
            continue
        if message.epoch != epoch:
            continue
        match message:
            case StepPlan():
                booted.runner.step(message, link.answer)
                loads.stepped()
            case Stop():
                return
            case Boot():
                raise ProtocolError("a rank that has booted was told to boot")


def _fault(link: Link, rank: int, epoch: int, kind: FaultKind, error: Exception) -> int:
    code = "error"
    if isinstance(error, TandemError):
        code, text = error.code, error.message
        if isinstance(error, ProtocolError | InvalidRequestError) and kind is not FaultKind.LOAD:
            kind = FaultKind.PROTOCOL
    else:
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {error}"
    link.send(Fault(epoch, rank, kind, text[:_MESSAGE_CHARS], code))
    return 1
