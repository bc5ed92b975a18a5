"""The one definition of every integer operation: pure functions on int64 tensors, shared by whoever computes them."""
