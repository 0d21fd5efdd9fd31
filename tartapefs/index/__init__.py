"""The index: the SQLite file that holds what was recorded, and the only code with SQL."""
