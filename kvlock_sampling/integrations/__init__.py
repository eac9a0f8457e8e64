"""Hosts that a lock can work in, one folder each."""
