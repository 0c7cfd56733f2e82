"""Which kernel this machine uses."""

from __future__ import annotations

import functools
import logging

from dtrain.compression.kernels.base import Kernel
from dtrain.compression.kernels.reference import ReferenceKernel

logger = logging.getLogger(__name__)


@functools.cache
def kernel(device: str = "cpu") -> Kernel:
    """The fastest kernel that runs here for tensors on a device; plain torch, with one warning, if there is none."""
    if device == "cuda" and (found := _cuda()):
        return found
    try:
        from dtrain.compression.kernels.cpu import CpuKernel
    except ImportError as error:
        logger.warning(
            "compressing with plain torch, about ten times slower: numba can't be used (%s)", error
        )
        return ReferenceKernel()
    return CpuKernel()


def _cuda() -> Kernel | None:
    try:
        from dtrain.compression.kernels.cuda import CudaKernel
    except ImportError as error:
        logger.warning("compressing on the CPU, not on the GPU: Triton can't be used (%s)", error)
        return None
    return CudaKernel(kernel("cpu"))
