"""Faults of one line, each with the test that must turn red. Add one wherever a fault would go unnoticed."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault in the package.

    Attributes:
        file: where it goes.
        old: the text that it replaces, found once in the file.
        new: the text of the fault.
        test: the id of the test that catches it.
        why: what a user would get.
    """

    file: str
    old: str
    new: str
    test: str
    why: str


_BRIDGE = "hf_softheads/bridge/"
_VQ = "hf_softheads/heads/forms/vq_module.py"
_BLOCKS = "hf_softheads/attention/engines/query_blocks.py"
_MODELS = "tests/attention/test_models.py::"
_CONTRACT = "tests/attention/test_contract.py::"
_UNPATCH = "tests/test_unpatch.py::"

MUTANTS = [
    # -- attention: scores, masks, heads --------------------------------------------------------------------------
    Mutant(
        _BRIDGE + "attention.py",
        'softcap=kwargs.get("softcap"),',
        "softcap=None,",
        _MODELS + "test_control_equals_eager_with_soft_caps_and_windows[gemma2]",
        "the layer's soft cap is dropped",
    ),
    Mutant(
        _BRIDGE + "attention.py",
        "keep = mask > torch.finfo(mask.dtype).min / 2",
        "keep = mask >= torch.finfo(mask.dtype).min",
        "tests/attention/test_masks.py::test_every_form_of_a_mask_means_the_same",
        "hidden keys of an additive mask are seen",
    ),
    Mutant(
        _BRIDGE + "attention.py",
        "return keep, mask.masked_fill(~keep, 0.0)",
        "return keep, None",
        "tests/attention/test_masks.py::test_an_additive_mask_keeps_its_bias",
        "the bias in an additive mask is dropped",
    ),
    Mutant(
        _BRIDGE + "attention.py",
        "key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]",
        "key, value = key[:, :, -query.shape[2] :], value[:, :, -query.shape[2] :]",
        "tests/attention/test_masks.py::test_a_static_cache_is_read_where_it_was_written",
        "a static cache is read at its empty end",
    ),
    Mutant(
        _BRIDGE + "attention.py",
        "bias = position_bias if bias is None else bias + position_bias",
        "bias = position_bias if bias is None else bias",
        "tests/attention/test_masks.py::test_a_position_bias_is_added_to_that_of_the_mask",
        "a position bias is lost beside a mask's",
    ),
    Mutant(
        _BRIDGE + "attention.py",
        "dropout=dropout if module.training else 0.0",
        "dropout=0.0",
        "tests/attention/test_masks.py::test_dropout_of_the_layer_is_applied_in_training_only",
        "attention dropout is off in training",
    ),
    Mutant(
        _BRIDGE + "attention.py",
        'variant.get_parameter("sinks").copy_(sinks)',
        'variant.get_parameter("sinks").copy_(sinks.flip(0))',
        _MODELS + "test_sinks_are_refused_or_adopted",
        "sinks go to the wrong heads",
    ),
    Mutant(
        _BLOCKS,
        "stacked = rows.reshape(batch, kv_heads, heads // kv_heads * queries, -1)",
        "stacked = rows.unflatten(1, (-1, kv_heads)).transpose(1, 2).reshape("
        "batch, kv_heads, heads // kv_heads * queries, -1)",
        _CONTRACT + "test_blocks_equal_the_whole_matrix[softpick]",
        "query heads read another group's keys",
    ),
    Mutant(
        _BLOCKS,
        "dscores = dscores * (1 - (capped / inputs.softcap).square())",
        "pass",
        "tests/attention/test_masks.py::test_a_soft_cap_has_its_gradient",
        "the gradient of a soft cap is left out",
    ),
    Mutant(
        _BLOCKS,
        "return keep if inputs.window is None else keep & (distance < inputs.window)",
        "return keep if inputs.window is None else keep & (distance <= inputs.window)",
        "tests/attention/test_masks.py::test_a_window_holds_the_latest_keys",
        "a window is one key too wide",
    ),
    Mutant(
        "hf_softheads/attention/engines/sdpa.py",
        "return inputs.bias.to(inputs.query.dtype).masked_fill(~keep, -torch.inf), False",
        "return keep, False",
        "tests/attention/test_masks.py::test_an_additive_mask_keeps_its_bias",
        "torch's kernel gets no bias",
    ),
    Mutant(
        "hf_softheads/attention/call.py",
        "return self.keep.sum(-1, keepdim=True)",
        "return self.keep.new_tensor(range(1, self.keep.shape[2] + 1), dtype=torch.long).view(1, 1, -1, 1)",
        _CONTRACT + "test_left_padding_equals_none[ssmax]",
        "padding is counted among the visible keys",
    ),
    Mutant(
        "hf_softheads/attention/call.py",
        "(stays >= inputs.dropout) / (1 - inputs.dropout)",
        "(stays >= inputs.dropout + 0.02) / (1 - inputs.dropout)",
        _CONTRACT + "test_dropout_is_that_of_the_weights[softpick]",
        "dropout drops more than it makes up for",
    ),
    Mutant(
        "hf_softheads/attention/call.py",
        "seed + self.rows.start + self.batch.start * inputs.query.shape[2]",
        "seed",
        _CONTRACT + "test_dropout_is_that_of_the_weights[learned_sink]",
        "every block of queries drops the same weights",
    ),
    Mutant(
        "hf_softheads/attention/entmax.py",
        "threshold.entmax_grad(weights, grad, self.alpha), {}",
        "threshold.entmax_grad(weights, grad, 1.5), {}",
        "tests/attention/test_entmax_package.py::test_gradients",
        "the gradient of entmax is that of another alpha",
    ),
    Mutant(
        "hf_softheads/attention/entmax.py",
        "weights = threshold.entmax(scores, keep, self.alpha)",
        "weights = threshold.entmax(scores, keep, 1.5)",
        "tests/attention/test_entmax_package.py::test_finite_where_the_package_crashes",
        "training with entmax takes the weights of another alpha",
    ),
    Mutant(
        "hf_softheads/sites/attention.py",
        "return {layer % count: spec for layer, spec in wanted.items()}",
        "return {abs(layer) % count: spec for layer, spec in wanted.items()}",
        "tests/attention/test_masks.py::test_negative_layers_count_from_the_end",
        "a negative layer index patches another layer",
    ),
    # -- the trial run --------------------------------------------------------------------------------------------
    Mutant(
        _BRIDGE + "probe.py",
        "    if unknown:",
        "    if False:",
        "tests/attention/test_probe.py::test_a_keyword_that_nothing_here_understands",
        "an attention keyword is ignored",
    ),
    Mutant(
        _BRIDGE + "probe.py",
        "    if silent:",
        "    if False:",
        "tests/attention/test_probe.py::test_a_layer_that_is_never_called",
        "a variant is put where nothing calls it",
    ),
    # -- unpatch --------------------------------------------------------------------------------------------------
    Mutant(
        _BRIDGE + "hidden.py",
        "    release_layer_input(module)\n",
        "",
        _UNPATCH + "test_nothing_is_left[True-eager-both]",
        "unpatch leaves its hook on a layer",
    ),
    Mutant(
        "hf_softheads/patching.py",
        "and not name.startswith(_OWN):",
        'and not name.startswith(_OWN) and name != "tie_word_embeddings":',
        _UNPATCH + "test_nothing_is_left[True-eager-head]",
        "unpatch leaves tie_word_embeddings",
    ),
    Mutant(
        "hf_softheads/patching.py",
        "    _put_back(base.__dict__.pop(_SETTINGS, []))\n    bridge.restore_class(base)\n",
        "    _put_back(base.__dict__.pop(_SETTINGS, []))\n",
        _UNPATCH + "test_nothing_is_left[True-eager-both]",
        "unpatch leaves the class",
    ),
    Mutant(
        "hf_softheads/patching.py",
        "        _put_back(_changed(before, model))\n",
        "",
        _UNPATCH + "test_nothing_is_left_of_a_patch_that_fails_late",
        "a failed patch leaves its settings",
    ),
    # -- files ----------------------------------------------------------------------------------------------------
    Mutant(
        "hf_softheads/plan.py",
        'MARKERS = ("attn_implementation", "_attn_implementation")',
        'MARKERS = ("attn_implementation",)',
        "tests/test_checkpoint.py::test_both_markers_are_in_the_folder",
        "an old transformers loads a wrong model",
    ),
    Mutant(
        "hf_softheads/plan.py",
        'MARKERS = ("attn_implementation", "_attn_implementation")',
        'MARKERS = ("_attn_implementation",)',
        "tests/test_checkpoint.py::test_both_markers_are_in_the_folder",
        "a recent transformers loads a wrong model",
    ),
    Mutant(
        "hf_softheads/config.py",
        "if version > FORMAT_VERSION:",
        "if version > FORMAT_VERSION + 1:",
        "tests/test_checkpoint.py::test_newer_format_asks_for_an_upgrade",
        "the next format is read as this one",
    ),
    Mutant(
        "hf_softheads/sites/attention.py",
        "return {bridge.CHILD}",
        "return set()",
        "tests/test_checkpoint.py::test_sharded_and_dispatched[bf16-False]",
        "a variant's parameters are rounded while loading",
    ),
    Mutant(
        _VQ,
        'keep_in_fp32 = ("bias",)',
        "keep_in_fp32 = ()",
        "tests/test_checkpoint.py::test_bf16_round_trip_is_bit_exact",
        "a head's bias is rounded while patching",
    ),
    Mutant(
        "hf_softheads/sites/lm_head.py",
        "config.tie_word_embeddings = False",
        "pass",
        "tests/test_ties.py::test_two_vocabularies_stay_two",
        "the config says that the new head is tied",
    ),
    Mutant(
        "hf_softheads/sites/lm_head.py",
        "            head.transform = _rising_transform(model)\n\n    def describe",
        "            pass\n\n    def describe",
        "tests/test_families.py::test_save_and_load_is_bit_exact_twice[gemma2]",
        "a loaded head forgets the family's soft cap",
    ),
    Mutant(
        "hf_softheads/bitpack.py",
        "3: (2, 1)",
        "3: (1, 2)",
        "tests/test_bitpack.py::test_bytes_by_hand",
        "codes that were saved before are cut otherwise",
    ),
    Mutant(
        "hf_softheads/bitpack.py",
        "shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)",
        "shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device).flip(0)",
        "tests/test_bitpack.py::test_bytes_by_hand",
        "codes are read in another order",
    ),
    # -- heads ----------------------------------------------------------------------------------------------------
    Mutant(
        "hf_softheads/heads/screened.py",
        "self.weight.fill_(shift)",
        "self.weight.fill_(shift + 0.05)",
        "tests/heads/test_log_z.py::test_a_screened_head_has_the_dense_level",
        "the tail of a screened head is 0.05 nat off",
    ),
    Mutant(
        _VQ,
        "lambda h: (self._code_logits(h) + mass).logsumexp(-1),",
        "lambda h: (self._code_logits(h) + mass).logsumexp(-1) + 0.05,",
        "tests/heads/test_contract.py::test_methods_agree_with_forward[vq-shape0-none]",
        "log Z of a head is 0.05 nat off",
    ),
    Mutant(
        _VQ,
        "within = self._within(temperature)",
        "within = self._within(1.0)",
        "tests/heads/test_vq.py::test_the_temperature_holds_within_a_code_too",
        "a sample ignores the temperature within a code",
    ),
    Mutant(
        "hf_softheads/heads/forms/sampling.py",
        "return (logits - noise.log_()).argmax(-1)",
        "return (logits - 0.9 * noise.log_()).argmax(-1)",
        "tests/heads/test_contract.py::test_samples_follow_the_distribution[vq-none-1.0]",
        "samples follow a sharper distribution",
    ),
    Mutant(
        _VQ,
        "if not self._known_transform().rises or depth",
        "if depth",
        "tests/heads/test_vq.py::test_a_transform_that_decreases_turns_the_order",
        "top-k takes the worst tokens",
    ),
    Mutant(
        _VQ,
        "                new.bias[:kept] = self.bias[:kept]\n",
        "",
        "tests/heads/test_vq.py::test_resize_keeps_the_old_tokens",
        "resize drops a fitted bias",
    ),
    Mutant(
        "hf_softheads/heads/dense.py",
        "                new.bias[:kept] = self.bias[:kept]\n",
        "",
        "tests/heads/test_vq.py::test_resize_keeps_a_dense_bias",
        "resize drops a dense bias",
    ),
    Mutant(
        _VQ,
        "picked = picked + self.bias[y].float() * self.gain",
        "picked = picked + self.bias[y].float()",
        "tests/heads/test_contract.py::test_methods_agree_with_forward[vq-shape0-scale]",
        "a bias escapes the family's scale",
    ),
    Mutant(
        _BRIDGE + "split_model.py",
        "return self.transform(self.head(hidden).float())",
        "return self.transform(self.transform(self.head(hidden).float()))",
        "tests/test_evaluation.py::test_strict_perplexity",
        "a soft cap is applied twice",
    ),
    # -- losses, training, statistics -----------------------------------------------------------------------------
    Mutant(
        _BRIDGE + "subclass.py",
        "items = head.counted.clamp(min=1) if num_items_in_batch is None else num_items_in_batch",
        "items = head.counted.clamp(min=1)",
        "tests/test_families.py::test_accumulated_gradients_are_those_of_the_whole_batch[llama]",
        "gradient accumulation weighs batches alike",
    ),
    Mutant(
        _BRIDGE + "family_loss.py",
        "torch.cat([labels[:, 1:], ends], 1)",
        "torch.cat([labels[:, :-1], ends], 1)",
        "tests/test_families.py::test_training_loss_inside_the_head[llama]",
        "a token is trained to predict itself",
    ),
    Mutant(
        _BRIDGE + "split_model.py",
        "if not error <= 1e-2 * float(expected.abs().max()) + 1e-4:",
        "if False:",
        "tests/losses/test_objective.py::test_other_logits_than_the_trace_promises_are_refused",
        "a loss is computed from wrong logits",
    ),
    Mutant(
        "hf_softheads/training/objective.py",
        "x = hidden[kept]",
        "x = hidden.roll(1, 1)[kept]",
        "tests/losses/test_objective.py::test_per_token_losses_and_their_gradients[cross_entropy-llama]",
        "the objective predicts from the wrong state",
    ),
    Mutant(
        "hf_softheads/training/distill_head.py",
        "                optimizer.step()\n",
        "",
        "tests/heads/test_models.py::test_trains_without_logits_and_repairs[low_rank]",
        "a repair does nothing",
    ),
    Mutant(
        "hf_softheads/losses/kl.py",
        "values.append(kl_divergence(t, s))",
        "values.append(kl_divergence(s, t))",
        "tests/losses/test_losses.py::test_value_equals_the_definition",
        "teacher and student are swapped in a loss",
    ),
    Mutant(
        "hf_softheads/measure/evaluation.py",
        "kl_divergence(log_q, log_p)",
        "kl_divergence(log_p, log_q)",
        "tests/test_evaluation.py::test_reference",
        "model and reference are swapped in a measured KL",
    ),
    Mutant(
        "hf_softheads/measure/divergence.py",
        "kl_divergence(dense, mine)",
        "kl_divergence(mine, dense)",
        "tests/test_evaluation.py::test_distance_from_the_dense_head",
        "head and dense head are swapped in a stated KL",
    ),
    Mutant(
        "hf_softheads/measure/calibration.py",
        "chosen = keys.topk(self.size, largest=False, sorted=False).indices.sort().values",
        "chosen = torch.arange(self.size)",
        "tests/test_evaluation.py::test_a_reservoir_takes_every_part_of_the_stream_alike",
        "a sample of states is the text's beginning",
    ),
    Mutant(
        "hf_softheads/text/windows.py",
        "ids.masked_fill((mask == 0) | (before == 0), -100)",
        "ids.masked_fill(mask == 0, -100)",
        "tests/test_evaluation.py::test_padding_is_not_counted",
        "a token is predicted from padding",
    ),
]
