"""Text in and out of token ids: templates, tokenising, incremental detokenising, stop strings.

Talks to the rest in typed calls only, so that it can become a process of its own. No torch.
"""

from orchestrator.text.service import TextService

__all__ = ["TextService"]
