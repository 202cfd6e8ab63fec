"""What a model IS, without torch.

Owns typed configurations, the one statement of every parameter (name, sources, shape, cut), the KV
layout, how layers are cut into stages, and byte and flop arithmetic. Imports protocol only.
"""
