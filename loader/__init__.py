"""From a model name to bytes in a rank's arena.

Owns the model cache (hub), GGUF conversion, safetensors headers, the reading plan and the reader.
Imports protocol and models; torch only where bytes meet parameters (``place``).
"""
