"""Machines that a model may have to fit on, and what of their memory is left for it.

Nothing here was measured on these machines: visible memory is what their Linux reports, the rest
are assumptions, all of them below.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB, GIB = 2**20, 2**30

# a process on a GPU: the CUDA context, the kernels that it loads, cuBLAS and cuDNN workspaces
CONTEXT_BYTES = 512 * MIB
# blocks that PyTorch's allocator holds but cannot use
FRAGMENTED = 0.03
# on shared memory, beside the GPU's: Linux without a desktop, and the Python process itself
SHARED_HOST_BYTES = 1280 * MIB
# a card that also drives a screen
SCREEN_BYTES = 256 * MIB


def usable_bytes(budget_bytes: int) -> int:
    """What tensors may take of the memory that one process is given."""
    return max(0, int((budget_bytes - CONTEXT_BYTES) * (1 - FRAGMENTED)))


@dataclass(frozen=True)
class Device:
    """``visible_bytes`` of memory, of which ``taken_bytes`` go to others than our process's GPU."""

    name: str
    visible_bytes: int
    taken_bytes: int

    @property
    def usable_bytes(self) -> int:
        """What tensors may take."""
        return usable_bytes(self.visible_bytes - self.taken_bytes)


def _shared(name: str, visible_gib: float) -> Device:
    return Device(name, int(visible_gib * GIB), SHARED_HOST_BYTES)


def _card(gigabytes: int) -> Device:
    return Device(f"{gigabytes} GB card", gigabytes * GIB, SCREEN_BYTES)


DEVICES = (
    _shared("Jetson Orin Nano 8 GB", 7.4),
    _card(8),
    _card(12),
    _shared("Jetson Orin NX 16 GB", 15.3),
    _card(16),
    _card(24),
    _shared("Jetson AGX Orin 32 GB", 29.8),
    _shared("Jetson AGX Orin 64 GB", 61.3),
)


def smallest_device(peak_bytes: int) -> Device | None:
    """The one with the least memory that so many bytes of tensors fit on; None if none does."""
    fitting = [device for device in DEVICES if device.usable_bytes >= peak_bytes]
    return min(fitting, key=lambda device: device.usable_bytes, default=None)
