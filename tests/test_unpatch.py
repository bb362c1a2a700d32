"""`unpatch` and a `patch` that failed leave a model as it was: modules, hooks, ties, settings, class and outputs."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import hf_softheads as sh

from .conftest import make_model

PATCHES = {
    "head": {"head": sh.heads.VQ(codes=24)},
    "attention": {"attention": sh.attention.Sigmoid()},
    "layer's input": {"attention": sh.attention.Gated()},
    "tempered values": {"attention": sh.attention.Selective(values=True)},
    "both": {"head": sh.heads.Dense(), "attention": {0: "gated", 1: "ssmax"}},
}
every_patch = pytest.mark.parametrize("arguments", PATCHES.values(), ids=PATCHES)


def traces(model):
    """Everything about a model but the values of its tensors: what a patch may have changed."""
    found = {"config": json.dumps(model.config.to_dict(), sort_keys=True, default=str)}
    for name, value in vars(model.config).items():
        found[f"config.{name}"] = repr(value)
    for path, module in model.named_modules(remove_duplicate=False):
        found[path] = type(module)
        for name, value in vars(module).items():
            if name.endswith("_hooks") or name.endswith("_hooks_with_kwargs"):
                found[f"{path}.{name}"] = dict(value)
            elif name == "_parameters":
                found[f"{path}.{name}"] = {key: id(p) for key, p in value.items()}
            elif name in ("_modules", "_buffers"):
                found[f"{path}.{name}"] = list(value)
            elif not name.startswith("_") or module is model:
                found[f"{path}.{name}"] = repr(value)
    return found


def put_back(model, tokens, change):
    before, wanted = traces(model), model(tokens, use_cache=False).logits
    state = copy.deepcopy(model.state_dict())
    change()
    after = traces(model)
    assert after.keys() == before.keys()
    for name in before:
        assert after[name] == before[name], name
    assert torch.equal(model(tokens, use_cache=False).logits, wanted)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


@every_patch
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [False, True])
def test_nothing_is_left(arguments, implementation, tied, tokens):
    model = make_model("llama", tie_word_embeddings=tied)
    model.set_attn_implementation(implementation)

    def change():
        sh.patch(model, **arguments)
        assert type(model).__mro__[0] is not type(model).__mro__[2]
        assert model.config._attn_implementation != implementation or "attention" not in arguments
        sh.unpatch(model)

    put_back(model, tokens, change)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.tie_word_embeddings == tied


@every_patch
def test_nothing_is_left_of_two_patches(arguments, tokens):
    """Patched in two turns, or twice after one another, it is put back as from one."""
    model = make_model("gemma2", tie_word_embeddings=True)

    def change():
        for slot, spec in arguments.items():
            sh.patch(model, **{slot: spec})
        sh.unpatch(model)
        sh.patch(model, **arguments)
        sh.unpatch(model)

    put_back(model, tokens, change)


@every_patch
def test_nothing_is_left_of_a_patch_that_fails_late(arguments, tokens, monkeypatch):
    """The last step raises, with all modules in place."""
    model = make_model("llama", tie_word_embeddings=True)

    def fail(*_):
        raise RuntimeError("no more room")

    monkeypatch.setattr("hf_softheads.patching.mark", fail)

    def change():
        with pytest.raises(RuntimeError, match="no more room"):
            sh.patch(model, **arguments)

    put_back(model, tokens, change)


def test_an_unpatched_model_saves_an_ordinary_folder(tokens, tmp_path):
    model = make_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "before")
    sh.unpatch(sh.patch(model, head="dense", attention="gated")).save_pretrained(tmp_path / "after")
    files = [sorted(p.name for p in (tmp_path / d).iterdir()) for d in ("before", "after")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
