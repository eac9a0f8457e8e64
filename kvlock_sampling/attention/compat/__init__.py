"""Other changes to a model that a lock works with: context parallelism, step caches, torch.compile, ComfyUI."""
