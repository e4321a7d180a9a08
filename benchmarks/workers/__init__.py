"""One process a contestant; each speaks the same two-line protocol (protocol.py)."""
