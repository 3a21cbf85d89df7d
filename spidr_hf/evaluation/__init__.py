"""Scores of units and features against phones: purities, PNMI, ABX."""
