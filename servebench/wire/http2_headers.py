"""Header blocks without state (RFC 7541): requests' encoded once, replies' decoded each by itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hpack import Decoder, HPACKError

from servebench.wire.faults import ProtocolFault

MAX_HEADER_BYTES = 64 * 1024  #: of a header block that is read
_MAX_BLOCK_BYTES = 16_384  #: what one frame holds of a peer that has announced nothing
_TABLE_OF_SIZE_0 = b"\x20"  #: a dynamic table size update (RFC 7541, 6.3)
_HEADER_NAME = re.compile(r":?[!#$%&'*+\-.^_`|~0-9a-z]+")


Fields = dict[bytes, bytes]


def encode_headers(fields: Iterable[tuple[str, str]]) -> bytes:
    """A header block that needs no state: literals without indexing, names and values as they are.

    It sets the dynamic table's size to 0 first, as a block must once the peer has announced a
    smaller table than before (RFC 9113, 4.3.1); that way it fits wherever in a connection it is sent.
    `ValueError` for what HTTP/2 forbids in names and values (RFC 9113, 8.2.1), and for more than a frame holds.
    """
    block = bytearray(_TABLE_OF_SIZE_0)
    for name, value in fields:
        if not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not an HTTP/2 header name: lower case, no spaces")
        if any(char in "\r\n\0" or ord(char) > 0xFF for char in value):
            raise ValueError(f"header {name}: the value holds a line break or a character outside Latin-1")
        if value.strip(" \t") != value:
            raise ValueError(f"header {name}: the value begins or ends with a space")
        block.append(0)
        for text in (name, value):
            data = text.encode("latin-1")
            block += _integer(len(data), 7) + data
    if len(block) > _MAX_BLOCK_BYTES:
        raise ValueError(f"the headers take {len(block)} bytes, more than the {_MAX_BLOCK_BYTES} of a frame")
    return bytes(block)


def decode_headers(block: bytes) -> Fields:
    """The fields of a block of a peer that was told to keep no table. `ProtocolFault` when it did, or for rubbish."""
    if len(block) > MAX_HEADER_BYTES:
        raise ProtocolFault(f"header block over {MAX_HEADER_BYTES} bytes")
    # A decoder of its own for each block: with a table of size 0 there is no state to share.
    decoder = Decoder(max_header_list_size=MAX_HEADER_BYTES)
    decoder.header_table_size = 0
    decoder.max_allowed_table_size = 0
    try:
        decoded: list[Any] = list(decoder.decode(block, raw=True))
    except HPACKError as error:
        raise ProtocolFault(f"header block cannot be decoded: {error}") from None
    return {bytes(name): bytes(value) for name, value in decoded}


def _integer(value: int, bits: int) -> bytes:
    """HPACK's variable-length integer (RFC 7541, 5.1), the bits above it 0."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes([value])
    out = bytearray([limit])
    value -= limit
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    out.append(value)
    return bytes(out)
