"""What this machine's processor can do."""

from __future__ import annotations

import torch


def bf16_is_fast(device: torch.device) -> bool:
    """Whether this processor multiplies bf16 natively; emulated bf16 is slower than fp32."""
    probe = getattr(torch.cpu, "get_capabilities", None)
    found: dict[str, object] = probe() if probe else {}
    return device.type == "cpu" and bool(found.get("avx512_bf16") or found.get("amx_bf16"))
