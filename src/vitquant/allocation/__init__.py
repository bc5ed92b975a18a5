"""Mixed precision: the sensitivity of each part of a model to its bits, their costs, and the optimal allocation."""
