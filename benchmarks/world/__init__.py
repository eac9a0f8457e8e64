"""The embedded world's tools for benchmarks: edits with a known right answer, an exact judge, and training."""
