"""The `softheads` command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_softheads import sites
from hf_softheads.registry import did_you_mean, kinds, read_setting, variants
from hf_softheads.report.tables import Table


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; 0 when it worked, 2 with one line of reason when it could not be done."""
    arguments = _parser().parse_args(argv)
    from hf_softheads.report.provenance import quiet_unless_terminal

    quiet_unless_terminal()
    try:
        arguments.run(arguments)
    except (ValueError, TypeError, OSError, RuntimeError, NotImplementedError) as error:
        reason = str(error).strip() or type(error).__name__
        print(f"softheads {arguments.command}: {reason}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="softheads",
        description="Retrofit a pretrained model with another output head or attention softmax.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo", help="the whole way on the embedded model, about two minutes"
    )
    demo.add_argument("--output", type=Path, default=Path("demo_output"))
    demo.add_argument(
        "--quick", action="store_true", help="half a minute: a check, not a measurement"
    )
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    listing = commands.add_parser("list", help="every variant, its fields and defaults")
    listing.add_argument("kind", nargs="?", choices=kinds())
    listing.set_defaults(run=_list)

    patching = commands.add_parser("patch", help="patch a model and save it as safetensors")
    _add_model(patching)
    for slot in sites.slots():
        patching.add_argument(f"--{slot}", metavar="VARIANT", help=f"see: softheads list {slot}")
    for site in sites.SITES:
        for option in site.options:
            help_text = f"comma-separated {option} that get the --{site.slot} variant"
            patching.add_argument(f"--{option}", help=help_text)
    patching.add_argument(
        "--set", action="append", default=[], metavar="SLOT.FIELD=VALUE", help="e.g. head.codes=512"
    )
    patching.add_argument(
        "--calibrate", metavar="DATA", help="text for the fit: a file, or 'stdlib'"
    )
    patching.add_argument(
        "--tokens", type=int, default=500_000, help="maximum number of calibration tokens"
    )
    patching.add_argument("--output", type=Path, required=True)
    patching.set_defaults(run=_patch)

    choosing = commands.add_parser(
        "choose", help="the head that loses least within a budget, and the table of those tried"
    )
    _add_model(choosing)
    budget = choosing.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--bits", type=float, help="bits per weight of the dense head, everything included"
    )
    budget.add_argument("--bytes", type=float, metavar="BYTES", help="total bytes of the head")
    choosing.add_argument(
        "--calibrate",
        metavar="DATA",
        default="stdlib",
        help="text to fit and to judge on: a file, or 'stdlib'",
    )
    choosing.add_argument(
        "--tokens", type=int, default=131_072, help="maximum number of calibration tokens"
    )
    choosing.add_argument(
        "--output", type=Path, help="patch the model with it and save it as safetensors"
    )
    choosing.set_defaults(run=_choose)

    evaluating = commands.add_parser("eval", help="strict perplexity, KL and agreement on text")
    _add_model(evaluating)
    evaluating.add_argument(
        "--data", default="stdlib", help="a text file, or 'stdlib' (held-out modules)"
    )
    evaluating.add_argument("--reference", help="another model over the same vocabulary")
    evaluating.add_argument("--window", type=int)
    evaluating.add_argument("--stride", type=int)
    evaluating.add_argument("--json", action="store_true", help="print JSON instead of a table")
    evaluating.set_defaults(run=_eval)

    diagnosing = commands.add_parser(
        "diagnose",
        help="attention sinks, entropy, sparsity, massive activations and the head on text",
    )
    _add_model(diagnosing)
    diagnosing.add_argument(
        "--data", default="stdlib", help="a text file, or 'stdlib' (held-out modules)"
    )
    diagnosing.add_argument("--window", type=int, default=256, help="tokens per row")
    diagnosing.add_argument("--rows", type=int, default=8, help="number of rows")
    diagnosing.add_argument(
        "--epsilon", type=float, default=0.3, help="threshold of the sink rates"
    )
    diagnosing.add_argument(
        "--raw", action="store_true", help="do not divide rows by their sum before the sink rate"
    )
    diagnosing.add_argument("--plot", type=Path, metavar="FOLDER", help="write PNG files too")
    diagnosing.add_argument("--json", action="store_true", help="print JSON instead of a table")
    diagnosing.set_defaults(run=_diagnose)

    card = commands.add_parser("card", help="write the model card of an exported folder")
    card.add_argument("folder", type=Path)
    card.add_argument("--results", type=Path, help="a results file; default the one in the folder")
    card.set_defaults(run=_card)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a Hub id, a folder, or 'embedded'")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16")
    )


def _demo(arguments: argparse.Namespace) -> None:
    from hf_softheads import demo

    demo.run(arguments.output, quick=arguments.quick, seed=arguments.seed)


def _list(arguments: argparse.Namespace) -> None:
    import hf_softheads  # noqa: F401 - registers every variant

    for kind in [arguments.kind] if arguments.kind else kinds():
        table = Table([kind, "fields", "what it is"])
        for name, cls in variants(kind).items():
            fields = ", ".join(_field(f) for f in dataclasses.fields(cls))
            table.add(name, fields, (cls.__doc__ or "").strip().partition("\n")[0])
        print(table)


def _field(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return field.name
    return f"{field.name}={field.default}"


def _patch(arguments: argparse.Namespace) -> None:
    import hf_softheads as sh
    from hf_softheads.files import refuse_existing

    plan: dict[str, Any] = {}
    for slot in sites.slots():
        if name := getattr(arguments, slot):
            plan[slot] = {"name": name}
    for setting in arguments.set:
        key, value = read_setting(setting)
        slot, dot, field = key.partition(".")
        if not dot or slot not in sites.slots():
            wanted = " or ".join(f"{slot}.FIELD=VALUE" for slot in sites.slots())
            raise ValueError(f"--set takes {wanted}, got {setting!r}")
        if slot not in plan:
            raise ValueError(f"--set {setting} sets a field of {slot}, but there is no --{slot}")
        plan[slot][field] = value
    for option in sites.options():
        if (given := getattr(arguments, option)) is not None:
            plan[option] = given.split(",")
    config = sh.SoftheadsConfig(**plan)  # before anything is loaded
    refuse_existing(arguments.output)
    model, tokenizer = _load(arguments.model, arguments.dtype)
    stats = _calibrated(model, tokenizer, arguments) if arguments.calibrate else None
    sh.patch(model, stats=stats, **config.keywords())
    print(sh.describe(model))
    _save(model, tokenizer, arguments)


def _choose(arguments: argparse.Namespace) -> None:
    import hf_softheads as sh
    from hf_softheads.files import refuse_existing

    if arguments.output is not None:
        refuse_existing(arguments.output)
    model, tokenizer = _load(arguments.model, arguments.dtype)
    stats = _calibrated(model, tokenizer, arguments)
    choice = sh.choose(model, stats, bits=arguments.bits, nbytes=arguments.bytes)
    print(choice)
    print(f"best: {json.dumps(choice.spec.to_dict())}")
    if arguments.output is not None:
        print(sh.describe(sh.patch(model, head=choice.spec, stats=stats)))
        _save(model, tokenizer, arguments)


def _calibrated(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> Any:
    import hf_softheads as sh
    from hf_softheads.text.windows import windows

    text = _text(arguments.calibrate, "train")
    rows = windows(text, tokenizer, window=_window(model))
    return sh.collect(model, rows.shuffled(0).head(arguments.tokens))


def _save(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    from hf_softheads.export import export
    from hf_softheads.report.provenance import provenance

    results = {"base_model": arguments.model, "provenance": provenance()}
    print(f"saved to {export(model, arguments.output, tokenizer, results)}")


def _eval(arguments: argparse.Namespace) -> None:
    import hf_softheads as sh

    text = _text(arguments.data, "heldout")
    model, tokenizer = _load(arguments.model, arguments.dtype)
    reference = _load(arguments.reference, arguments.dtype)[0] if arguments.reference else None
    found = sh.evaluate(
        model,
        text,
        tokenizer,
        reference=reference,
        window=arguments.window,
        stride=arguments.stride,
    )
    print(found.to_json() if arguments.json else found)


def _diagnose(arguments: argparse.Namespace) -> None:
    import hf_softheads as sh
    from hf_softheads.text.windows import windows

    text = _text(arguments.data, "heldout")
    model, tokenizer = _load(arguments.model, arguments.dtype)
    rows = windows(text, tokenizer, window=min(arguments.window, _window(model)))
    batch = {"input_ids": rows.input_ids[: arguments.rows]}
    found = sh.diagnose(model, batch, epsilon=arguments.epsilon, renormalise=not arguments.raw)
    print(found.to_json() if arguments.json else found)
    if arguments.plot:
        for file in found.plot(arguments.plot):
            print(f"saved to {file}", file=sys.stderr)


def _card(arguments: argparse.Namespace) -> None:
    from hf_softheads.report import cards

    source = arguments.results or arguments.folder / cards.RESULTS
    if not source.is_file():
        raise FileNotFoundError(f"no results to put on the card: {source}; give --results FILE")
    print(cards.write_card(arguments.folder, json.loads(source.read_text())))


def _load(name: str, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_softheads.text import embedded

    if name == embedded.NAME:
        return embedded.load_embedded(torch.float32 if dtype == "auto" else getattr(torch, dtype))
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except OSError as error:
        hint = did_you_mean(name, [embedded.NAME])
        raise OSError(
            f"cannot load {name!r}: {str(error).splitlines()[0]} ({hint} without a Hub)"
        ) from error
    try:
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{name!r} holds a model but no tokenizer that can be loaded; put its tokenizer there too "
            f"({str(error).splitlines()[0]})"
        ) from error


def _text(source: str, split: Any) -> list[str]:
    from hf_softheads.text.documents import read

    return list(read(source, split))


def _window(model: Any) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024
    return int(min(limit, 1024))


if __name__ == "__main__":
    raise SystemExit(main())
