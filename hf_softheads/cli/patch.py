"""patch a model and save it as safetensors"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_softheads.cli import models, texts
from hf_softheads.cli.values import items, whole
from hf_softheads.registry import read_setting

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats
    from hf_softheads.pretrained import NamedModel


def add(parser: argparse.ArgumentParser) -> None:
    from hf_softheads import sites

    models.add_model(parser)
    for slot in sites.slots():
        kind = next(site.kind for site in sites.SITES if site.slot == slot)
        told = f"see: softheads list {kind}; no: not even by default"
        parser.add_argument(f"--{slot}", metavar="VARIANT", help=told)
    for site in sites.SITES:
        for option in site.options:
            told = f"those that get the --{site.slot} variant, with commas; --{option}=-2,-1 counts from the end"
            parser.add_argument(f"--{option}", type=items, help=told)
    parser.add_argument(
        "--set", action="append", default=[], metavar="SLOT.FIELD=VALUE", help="e.g. head.codes=512"
    )
    parser.add_argument("--calibrate", metavar="DATA", help="text for the fit: a file, or 'stdlib'")
    parser.add_argument(
        "--tokens", type=whole(1), default=500_000, help="maximum number of calibration tokens"
    )
    parser.add_argument("--output", type=Path, required=True)


def run(arguments: argparse.Namespace) -> None:
    import hf_softheads as sh
    from hf_softheads.files import check_output

    config = sh.SoftheadsConfig(**_plan(arguments))
    check_output(arguments.output)
    named = models.find(arguments.model)
    rows = texts.rows(arguments.calibrate, "train", named) if arguments.calibrate else None
    model = named.load(arguments.dtype)
    check_output(arguments.output, models.nbytes(model))
    stats = None if rows is None else calibrated(model, rows, arguments.tokens)
    sh.patch(model, stats=stats, **config.keywords())
    print(sh.describe(model))
    save(model, named, arguments.output)


def calibrated(model: Any, rows: Any, tokens: int) -> HeadStats:
    """What `collect` finds on at most `tokens` tokens, drawn from all of the text."""
    import hf_softheads as sh

    return sh.collect(model, rows.shuffled(0).head(tokens))


def save(model: Any, named: NamedModel, output: Path) -> None:
    """Export the patched model, with a card."""
    from hf_softheads.exporting import export
    from hf_softheads.report.provenance import provenance

    results = {"base_model": named.name, "provenance": provenance()}
    print(f"saved to {export(model, output, named.tokenizer, results)}")


def _plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `SoftheadsConfig`.

    Raises:
        ValueError: a setting of nothing.
    """
    from hf_softheads import sites

    plan: dict[str, Any] = {}
    for slot in sites.slots():
        if name := getattr(arguments, slot):
            plan[slot] = False if name == "no" else {"name": name}
    if not any(plan.values()):
        wanted = " or ".join(f"--{slot} VARIANT" for slot in sites.slots())
        raise ValueError(f"nothing to do: give {wanted}; `softheads list` names the variants")
    for setting in arguments.set:
        key, value = read_setting(setting)
        slot, dot, field = key.partition(".")
        if not dot or slot not in sites.slots():
            wanted = " or ".join(f"{slot}.FIELD=VALUE" for slot in sites.slots())
            raise ValueError(f"--set takes {wanted}, got {setting!r}")
        if not plan.get(slot):
            raise ValueError(f"--set {setting} sets a field of {slot}, but there is no --{slot}")
        plan[slot][field] = value
    for option in sites.options():
        if (given := getattr(arguments, option)) is not None:
            plan[option] = given
    return plan
