"""What a query and its reply look like: the contract of every protocol we speak, to one model.

Pure: arrays in, bytes out, and back. The engine encodes each sample once with it, before the
clock starts, and decodes kept replies after the timed path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

from servebench.wire.tensors import Array


class OutputTensor(NamedTuple):
    """A decoded output and the datatype it was declared with."""

    datatype: str
    array: Array


class EncodedQuery(NamedTuple):
    """One query: an HTTP body, or a protobuf message."""

    body: bytes
    headers: list[tuple[str, str]]  #: that go with the body; none for gRPC


class QueryProtocol(Protocol):
    """How to ask one model over one protocol."""

    @property
    def framing(self) -> Literal["http1", "grpc"]:
        """What carries it."""

    @property
    def target(self) -> str:
        """The HTTP path that queries are posted to, or gRPC's ``/package.Service/Method``."""

    def encode(self, arrays: Mapping[str, Array]) -> EncodedQuery:
        """One query. `ValueError` for arrays that the protocol or the model cannot take."""

    def decode(self, status: int, headers: Mapping[str, str], body: bytes) -> Mapping[str, OutputTensor]:
        """The outputs in a reply: HTTP's parts, or gRPC's message with status 0. `ValueError` says what is wrong with it."""
