"""Whether the integers that a head has loaded point to something."""

from __future__ import annotations

from hf_softheads.heads.base import Head


def check_indices(head: Head) -> None:
    """Raise ValueError if a head, or one inside it, holds an index to something that is not there."""
    for path, module in head.named_modules():
        for name, count in module.index_limits().items() if isinstance(module, Head) else ():
            tensor = module.get_buffer(name)
            if tensor.is_meta or not tensor.numel():
                continue
            low, high = map(int, tensor.aminmax())
            if low < 0 or high >= count:
                raise ValueError(
                    f"{path}{path and '.'}{name} of the {type(head).__name__} holds indices from {low} to {high}, "
                    f"but there are 0 to {count - 1}: the checkpoint is damaged; export or download it again"
                )
