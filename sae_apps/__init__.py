"""Applications of sparse autoencoder features; each reads ``sae_core`` alone, none another."""
