"""What several heads are made of: modules whose rows are rebuilt or coded, wrappers, and what is done to logits."""
