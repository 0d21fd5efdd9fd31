"""Copies at the far end: how far they are right, completing them, digests, parts, uploads, URLs."""
