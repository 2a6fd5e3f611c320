"""From bytes to token ids."""
