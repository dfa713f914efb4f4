"""Runs: recipes checked and built, trained from data to report, and compared in sweeps."""
