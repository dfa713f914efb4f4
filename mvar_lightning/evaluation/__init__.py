"""What trained models are measured for beyond their training runs: evaluations, the papers' analyses."""
