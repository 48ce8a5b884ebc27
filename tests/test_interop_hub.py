"""Upload to and download from a stand-in for the hub on loopback, through the real client."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from huggingface_hub import HfApi, constants

from sae_core.errors import UserError
from sae_core.interop.hub import from_pretrained, push_to_hub
from sae_core.sae import SAE, SAEConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/saes"


class Hub(BaseHTTPRequestHandler):
    """The calls that an upload of small files and a snapshot need; files live in `server.files`."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        sent = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}
        for name, value in (sent | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def as_json(self, value: object, status: int = 200) -> None:
        self.answer(json.dumps(value).encode(), status, Content_Type="application/json")

    def url(self, path: str) -> str:
        return f"http://{self.headers['Host']}/{path}"

    def do_GET(self) -> None:
        files = self.server.files  # type: ignore[attr-defined]
        if found := re.match(rf"/{REPO}/resolve/\w+/(.*)", self.path):
            if found[1] not in files:
                self.answer(b"", 404, X_Error_Code="EntryNotFound")
                return
            content = files[found[1]]
            self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        elif re.match(rf"/api/models/{REPO}/tree/", self.path):
            self.as_json([
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in files.items()
            ])  # fmt: skip
        elif self.path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": name, "size": len(files[name])} for name in files]
            self.as_json({"id": REPO, "sha": COMMIT, "siblings": siblings})
        else:
            self.answer(b"", 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/api/repos/create":
            self.as_json({"url": self.url(REPO), "id": REPO})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in asked]  # fmt: skip
            self.as_json({"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    content = base64.b64decode(value["content"])
                    self.server.files[value["path"]] = content  # type: ignore[attr-defined]
            url = self.url(f"{REPO}/commit/{COMMIT}")
            self.as_json({"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:
            self.as_json({"ok": True})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[HfApi, dict[str, bytes]]]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # this server is on loopback
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    yield HfApi(endpoint=endpoint, token="hf_none"), server.files  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def make() -> SAE:
    sae = SAE(SAEConfig(8, 24, k=4), generator=torch.Generator().manual_seed(0))
    sae.b_enc.data = -0.2 * torch.rand(24, generator=torch.Generator().manual_seed(1))
    return sae.eval()


def test_what_is_pushed_comes_back(hub: tuple[HfApi, dict[str, bytes]], tmp_path: Path) -> None:
    api, files = hub
    sae, facts = make(), {"model_id": "org/model", "hook_point": "layers.3.out"}
    notes = push_to_hub(sae, REPO, "layers.3.out", facts, api=api)
    folder = {"layers.3.out/cfg.json", "layers.3.out/sae_weights.safetensors"}
    assert set(files) - {".gitattributes"} == folder | {"README.md"}
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: saelens\nbase_model: org/model\n")
    assert f'SAE.from_pretrained("{REPO}", "layers.3.out")' in card and sae.hash() in card
    assert notes and all(f"- {note}" in card for note in notes)
    files["other/cfg.json"] = b"{}"
    converted = from_pretrained(REPO, "layers.3.out", cache=tmp_path, api=api)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(converted.sae.encode(x), sae.encode(x))
    assert converted.facts["hook_point"] == "layers.3.out"
    assert not list(tmp_path.rglob("other")), "only the folder that was asked for"


def test_a_card_that_is_there_stays(hub: tuple[HfApi, dict[str, bytes]]) -> None:
    api, files = hub
    files["README.md"] = b"mine"
    push_to_hub(make(), REPO, "a/b", api=api)
    assert files["README.md"] == b"mine" and "a/b/cfg.json" in files


def test_what_is_not_there_is_one_sentence(
    hub: tuple[HfApi, dict[str, bytes]], tmp_path: Path
) -> None:
    api, files = hub
    files["README.md"] = b"mine"
    with pytest.raises(UserError, match=f"the folder layers.9 in {REPO}, got no files"):
        from_pretrained(REPO, "layers.9", cache=tmp_path, api=api)
    with pytest.raises(UserError, match="The download from no/such failed: "):
        from_pretrained("no/such", "x", cache=tmp_path, api=api)
    for name in ("", "../x", "/x", "a/../../x"):
        with pytest.raises(UserError, match="name of a folder in the repository"):
            from_pretrained(REPO, name, api=api)
        with pytest.raises(UserError, match="name of a folder in the repository"):
            push_to_hub(make(), REPO, name, api=api)


def test_a_refusal_of_the_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"The upload to {REPO} failed: "):
        push_to_hub(make(), REPO, "x")
