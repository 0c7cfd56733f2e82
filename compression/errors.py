"""The two ways in which this package refuses something.

ValueError ├── CompressionError   misuse by the caller: a bad spec, a tensor that does not fit the layout, NaN
in a source tensor └── PayloadError       bytes from elsewhere that break the wire format; `reason` says how,
in one short name
"""

from __future__ import annotations


class CompressionError(ValueError):
    """The caller asked for something impossible; the text names the field or the tensor and what to do."""


class PayloadError(ValueError):
    """Bytes that are not a valid payload or aggregate for the place where they were offered.

    `reason` is a short machine name such as "bad-magic", "wrong-round" or "index-out-of-range" (the list is
    in WIRE.md); the text of the error is one clear line that starts with it.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
