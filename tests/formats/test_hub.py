"""`push`: the real client of huggingface_hub against a server on this machine, and the model card."""

import base64
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.formats.card import card_text
from softprompt_kernels.formats.content import Content
from softprompt_kernels.formats.exporting import export
from softprompt_kernels.formats.files import read
from softprompt_kernels.formats.hub import push
from softprompt_kernels.prompts import KVPrompt

BASE = "org/base"


@dataclass
class Hub:
    """A hub with one repository, `me/prompt`. `files` is None until it is made."""

    url: str = ""
    files: dict[str, bytes] | None = None
    asked: list[str] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)
    refuses: bool = False

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        self.asked.append(f"{method} {path}")
        if self.refuses and method == "POST":
            return 403, {"error": "read only"}
        if path == "/api/repos/create":
            self.made, self.files = json.loads(body), self.files or {}
            return 200, {"url": f"{self.url}/me/prompt", "id": "me/prompt"}
        if self.files is None:
            return 404, {}
        if "/preupload/" in path:
            sizes = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in sizes]}
        if "/commit/" in path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "deletedFile":
                    del self.files[entry["value"]["path"]]
            return 200, {"commitUrl": f"{self.url}/me/prompt/commit/1", "commitOid": "1"}
        if "/tree/" in path:
            return 200, [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.files]
        return 200, {"id": "me/prompt", "siblings": [{"rfilename": name} for name in self.files]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            status, value = found.answer(self.command, self.path, body)
            data = json.dumps(value).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("x-error-code", "RepoNotFound")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_HEAD = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield found
    server.shutdown()
    server.server_close()


def send(folder: Path, **options: Any) -> str:
    return push(folder, read(folder), "me/prompt", **{"base_model": BASE, **options})


def test_a_prompt_is_uploaded_with_a_card_and_without_paths_or_texts(
    hub: Hub, kv: KVPrompt, saved: Callable[..., Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    secret = "The red house by the river is number seven, and its owner keeps nine geese and a cat."
    folder = saved(
        kv,
        context={
            "sha256": "cd" * 32,
            "tokens": 40,
            "text": secret,
            "template_arguments": {"documents": [secret], "a": 1},
        },
        objective={"name": "kl", "queries": "ada/questions.jsonl", "loss": "f of ../mine.py", "/home/x": 1, secret: 2},
    )
    assert str(tiny_model_folder) in (folder / "adapter_config.json").read_text()
    with pytest.warns(
        UserWarning, match=r"template_arguments.documents\[0\], 2 names in objective, objective.loss, objective.queries"
    ):
        address = send(folder, private=True)
    assert address == f"{hub.url}/me/prompt" and hub.made["visibility"] == "private"
    assert hub.files is not None
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "softprompt.json"}
    assert set(hub.files) == names
    everything = b"\n".join(hub.files[name] for name in names - {"adapter_model.safetensors"}).decode()
    for private in (secret, secret[:30], str(tiny_model_folder), str(tmp_path), "/home", "mine.py", "questions.jsonl"):
        assert private not in everything
    assert hub.files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    record = json.loads(hub.files["softprompt.json"])
    assert record["context"] == {"sha256": "cd" * 32, "tokens": 40, "template_arguments": {"documents": [], "a": 1}}
    assert record["model"] == read(folder).record["model"] and record["figures"]["recovered"] == 0.75
    card = ModelCard(hub.files["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == (BASE, "peft") and "soft-prompt" in (card.data.tags or [])
    for text in (
        "softprompt generate --model org/base --prompt me/prompt",
        "PeftModel",
        "cd" * 32,
        "0.75",
        "40 tokens",
    ):
        assert text in card.text


def test_the_commands_of_a_card_hold_any_name(content: Content) -> None:
    odd = replace(content, base_model="my models/a\n`$(b)", record=content.record | {"objective": {"name": "a\n# b"}})
    text = card_text(odd, "float32", 'a "b" c')
    assert """softprompt generate --model 'my models/a `$(b)' --prompt 'a "b" c' "your question\"""" in text
    assert 'from_pretrained(model, "a \\"b\\" c")' in text and "objective: name a # b\n" in text
    assert ModelCard(text).data.base_model == odd.base_model


def test_a_second_upload_replaces_the_first_also_in_another_dtype(
    hub: Hub, kv: KVPrompt, saved: Callable[..., Path], tmp_path: Path
) -> None:
    send(saved(kv))
    export(read(saved(kv)), "folder", tmp_path / "int8", dtype="int8")
    send(tmp_path / "int8")
    assert hub.files is not None and "adapter_model.safetensors" not in hub.files
    assert "prompt_int8.safetensors" in hub.files and "PEFT cannot read" in hub.files["README.md"].decode()


def test_a_card_of_the_user_is_kept_and_one_with_a_path_is_refused(
    hub: Hub, kv: KVPrompt, saved: Callable[..., Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    export(read(saved(kv)), "folder", tmp_path / "mine")
    card = tmp_path / "mine" / "README.md"
    assert str(tiny_model_folder) in card.read_text()
    send(tmp_path / "mine")  # a card that `export` made is made again, without the path
    assert hub.files is not None and str(tiny_model_folder) not in hub.files["README.md"].decode()
    card.write_text(f"my words on {tiny_model_folder}\n")
    with pytest.raises(SoftPromptError, match="has the local path"):
        send(tmp_path / "mine")
    card.write_text("my words\n")
    send(tmp_path / "mine")
    assert hub.files["README.md"] == b"my words\n"


def test_what_is_no_upload(
    hub: Hub, kv: KVPrompt, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = saved(kv)
    with pytest.raises(SoftPromptError, match="--base-model with its name on the hub"):
        send(folder, base_model=None)
    with pytest.raises(SoftPromptError, match="--base-model: names the local folder"):
        send(folder, base_model=str(tmp_path))
    for name in ("prompt", "a/b/c", "me/..", "me/ x"):
        with pytest.raises(SoftPromptError, match="accepted is USER/NAME"):
            push(folder, read(folder), name, base_model=BASE)
    export(read(folder), "safetensors", tmp_path / "p.safetensors")
    with pytest.raises(SoftPromptError, match="got safetensors, accepted is a folder"):
        send(tmp_path / "p.safetensors")
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(b"12")
    with pytest.raises(SoftPromptError, match="truncated"):
        send(tmp_path / "cut")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(SoftPromptError, match="no token for the hub was found; accepted are `hf auth login`"):
        send(folder)
    assert hub.asked == []


def test_a_repository_with_something_else_and_a_hub_that_refuses(
    hub: Hub, kv: KVPrompt, saved: Callable[..., Path]
) -> None:
    hub.files = {".gitattributes": b"", "model.safetensors": b"weights"}
    with pytest.raises(SoftPromptError, match=r"me/prompt holds something else \(model.safetensors\)"):
        send(saved(kv))
    assert not any(one.startswith("POST") and "repos" in one for one in hub.asked)
    hub.files, hub.refuses = None, True
    with pytest.raises(SoftPromptError, match="--repo: me/prompt could not be written"):
        send(saved(kv))
