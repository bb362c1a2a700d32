"""Model cards, rendered from measured results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_softheads.files import read_json, replacing
from hf_softheads.report.tables import Table, human_bytes

TEMPLATE = Path(__file__).parents[1] / "assets" / "card.md"
RESULTS = "softheads_results.json"
REPOSITORY = "https://github.com/hf-softheads/hf_softheads"


class BadResults(ValueError):
    """Results of another shape than a card needs."""


def write_card(folder: str | Path, results: Mapping[str, Any]) -> Path:
    """Render `README.md` into a saved model's folder.

    Args:
        folder: what `save_pretrained` wrote.
        results: `{"stages": [{"name": …, "perplexity": …, "kl": …, "top1": …}, …], "sizes": {…}, "data": …,
            "base_model": …, "provenance": {…}, "repo": …}`; everything but `stages` may be missing.

    Raises:
        ValueError: the folder holds no patched model.
        BadResults: they have another shape.
    """
    _check_results(results)
    folder = Path(folder)
    config_file = folder / "config.json"
    name = str(results.get("repo") or folder.name)
    config = read_json(config_file) if config_file.is_file() else None
    plan = config.get("quantization_config") if isinstance(config, dict) else None
    if not plan or plan.get("quant_method") != "softheads":
        raise ValueError(
            f"{folder} holds no model patched by hf_softheads (no plan in config.json)"
        )
    stages = results.get("stages") or []
    base = str(results.get("base_model") or "a pretrained model")
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None
    data = results.get("data")
    card_data = ModelCardData(
        library_name="transformers",
        base_model=base if on_hub else None,
        base_model_relation="quantized" if plan.get("head") else "finetune",
        pipeline_tag="text-generation",
        tags=["softheads", *_variant_names(plan)],
        model_name=name,
        eval_results=_eval_results(stages, str(data or "held-out text")),
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        model_name=name,
        base_model_name=base,
        repo=name,
        repository=REPOSITORY,
        plan=plan,
        attention=", ".join(f"`{name}`" for name in _attention_names(plan)),
        plan_json=json.dumps(plan, indent=1),
        table=stage_table(stages).markdown() if stages else "Nothing was measured.",
        sizes=_size_table(results.get("sizes") or {}),
        data=data,
        provenance_json=json.dumps(results.get("provenance", {}), indent=1),
    )
    target = folder / "README.md"
    with replacing(target) as fresh:
        card.save(fresh)
    return target


_OPTIONAL = ("floor", "kl", "top1", "parameters_ratio", "bytes_ratio")
_SIZES = {
    "parameters": ("parameters", "{:,}".format),
    "nbytes": ("bytes as stored", human_bytes),
    "bytes_read": ("bytes read a token", human_bytes),
    "flops": ("FLOPs a token", "{:,}".format),
}


def _check_results(results: Any) -> None:
    """Raise BadResults unless a card can be made of it."""
    if not isinstance(results, Mapping):
        raise BadResults(f"results are a dictionary with 'stages', got {_kind(results)}")
    stages = results.get("stages") or []
    if isinstance(stages, str) or not isinstance(stages, Sequence):
        raise BadResults(f"'stages' is a list of dictionaries, got {_kind(stages)}")
    for number, stage in enumerate(stages):
        if not isinstance(stage, Mapping):
            raise BadResults(f"stage {number} is a dictionary, got {_kind(stage)}")
        if "name" not in stage or "perplexity" not in stage:
            raise BadResults(f"a stage needs at least 'name' and 'perplexity', got {sorted(stage)}")
        for key in ("perplexity", *_OPTIONAL):
            value = stage.get(key)
            if not (_is_number(value) or (value is None and key in _OPTIONAL)):
                raise BadResults(f"{key!r} of stage {stage['name']!r} is a number, got {value!r}")
    sizes = results.get("sizes") or {}
    for part in ("head", "dense") if sizes else ():
        own = sizes.get(part) if isinstance(sizes, Mapping) else None
        if not isinstance(own, Mapping) or not all(_is_number(own.get(key)) for key in _SIZES):
            raise BadResults(
                f"'sizes' needs a 'head' and a 'dense' with numbers {', '.join(_SIZES)}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    names = {dict: "a dictionary", list: "a list", str: "a string", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")


def stage_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """The quality of each stage of a retrofit, the first one the dense model, as the card and the demo show it."""
    table = Table(
        ["head", "perplexity", "ratio", "floor", "KL", "top-1", "parameters ÷", "bytes ÷"]
    )
    dense = stages[0]["perplexity"] if stages else None
    for stage in stages:
        table.add(
            stage["name"],
            f"{stage['perplexity']:.2f}",
            _number(stage["perplexity"] / dense if dense else None, "{:.3f}"),
            _number(stage.get("floor"), "{:.2f}"),
            _number(stage.get("kl"), "{:.4f}"),
            _number(stage.get("top1"), "{:.1%}"),
            _number(stage.get("parameters_ratio"), "{:.1f}"),
            _number(stage.get("bytes_ratio"), "{:.1f}"),
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _size_table(sizes: Mapping[str, Any]) -> str:
    if not sizes:
        return "Not measured."
    table = Table(["", "this head", "dense bf16", "÷"])
    for key, (name, show) in _SIZES.items():
        mine, dense = sizes["head"][key], sizes["dense"][key]
        table.add(name, show(mine), show(dense), _number(dense / mine if mine else None, "{:.1f}"))
    return table.markdown()


def _attention_names(plan: Mapping[str, Any]) -> list[str]:
    attention = plan.get("attention") or {}
    if "name" in attention:
        return [attention["name"]]
    return sorted({spec["name"] for spec in attention.values()})


def _variant_names(plan: Mapping[str, Any]) -> list[str]:
    head = [plan["head"]["name"]] if plan.get("head") else []
    return head + _attention_names(plan)


def _eval_results(stages: Sequence[Mapping[str, Any]], data: str) -> list[EvalResult] | None:
    if not stages:
        return None
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=data,
            metric_type="perplexity",
            metric_name="strict perplexity",
            metric_value=round(float(stages[-1]["perplexity"]), 4),
        )
    ]
