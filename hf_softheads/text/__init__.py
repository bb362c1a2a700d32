"""Every source of text becomes token windows here."""
