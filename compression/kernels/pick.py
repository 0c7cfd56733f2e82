"""Which kernel this machine uses, and getting it ready."""

from __future__ import annotations

import functools
import logging

from dtrain.compression.kernels.base import Kernel
from dtrain.compression.kernels.reference import ReferenceKernel

logger = logging.getLogger(__name__)


@functools.cache
def kernel() -> Kernel:
    """The fastest kernel that runs here: numba, or plain torch with one warning where numba is missing."""
    try:
        from dtrain.compression.kernels.cpu import CpuKernel
    except ImportError as error:
        logger.warning(
            "compressing with plain torch, about ten times slower: numba can't be used (%s)", error
        )
        return ReferenceKernel()
    return CpuKernel()
