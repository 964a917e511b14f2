"""Numbers of a trained run: the exact bound, tasks of ranking, judges of its texts."""
