"""The one exception of the wire: the peer broke its protocol."""


class ProtocolFault(Exception):
    """What the peer sent is not its protocol; the text says how. The connection must be thrown away."""
