"""Pretrain the embedded model: a small Llama on the source text of the Python standard library.

    accelerate launch recipes/pretrain_tiny.py --output runs/tiny

Reads the running interpreter's standard library, splits it by module with a stable hash, trains a byte-level
BPE tokenizer and the model (Muon for the matrices of the body, AdamW for the rest), and writes bf16 safetensors,
the tokenizer and `pretraining.json`. Killed and started again with the same arguments it continues where its
last checkpoint was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_softheads.text.stdlib_corpus import stdlib_documents

END = "<|endoftext|>"
PROMPT = "def __init__(self,"


@dataclass(frozen=True)
class Pretraining:
    """Everything that decides the result; a checkpoint of other values is refused.

    The last `definition_steps` read short windows that begin where a function or a class does, at `definition_lr` times
    the rates: in windows cut anywhere, a prompt without context hardly ever comes up.
    """

    vocab: int = 8192
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 512
    window: int = 512
    batch: int = 16
    steps: int = 3600
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.02
    definition_steps: int = 150
    definition_window: int = 96
    definition_batch: int = 64
    definition_lr: float = 0.1
    seed: int = 0


def train_tokenizer(documents: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one special token, which begins every document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
    )


def pack(tokenizer: PreTrainedTokenizerFast, documents: list[str], window: int) -> torch.Tensor:
    """All documents, each begun by the special token, in rows of `window` tokens: `(rows, window)`."""
    ids: list[int] = []
    for encoding in tokenizer(documents)["input_ids"]:
        ids.append(tokenizer.bos_token_id)
        ids.extend(encoding)
    rows = len(ids) // window
    return torch.tensor(ids[: rows * window]).view(rows, window)


def definitions(
    tokenizer: PreTrainedTokenizerFast, documents: list[str], window: int
) -> torch.Tensor:
    """The first `window` tokens of every function and class that has as many: `(rows, window)`."""
    texts = [
        document[found.start() : found.start() + 6 * window].lstrip(" ")
        for document in documents
        for found in re.finditer(r"^ *(?:async def|def|class) ", document, flags=re.MULTILINE)
    ]
    encoded = tokenizer(texts)["input_ids"]
    return torch.tensor([ids[:window] for ids in encoded if len(ids) >= window])


def build(config: Pretraining, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.window,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def optimizers(model: LlamaForCausalLM, config: Pretraining) -> list[torch.optim.Optimizer]:
    body = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in body}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            body, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=0.95, nesterov=True
        ),
        torch.optim.AdamW(
            rest, lr=config.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    ]


def schedule(step: int, config: Pretraining) -> float:
    """Linear warm-up, linear decay to zero, and a small linear decay over the definitions."""
    if step >= config.steps:
        return config.definition_lr * (1 - (step - config.steps) / config.definition_steps)
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    return (config.steps - step) / (config.steps - warmup)


def rows_of_step(
    rows: torch.Tensor, step: int, batch: int, seed: int, accelerator: Accelerator
) -> torch.Tensor:
    """This process's share of a step's rows: a permutation an epoch, the same in every process and after a restart."""
    epoch, offset = divmod(step * batch, len(rows) // batch * batch)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch))
    share = batch // accelerator.num_processes
    mine = offset + accelerator.process_index * share
    return rows[order[mine : mine + share]].to(accelerator.device)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: torch.Tensor, accelerator: Accelerator) -> float:
    """Mean nats per token over windows that do not overlap; first token of a window not counted."""
    model.eval()
    total = 0.0
    for batch in rows.split(16):
        with accelerator.autocast():
            loss = model(
                input_ids=batch.to(accelerator.device), labels=batch.to(accelerator.device)
            ).loss
        total += float(loss) * len(batch)
    model.train()
    return total / len(rows)


def save_checkpoint(accelerator: Accelerator, folder: Path, state: dict[str, object]) -> None:
    """Write beside, then rename: an interrupted save leaves the previous checkpoint whole."""
    fresh = folder.with_name(folder.name + ".writing")
    accelerator.save_state(str(fresh))
    if accelerator.is_main_process:
        (fresh / "progress.json").write_text(json.dumps(state))
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--checkpoint-every", type=int, default=200)
    for name, value in asdict(Pretraining()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    output: Path = arguments.pop("output")
    every: int = arguments.pop("checkpoint_every")
    config = Pretraining(**arguments)

    accelerator = Accelerator(mixed_precision="bf16")
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise RuntimeError(
            f"{expected} processes were launched, accelerate sees {accelerator.num_processes}"
        )
    for batch in (config.batch, config.definition_batch):
        if batch % accelerator.num_processes:
            raise ValueError(
                f"batch {batch} does not divide by {accelerator.num_processes} processes"
            )
    set_seed(config.seed)
    output.mkdir(parents=True, exist_ok=True)

    tokenizer_folder = output / "tokenizer"
    train_documents = stdlib_documents("train", tests=True)
    held_documents = stdlib_documents("heldout")
    if accelerator.is_main_process and not tokenizer_folder.exists():
        accelerator.print("training the tokenizer")
        train_tokenizer(train_documents, config.vocab).save_pretrained(tokenizer_folder)
    accelerator.wait_for_everyone()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    train = pack(tokenizer, train_documents, config.window)
    short = definitions(tokenizer, train_documents, config.definition_window)
    held = pack(tokenizer, held_documents, config.window)
    held_bytes = sum(len(d.encode()) for d in held_documents)
    held_tokens = sum(len(e) + 1 for e in tokenizer(held_documents)["input_ids"])
    accelerator.print(f"train {train.numel():,} tokens, held out {held.numel():,} tokens")

    model = build(config, tokenizer)
    accelerator.print(f"{model.num_parameters():,} parameters")
    model, *opts = accelerator.prepare(model, *optimizers(model, config))
    base_lr = [opt.param_groups[0]["lr"] for opt in opts]

    checkpoint = output / "checkpoint"
    start, seconds, curve = 0, 0.0, []
    if checkpoint.exists():
        progress = json.loads((checkpoint / "progress.json").read_text())
        if progress["config"] != asdict(config):
            raise ValueError(f"{checkpoint} belongs to another run: {progress['config']}")
        accelerator.load_state(str(checkpoint))
        start, seconds, curve = progress["step"], progress["seconds"], progress["curve"]

    total = config.steps + config.definition_steps
    bar = tqdm(total=total, initial=start, disable=not accelerator.is_main_process, mininterval=10)
    clock = time.perf_counter()
    for step in range(start, total):
        if step < config.steps:
            batch = rows_of_step(train, step, config.batch, config.seed, accelerator)
        else:
            batch = rows_of_step(
                short, step - config.steps, config.definition_batch, config.seed, accelerator
            )
        for opt, lr in zip(opts, base_lr, strict=True):
            for group in opt.param_groups:
                group["lr"] = lr * schedule(step, config)
        loss = model(input_ids=batch, labels=batch).loss
        if not math.isfinite(float(loss)):
            raise FloatingPointError(
                f"loss {float(loss)} at step {step}; last checkpoint in {checkpoint}"
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        bar.update()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
        if (step + 1) % every == 0 or step + 1 in (config.steps, total):
            elapsed = seconds + time.perf_counter() - clock
            curve.append(
                {
                    "step": step + 1,
                    "train": float(loss),
                    "held_out": held_out_loss(model, held, accelerator),
                }
            )
            tqdm.write(f"{curve[-1]}  {elapsed:.0f} s")
            state = {"config": asdict(config), "step": step + 1, "seconds": elapsed, "curve": curve}
            save_checkpoint(accelerator, checkpoint, state)
    bar.close()
    seconds += time.perf_counter() - clock

    if accelerator.is_main_process:
        final = accelerator.unwrap_model(model).to(torch.bfloat16)
        loss = held_out_loss(final, held, accelerator)
        prompt = tokenizer(PROMPT, return_tensors="pt").to(final.device)
        written = final.generate(**prompt, max_new_tokens=64, do_sample=False)
        result = {
            "config": asdict(config),
            "parameters": final.num_parameters(),
            "train_tokens_seen": config.steps * config.batch * config.window
            + config.definition_steps * config.definition_batch * config.definition_window,
            "train_tokens": train.numel(),
            "held_out_tokens": held.numel(),
            "held_out_perplexity": math.exp(loss),
            "held_out_bits_per_byte": loss * held_tokens / held_bytes / math.log(2),
            "seconds": seconds,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "curve": curve,
            "greedy": tokenizer.decode(written[0]),
        }
        final.save_pretrained(output / "model")
        tokenizer.save_pretrained(output / "model")
        vocabulary = output / "model" / "tokenizer.json"
        compact = json.dumps(
            json.loads(vocabulary.read_text()), ensure_ascii=False, separators=(",", ":")
        )
        vocabulary.write_text(compact)
        (output / "model" / "pretraining.json").write_text(json.dumps(result, indent=1))
        print(json.dumps({k: v for k, v in result.items() if k != "curve"}, indent=1))
    accelerator.end_training()


if __name__ == "__main__":
    main()
