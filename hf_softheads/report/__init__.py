"""Tables, plots, cards and where numbers came from."""
