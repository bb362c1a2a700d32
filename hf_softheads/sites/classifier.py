"""The last module of a sequence classifier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from hf_softheads import bridge
from hf_softheads.classifiers.base import PooledClassifier
from hf_softheads.sites.base import Fitting, Part, Row, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Classifier(Site):
    slot = "head"
    kind = "classifier"
    order = 20

    def is_in(self, model: PreTrainedModel) -> bool:
        return bridge.classifies(model)

    def build(self, model: PreTrainedModel, part: Part) -> PooledClassifier:
        _, inner = bridge.find_classifier(model)
        dim, labels = bridge.text_config(model).hidden_size, model.config.num_labels
        part.value.check(dim, labels)
        classifier: PooledClassifier = part.value.module(dim, labels, inner)
        like = next(inner.parameters())
        for parameter in classifier.parameters(recurse=False):
            parameter.data = parameter.data.to(like.dtype)
        return classifier

    def prepare(self, model: PreTrainedModel, part: Part, fitting: Fitting) -> PooledClassifier:
        """A classifier that changes nothing until it is trained."""
        fitting.demand(f"classifier {part.value.name}", "there is none for this variant")
        classifier = self.build(model, part)
        like = next(classifier.inner.parameters())
        if like.device.type == "meta":
            raise ValueError(
                "the classifier is not in memory (meta device or offloaded); patch the model before offloading"
            )
        with torch.no_grad():
            classifier.reset_parameters()
        for parameter in classifier.parameters(recurse=False):
            parameter.data = parameter.data.to(like)
        return classifier.train(classifier.inner.training)

    def present(self, model: PreTrainedModel) -> None:
        """Nothing: the new module holds the old one."""

    def install(self, model: PreTrainedModel, new: PooledClassifier) -> None:
        setattr(model, bridge.find_classifier(model)[0], new)

    def restore(self, model: PreTrainedModel, old: None) -> None:
        name, now = bridge.find_classifier(model)
        if isinstance(now, PooledClassifier):
            setattr(model, name, now.inner)

    def describe(self, model: PreTrainedModel, part: Part) -> tuple[Iterable[Row], list[str]]:
        classifier = bridge.active_classifier(model)
        if classifier is None:
            return [], []
        own = [p for name, p in classifier.named_parameters() if not name.startswith("inner.")]
        count, size = sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own)
        path, _ = bridge.find_classifier(model)
        return [Row(path, part.value.short(), f"{count:,}", size, "torch")], []
