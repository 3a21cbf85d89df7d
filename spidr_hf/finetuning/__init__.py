"""A fine-tuning run: its task (CTC, utterances, speakers, frames), its batches, its loop."""
