"""Seals a tape, compares contents with its digests, and restores members from a copy."""
