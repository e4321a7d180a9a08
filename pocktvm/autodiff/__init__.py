"""Autodiff: what learns, the backward graph, the loss and the updates, before anything runs."""
