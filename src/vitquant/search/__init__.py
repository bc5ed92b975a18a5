"""Search algorithms that are independent of models: a callback returns the scores of candidates."""
