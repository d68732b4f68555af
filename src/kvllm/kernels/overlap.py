"""Programmatic dependent launch: a kernel's programs start before the kernel before it has ended.

The earlier kernel says when, with `gdc_launch_dependents`. The later one waits for the earlier one's results with
`gdc_wait`; before that it may read only what is older. Each of its programs must wait, also those with nothing to do. A
kernel that permits an early start must be followed by one of ours: another one might not wait.
"""

from __future__ import annotations

import torch

from kvllm.kernels.paged import INTERPRETED


def can_overlap(device: torch.device) -> bool:
    """Whether the device has it: NVIDIA GPUs since compute capability 9.0."""
    nvidia = device.type == "cuda" and torch.version.hip is None and not INTERPRETED
    return nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


def overlapping(overlap: bool) -> dict[str, bool]:
    """Launch options of a kernel that waits for the kernel before it with `gdc_wait` if `overlap`."""
    return {"OVERLAP": True, "launch_pdl": True} if overlap else {"OVERLAP": False}
