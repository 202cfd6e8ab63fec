"""Forward passes, one file an architecture, that read as their mathematics."""
