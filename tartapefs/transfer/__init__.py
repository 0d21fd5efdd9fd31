"""Checks and completes copies, computes digests, compares recordings, uploads parts, and serves URLs."""
