"""How fast servebench itself is, measured against servers that cost next to nothing."""
