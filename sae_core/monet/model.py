"""Monet as a causal language model of transformers: Llama with experts in place of the MLP.

    x = x + attention(norm(x));  u = norm(x);  x = x + experts(u; g_1, g_2)

Only every ``moe_groups``-th layer has a router; the layers behind it use its gates (arXiv
2412.04139, "we reuse the routings every 4 layers"). Names of modules and parameters are those of
the published checkpoints, which load without code of their own. In training the loss is
loss_LM + moe_aux (uniformity + ambiguity), each averaged over the routers (how the paper joins
several routers is not printed), the uniformity as published or of all logits (``router``).

The only file here that imports transformers: import it when a model is at hand.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from sae_core.errors import UserError
from sae_core.monet.experts import HorizontalExperts, VerticalExperts
from sae_core.monet.router import (
    Gates,
    MonetRouter,
    Seen,
    ambiguity,
    mean_use,
    uniformity,
)

UNIFORMITIES = ("gates", "logits")
DECOMPOSITIONS = {"horizontal": HorizontalExperts, "vertical": VerticalExperts}


class MonetConfig(LlamaConfig):
    """Llama's settings, and those of the experts.

    Args:
        moe_dim: neurons m of an expert (even for ``vertical``).
        moe_heads: routing heads H.
        moe_experts: halves n a side, so n * n experts a layer.
        moe_topk: halves wanted on average a head and side.
        moe_groups: layers that share a router.
        moe_decompose: ``vertical`` or ``horizontal``.
        moe_aux: weight of the two auxiliary losses in training.
        moe_uniformity: of the ``gates``, as published, or of all ``logits``, so that a half that no
            token of a batch uses can come back.
    Raises:
        UserError: settings that do not fit each other.
    """

    model_type = "monet"

    def __init__(
        self,
        moe_dim: int = 8,
        moe_heads: int = 8,
        moe_experts: int = 512,
        moe_topk: int = 32,
        moe_groups: int = 4,
        moe_decompose: str = "vertical",
        moe_aux: float = 1e-3,
        moe_uniformity: str = "gates",
        output_router_probs: bool = False,
        hidden_act: str = "relu2",
        **kwargs: Any,
    ) -> None:
        self.moe_dim, self.moe_heads, self.moe_experts = moe_dim, moe_heads, moe_experts
        self.moe_topk, self.moe_groups, self.moe_decompose = moe_topk, moe_groups, moe_decompose
        self.moe_aux, self.moe_uniformity = moe_aux, moe_uniformity
        self.output_router_probs = output_router_probs
        super().__init__(hidden_act=hidden_act, **kwargs)
        _check(self)


def _check(config: MonetConfig) -> None:
    if config.moe_decompose not in DECOMPOSITIONS:
        raise UserError(
            f"Expected moe_decompose of {', '.join(DECOMPOSITIONS)}, got {config.moe_decompose!r}."
        )
    if config.moe_uniformity not in UNIFORMITIES:
        raise UserError(
            f"Expected moe_uniformity of {', '.join(UNIFORMITIES)}, got {config.moe_uniformity!r}."
        )
    if config.hidden_act != "relu2":
        raise UserError(f"Expected hidden_act 'relu2', got {config.hidden_act!r}.")
    if not 0 < config.moe_topk < config.moe_experts:
        raise UserError(
            f"Expected moe_topk between 1 and moe_experts - 1 = {config.moe_experts - 1}, "
            f"got {config.moe_topk}."
        )
    odd = [name for name in ("hidden_size", "moe_dim") if getattr(config, name) % 2]
    if config.moe_decompose == "vertical" and odd:
        raise UserError(f"Expected an even {odd[0]}, got {getattr(config, odd[0])}.")


@dataclass
class Routing:
    """Gates of one forward pass, by group; each is written by the first layer of its group."""

    gates: dict[int, Gates] = field(default_factory=dict)
    seen: dict[int, Seen] = field(default_factory=dict)

    def auxiliary(self, of: str) -> Tensor:
        """uniformity + ambiguity, averaged over the routers."""
        terms = []
        for group, gates in self.gates.items():
            use = self.seen[group].use if of == "logits" else [mean_use(g) for g in gates]
            terms.append(uniformity(use[0], use[1]) + ambiguity(gates))
        return torch.stack(terms).mean()


@dataclass
class MonetOutput(CausalLMOutputWithPast):
    """Logits and what the routers said."""

    aux_loss: Tensor | None = None
    """uniformity + ambiguity, averaged over the routers; in training."""
    router_probs: tuple[Gates | None, ...] | None = None
    """One entry a layer: (g1, g2), each [b, t, heads, n], where the layer has a router, else None;
    with ``output_router_probs=True``."""


class MonetDecoderLayer(GradientCheckpointingLayer):
    """Attention and experts."""

    def __init__(self, config: MonetConfig, layer_idx: int) -> None:
        super().__init__()
        d, self.group = config.hidden_size, layer_idx // config.moe_groups
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.moe = DECOMPOSITIONS[config.moe_decompose](d, config.moe_experts, config.moe_dim)
        if layer_idx % config.moe_groups == 0:
            self.router = MonetRouter(d, config.moe_heads, config.moe_experts, config.moe_topk)
        self.input_layernorm = LlamaRMSNorm(d, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(d, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, *, routing: Routing, **kwargs: Any) -> Tensor:
        """The residual stream behind the layer."""
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), **kwargs
        )
        hidden_states = hidden_states + attended
        x = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.moe(x, *self._gates(x, routing))

    def _gates(self, x: Tensor, routing: Routing) -> Gates:
        if not hasattr(self, "router"):
            return routing.gates[self.group]
        seen = Seen()
        gates = self.router(x, seen)
        # A layer that is computed again in the backward pass finds its entry there: the layers
        # behind it must go on reading the first gates, and moments are tracked once.
        routing.gates.setdefault(self.group, gates)
        routing.seen.setdefault(self.group, seen)
        return gates


class MonetPreTrainedModel(LlamaPreTrainedModel):
    """Loading, saving and starting weights."""

    config_class = MonetConfig
    config: MonetConfig
    _no_split_modules = ["MonetDecoderLayer"]  # noqa: RUF012 - as transformers declares it
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MonetDecoderLayer,
        "attentions": LlamaAttention,
    }

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        """Never reentrant: gates reach the later layers of a group beside the arguments."""
        chosen = getattr(gradient_checkpointing_func, "keywords", {}) | {"use_reentrant": False}
        super()._set_gradient_checkpointing(enable, partial(checkpoint, **chosen), **kwargs)


class MonetModel(MonetPreTrainedModel, LlamaModel):
    """The decoder without its head."""

    def __init__(self, config: MonetConfig) -> None:
        MonetPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            MonetDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self, *args: Any, routing: Routing | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """As ``LlamaModel``; ``routing`` takes the gates of the pass."""
        routing = Routing() if routing is None else routing
        kwargs.pop("output_router_probs", None)
        beside: dict[str, Any] = {"routing": routing}  # goes through to the layers
        output = super().forward(*args, **beside, **kwargs)
        if self.training:
            for layer in leaders(self):
                layer.router.track(routing.seen[layer.group].moments)
        return output


class MonetForCausalLM(MonetPreTrainedModel, LlamaForCausalLM):
    """The decoder with its head; ``generate``, KV cache and checkpoints as for Llama."""

    _tied_weights_keys = LlamaForCausalLM._tied_weights_keys

    def __init__(self, config: MonetConfig) -> None:
        MonetPreTrainedModel.__init__(self, config)
        self.model = MonetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        *args: Any,
        output_router_probs: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MonetOutput | tuple[Any, ...]:
        """As ``LlamaForCausalLM``, with ``output_router_probs``; see :class:`MonetOutput`."""
        routing = Routing()
        beside: dict[str, Any] = {"routing": routing, "return_dict": True}
        found = super().forward(*args, **beside, **kwargs)
        output = MonetOutput(**found)
        if self.training:
            output.aux_loss = routing.auxiliary(self.config.moe_uniformity)
            if output.loss is not None:
                output.loss = output.loss + self.config.moe_aux * output.aux_loss
        wanted = self.config.output_router_probs
        if wanted if output_router_probs is None else output_router_probs:
            probs: list[Gates | None] = [None] * len(self.model.layers)
            for layer in leaders(self.model):
                probs[layer.self_attn.layer_idx] = routing.gates[layer.group]
            output.router_probs = tuple(probs)
        return output.to_tuple() if return_dict is False else output


def leaders(model: MonetModel) -> list[MonetDecoderLayer]:
    """The layers that have a router."""
    layers = cast("list[MonetDecoderLayer]", model.layers)
    return [layer for layer in layers if hasattr(layer, "router")]


def register() -> None:
    """Let ``AutoModelForCausalLM`` load folders of the type ``monet``."""
    AutoConfig.register("monet", MonetConfig, exist_ok=True)
    AutoModel.register(MonetConfig, MonetModel, exist_ok=True)
    AutoModelForCausalLM.register(MonetConfig, MonetForCausalLM, exist_ok=True)
