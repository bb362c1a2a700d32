"""The only package that knows the inside of transformers, one file a subject.

`attention`: the registered implementation, its mask, the layers. `hidden`: the layer's input and its cache. `heads`:
the output embedding. `logit_transform`: what a family does after it. `split_model`: the model without its head, and
the head alone. `linear`: what else a dense head may do. `family_loss`: the loss of a family's own forward. `inputs`:
token ids. `loading`: what a model was loaded from. `ties`: parameters that are one. `embeddings`: those that read the
head's matrix, and special tokens. `generation`: the loops of `generate`. `classifiers`: the last module of a sequence
classifier. `subclass`: the class of a patched model, and the loss inside its head. `probe`: a trial run. Nothing is
assigned into a transformers class.
"""

from hf_softheads.bridge.attention import IMPLEMENTATION as IMPLEMENTATION
from hf_softheads.bridge.attention import attention_forward as attention_forward
from hf_softheads.bridge.attention import attention_layers as attention_layers
from hf_softheads.bridge.attention import geometry as geometry
from hf_softheads.bridge.attention import modalities as modalities
from hf_softheads.bridge.attention import observed as observed
from hf_softheads.bridge.attention import take_sinks as take_sinks
from hf_softheads.bridge.attention import visible as visible
from hf_softheads.bridge.classifiers import active_classifier as active_classifier
from hf_softheads.bridge.classifiers import classifies as classifies
from hf_softheads.bridge.classifiers import find_classifier as find_classifier
from hf_softheads.bridge.embeddings import special_tokens as special_tokens
from hf_softheads.bridge.embeddings import tied_embeddings as tied_embeddings
from hf_softheads.bridge.family_loss import IGNORE as IGNORE
from hf_softheads.bridge.family_loss import asks_for_loss as asks_for_loss
from hf_softheads.bridge.family_loss import check_own_loss as check_own_loss
from hf_softheads.bridge.family_loss import loss_as as loss_as
from hf_softheads.bridge.family_loss import loss_of as loss_of
from hf_softheads.bridge.family_loss import targets_of as targets_of
from hf_softheads.bridge.family_loss import with_decoder_inputs as with_decoder_inputs
from hf_softheads.bridge.family_loss import without_logits as without_logits
from hf_softheads.bridge.generation import AskedHead as AskedHead
from hf_softheads.bridge.generation import Question as Question
from hf_softheads.bridge.generation import by_value as by_value
from hf_softheads.bridge.generation import check_mode as check_mode
from hf_softheads.bridge.generation import decode as decode
from hf_softheads.bridge.generation import decode_whole as decode_whole
from hf_softheads.bridge.generation import lowers as lowers
from hf_softheads.bridge.head_weight import guard_weight as guard_weight
from hf_softheads.bridge.heads import Function as Function
from hf_softheads.bridge.heads import active_head as active_head
from hf_softheads.bridge.heads import base_model as base_model
from hf_softheads.bridge.heads import find_head as find_head
from hf_softheads.bridge.heads import head_as as head_as
from hf_softheads.bridge.heads import is_hooked as is_hooked
from hf_softheads.bridge.heads import output_head as output_head
from hf_softheads.bridge.heads import text_config as text_config
from hf_softheads.bridge.heads import transformers_model as transformers_model
from hf_softheads.bridge.heads import vocabulary as vocabulary
from hf_softheads.bridge.hidden import CHILD as CHILD
from hf_softheads.bridge.hidden import capture_layer_input as capture_layer_input
from hf_softheads.bridge.hidden import check_layer as check_layer
from hf_softheads.bridge.hidden import drop_variant as drop_variant
from hf_softheads.bridge.hidden import give_variant as give_variant
from hf_softheads.bridge.inputs import check_tokens as check_tokens
from hf_softheads.bridge.linear import check_linear as check_linear
from hf_softheads.bridge.loading import check_loaded as check_loaded
from hf_softheads.bridge.loading import name_in_memory as name_in_memory
from hf_softheads.bridge.loading import source as source
from hf_softheads.bridge.logit_transform import logit_transform as logit_transform
from hf_softheads.bridge.probe import probe as probe
from hf_softheads.bridge.split_model import FEW as FEW
from hf_softheads.bridge.split_model import SplitModel as SplitModel
from hf_softheads.bridge.split_model import check_transform as check_transform
from hf_softheads.bridge.split_model import few_tokens as few_tokens
from hf_softheads.bridge.subclass import Patched as Patched
from hf_softheads.bridge.subclass import restore_class as restore_class
from hf_softheads.bridge.subclass import subclass_patched as subclass_patched
from hf_softheads.bridge.ties import leave_ties as leave_ties
from hf_softheads.bridge.ties import tied_names as tied_names
from hf_softheads.bridge.ties import without_heads as without_heads
