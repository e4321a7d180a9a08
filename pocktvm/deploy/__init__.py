"""Artifacts on devices that OpenSSH reaches: probe, upload, self-test, switch, train, fetch."""
