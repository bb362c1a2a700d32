"""Decoding with what a head knows: candidates instead of all logits, and what to keep of a distribution."""

from hf_softheads.decoding.basis_aware import BasisAware as BasisAware
from hf_softheads.decoding.bregman import BregmanTopK as BregmanTopK
from hf_softheads.decoding.byte_level import ByteLevel as ByteLevel
from hf_softheads.decoding.candidates import candidates as candidates
from hf_softheads.decoding.multi_draft import MultiDraft as MultiDraft
from hf_softheads.decoding.steps import Candidates as Candidates
from hf_softheads.decoding.top_n_sigma import TopNSigma as TopNSigma
