"""What a patched model is worth: statistics, perplexity, diagnostics, and the head that loses least in a budget."""
