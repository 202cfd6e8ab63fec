"""One asyncio process that serves an instance: no torch, idle when nothing runs.

Owns the gateway, the engine and its scheduler, the transport to the ranks and the supervisor.
Imports protocol, models, kv (but tensors), loader.hub and loader.index; to show a load, its plan.
"""
