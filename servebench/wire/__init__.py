"""WHAT travels: bytes in, values out, and back. Nothing here knows sockets, clocks or event loops."""
