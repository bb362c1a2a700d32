"""`finetune.py`: what it trains, that it continues exactly, on one and two processes, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib import util
from pathlib import Path
from typing import Any

import checkpoints
import export
import finetune
import preparing
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from experiment import Experiment
from peft import PeftModel
from torch.multiprocessing import ProcessExitedException
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_utils

from hf_softheads.registry import spec_from_dict

from . import processes
from .conftest import RECIPES

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # peft's
    "ignore:.*pin_memory.*:UserWarning",
)


def run(fields: dict[str, Any], output: Path) -> dict[str, Any]:
    return finetune.run(spec_from_dict("experiment", fields), output)


def losses(results: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in results["curve"]]


def command(config: Path, output: Path) -> list[str]:
    return [
        sys.executable,
        str(RECIPES / "finetune.py"),
        "--config",
        str(config),
        "--output",
        str(output),
    ]


def environment(**more: str) -> dict[str, str]:
    threads = str(torch.get_num_threads())
    paths = [str(RECIPES.parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def write(fields: dict[str, Any], folder: Path) -> Path:
    path = folder / "experiment.json"
    path.write_text(json.dumps(fields))
    return path


def test_head_repair_end_to_end(experiment: dict[str, Any], tmp_path: Path) -> None:
    results = run({**experiment, "steps": 30, "eval_every": 0}, tmp_path / "run")
    assert len(results["curve"]) == 30
    assert losses(results)[-1] < 0.9 * losses(results)[0]
    names = [stage["name"] for stage in results["stages"]]
    assert names == ["original", "patched", "trained"]
    original, patched, trained = results["stages"]
    assert trained["kl"] < patched["kl"]
    assert original["kl"] == pytest.approx(0, abs=1e-6)
    assert set(results["provenance"]) >= {"commit", "versions", "machine", "seed"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "start")
    changed = {
        k for k, v in model.state_dict().items() if not torch.equal(v, start.state_dict()[k])
    }
    assert changed == {"lm_head.weight"}
    assert (
        json.loads((tmp_path / "run" / "results.json").read_text())["loss"] == losses(results)[-1]
    )


def test_accumulation_changes_nothing(experiment: dict[str, Any], tmp_path: Path) -> None:
    whole = run(experiment, tmp_path / "whole")
    pieces = run({**experiment, "micro_batch": 1}, tmp_path / "pieces")
    assert losses(pieces) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("train", ["head", "lora"])
def test_stopped_and_continued_ends_the_same(
    experiment: dict[str, Any],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train: str,
    streaming: bool,
) -> None:
    fields = {**experiment, "train": train, "lora_dropout": 0.2, "losses": {"cross_entropy": 1.0}}
    if streaming:
        fields |= {"streaming": True, "data": str(folder / "train.jsonl")}
    expected = run(fields, tmp_path / "whole")
    finetune_batches = preparing.training_batches

    def stop_at_three(*arguments: Any) -> Any:
        batches = finetune_batches(*arguments)
        at = batches.at

        def watched(step: int) -> Any:
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return at(step)

        batches.at = watched
        return batches

    monkeypatch.setattr(preparing, "training_batches", stop_at_three)
    with pytest.raises(SystemExit) as stopped:
        run(fields, tmp_path / "stopped")
    assert stopped.value.code == 143
    assert checkpoints.complete(tmp_path / "stopped" / "checkpoints")[-1].name == "step_000003"
    monkeypatch.setattr(preparing, "training_batches", finetune_batches)
    found = run(fields, tmp_path / "stopped")
    assert losses(found) == losses(expected)
    assert found["stages"] == expected["stages"]


def wait_for_step(output: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        found = checkpoints.complete(output / "checkpoints")
        if found and int(found[-1].name.removeprefix("step_")) >= step:
            return
        time.sleep(0.02)


def killed(_: int, fields: dict[str, Any], output: Path, at: int) -> None:
    """A run that dies of SIGKILL before step `at`."""
    batches = preparing.training_batches

    def dying(*arguments: Any) -> Any:
        found = batches(*arguments)
        batch = found.at

        def watched(step: int) -> Any:
            if step == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return batch(step)

        found.at = watched
        return found

    preparing.training_batches = dying
    run(fields, output)


@pytest.mark.slow
def test_killed_and_restarted_ends_the_same(experiment: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL in a process of its own; what it left half-written is ignored."""
    fields = {**experiment, "steps": 12, "eval_every": 0, "eval_tokens": 64}
    output = tmp_path / "killed"
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        processes.start(killed, 1, fields, output, 7)
    assert checkpoints.complete(output / "checkpoints")[-1].name == "step_000006"
    (output / "checkpoints" / "step_000008.writing").mkdir()
    assert losses(run(fields, output)) == losses(run(fields, tmp_path / "whole"))


@pytest.mark.slow
def test_ten_kills_at_random_lose_nothing(experiment: dict[str, Any], tmp_path: Path) -> None:
    fields = {**experiment, "steps": 400, "checkpoint_every": 7, "eval_every": 0, "eval_tokens": 64}
    config, output = write(fields, tmp_path), tmp_path / "killed"
    generator = random.Random(0)
    for kill in range(10):
        process = subprocess.Popen(
            command(config, output), env=environment(), stderr=subprocess.DEVNULL
        )
        wait_for_step(output, (kill + 1) * 30, process)
        time.sleep(generator.random() * 0.3)
        process.kill()
        process.wait()
    subprocess.run(command(config, output), env=environment(), check=True)
    found = json.loads((output / "results.json").read_text())
    assert losses(found) == losses(run(fields, tmp_path / "whole"))


def launch(config: Path, output: Path, *options: str) -> list[str]:
    """The recipe on two processes."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options]
    launcher += ["--num_processes", "2", "--main_process_port", "0"]
    return launcher + command(config, output)[1:]


DDP = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
FSDP = ["--config_file", str(RECIPES / "accelerate" / "fsdp2.yaml")]


def assert_same(output: Path, expected: dict[str, Any]) -> None:
    """Losses of every step to 2e-5, held-out losses to 1e-4: sums in another order."""
    found = json.loads((output / "results.json").read_text())
    assert found["processes"] == 2
    assert losses(found) == pytest.approx(losses(expected), rel=2e-5)
    for mine, theirs in zip(found["stages"], expected["stages"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def one_of_two(rank: int, port: int, fields: dict[str, Any], output: Path) -> None:
    processes.join(rank, 2, port)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    run(fields, output)


def test_two_processes_give_the_result_of_one(experiment: dict[str, Any], tmp_path: Path) -> None:
    fields = {**experiment, "losses": {"kl": 1.0, "cross_entropy": 0.1}}
    processes.start(one_of_two, 2, processes.free_port(), fields, tmp_path / "two")
    assert_same(tmp_path / "two", run(fields, tmp_path / "one"))


@pytest.mark.slow
def test_two_launched_processes_give_the_result_of_one(
    experiment: dict[str, Any], tmp_path: Path
) -> None:
    fields = {**experiment, "train": "lora", "losses": {"kl": 1.0, "cross_entropy": 0.1}}
    subprocess.run(
        launch(write(fields, tmp_path), tmp_path / "two", *DDP),
        env=environment(ACCELERATE_USE_CPU="true"),
        check=True,
        capture_output=True,
    )
    assert_same(tmp_path / "two", run(fields, tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.parametrize("train", ["full", "lora"])
def test_sharded_killed_and_restarted_gives_the_result_of_one(
    experiment: dict[str, Any], tmp_path: Path, train: str
) -> None:
    """FSDP2: parameters, checkpoints and optimizer in pieces; the exported model is whole."""
    fields = {**experiment, "train": train, "losses": {"kl": 1.0, "cross_entropy": 0.1}}
    fields |= {"steps": 30, "checkpoint_every": 5, "eval_every": 0}
    output = tmp_path / "two"
    started = launch(write(fields, tmp_path), output, *FSDP)
    env = environment(ACCELERATE_USE_CPU="true")
    process = subprocess.Popen(started, env=env, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for_step(output, 5, process)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    saved = checkpoints.complete(output / "checkpoints")[-1]
    pieces = sorted(path.name for path in (saved / "pytorch_model_fsdp_0").glob("*.distcp"))
    assert pieces == ["__0_0.distcp", "__1_0.distcp"]
    subprocess.run(started, env=env, check=True, capture_output=True)
    assert_same(output, run(fields, tmp_path / "one"))
    exported = export.export_run(output, tmp_path / "exported")
    assert AutoModelForCausalLM.from_pretrained(exported).lm_head.weight.shape == (40, 16)


def test_processes_that_do_not_know_each_other_are_refused(
    experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        preparing, "Accelerator", lambda **_: type("One", (), {"num_processes": 1})()
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were launched, but accelerate connects 1"):
        run(experiment, tmp_path / "run")


def test_adapters_merge_and_export(experiment: dict[str, Any], tmp_path: Path) -> None:
    fields = {**experiment, "train": "lora", "attention": {"name": "ssmax"}, "lora_rank": 2}
    run(fields, tmp_path / "run")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "start")
    adapted = PeftModel.from_pretrained(start, str(tmp_path / "run" / "adapter"))
    ids = torch.arange(1, 20).unsqueeze(0)
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    exported = export.export_run(tmp_path / "run", tmp_path / "exported")
    assert "softheads" in (exported / "README.md").read_text()
    again = AutoModelForCausalLM.from_pretrained(exported)
    assert torch.equal(again(ids).logits, merged(ids).logits)
    assert AutoTokenizer.from_pretrained(exported).bos_token == "<s>"
    with pytest.raises(FileExistsError):
        export.export_run(tmp_path / "run", tmp_path / "exported")


def test_repair_in_two_stages(experiment: dict[str, Any], tmp_path: Path) -> None:
    """First the head, then adapters on the body and the head; both from the dense model."""
    shared = [f"--set={k}={experiment[k]}" for k in ("data", "eval_data", "window", "precision")]
    shared += ["--set=calibration_tokens=512", "--set=eval_tokens=256", "--set=steps=30"]
    dense = experiment["model"]
    head = [f"--set=model={dense}", "--set", 'head={"name": "vq", "codes": 40}']
    first = finetune.main(["--repair", "head", *shared, *head, "--output", str(tmp_path / "head")])
    repaired = str(tmp_path / "head" / "model")
    again = [f"--set=model={repaired}", f"--set=teacher={dense}", "--set=lora_rank=4"]
    second = finetune.main(
        ["--repair", "lora", *shared, *again, "--set=lr=0.01", "--output", str(tmp_path / "lora")]
    )
    assert [stage["name"] for stage in second["stages"]] == ["original", "trained"]
    patched, trained = first["stages"][1:]
    assert second["stages"][1]["kl"] < trained["kl"] < patched["kl"]
    before = AutoModelForCausalLM.from_pretrained(repaired).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "lora" / "model").state_dict()
    changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert {"lm_head.weight", "model.layers.0.self_attn.q_proj.weight"} <= changed
    assert "model.embed_tokens.weight" not in changed
    with pytest.raises(ValueError, match="teacher to the original one"):
        finetune.main(["--repair", "lora", *shared, again[0], "--output", str(tmp_path / "no")])
    with pytest.raises(SystemExit):
        finetune.main(["--output", str(tmp_path / "nothing")])


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # peft's
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_on_the_dense_head(experiment: dict[str, Any], tmp_path: Path, dora: bool) -> None:
    """LoRA and DoRA on `lm_head` itself; merged they are the trained head."""
    fields = {**experiment, "train": "lora", "lora_targets": ["q_proj", "lm_head"], "dora": dora}
    fields |= {"head": None, "losses": {"cross_entropy": 1.0}, "lora_rank": 4, "steps": 12}
    results = run(fields, tmp_path / "run")
    assert losses(results)[-1] < losses(results)[0]
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "start")
    weight = start.lm_head.weight.clone()
    adapted = PeftModel.from_pretrained(start, str(tmp_path / "run" / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = torch.arange(1, 20).unsqueeze(0)
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.equal(merged.lm_head.weight, weight)


def test_gradient_checkpointing_changes_nothing(
    experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**experiment, "train": "full", "attention": {"name": "ssmax"}, "eval_data": None}
    fields["losses"] = {"kl": 1.0, "cross_entropy": 0.1}
    plain = run(fields, tmp_path / "plain")
    recomputed: list[int] = []
    checkpoint = modeling_utils.checkpoint

    def watched(*arguments: Any, **options: Any) -> Any:
        recomputed.append(1)
        return checkpoint(*arguments, **options)

    monkeypatch.setattr(modeling_utils, "checkpoint", watched)
    saving = run({**fields, "gradient_checkpointing": True}, tmp_path / "saving")
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-6)
    assert recomputed


def test_a_tracker_sees_every_step(
    experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, dict[str, Any]]] = []

    class Notes(GeneralTracker):
        name = "notes"
        requires_logging_directory = False

        def __init__(self, run_name: str):
            super().__init__()

        @property
        def tracker(self) -> Any:
            return seen

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            assert json.loads(values["experiment"])["lr"] == experiment["lr"]

        def log(self, values: dict[str, Any], step: int | None, **_: Any) -> None:
            assert step is not None
            seen.append((step, values))

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notes", Notes)
    results = run({**experiment, "tracker": "notes"}, tmp_path / "run")
    assert [(step, values["loss"]) for step, values in seen] == [
        (entry["step"], entry["loss"]) for entry in results["curve"]
    ]
    assert "held_out" in seen[2][1]
    with pytest.raises(ValueError, match=r"'wandbb' is not installed; there are: (.*, )?notes"):
        run({**experiment, "tracker": "wandbb"}, tmp_path / "other")


@pytest.mark.skipif(not util.find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard(experiment: dict[str, Any], tmp_path: Path) -> None:
    run({**experiment, "tracker": "tensorboard"}, tmp_path / "run")
    events = list((tmp_path / "run").rglob("events.out.tfevents*"))
    assert any(b"gradient_norm" in path.read_bytes() for path in events)


def test_full_fine_tuning_of_an_unpatched_model(experiment: dict[str, Any], tmp_path: Path) -> None:
    fields = {k: v for k, v in experiment.items() if k != "head"}
    fields |= {"train": "full", "optimizer": "orthograd", "steps": 20, "packing": "pad"}
    results = run(fields, tmp_path / "run")
    assert losses(results)[-1] < losses(results)[0]
    assert [stage["name"] for stage in results["stages"]] == ["original", "trained"]
    exported = export.export_run(tmp_path / "run", tmp_path / "exported")
    assert AutoModelForCausalLM.from_pretrained(exported).lm_head.weight.shape == (384, 16)


def test_a_step_that_is_not_finite_stops(experiment: dict[str, Any], tmp_path: Path) -> None:
    fields = {
        **experiment,
        "lr": 1e37,
        "warmup": 0.0,
        "schedule": "constant",
        "checkpoint_every": 1,
    }
    with pytest.raises(
        FloatingPointError, match="nothing was updated and the last good checkpoint"
    ) as error:
        run(fields, tmp_path / "run")
    assert "begins with '" in str(error.value)
    assert checkpoints.complete(tmp_path / "run" / "checkpoints")


def test_only_the_last_checkpoints_stay(experiment: dict[str, Any], tmp_path: Path) -> None:
    run({**experiment, "checkpoint_every": 1, "keep": 2}, tmp_path / "run")
    found = checkpoints.complete(tmp_path / "run" / "checkpoints")
    assert [path.name for path in found] == ["step_000005", "step_000006"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stpes": 3}, "did you mean 'steps'"),
        ({"head": {"name": "vq", "code": 3}}, "did you mean 'codes'"),
        ({"losses": {"kll": 1.0}}, "did you mean 'kl'"),
        ({"train": "all"}, "'head', 'lora', 'full'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"packing": "none"}, "packing"),
        ({"window": 5000, "data": "held"}, "shorter than one window"),
        ({"data": "empty"}, "holds no text"),
        ({"data": "jsonl", "text_column": "body"}, "no text column 'body', its columns are"),
        ({"split": "validation", "data": "stdlib"}, "train and heldout"),
        ({"head": {"name": "vq", "codes": 5000}}, "5000 codes"),
    ],
)
def test_wrong_experiments_are_refused(
    experiment: dict[str, Any], folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (folder / "empty.txt").write_text(" \n")
    places = {"held": "held.txt", "empty": "empty.txt", "jsonl": "train.jsonl"}
    if change.get("data") in places:
        change = {**change, "data": str(folder / places[change["data"]])}
    with pytest.raises(ValueError, match=message):
        run({**experiment, **change}, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_hub_id_that_cannot_be_reached_is_refused(
    experiment: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConnectionError, match="Couldn't reach 'owner/name' on the Hub"):
        run({**experiment, "data": "owner/name"}, tmp_path / "run")
    assert not (tmp_path / "run" / "start").exists()


def test_a_missing_file_is_refused(experiment: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no/such\.txt"):
        run({**experiment, "data": "no/such.txt"}, tmp_path / "run")


def test_a_teacher_of_another_vocabulary_is_refused(
    experiment: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    other = AutoModelForCausalLM.from_pretrained(folder / "model")
    other.resize_token_embeddings(400)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="400 tokens, the model 384"):
        run({**experiment, "teacher": str(tmp_path / "other")}, tmp_path / "run")


def test_a_tokenizer_of_another_model_is_refused(
    experiment: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    small = AutoModelForCausalLM.from_pretrained(folder / "model")
    small.resize_token_embeddings(200)
    small.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "small")
    fields = {**experiment, "model": str(tmp_path / "small"), "head": None, "train": "full"}
    with pytest.raises(ValueError, match="its model 200: they do not belong together"):
        run(fields, tmp_path / "run")


def test_a_folder_of_another_experiment_is_refused(
    experiment: dict[str, Any], tmp_path: Path
) -> None:
    run(experiment, tmp_path / "run")
    before = (tmp_path / "run" / "results.json").read_bytes()
    with pytest.raises(ValueError, match=r"lr: 0\.01 there, 0\.02 here"):
        run({**experiment, "lr": 0.02}, tmp_path / "run")
    assert (tmp_path / "run" / "results.json").read_bytes() == before


def test_a_run_that_is_not_finished_is_not_exported(
    experiment: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="not a run of finetune"):
        export.export_run(tmp_path, tmp_path / "exported")
    run(experiment, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match="not finished yet"):
        export.export_run(tmp_path / "run", tmp_path / "exported")


def test_every_shipped_experiment_is_valid() -> None:
    files = sorted((RECIPES / "experiments").glob("*.json"))
    assert len(files) >= 3
    for path in files:
        fields = {"name": "experiment", **json.loads(path.read_text())}
        assert isinstance(spec_from_dict("experiment", fields), Experiment)
