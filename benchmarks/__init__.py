"""One file a question; each prints measured, ceiling and ratio, and writes JSON."""
