"""pocktvm: a model in, one shared library out that trains on the device that holds it."""
