"""Keeps secrets out of what is written and said: a server may quote the headers that it was sent."""

from __future__ import annotations

import re
from collections.abc import Iterable

from servebench.profile import REDACTED

#: A shorter value is replaced only where it stands alone: a priority of 1 is not what "HTTP 501" tells.
_TELLING_CHARACTERS = 8
#: So much of a secret's beginning, at the end of a text that was cut there, is part of the secret.
_BEGINNING_CHARACTERS = 4


class Redaction:
    """Replaces header values and tokens in texts, and the credentials of a value like ``Bearer TOKEN`` alone."""

    def __init__(self, values: Iterable[str]) -> None:
        words = [value.split() for value in values]
        # The longest first: where one is part of another, nothing of the other is left.
        secrets = sorted({" ".join(part) for one in words for part in (one, one[1:]) if part}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(_anywhere, secrets)) or r"(?!)")
        self._long = [secret for secret in secrets if len(secret) >= _TELLING_CHARACTERS]

    def __call__(self, text: str) -> str:
        """``text`` without them, also where its end was cut within one."""
        text = self._pattern.sub(REDACTED, text)
        kept = text.rstrip("….'\"")
        for secret in self._long:
            for size in range(min(len(secret) - 1, len(kept)), _BEGINNING_CHARACTERS - 1, -1):
                if kept.endswith(secret[:size]):
                    return kept[:-size] + REDACTED
        return text


def _anywhere(secret: str) -> str:
    spaced = r"\s+".join(map(re.escape, secret.split()))
    return spaced if len(secret) >= _TELLING_CHARACTERS else rf"(?<!\w){spaced}(?!\w)"
