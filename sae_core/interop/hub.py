"""SAEs on the Hugging Face hub, in the layout that SAELens reads: one folder an SAE, one card.

repo/<sae_id>/{cfg.json, sae_weights.safetensors[, sparsity.safetensors]} and a README.md whose
front matter says `library_name: saelens`: `sae_lens.SAE.from_pretrained(repo, sae_id)` reads it.
"""

import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sae_core.errors import UserError
from sae_core.interop.foreign import read_foreign
from sae_core.interop.result import Converted
from sae_core.interop.saelens_write import write_sae_lens
from sae_core.provenance import package_versions
from sae_core.sae import SAE
from sae_core.store import MANIFEST

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"


def push_to_hub(
    sae: SAE,
    repo_id: str,
    sae_id: str,
    facts: dict[str, Any] | None = None,
    *,
    private: bool = False,
    revision: str = "main",
    api: "HfApi | None" = None,
) -> tuple[str, ...]:
    """Upload an SAE as one commit: its folder, and a model card where the repository has none.

    Args:
        sae: of any kind that `write_sae_lens` writes; checked in the same way before the upload.
        repo_id: user/name; created where it does not exist.
        sae_id: folder of the SAE in the repository, e.g. layers.15.out.
        facts: what `load_sae` returns beside the SAE: model_id, hook_point, freq, ...
        private: whether a new repository is private.
        revision: branch.
        api: a client with another endpoint or token; None takes the environment's.
    Returns:
        The notes of `write_sae_lens`.
    Raises:
        UserError: the name of the folder leaves the repository, the SAE cannot be written, or the
            hub refuses.
    """
    folder, facts = _inside(sae_id), facts or {}
    with tempfile.TemporaryDirectory() as temp:
        root = Path(temp)
        notes = write_sae_lens(sae, root / folder, facts)
        try:
            client = api or _client()
            client.create_repo(repo_id, private=private, exist_ok=True)
            if not client.file_exists(repo_id, CARD, revision=revision):
                (root / CARD).write_text(model_card(sae, repo_id, sae_id, facts, notes))
            client.upload_folder(
                repo_id=repo_id, folder_path=root, revision=revision,
                ignore_patterns=[f"**/{MANIFEST}"], commit_message=f"Add {sae_id}",
            )  # fmt: skip
        except (OSError, ValueError) as error:  # what the client's own errors derive from
            raise _refused("upload to", repo_id, error) from error
    return notes


def from_pretrained(
    repo_id: str,
    sae_id: str,
    *,
    revision: str | None = None,
    cache: Path | str | None = None,
    api: "HfApi | None" = None,
) -> Converted:
    """Download one SAE and read it, whichever of the three libraries wrote it.

    Args:
        repo_id: user/name.
        sae_id: folder of the SAE in the repository.
        revision: branch, tag or commit.
        cache: folder of the downloads; None is the hub client's own.
        api: a client with another endpoint or token; None takes the environment's.
    Raises:
        UserError: there is no such repository or folder, no network, or the files cannot be read.
        ConversionError: the SAE does not compute what the file's formula computes.
    """
    folder = _inside(sae_id)
    try:
        root = (api or _client()).snapshot_download(
            repo_id, revision=revision, allow_patterns=[f"{folder}/*"], cache_dir=cache
        )
    except (OSError, ValueError) as error:
        raise _refused("download from", repo_id, error) from error
    if not (Path(root) / folder).is_dir():
        raise UserError(f"Expected the folder {sae_id} in {repo_id}, got no files below it.")
    return read_foreign(Path(root) / folder)


def model_card(
    sae: SAE, repo_id: str, sae_id: str, facts: dict[str, Any], notes: tuple[str, ...]
) -> str:
    """README.md of a repository: what the SAE is, how to load it, what the format cannot say."""
    model = facts.get("model_id")
    base = f"base_model: {model}\n" if isinstance(model, str) and model.count("/") == 1 else ""
    lines = [
        f"---\nlibrary_name: saelens\n{base}tags:\n- sparse-autoencoder\n---",
        f"# {repo_id}",
        f"`{sae_id}`: a sparse autoencoder of {sae.d_sae:,} latents (kind {sae.config.kind}) on "
        f"activations of width {sae.d_in}, {facts.get('hook_point', 'of a place not stated')} of "
        f"{model or 'a model not stated'}. sha256 of weights and configuration: `{sae.hash()}`.",
        f'```python\nfrom sae_lens import SAE\n\nsae = SAE.from_pretrained("{repo_id}", '
        f'"{sae_id}")\n```',
        "\n".join(f"- {note}" for note in notes),
        f"Written by {package_versions('sae-apps', 'torch')}. What these files compute was "
        "compared with the SAE before the upload.",
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def _inside(sae_id: str) -> str:
    path = PurePosixPath(sae_id)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise UserError(f"Expected the name of a folder in the repository, got {sae_id!r}.")
    return path.as_posix()


def _client() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi()


def _refused(what: str, repo_id: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(f"The {what} {repo_id} failed: {reason[0]}")
