"""Searches that know nothing of models: they ask for the value of candidates and are told it."""
