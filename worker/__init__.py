"""One rank: takes a message, does it, answers.

Owns the model shard, the KV shard and the device's batch state. Synchronous; waits block, never spin.
Imports protocol, models, kv and loader; never the orchestrator.
"""
