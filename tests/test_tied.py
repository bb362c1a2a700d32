"""The input embedding of a tied model reads its rows from the new head: one table for both ends."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import hf_softheads as sh
from hf_softheads.embeddings.head_rows import RowsEmbedding, RowsTwin
from hf_softheads.heads.stats import HeadStats

from .conftest import VOCAB, make_model
from .encoder_decoders import SEQ2SEQ, make_seq2seq, pairs

ROWS = {
    "dense": sh.heads.Dense(),
    "quantized": sh.heads.Quantized(4, group=8),
    "quantized frequent": sh.heads.Quantized(3, frequent=20),
    "product_vq": sh.heads.ProductVQ(groups=8, codes=16),
    "residual_vq": sh.heads.ResidualVQ(stages=2, codes=16),
    "lattice": sh.heads.Lattice(),
    "low_rank": sh.heads.LowRank(8),
    "low_rank inner": sh.heads.LowRank(8, inner=sh.heads.Quantized(8)),
    "low_rank_residual": sh.heads.LowRankResidual(rank=4, bits=4),
    "transform_coded": sh.heads.TransformCoded(bits=8, tiers=2),
    "cosine": sh.heads.Cosine(),
    "screened": sh.heads.Screened(sh.heads.LowRank(4), candidates=16),
    "screened quantized": sh.heads.Screened(sh.heads.LowRank(4), 16, inner=sh.heads.Quantized(8)),
    "cascade": sh.heads.Cascade(sh.heads.LowRank(4), candidates=16),
    "temperature": sh.heads.Temperature(inner=sh.heads.Quantized(4)),
}
every_head = pytest.mark.parametrize("spec", ROWS.values(), ids=ROWS)
ADAPTIVE = sh.heads.Adaptive(cutoffs=(16,))
NO_ROWS = [ADAPTIVE, sh.heads.LowRank(8, inner=ADAPTIVE)]


def tied(family: str = "llama", **changes: Any) -> Any:
    return make_model(family, tie_word_embeddings=True, **changes)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def stats() -> HeadStats:
    rows = torch.randint(3, VOCAB, (40, 32), generator=torch.Generator().manual_seed(2))
    return sh.collect(tied(), rows)


def expected(model: Any, tokens: Tensor) -> Tensor:
    """Rows that are read off the head's matrix of logits, fp64, with what the embedding keeps of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    head.use_kernels("off")
    holder: Any = sh.heads.forms.token_rows.token_rows(head)
    unit = torch.eye(head.in_features)
    bias = holder.scores(torch.zeros_like(unit)).double()
    matrix = (holder.scores(unit).double() - bias).T * embedding.weight.detach().double()
    matrix[embedding.tokens] = embedding.exact.double()
    return matrix[tokens]


@every_head
def test_rows_are_the_head_s_own(spec: Any, stats: HeadStats, tokens: Tensor) -> None:
    model = sh.patch(tied(), head=spec, stats=stats, tie=sh.embeddings.HeadRows(exact=5))
    with torch.no_grad():
        found = model.get_input_embeddings()(tokens)
        if not isinstance(spec, sh.heads.Cosine):  # whose scores are no products with its rows
            torch.testing.assert_close(
                found.double(), expected(model, tokens), rtol=1e-4, atol=1e-4
            )
    assert found.shape == (*tokens.shape, 32)
    assert not model.get_output_embeddings().untied


@every_head
def test_is_smaller_on_disk_and_in_memory(spec: Any, stats: HeadStats, tmp_path: Path) -> None:
    """No dense matrix is left beside a compact head; what keeps one inside keeps only that."""
    model = tied()
    model.save_pretrained(tmp_path / "dense")
    dense = size(tmp_path / "dense")
    matrix = model.lm_head.weight.nbytes
    sh.patch(model, head=spec, stats=stats, tie=sh.embeddings.HeadRows(exact=0))
    own = model.lm_head.nbytes + model.model.embed_tokens.weight.nbytes
    model.save_pretrained(tmp_path / "tied")
    slack = 2048  # names and shapes in the file's header
    assert size(tmp_path / "tied") <= dense - matrix + own + slack
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    held = sum(t.nbytes for t in (*again.parameters(), *again.buffers()))
    before = sum(t.nbytes for t in (*tied().parameters(), *tied().buffers()))
    assert held <= before - matrix + own + 64


@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "gemma2", "gpt2", "opt", "qwen3", "cohere"]
)
def test_the_dense_head_changes_nothing(family: str, tokens: Tensor, tmp_path: Path) -> None:
    """Whatever a family does with its rows, such as Gemma's multiplier."""
    model = tied(family)
    wanted = model(tokens).logits
    sh.patch(model, head=sh.heads.Dense())
    assert isinstance(model.get_input_embeddings(), RowsEmbedding)
    assert torch.equal(model(tokens).logits, wanted)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again.get_input_embeddings(), RowsEmbedding)
    assert torch.equal(again(tokens).logits, wanted)
    again.tie_weights()
    assert torch.equal(again(tokens).logits, wanted)
    sh.unpatch(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert type(model.get_input_embeddings()) is type(tied(family).get_input_embeddings())
    assert torch.equal(model(tokens).logits, wanted)


@pytest.mark.parametrize("family", sorted(SEQ2SEQ))
def test_every_place_of_an_encoder_decoder_reads_the_table(family: str, tmp_path: Path) -> None:
    model, batch = make_seq2seq(family), pairs()
    wanted = model(**batch).logits
    sh.patch(model, head=sh.heads.Dense())
    assert torch.equal(model(**batch).logits, wanted)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    own = [m for m in again.modules() if isinstance(m, RowsEmbedding | RowsTwin)]
    assert sum(isinstance(m, RowsEmbedding) for m in own) == 1
    assert len(own) == 3
    assert torch.equal(again(**batch).logits, wanted)
    again.resize_token_embeddings(70)
    grown = again(**batch).logits
    assert grown.shape[-1] == 70
    torch.testing.assert_close(grown[..., :64], wanted)


@pytest.mark.parametrize(
    "spec", [ROWS["transform_coded"], ROWS["quantized"]], ids=["coded", "int4"]
)
def test_generates_as_its_full_forward(spec: Any, stats: HeadStats, tmp_path: Path) -> None:
    """Left padding, caches, `inputs_embeds`, an assistant, a copy and a reloaded one."""
    model = sh.patch(tied(), head=spec, stats=stats)
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    wanted = model.generate(**batch, max_new_tokens=6, do_sample=False)
    embedded = model.get_input_embeddings()(ids)
    by_rows = model.generate(
        inputs_embeds=embedded,
        attention_mask=batch["attention_mask"],
        max_new_tokens=6,
        do_sample=False,
    )
    assert torch.equal(by_rows, wanted[:, 5:])
    static = model.generate(
        **batch,
        max_new_tokens=6,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
    )
    assert torch.equal(static, wanted)
    alone = model.generate(ids[1:], max_new_tokens=6, do_sample=False)
    assisted = model.generate(
        ids[1:], max_new_tokens=6, do_sample=False, assistant_model=tied(seed=0)
    )
    assert torch.equal(assisted, alone)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    for other in (copy.deepcopy(model), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(other.generate(**batch, max_new_tokens=6, do_sample=False), wanted)


def test_a_copy_reads_its_own_head(tokens: Tensor) -> None:
    model = sh.patch(tied(), head=sh.heads.Dense())
    wanted = model(tokens).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert not other.get_input_embeddings()(tokens).any()
    assert torch.equal(model(tokens).logits, wanted)
    alone = copy.deepcopy(model.get_input_embeddings())  # as PEFT's modules_to_save makes it
    assert torch.equal(alone(tokens), model.get_input_embeddings()(tokens))
    assert alone._head[0] is model.lm_head


def test_both_uses_train_the_one_table(tokens: Tensor) -> None:
    model = sh.patch(tied(), head=sh.heads.Dense()).train()
    dense = tied().train()
    for each in (model, dense):
        each(tokens, labels=tokens).loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, dense.lm_head.weight.grad)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing(tokens: Tensor, stats: HeadStats) -> None:
    model = sh.patch(tied(), head=ROWS["quantized"], stats=stats).train()
    model(tokens, labels=tokens).loss.backward()
    wanted = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(tokens, labels=tokens).loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, wanted)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.slow
@every_head
def test_is_one_graph(spec: Any, stats: HeadStats, tokens: Tensor) -> None:
    torch._dynamo.reset()
    embedding = sh.patch(tied(), head=spec, stats=stats).get_input_embeddings()
    compiled = torch.compile(embedding, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), embedding(tokens))
    torch._dynamo.reset()


def test_frequent_and_special_tokens_are_exact(stats: HeadStats) -> None:
    model = tied()
    matrix = model.lm_head.weight.clone()
    sh.patch(model, head=sh.heads.Quantized(2), stats=stats, tie=sh.embeddings.HeadRows(exact=10))
    embedding = model.get_input_embeddings()
    assert {0, 1, 2} <= set(embedding.tokens.tolist())  # padding, start and end
    found = embedding(torch.arange(VOCAB))
    assert torch.equal(found[embedding.tokens], matrix[embedding.tokens])
    others = torch.ones(VOCAB, dtype=torch.bool)
    others[embedding.tokens] = False
    assert not torch.equal(found[others], matrix[others])


def test_a_tokenizer_beside_the_checkpoint_names_special_tokens(tmp_path: Path) -> None:
    model = tied()
    model.save_pretrained(tmp_path)
    added = [
        {"id": 77, "special": True},
        {"id": 78, "special": False},
        {"id": 999, "special": True},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sh.bridge.special_tokens(again) == (0, 1, 2, 77)


@pytest.mark.parametrize("rows", [100, 70])
def test_resizes_or_refuses(rows: int, tokens: Tensor, tmp_path: Path, stats: HeadStats) -> None:
    model = sh.patch(tied(), head=sh.heads.Dense())
    model.resize_token_embeddings(rows)
    assert model.config.vocab_size == rows == model.get_input_embeddings().num_embeddings
    ids = tokens % 70
    wanted = model(ids).logits
    torch.testing.assert_close(wanted, tied()(ids).logits[..., :rows] if rows < VOCAB else wanted)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, wanted)
    coded = sh.patch(tied(), head=ROWS["transform_coded"], stats=stats)
    with pytest.raises(NotImplementedError, match="cannot be resized"):
        coded.resize_token_embeddings(rows)
    assert coded.config.vocab_size == VOCAB


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_adapters_on_the_embedding_are_kept_but_not_merged(tokens: Tensor, tmp_path: Path) -> None:
    import peft

    model = sh.patch(tied(), head=sh.heads.Dense())
    wanted = model(tokens).logits
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(adapted(tokens).logits, wanted)
    with torch.no_grad():
        adapted(tokens).logits  # noqa: B018
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.add_(0.1)
    changed = adapted(tokens).logits
    assert not torch.equal(changed, wanted)
    adapted.save_pretrained(tmp_path)
    fresh = peft.PeftModel.from_pretrained(sh.patch(tied(), head=sh.heads.Dense()), tmp_path)
    assert torch.equal(fresh(tokens).logits, changed)
    with pytest.raises((RuntimeError, ValueError)):  # its rows are the head's too
        adapted.merge_and_unload()


@pytest.mark.parametrize("spec", NO_ROWS, ids=lambda spec: spec.short())
def test_heads_without_rows_leave_the_embedding_a_matrix(spec: Any, stats: HeadStats) -> None:
    model = sh.patch(tied(), head=spec, stats=stats)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert not model.config.tie_word_embeddings
    with pytest.raises(ValueError, match=r"has no row for each token .* tie=False"):
        sh.patch(tied(), head=spec, tie=True)


def test_shared_rows_are_asked_for() -> None:
    spec = sh.heads.VQ(codes=24)
    assert type(sh.patch(tied(), head=spec).get_input_embeddings()) is nn.Embedding
    with pytest.raises(ValueError, match=r"cannot tell them apart.*share_inputs=True"):
        sh.patch(tied(), head=spec, tie=True)
    rows = sh.embeddings.HeadRows(share_inputs=True)
    assert isinstance(sh.patch(tied(), head=spec, tie=rows).get_input_embeddings(), RowsEmbedding)


def test_refusals(tmp_path: Path, tokens: Tensor) -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match="has a matrix of its own"):
        sh.patch(model, head="dense", tie=True)
    with pytest.raises(ValueError, match="it needs head=variant"):
        sh.patch(tied(), attention="ssmax", tie=True)
    with pytest.raises(ValueError, match="97 exact rows; 0 to 96 are possible"):
        sh.patch(tied(), head="dense", tie=sh.embeddings.HeadRows(exact=97))
    with pytest.raises(ValueError, match="head_rows"):
        sh.patch(tied(), head="dense", tie="head_row")
    model = tied()
    model.other = nn.Linear(32, VOCAB, bias=False)
    model.other.weight = model.lm_head.weight
    with pytest.raises(ValueError, match=r"shared by other \(Linear\), which is no embedding"):
        sh.patch(model, head="dense", tie=True)
    assert type(sh.patch(model, head="dense").get_input_embeddings()) is nn.Embedding
    model = tied()
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(ValueError, match="max_norm"):
        sh.patch(model, head="dense", tie=True)
    sh.patch(tied(), head="dense").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="reads the rows of its head, which a LlamaModel does not have"
    ):
        AutoModel.from_pretrained(tmp_path)


def test_an_embedding_that_looks_up_by_itself_is_refused() -> None:
    class Own(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return self.weight[input] * 2

    model = tied()
    model.model.embed_tokens.__class__ = Own
    with pytest.raises(ValueError, match=r"model.embed_tokens \(Own\) looks its rows up by itself"):
        sh.patch(model, head="dense", tie=True)
    assert model.model.embed_tokens.weight is model.lm_head.weight


def test_tie_false_and_old_folders_keep_a_matrix(tokens: Tensor, tmp_path: Path) -> None:
    model = sh.patch(tied(), head=sh.heads.Quantized(4), tie=False)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert model.lm_head.untied
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.get_input_embeddings()) is nn.Embedding
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_other_code_may_not_read_rows_of_the_weight(tokens: Tensor) -> None:
    weight = sh.patch(tied(), head=sh.heads.Quantized(4)).get_input_embeddings().weight
    assert weight.shape == (VOCAB, 1)
    with pytest.raises(ValueError, match="embedding"):
        weight[tokens]
    with pytest.raises(ValueError, match="embedding"):
        nn.functional.embedding(tokens, weight)


def test_offloaded_to_disk(tokens: Tensor, tmp_path: Path, stats: HeadStats) -> None:
    model = sh.patch(tied(), head=ROWS["transform_coded"], stats=stats)
    model.save_pretrained(tmp_path / "saved")
    device_map = {"model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"lm_head": "disk", "model.embed_tokens": "disk"}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=os.fspath(tmp_path / "disk")
    )
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


def test_describes_both_ends(stats: HeadStats) -> None:
    text = str(sh.describe(sh.patch(tied(), head=ROWS["quantized"], stats=stats)))
    assert "model.embed_tokens" in text
    assert "head_rows" in text
    assert "reads its rows from the head" in text
    assert "a copy of its own" not in text


@pytest.mark.parametrize("rows", [100, 70])
def test_unpatch_after_a_resize(rows: int, tokens: Tensor) -> None:
    model = tied("gemma2")
    wanted = model(tokens % 70).logits
    sh.patch(model, head=sh.heads.Dense())
    model.resize_token_embeddings(rows)
    sh.unpatch(model)
    embedding = model.get_input_embeddings()
    assert model.get_output_embeddings().weight is embedding.weight
    assert len(embedding.weight) == rows == embedding.num_embeddings == model.config.vocab_size
    kept = min(rows, VOCAB)
    torch.testing.assert_close(model(tokens % 70).logits[..., :kept], wanted[..., :kept])
    assert model.generate(tokens % 70, max_new_tokens=2).shape == (2, 14)
