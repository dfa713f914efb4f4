"""What trained models are measured for beyond their training runs: evaluations, sweeps, the papers' analyses."""
