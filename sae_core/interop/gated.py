"""A gated encoder with shared weights is a JumpReLU encoder (arXiv 2404.16014, section 3.2).

With z = (x - b_dec) W_enc, gate z + b_gate > 0 and magnitude relu(e^r z + b_mag), put
pre = e^r z + b_mag: since e^r > 0, the gate is open where pre > b_mag - e^r b_gate. So
acts = pre where pre > max(0, b_mag - e^r b_gate), exactly.
"""

from torch import Tensor

from sae_core.interop.build import Parts


def jump_parts(
    W_enc: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor, W_dec: Tensor, b_dec: Tensor
) -> Parts:
    """The JumpReLU encoder of a gated one.

    Args:
        W_enc: [d_in, d_sae], float64.
        b_gate: [d_sae]; b_mag: [d_sae]; r_mag: [d_sae], logarithm of the magnitude's scale.
        W_dec: [d_sae, d_in]; b_dec: [d_in].
    """
    scale = r_mag.exp()
    return Parts(W_enc * scale, b_mag, W_dec, b_dec, b_mag - scale * b_gate)
