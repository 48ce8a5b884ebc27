"""Monet: mixtures of n x n small experts a layer, made of 2 n halves (arXiv 2412.04139).

    router.py    which experts a token uses, and the two auxiliary losses
    mixing.py    weighted sums over all n x n experts without an n x n tensor, or over some of them
    experts.py   the experts, in horizontal and vertical decomposition
    model.py     a causal language model around them, in the conventions of transformers
    routing.py   routing weights as sparse features
    masks.py     sets of deleted experts: applied while a block runs, saved, loaded
"""
