"""Blocks of KV: who owns them.

Owns the pool (free, used, cached), the prefix index and what each request holds. Pure and synchronous;
imports protocol and models; ``kv/tensors.py`` is its only torch module.
"""
