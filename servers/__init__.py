"""Launchers for the servers that servebench bundles, found through the entry-point group ``servebench.servers``."""
