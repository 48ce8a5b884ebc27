"""Sparse products of an autoencoder: references, CSR versions, autograd functions."""
