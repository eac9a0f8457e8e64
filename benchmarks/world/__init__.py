"""Tools for benchmarks on the stage: edits with a known right answer, a judge, and training."""
