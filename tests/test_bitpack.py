"""The bytes that packed integers become: they are in files that were saved before, so they may never change."""

from __future__ import annotations

import pytest
import torch

from hf_softheads.bitpack import PARTS, pack, pack_bits, unpack_bits

# Values 0, 1, 2, … below 2 ** bits, eight of them, and the bytes of each part, by hand: the highest bits come first,
# and within a byte the first value takes the lowest bits.
BYTES = {
    1: [[0b10101010]],
    2: [[0b11100100, 0b11100100]],
    3: [[0b01010000, 0b11111010], [0b10101010]],
    4: [[0x10, 0x32, 0x54, 0x76]],
    5: [[0x00, 0x11, 0x22, 0x33], [0b10101010]],
    6: [[0x00, 0x00, 0x11, 0x11], [0b11100100, 0b11100100]],
    7: [[0x00, 0x00, 0x00, 0x00], [0b01010000, 0b11111010], [0b10101010]],
    8: [[0, 1, 2, 3, 4, 5, 6, 7]],
}


@pytest.mark.parametrize("bits", PARTS)
def test_bytes_by_hand(bits: int) -> None:
    values = torch.arange(8).remainder(2**bits)[None]
    assert [part[0].tolist() for part in pack_bits(values, bits)] == BYTES[bits]
    saved = [torch.tensor([part], dtype=torch.uint8) for part in BYTES[bits]]
    assert unpack_bits(saved, bits, 8)[0].tolist() == values[0].tolist()


def test_a_row_is_filled_up_with_zeros() -> None:
    assert pack(torch.tensor([[3, 3, 3, 3, 3], [1, 0, 0, 0, 2]]), 2).tolist() == [[255, 3], [1, 2]]
