"""Contents and seals: making them, checking them, restoring members out of a copy."""
