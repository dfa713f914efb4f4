"""The papers' analyses of trained models: attention (MVAR), alignment and perturbation (Markov-VAR), scaling (VAR)."""
