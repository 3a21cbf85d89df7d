"""Units and features out: one extractor for audio of any length, and the files that other tools read."""
