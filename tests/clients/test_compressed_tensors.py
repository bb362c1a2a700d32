"""Packed heads in a process that does not have this package: transformers loads them by compressed-tensors alone."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_softheads as sh
from tests.conftest import make_model

pytest.importorskip(
    "compressed_tensors",
    reason="compressed-tensors is not installed: pip install hf_softheads[compressed-tensors]",
)

STRANGER = """
import sys
sys.modules["hf_softheads"] = None  # an import raises
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
folder = sys.argv[1]
tokens, found = load_file(folder + ".tokens")["tokens"], {}
for name, options in {
    "packed": {},
    "dequantized": {"quantization_config": CompressedTensorsConfig(dequantize=True)},
}.items():
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    with torch.no_grad():
        found[name] = model(tokens).logits
save_file(found, folder + ".logits")
"""


def logits_without_this_package(folder: Path, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    save_file({"tokens": tokens}, f"{folder}.tokens")
    code = [sys.executable, "-c", STRANGER, str(folder)]
    done = subprocess.run(code, cwd=folder.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(f"{folder}.logits")


@pytest.mark.client(
    "compressed-tensors",
    works='`export(…, format="compressed-tensors")` of `quantized` heads of 4 or 8 bits with `levels="integers"`: '
    "loaded without this package, packed or with `dequantize=True`",
)
@pytest.mark.parametrize(
    ("family", "head", "tie"),
    [("llama", {"bits": 4, "group": 8}, None), ("gemma3_text", {"bits": 8}, True)],
)
def test_a_packed_head_without_this_package(family, head, tie, tokens, tmp_path):
    model = make_model(family, tie_word_embeddings=tie is not None)
    spec = sh.heads.Quantized(levels="integers", **head)
    sh.patch(model, head=spec, kernels="off", **({} if tie is None else {"tie": tie}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "model.embed_tokens reads the rows of the head")
        sh.export(model, tmp_path / "out", format="compressed-tensors")
    with torch.no_grad():
        expected = model(tokens).logits
    for found in logits_without_this_package(tmp_path / "out", tokens).values():
        # torch's product of bytes, which scores 8 bits here, rounds states to 15 bits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.client(
    "compressed-tensors",
    refused="every other head",
    why="the format has no place for it; the message names the heads that it holds",
)
def test_another_head(tmp_path):
    model = sh.patch(make_model("llama"), head=sh.heads.VQ(codes=24))
    with pytest.raises(ValueError, match=r"cannot hold the head vq.*levels='integers'"):
        sh.export(model, tmp_path / "out", format="compressed-tensors")
