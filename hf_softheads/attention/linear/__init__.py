"""Attention variants whose weights are products of features: linear in the length of the text, with a state of fixed
size in place of cached keys and values."""
