"""The commands that people run. Each is a file of its own, and nothing imports them."""
