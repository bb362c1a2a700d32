"""The only package that knows the inside of transformers.

`attention`: the registered implementation, its mask, the layers. `hidden`: the layer's input and its cache. `heads`:
the output embedding, hidden states, what a family does to its logits. `classifiers`: the last module of a sequence
classifier. `adoption`: the class of a patched model, and the loss inside its head. Nothing is assigned into a
transformers class.
"""

from hf_softheads.bridge.adoption import Adopted, adopt, disown
from hf_softheads.bridge.attention import (
    IMPLEMENTATION,
    attention_forward,
    attention_layers,
    geometry,
    observed,
    take_sinks,
    visible,
)
from hf_softheads.bridge.classifiers import (
    active_classifier,
    build_classifier,
    classifies,
    find_classifier,
    fresh_classifier,
)
from hf_softheads.bridge.heads import (
    Function,
    Reader,
    active_head,
    base_model,
    check_transform,
    find_head,
    head_as,
    logit_transform,
    output_head,
    text_config,
    vocabulary,
)
from hf_softheads.bridge.hidden import CHILD, check_values, forget_hidden, show_hidden

__all__ = [
    "CHILD",
    "IMPLEMENTATION",
    "Adopted",
    "Function",
    "Reader",
    "active_classifier",
    "active_head",
    "adopt",
    "attention_forward",
    "attention_layers",
    "base_model",
    "build_classifier",
    "check_transform",
    "check_values",
    "classifies",
    "disown",
    "find_classifier",
    "find_head",
    "forget_hidden",
    "fresh_classifier",
    "geometry",
    "head_as",
    "logit_transform",
    "observed",
    "output_head",
    "show_hidden",
    "take_sinks",
    "text_config",
    "visible",
    "vocabulary",
]
