"""The format of the archive: offsets, headers, members and the hash tree. Pure, no I/O."""
