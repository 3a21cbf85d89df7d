"""What every other folder stands on: files that are complete or not there, and how a process uses memory."""
