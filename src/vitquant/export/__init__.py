"""Other runtimes' formats."""
