"""Checks of this host: the client's own needs, its devices, and every way to launch a server."""
