"""The way of a byte from the source to a reader, with every check on it."""
