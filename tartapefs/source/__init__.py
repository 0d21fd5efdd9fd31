"""The source folder: the only code that opens files in it, and the comparison that decides what is drift."""
