"""Hook points: names on five architectures, the forward pass that stops, replaced values."""

import pytest
import torch
from tiny_models import ARCHITECTURES, D_MODEL, N_LAYERS, tiny_model
from torch import Tensor, nn

from sae_core.errors import UserError
from sae_core.hooks import (
    hook_point_names,
    read_and_stop,
    replace_value,
    resolve_hook_point,
)

IDS = torch.tensor([[1, 403, 407, 261, 300], [1, 388, 402, 9, 77]])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny_model("llama")


def read(model: nn.Module, *names: str) -> dict[str, Tensor]:
    points = [resolve_hook_point(model, name) for name in names]
    return read_and_stop(model, points, {"input_ids": IDS})


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- which value a name means -------------------------------------------------------------------


def test_block_outputs_are_the_hidden_states_of_transformers(model: nn.Module) -> None:
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
    for layer in range(N_LAYERS - 1):  # the last of transformers' list is behind the final norm
        got = read(model, f"layers.{layer}.in", f"layers.{layer}.out")
        assert torch.equal(got[f"layers.{layer}.in"], hidden[layer])
        assert torch.equal(got[f"layers.{layer}.out"], hidden[layer + 1])


def test_mlp_and_attention_are_the_modules_of_the_block(model: nn.Module) -> None:
    mlp = model.get_submodule(resolve_hook_point(model, "layers.2.mlp.out").path)
    got = read(model, "layers.2.mlp.in", "layers.2.mlp.out")
    with torch.no_grad():
        assert torch.equal(mlp(got["layers.2.mlp.in"]), got["layers.2.mlp.out"])
    attention = resolve_hook_point(model, "layers.2.attn.out")
    assert "attn" in attention.path or "attention" in attention.path
    attn_in_out = read(model, "layers.2.attn.in", "layers.2.attn.out")
    assert {v.shape for v in attn_in_out.values()} == {(*IDS.shape, D_MODEL)}
    assert not torch.equal(*attn_in_out.values())


def test_the_parts_add_up_to_the_block() -> None:
    """gpt2: out = in + attn.out + mlp.out, so the three points are really the three terms."""
    gpt2 = tiny_model("gpt2")
    names = [f"layers.1.{p}" for p in ("in", "attn.out", "mlp.out", "out")]
    before, attn, mlp, after = (read(gpt2, *names)[name] for name in names)
    torch.testing.assert_close(before + attn + mlp, after)


def test_every_listed_name_can_be_read(model: nn.Module) -> None:
    names = hook_point_names(model)
    assert len(names) == 6 * N_LAYERS
    assert set(read(model, *names)) == set(names)


def test_a_module_path_names_the_same_place(llama: nn.Module) -> None:
    names = ["layers.1.out", "model.layers.1.out", "model.layers.1.mlp.act_fn.out"]
    got = read(llama, *names)
    assert torch.equal(got[names[0]], got[names[1]])
    assert got[names[2]].shape == (*IDS.shape, 48)


# --- the pass stops -----------------------------------------------------------------------------


def test_no_later_module_runs_and_no_logits_are_computed(model: nn.Module) -> None:
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
    ]
    try:
        read(model, "layers.0.out", "layers.1.mlp.out")
        stopped = list(called)
        called.clear()
        with torch.no_grad():
            model(IDS)
    finally:
        for handle in handles:
            handle.remove()
    block = resolve_hook_point(model, "layers.2.out").path
    head = next(name for name in ("lm_head", "embed_out") if name in called)
    # the control: in a whole pass the later block and the head are called
    assert block in called
    assert block not in stopped and head not in stopped
    assert resolve_hook_point(model, "layers.1.out").path in stopped


def test_the_value_is_taken_before_later_layers_can_write_into_it(llama: nn.Module) -> None:
    clean = read(llama, "layers.0.out")["layers.0.out"]
    block = llama.model.layers[1]

    def erase(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].zero_()

    handle = block.register_forward_pre_hook(erase)
    try:
        got = read(llama, "layers.0.out", "layers.2.out")
    finally:
        handle.remove()
    assert torch.equal(got["layers.0.out"], clean)


def test_values_can_be_used_in_a_backward_pass(llama: nn.Module) -> None:
    x = read(llama, "layers.0.out")["layers.0.out"]
    weight = torch.ones(D_MODEL, requires_grad=True)
    (x @ weight).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_hooks_are_gone_after_an_error(llama: nn.Module) -> None:
    points = [resolve_hook_point(llama, "layers.1.out")]

    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        read_and_stop(llama, points, {"input_ids": IDS}, broken)
    assert n_hooks(llama) == 0
    with pytest.raises(RuntimeError, match="inside"), replace_value(llama, points[0], broken):
        assert n_hooks(llama) == 1
        llama(IDS)
    assert n_hooks(llama) == 0


# --- replacing ----------------------------------------------------------------------------------


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("part", ["in", "out", "mlp.in", "mlp.out", "attn.in", "attn.out"])
def test_the_same_value_changes_nothing_and_another_does(model: nn.Module, part: str) -> None:
    point = resolve_hook_point(model, f"layers.1.{part}")
    clean = logits(model)
    with replace_value(model, point, torch.clone):
        assert torch.equal(logits(model), clean)
    with replace_value(model, point, torch.zeros_like):
        assert not torch.allclose(logits(model), clean)
        again = read_and_stop(
            model, [resolve_hook_point(model, "layers.1.out")], {"input_ids": IDS}
        )
    assert torch.equal(logits(model), clean)
    assert torch.isfinite(again["layers.1.out"]).all()


def test_a_spliced_layer_gives_the_activations_of_the_other_run(llama: nn.Module) -> None:
    """The output of layer 2 put in at layer 0 makes layers 1.. see it as their input."""
    donor = read(llama, "layers.2.out")["layers.2.out"]
    with replace_value(llama, resolve_hook_point(llama, "layers.0.out"), lambda _: donor):
        assert torch.equal(read(llama, "layers.1.in")["layers.1.in"], donor)


def test_two_points_at_once_and_two_on_one_point(llama: nn.Module) -> None:
    first, second = (resolve_hook_point(llama, f"layers.{n}.mlp.out") for n in (0, 2))
    with replace_value(llama, first, torch.zeros_like):
        one = logits(llama)
        with replace_value(llama, second, torch.zeros_like):
            both = logits(llama)
        assert torch.equal(logits(llama), one)
    assert not torch.allclose(one, both)
    out = resolve_hook_point(llama, "layers.3.out")
    with (
        replace_value(llama, out, lambda v: v + 1),
        replace_value(llama, out, lambda v: v * 2),
    ):
        value = read(llama, "layers.3.out")["layers.3.out"]
    clean = read(llama, "layers.3.out")["layers.3.out"]
    assert torch.equal(value, (clean + 1) * 2)


def test_a_float32_result_fits_a_bfloat16_model() -> None:
    model = tiny_model("qwen2").to(torch.bfloat16)
    point = resolve_hook_point(model, "layers.1.out")
    with replace_value(model, point, lambda v: v.float()):
        assert logits(model).dtype == torch.bfloat16


def test_another_shape_is_refused(llama: nn.Module) -> None:
    point = resolve_hook_point(llama, "layers.1.out")
    with (
        replace_value(llama, point, lambda v: v[..., :5]),
        pytest.raises(UserError, match=r"layers.1.out.*\(2, 5, 32\).*\(2, 5, 5\)"),
    ):
        logits(llama)


# --- bad names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.4.out", r"layer must be in 0\.\.3, got 4"),
        ("layers.99.mlp.in", r"layer must be in 0\.\.3, got 99"),
        ("layers.1.output", r"nearest that exist are layers\.1\.out"),
        ("layers.1.mpl.out", r"layers\.1\.mlp\.out"),
        ("layer.2.attn.out", r"layers\.2\.attn\.out"),
        ("model.layers.1.mlp.act.out", r"model\.layers\.1\.mlp\.act_fn\.out"),
        ("layers.-1.out", r"Unknown hook point.*nearest"),
        ("model.layers.1.mlp", r"Unknown hook point.*nearest"),
        ("nonsense", r"Unknown hook point.*layers\.0\.out"),
        ("", r"Unknown hook point"),
    ],
)
def test_bad_names_have_their_message(llama: nn.Module, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_hook_point(llama, name)


def test_a_place_that_the_pass_never_reaches_is_refused(llama: nn.Module) -> None:
    with pytest.raises(UserError, match="lm_head.out.*never reaches"):
        read(llama, "lm_head.out")


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="Expected a decoder"):
        resolve_hook_point(nn.Linear(2, 2), "layers.0.out")


def test_a_place_without_a_tensor_is_refused(llama: nn.Module) -> None:
    with pytest.raises(UserError, match="must carry a tensor"):
        read(llama, "model.layers.1.self_attn.in", "model.in")
