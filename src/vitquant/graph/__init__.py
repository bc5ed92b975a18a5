"""Reading and rewriting captured graphs: every rewrite here preserves the function."""
