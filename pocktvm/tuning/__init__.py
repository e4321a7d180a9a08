"""Tuning: MetaSchedule searches the rules' knobs; the best of each kernel is kept as a record."""
