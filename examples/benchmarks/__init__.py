"""What the measuring commands share: timing, peers, whole steps, data costs, recorded numbers."""
