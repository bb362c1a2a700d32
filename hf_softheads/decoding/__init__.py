"""Decoding with what a head knows: candidates instead of all logits."""

from hf_softheads.decoding.candidates import candidates as candidates
from hf_softheads.decoding.steps import Candidates as Candidates
