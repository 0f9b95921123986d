"""The training loop and the small objects it stands on."""
