"""The hook of every suppression: which tokens it edits, generation, and what it leaves behind."""

import threading
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model
from torch import Tensor, nn

from sae_apps.suppression.suppress import suppress
from sae_core.errors import UserError
from sae_core.hooks import read_and_stop, resolve_hook_point
from sae_core.models import LanguageModel

IDS = torch.tensor([[1, 403, 407, 261, 300], [1, 388, 402, 9, 77]])
ROUNDING = 2e-4  # logits of sums in another order, at ten times the usual weights


@dataclass(frozen=True)
class Turn:
    """Rotates tokens by a fixed orthogonal step: visible everywhere and never undone."""

    hook_point: str = "layers.1.out"
    strength: float = 1.0
    model_revision: str = "unknown"

    def apply(self, x: Tensor) -> Tensor:
        return x + self.strength * x.roll(1, dims=1)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


def logits(model: Any, ids: Tensor = IDS, **more: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, **more).logits


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_strength_zero_is_the_plain_model_bit_for_bit(model: nn.Module) -> None:
    plain = logits(model)
    with suppress(model, Turn(), strength=0):
        assert n_hooks(model) == 0
        assert torch.equal(logits(model), plain)
    with suppress(model, Turn(), strength=0.5):
        assert not torch.allclose(logits(model), plain)
    assert torch.equal(logits(model), plain)


def test_the_first_and_special_tokens_are_out_of_scope(llama: Any) -> None:
    ids = torch.tensor([[403, 407, 2, 300]])  # 2 ends a text
    point = [resolve_hook_point(llama, "layers.1.out")]
    plain = read_and_stop(llama, point, {"input_ids": ids})["layers.1.out"]
    seen = {}
    for scope in ("text", "all"):
        with suppress(llama, Turn(), scope=scope):
            edited = read_and_stop(llama, point, {"input_ids": ids})["layers.1.out"]
        seen[scope] = (edited != plain).any(dim=-1)[0].tolist()
    assert seen == {"text": [False, True, False, True], "all": [True] * 4}


def test_left_padding_makes_no_difference(model: nn.Module) -> None:
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), IDS], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(IDS)], dim=1)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    with suppress(model, Turn()):
        alone = torch.cat([logits(model, IDS[i : i + 1]) for i in range(2)])
        together = logits(model, padded, attention_mask=mask, position_ids=position)[:, 3:]
    torch.testing.assert_close(together, alone, atol=ROUNDING, rtol=ROUNDING)


def generated(model: Any, **more: Any) -> Tensor:
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0  # left padding
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | more
    return model.generate(IDS, attention_mask=mask, **settings)


def test_generation_with_a_cache_equals_recomputation(model: nn.Module) -> None:
    plain = generated(model)
    with suppress(model, Turn(strength=0.7)):
        cached, whole = generated(model, use_cache=True), generated(model, use_cache=False)
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, plain)


def test_beams_may_be_reordered(llama: Any) -> None:
    with suppress(llama, Turn(strength=0.7)):
        a = generated(llama, num_beams=3, use_cache=True)
        b = generated(llama, num_beams=3, use_cache=False)
    assert torch.equal(a, b)


def test_hooks_are_gone_after_an_error(llama: Any) -> None:
    with pytest.raises(RuntimeError, match="stop"), suppress(llama, Turn()):
        assert n_hooks(llama) == 2
        raise RuntimeError("stop")
    assert n_hooks(llama) == 0


def test_hooks_are_gone_when_a_later_edit_is_refused(llama: Any) -> None:
    edits = [Turn(), Turn(hook_point="layers.99.out")]
    with pytest.raises(UserError, match="layer must be in"), suppress(llama, edits):
        pass
    assert n_hooks(llama) == 0


def test_threads_inside_the_block_are_edited_each_with_its_own_tokens(llama: Any) -> None:
    short, long = IDS[:, :3], IDS.repeat(1, 4)
    results: dict[str, list[Tensor]] = {"short": [], "long": []}

    def work(name: str, ids: Tensor) -> None:
        for _ in range(15):
            results[name].append(logits(llama, ids))

    with suppress(llama, Turn()):
        alone = {"short": logits(llama, short), "long": logits(llama, long)}
        threads = [
            threading.Thread(target=work, args=(name, ids))
            for name, ids in (("short", short), ("long", long))
        ]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    for name, found in results.items():
        assert len(found) == 15
        assert all(torch.equal(one, alone[name]) for one in found)
    assert n_hooks(llama) == 0


def test_several_edits_are_nested_blocks(llama: Any) -> None:
    first, second = Turn(strength=0.3), Turn(hook_point="layers.2.out", strength=0.6)
    with suppress(llama, [first, second]):
        both = logits(llama)
    with suppress(llama, first), suppress(llama, second):
        assert torch.equal(logits(llama), both)
    with suppress(llama, first):
        assert not torch.allclose(logits(llama), both)


def test_gradients_pass_and_inference_mode_works(llama: Any) -> None:
    embedded = llama.get_input_embeddings()(IDS).detach().requires_grad_()
    with suppress(llama, Turn(), scope="all"):
        llama(inputs_embeds=embedded).logits.sum().backward()
        with torch.inference_mode():
            inferred = llama(IDS).logits
        assert torch.allclose(inferred, logits(llama))
    assert embedded.grad is not None and embedded.grad.abs().sum() > 0


def test_half_precision_is_computed_in_float32() -> None:
    seen = []

    @dataclass(frozen=True)
    class Look(Turn):
        def apply(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return x

    half = tiny_model("llama").to(torch.bfloat16)
    plain = logits(half)
    with suppress(half, Look()):
        assert torch.equal(logits(half), plain)
    assert seen == [torch.float32]


def test_a_model_may_come_in_its_holder(llama: Any) -> None:
    tokenizer = SimpleNamespace(all_special_ids=[1, 2])
    with suppress(llama, Turn()):
        bare = logits(llama)
    for holder in (LanguageModel(llama, tokenizer, "m", "r"), SimpleNamespace(model=llama)):
        with suppress(holder, Turn()):
            assert torch.equal(logits(llama), bare)


def test_bad_input_is_refused(llama: Any) -> None:
    lm = LanguageModel(llama, SimpleNamespace(all_special_ids=[]), "mine", "abc")
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (llama, Turn(), {"scope": "some"}, "a scope of .* got 'some'"),
        (llama, Turn(), {"strength": -1.0}, "strength of at least 0, got -1.0"),
        (llama, Turn(), {"strength": float("nan")}, "strength of at least 0, got nan"),
        (llama, Turn(hook_point="layers.1.up"), {}, "Unknown hook point"),
        ("llama", Turn(), {}, "got str"),
        (lm, replace(Turn(), model_revision="xyz"), {}, r"\(xyz\), got mine \(abc\)"),
    ]
    for model, edit, more, message in cases:
        with pytest.raises(UserError, match=message), suppress(model, edit, **more):
            pass
    assert n_hooks(llama) == 0
