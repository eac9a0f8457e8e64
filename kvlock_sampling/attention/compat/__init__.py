"""What else acts on a model beside a lock: context parallelism, step caches, torch.compile."""
