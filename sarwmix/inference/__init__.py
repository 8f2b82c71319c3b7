"""A trained model at work: scenes, pairs, embeddings, export."""
