"""The paper's tables as benchmarks: a definition each, what runs them, the rules that judge them, and their page."""
