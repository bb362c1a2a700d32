"""`softheads demo`: the whole way of a retrofit on the embedded model, measured at every stage."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from hf_softheads.exporting import export
from hf_softheads.files import check_output, write_json
from hf_softheads.heads.base import Head
from hf_softheads.heads.forms.vq_module import VQHead
from hf_softheads.heads.transform_coded import TransformCoded
from hf_softheads.heads.vq import VQ
from hf_softheads.measure.calibration import collect
from hf_softheads.measure.evaluation import evaluate
from hf_softheads.measure.sizes import head_sizes
from hf_softheads.patching import patch
from hf_softheads.plan import dense_head
from hf_softheads.report.cards import stage_table
from hf_softheads.report.describe import describe
from hf_softheads.report.plots import plot_stages, pyplot
from hf_softheads.report.provenance import provenance, quiet_unless_terminal
from hf_softheads.text.embedded import load_embedded
from hf_softheads.text.stdlib_corpus import stdlib_documents
from hf_softheads.text.windows import windows
from hf_softheads.training.distill_head import repair_head

PROMPT = "def __init__(self,"
_RELOAD = """
import sys, torch
from hf_softheads.report.provenance import quiet_unless_terminal
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
import hf_softheads
quiet_unless_terminal()
folder, prompt, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(prompt, return_tensors="pt").input_ids
with torch.no_grad():
    logits = model(ids).logits
written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
save_file({"logits": logits, "written": written}, out)
"""


def run(output: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Dense → VQ as published → repaired → distilled → exported → reloaded in a fresh process.

    Args:
        output: a folder; an earlier demo's files in it are replaced.
        quick: less calibration text and a few seconds of distillation, to see that everything works.

    Raises:
        RuntimeError: the reloaded model does not give the same logits bit for bit.
    """
    began = time.perf_counter()
    quiet_unless_terminal()
    pyplot()  # now, if it is not installed
    check_output(output, filled=True)
    torch.manual_seed(seed)
    model, tokenizer = load_embedded()
    window = model.config.max_position_embeddings
    codes = model.config.vocab_size // 8
    train = windows(stdlib_documents("train"), tokenizer, window=window).shuffled(seed)
    train = train.head(32_768 if quick else 524_288)
    held_out = windows(stdlib_documents("heldout"), tokenizer, window=window)
    if quick:
        held_out = held_out.shuffled(seed).head(8_192)
    _say(
        f"embedded model: {model.num_parameters():,} parameters, vocabulary {model.config.vocab_size:,}"
    )
    _say("calibrating on the standard library's train split; measuring on modules it never saw")
    stats = collect(model, train, states=4096 if quick else 16_384)
    dense = copy.deepcopy(model)
    stages: list[dict[str, Any]] = []

    def measure(name: str, patched: nn.Module) -> None:
        found = evaluate(patched, held_out, reference=dense)
        stages.append({"name": name, **asdict(found), **_sizes_of(patched)})
        _say(f"{name}: perplexity {found.perplexity:.2f}")

    measure("dense", model)
    published = patch(copy.deepcopy(model), head=VQ(codes=codes), stats=stats)
    measure(f"VQ as published, {codes} codes", published)
    patch(model, head=VQ.repaired(codes=codes), stats=stats)
    measure("… repaired, no training", model)
    steps = 20 if quick else 400
    repair_head(model, dense_head(model), train.input_ids, steps=steps, seed=seed)
    measure("… repaired + distilled", model)

    exported = output / f"tiny-vq{codes}"
    shutil.rmtree(exported, ignore_errors=True)
    results: dict[str, Any] = {
        "base_model": "the embedded model of hf_softheads",
        "data": "held-out modules of the Python standard library",
        "stages": stages,
        "provenance": provenance(seed),
    }
    export(model, exported, tokenizer, {**results, "stages": list(stages)})
    coded = TransformCoded(bits=2.25)
    measure("transform_coded, that size", patch(copy.deepcopy(dense), head=coded, stats=stats))
    same, text = _reload(model, tokenizer, exported, output)
    results |= {"reloaded_bit_exact": same, "greedy": text, "seconds": time.perf_counter() - began}
    write_json(output / "results.json", results)
    plot_stages(stages, output / "stages.png", f"Embedded model, VQ head with {codes} codes (V/8)")

    print()
    print(describe(model))
    print(stage_table(stages))
    print(
        f"\nreloaded in a fresh process by AutoModelForCausalLM: logits {'bit-equal' if same else 'DIFFER'}"
    )
    print(f"greedy continuation of {PROMPT!r}:\n{_indent(text)}")
    print(
        f"\n{output / 'results.json'}, {output / 'stages.png'} and {exported / 'README.md'} written"
    )
    if not same:
        raise RuntimeError("the reloaded model does not give the same logits")
    return results


def _sizes_of(model: Any) -> dict[str, Any]:
    head = model.get_output_embeddings()
    if not isinstance(head, Head):
        return {"floor": None, "parameters_ratio": 1.0, "bytes_ratio": 1.0}
    sizes = head_sizes(head)
    mine, full = sizes["head"], sizes["dense"]
    return {
        "floor": head.perplexity_floor if isinstance(head, VQHead) else None,
        "parameters_ratio": full["parameters"] / mine["parameters"],
        "bytes_ratio": full["nbytes"] / mine["nbytes"],
    }


def _reload(model: Any, tokenizer: Any, folder: Path, output: Path) -> tuple[bool, str]:
    out = output / "reloaded.safetensors"
    command = [sys.executable, "-c", _RELOAD, str(folder), PROMPT, str(out)]
    try:
        # in a session of its own: Ctrl-C is for this process, which ends that one
        subprocess.run(command, check=True, start_new_session=True)
        found = load_file(out)
    finally:
        out.unlink(missing_ok=True)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    model.eval()
    with torch.no_grad():
        here = model(ids).logits
    return torch.equal(here, found["logits"]), tokenizer.decode(found["written"][0])


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def _say(text: str) -> None:
    print(text, flush=True)
