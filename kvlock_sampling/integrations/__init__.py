"""Hosts that a lock works in, one folder each."""
