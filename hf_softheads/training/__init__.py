"""Losses on a language model without its logits, and the repair of a patched head."""
