"""Training steps and runs."""
