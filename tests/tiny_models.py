"""Random language models of five architectures, small enough for tests, and one tokenizer."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

from sae_core.sae import SAE, SAEConfig

N_LAYERS = 4
D_MODEL = 32
SLIDING_WINDOW = 16
MAX_POSITIONS = 128
_VOCAB = 512  # of the tokenizer of stories260k
_SIZES = {
    "vocab_size": _VOCAB,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # ten times the usual width: at the usual one attention is nearly uniform and a leak from
    # another sequence would drown in the residual stream
    "initializer_range": 0.2,
}
ARCHITECTURES = ("llama", "gemma3", "gpt2", "gpt_neox", "qwen2")


def _config(architecture: str) -> PretrainedConfig:
    grouped = {**_SIZES, "num_key_value_heads": 2}
    if architecture == "llama":
        return LlamaConfig(**grouped)
    if architecture == "qwen2":
        return Qwen2Config(**grouped)
    if architecture == "gpt_neox":
        return GPTNeoXConfig(**_SIZES)
    if architecture == "gemma3":
        kinds = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)
        return Gemma3TextConfig(
            **grouped, head_dim=8, sliding_window=SLIDING_WINDOW, layer_types=kinds
        )
    return GPT2Config(
        vocab_size=_VOCAB,
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=4,
        n_positions=MAX_POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )


def tiny_model(architecture: str, attention: str = "sdpa") -> torch.nn.Module:
    """The same weights each time; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = _config(architecture)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def mirror_sae() -> SAE:
    """Reads the positive and the negative part of every dimension: an exact reconstruction."""
    sae = SAE(SAEConfig(64, 128, "relu"))
    eye = torch.eye(64)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
    return sae.eval()
