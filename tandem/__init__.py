"""The client SDK: ``Client`` and ``AsyncClient`` for a running server, their streams, results and errors.

Owns the connection, its keep-alive and the finding of servers by name. Imports protocol only.
"""

from protocol.chat import ChatMessage, FunctionCall, Tool, ToolCall
from protocol.client import Info, Stats, Timings, Usage
from protocol.control import TokenLogprobs
from tandem.aio import AsyncClient, AsyncStream
from tandem.client import Client, Stream
from tandem.discovery import find_instance
from tandem.errors import TandemError
from tandem.results import Choice, Chunk, Parameters, Result

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "ChatMessage",
    "Choice",
    "Chunk",
    "Client",
    "FunctionCall",
    "Info",
    "Parameters",
    "Result",
    "Stats",
    "Stream",
    "TandemError",
    "Timings",
    "TokenLogprobs",
    "Tool",
    "ToolCall",
    "Usage",
    "find_instance",
]
