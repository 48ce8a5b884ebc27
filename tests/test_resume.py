"""A pass that starts behind a block ends where a whole pass does, and leaves nothing behind."""

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model

from sae_core.errors import UserError
from sae_core.hooks import read_and_stop, replace_value, resolve_hook_point
from sae_core.resume import resume_from

IDS = torch.tensor([[1, 5, 9, 3], [2, 7, 4, 8]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resuming_is_the_whole_pass(architecture: str) -> None:
    model = tiny_model(architecture)
    point = resolve_hook_point(model, "layers.1.out")
    with torch.no_grad():
        whole = model(input_ids=IDS, use_cache=False).logits
        state = read_and_stop(model, [point], {"input_ids": IDS})[point.name]
        with resume_from(model, point, state):
            again = model(input_ids=IDS, use_cache=False).logits
        with replace_value(model, point, lambda value: 2 * value):
            doubled = model(input_ids=IDS, use_cache=False).logits
        with resume_from(model, point, 2 * state):
            resumed = model(input_ids=IDS, use_cache=False).logits
        after = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(again, whole) and torch.equal(after, whole)
    assert torch.equal(resumed, doubled) and not torch.allclose(resumed, whole)


def test_skipped_blocks_do_not_run_and_come_back_after_an_error() -> None:
    model = tiny_model(next(iter(ARCHITECTURES)))
    point = resolve_hook_point(model, "layers.1.out")
    ran = []
    names = [resolve_hook_point(model, f"layers.{i}.out").path for i in (0, 1)]
    blocks = [model.get_submodule(name) for name in names]
    handles = [b.mlp.register_forward_hook(lambda *_: ran.append(1)) for b in blocks]
    state = torch.zeros(2, 4, read_width(model))
    with pytest.raises(ZeroDivisionError), torch.no_grad(), resume_from(model, point, state):
        model(input_ids=IDS, use_cache=False)
        assert not ran
        raise ZeroDivisionError
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    assert len(ran) == 2 and not any("forward" in block.__dict__ for block in blocks)
    for handle in handles:
        handle.remove()


def read_width(model: torch.nn.Module) -> int:
    return model.get_input_embeddings().weight.shape[1]


def test_only_outputs_of_blocks() -> None:
    model = tiny_model(next(iter(ARCHITECTURES)))
    for name in ("layers.1.in", "layers.1.mlp.out"):
        point = resolve_hook_point(model, name)
        with pytest.raises(UserError, match="Expected the output of a block"), resume_from(
            model, point, torch.zeros(1, 1, 1)
        ):
            pass
