"""Small helpers without diffusion in them: files, extras, precision, modules."""
