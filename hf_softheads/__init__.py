"""hf_softheads: retrofit pretrained Transformers with other output heads and other attention softmaxes."""

__version__ = "0.1.0"
