"""Everything that crosses a process boundary.

Owns the wire messages (frozen msgspec structs), the exception tree, the topology arithmetic, the
framing with its size limits, and where an instance's sockets lie. Imports only the standard
library and msgspec.
"""
