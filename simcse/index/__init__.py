"""From embeddings to documents."""
