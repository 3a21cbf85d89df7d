"""Checkpoint formats in and out. The commands are `convert_checkpoint.py` and `export_checkpoint.py`."""
