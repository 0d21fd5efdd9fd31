"""The format of the archive: where each byte lies, and what it is. Arithmetic and bytes, no I/O."""
