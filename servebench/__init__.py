"""servebench: load-tests model servers with Poisson traffic and judges their tail latency."""

from importlib.metadata import version as _version

__version__ = _version("servebench")
