"""Copies between the CPU and an accelerator that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def has_own_memory(device: torch.device | None) -> bool:
    """Return whether a device has its own memory: it copies from and to pinned memory while the host goes on."""
    return device is not None and device.type in ("cuda", "xpu")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device, without waiting where the device allows that."""
    is_pinned = has_own_memory(device)
    return (tensor.pin_memory() if is_pinned else tensor).to(device, non_blocking=is_pinned)


def copied_to_host(state: Any) -> Any:
    """Return nested lists and dictionaries with copies of all tensors on the CPU.

    Copies from a device with its own memory go to pinned memory, without a wait between them.
    """
    import torch
    from accelerate.utils import recursively_apply

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", non_blocking=has_own_memory(tensor.device), copy=True)

    copies = recursively_apply(copied, state)
    if torch.accelerator.current_accelerator(True) is not None:
        torch.accelerator.synchronize()
    return copies


class HostCopies:
    """Copies of tensors of a device on the CPU, which are begun at once, and complete after `wait`."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        import torch

        is_late = has_own_memory(device)
        self.tensors = [tensor.to("cpu", non_blocking=is_late) for tensor in tensors]
        self.end = torch.Event(device) if is_late else None
        if self.end is not None:
            self.end.record()

    def wait(self) -> list[Tensor]:
        """Return the copies when they are complete."""
        if self.end is not None:
            self.end.synchronize()
        return self.tensors
