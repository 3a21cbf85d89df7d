"""A pretraining run: its config, its model, its batches and updates, what it reports, its validation."""
