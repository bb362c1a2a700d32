"""What the fits of several heads use."""
