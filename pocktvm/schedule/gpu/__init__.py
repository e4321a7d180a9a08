"""Rules for GPUs: loop nests bound to blocks and threads, one float a thread at a time."""
