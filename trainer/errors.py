"""The errors a user can meet. Each one's text is a single line: what is wrong, and what to type instead.

    DtrainError              anything dtrain itself reports
    ├── UsageError           a wrong flag, file or run file; nothing has started yet     exit code 2
    └── RunError             the run cannot go on: network, disk, a damaged state        exit code 1
        └── CheckpointError  a checkpoint or a state from a peer fails its own checks

Mistakes in the code raise AssertionError and friends, with a traceback; they are no part of this tree.
"""

from __future__ import annotations


class DtrainError(Exception):
    """Base of all errors whose text is meant for the user."""

    exit_code: int = 1
    """What the process ends with when this error reaches the top."""


class UsageError(DtrainError):
    """The user asked for something impossible; the text says what to type instead."""

    exit_code = 2


class RunError(DtrainError):
    """A run that had begun cannot go on."""


class CheckpointError(RunError):
    """Stored or downloaded state is damaged; older state may still be good."""
