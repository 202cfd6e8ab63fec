"""A text helper process: renders templates and tokenises, where that may take long or end badly.

``python -P -m orchestrator.text.helper DIRECTORY PARENT_PID MEMORY_BYTES CPU_SECONDS``. Speaks
``protocol.text`` over its standard input and output; no sockets, no torch. Ends with its input or parent.
"""

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

from orchestrator.text.conversation import Conversation
from orchestrator.text.guard import name_pattern
from orchestrator.text.template import ChatTemplate, TemplateSource
from orchestrator.text.vocabulary import load_vocabulary
from protocol.errors import TandemError
from protocol.text import (
    LENGTH_BYTES,
    MAX_TEXT_FRAME_BYTES,
    EncodeChat,
    Encoded,
    EncodeText,
    HelperReady,
    RefusalKind,
    Refused,
    TextAnswer,
    TextJob,
    from_helper_codec,
    to_helper_codec,
)

_PR_SET_PDEATHSIG = 1


class Helper:
    """Answers one job at a time from its own tokenizer and template."""

    def __init__(self, directory: Path) -> None:
        vocabulary = load_vocabulary(directory)
        assert vocabulary is not None, "a directory without a vocabulary gets no helpers"
        self._vocabulary = vocabulary
        self._added_names = name_pattern(vocabulary.added_tokens)
        self._special_names = name_pattern(vocabulary.special_tokens)
        self._source = TemplateSource(directory)
        self._template: ChatTemplate | None = None

    def answer(self, job: TextJob) -> TextAnswer:
        """Return the token ids of a job, or why there are none."""
        is_thinking = False
        try:
            match job:
                case EncodeText(text=text):
                    token_ids = self._vocabulary.encode(text, as_prompt=True)
                case EncodeChat():
                    token_ids, is_thinking = self._chat(job)
        except TandemError as error:
            return Refused(RefusalKind.TEMPLATE, error.message)
        except MemoryError:
            return Refused(RefusalKind.MEMORY, "the memory for one text ran out")
        except Exception as error:
            # The tokenizer's errors have no class of their own.
            return Refused(RefusalKind.TOKENIZER, f"the tokenizer refuses the text: {error}")
        count = len(token_ids)
        return Encoded(token_ids if count <= job.limit else [], count, is_thinking)

    def _chat(self, job: EncodeChat) -> tuple[list[int], bool]:
        if self._template is None:
            self._template = ChatTemplate(self._source)
        said = Conversation(
            job.messages,
            job.tools,
            job.variables,
            self._source.text or "",
            added_names=self._added_names,
            special_names=self._special_names,
        )
        rendered = self._template.render(said.messages, said.tools, said.variables)
        pieces = said.guard.pieces(rendered)
        token_ids = [t for piece in pieces for t in self._vocabulary.encode(piece, as_prompt=False)]
        return token_ids, rendered.rstrip().endswith("<think>")


def main(arguments: list[str]) -> int:
    """Serve jobs until the input ends."""
    directory, parent, memory_bytes, cpu_s = Path(arguments[0]), *map(int, arguments[1:4])
    _die_with(parent)
    # Whatever prints must not print into the answers.
    answers = os.dup(1)
    os.dup2(2, 1)
    helper = Helper(directory)
    jobs, encode = to_helper_codec(), from_helper_codec().encode
    _limit_memory(memory_bytes)
    _write(answers, encode(HelperReady(os.getpid())))
    while (frame := _read(0)) is not None:
        _limit_cpu(cpu_s)
        answer = helper.answer(jobs.decode(frame))
        _write(answers, encode(answer))
        if isinstance(answer, Refused) and answer.kind is RefusalKind.MEMORY:
            return 1
    return 0


def _die_with(parent: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit(0)  # It died before we could ask to follow it.


def _limit_memory(memory_bytes: int) -> None:
    """Bound the address space to what is in use now and ``memory_bytes`` more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _limit_cpu(cpu_s: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + 1 + cpu_s
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _read(source: int) -> bytes | None:
    header = _read_exactly(source, LENGTH_BYTES)
    if header is None:
        return None
    size = int.from_bytes(header, "little")
    if size > MAX_TEXT_FRAME_BYTES:
        raise ValueError(f"a job of {size} bytes is over the limit of {MAX_TEXT_FRAME_BYTES}")
    return _read_exactly(source, size)


def _read_exactly(source: int, size: int) -> bytes | None:
    found = bytearray()
    while len(found) < size:
        piece = os.read(source, size - len(found))
        if not piece:
            return None
        found += piece
    return bytes(found)


def _write(target: int, frame: bytes) -> None:
    left = memoryview(len(frame).to_bytes(LENGTH_BYTES, "little") + frame)
    while left:
        left = left[os.write(target, left) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
