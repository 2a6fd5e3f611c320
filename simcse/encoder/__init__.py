"""From token ids to embeddings."""
