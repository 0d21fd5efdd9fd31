"""The mounted folder: FUSE, the daemon behind it, and what it tells of itself."""
