"""Small helpers that know nothing of diffusion: files, precision, modules, optional packages."""
