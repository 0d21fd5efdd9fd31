"""The recorder: walks the source, checks it, and writes the index."""
