"""A server without a model, as a process: it speaks the client protocol and answers in numbered words.

A message ``say N`` is answered by N words, one every 20 ms; anything else is echoed; ``fail`` fails with
``queue_full``; ``system?`` is answered by the system prompt; ``turns?`` by the number of messages.
"""

import argparse
import os
import signal
import sys
import time
from collections import deque

import zmq

from protocol.client import (
    Cancel,
    Cancelled,
    Delta,
    Event,
    Events,
    Failed,
    Finished,
    Generate,
    GetInfo,
    GetStats,
    Info,
    KeepAlive,
    Started,
    Stats,
    Timings,
    Usage,
    from_gateway_codec,
    to_gateway_codec,
)
from protocol.errors import ErrorInfo
from protocol.runtime_dir import InstanceDirectory, InstanceFacts, runtime_root

WORD_S = 0.02


class FakeServer:
    """One instance. Streams are (identity, id, words left, words said)."""

    def __init__(self, name: str, *, has_tokenizer: bool, has_chat_template: bool) -> None:
        self.directory = InstanceDirectory(runtime_root(os.environ), name)
        self.name = name
        self.has_tokenizer = has_tokenizer
        self.has_chat_template = has_chat_template
        self.decode, self.encode = to_gateway_codec().decode, from_gateway_codec().encode
        self.streams: dict[tuple[bytes, str], tuple[deque[str], int]] = {}
        self.requests: list[Generate] = []
        self.cancelled = 0

    def facts(self) -> InstanceFacts:
        return InstanceFacts(
            name=self.name,
            pid=os.getpid(),
            model="fake",
            tp=2,
            pp=1,
            state="ready",
            memory_bytes=3 << 30,
            address=self.directory.gateway_address,
            started_at=time.time(),
        )

    def run(self) -> None:
        self.directory.acquire()
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(self.directory.gateway_address)
        self.directory.publish(self.facts())
        print("ready", flush=True)
        self.socket = socket
        try:
            while True:
                if socket.poll(round(WORD_S * 1000) if self.streams else None):
                    identity, frame = socket.recv_multipart()
                    self.take(identity, self.decode(frame))
                else:
                    self.say()
        finally:
            socket.close(0)
            self.directory.release()

    def send(self, identity: bytes, *events: Event) -> None:
        self.socket.send_multipart([identity, self.encode(Events(list(events)))])

    def take(self, identity: bytes, message: object) -> None:
        match message:
            case Generate():
                self.requests.append(message)
                self.start(identity, message)
            case Cancel(id=stream):
                if self.streams.pop((identity, stream), None) is not None:
                    self.cancelled += 1
                    self.send(identity, Cancelled(stream))
            case GetStats(id=stream):
                self.send(identity, self.stats(stream))
            case GetInfo(id=stream):
                self.send(identity, self.info(stream))
            case KeepAlive():
                pass

    def start(self, identity: bytes, message: Generate) -> None:
        turns = message.messages or []
        asked = turns[-1].content if turns else message.prompt or ""
        if asked == "fail":
            self.send(identity, Failed(message.id, ErrorInfo("queue_full", "the queue is full, try later")))
            return
        if asked.startswith("say "):
            words = [f"word{i} " for i in range(int(asked.split()[1]))] or [""]
        elif asked == "system?":
            words = [turns[0].content if turns[0].role == "system" else "none"]
        elif asked == "turns?":
            words = [str(len(turns))]
        elif asked == "sampling?":
            seed = message.sampling.seed
            words = [f"t={message.sampling.temperature} seed={seed} max={message.max_tokens}"]
        else:
            words = [f"echo: {asked!r}"]
        self.streams[identity, message.id] = (deque(words), 0)
        self.send(
            identity, Started(message.id, message.prompt_ids or [1, 2, 3], message.sampling.seed or 7)
        )
        self.say()

    def say(self) -> None:
        for key, (words, said) in list(self.streams.items()):
            word = words.popleft()
            events: list[Event] = [Delta(key[1], 0, [said], word, finish_reason=None if words else "stop")]
            self.streams[key] = (words, said + 1)
            if not words:
                del self.streams[key]
                events.append(
                    Finished(key[1], Usage(3, 1, said + 1), Timings(0.0, 0.01, 0.02 * (said + 1)))
                )
            self.send(key[0], *events)

    def stats(self, stream: str) -> Stats:
        done = len(self.requests)
        return Stats(
            stream, 5.0, 0, len(self.streams), done, self.cancelled, 0, 0, 9, 1, 2, 3, 8, 5, 1, 1, 2.5
        )

    def info(self, stream: str) -> Info:
        return Info(
            id=stream,
            instance=self.name,
            model="fake",
            architecture="FakeForCausalLM",
            state="ready",
            tp=2,
            pp=1,
            dtype="float32",
            context=512,
            vocab_size=100,
            kv_tokens=1024,
            max_rows=4,
            has_tokenizer=self.has_tokenizer,
            has_chat_template=self.has_chat_template,
            memory=[],
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="fake")
    parser.add_argument("--no-tokenizer", action="store_true")
    parser.add_argument("--no-template", action="store_true")
    parser.add_argument("--ignore-term", action="store_true", help="Never drain.")
    given = parser.parse_args()
    handler = signal.SIG_IGN if given.ignore_term else lambda *_: sys.exit(0)
    signal.signal(signal.SIGTERM, handler)
    FakeServer(
        given.name,
        has_tokenizer=not given.no_tokenizer,
        has_chat_template=not (given.no_template or given.no_tokenizer),
    ).run()


if __name__ == "__main__":
    main()
