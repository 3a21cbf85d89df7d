"""Pictures: of utterances and scores, and of a run as it goes."""
