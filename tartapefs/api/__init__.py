"""What users import: a tape, its archive as a file, and the public names."""
