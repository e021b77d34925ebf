"""`softprompt inspect`, `export`, `import` and `push`: a prompt leaves this package and comes back the same."""

import base64
import io
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from softprompt_kernels.compress import ChatFormat, load_model
from softprompt_kernels.models import prefix_of, prompted_logits
from softprompt_kernels.prompts import EmbeddingPrompt, load, save


@pytest.fixture
def refused(run):
    """`refused(*arguments)`: the message of a command that must end with exit code 2 and one sentence."""

    def check(*arguments: object) -> str:
        result = run(*arguments)
        assert result.exit_code == 2 and "Traceback" not in result.output, result.output
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1, result.stderr
        return errors[0]

    return check


@pytest.fixture
def vectors(inputs, tmp_path) -> Path:
    """The folder of an embedding prompt."""
    model, tokenizer = load_model(str(inputs.model))
    torch.manual_seed(4)
    save(tmp_path / "vectors", EmbeddingPrompt(torch.randn(5, 32)), model=model, tokenizer=tokenizer)
    return tmp_path / "vectors"


def evaluate(run, inputs, prompt: Path, file: Path) -> dict[str, float]:
    files = ["--context", inputs.context, "--prompt", prompt, "--queries", inputs.heldout, "--json", file]
    result = run("evaluate", "--model", inputs.model, *files, "--new-tokens", 6)
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text())["queries"]


@pytest.mark.parametrize(
    ("to", "queries_at"), [("peft", "k"), ("safetensors", "k"), ("cartridges", "k"), ("cartridges", "0")]
)
def test_a_prompt_that_was_exported_and_imported_has_the_same_figures(run, inputs, finished, tmp_path, to, queries_at):
    prompt, there, back = finished.folder / "prompt", tmp_path / "there", tmp_path / "back"
    moving = ["--queries-at", "0", "--model", inputs.model] if queries_at == "0" else []
    result = run("export", prompt, "--to", to, "--output", there, *moving)
    assert result.exit_code == 0, result.output
    if to == "peft":
        model = AutoModelForCausalLM.from_pretrained(inputs.model).eval()
        ids = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))
        ours, tokenizer = load_model(str(inputs.model))
        with torch.no_grad():
            theirs = PeftModel.from_pretrained(model, str(there)).eval()(input_ids=ids).logits
            expected = prompted_logits(ours, ids, prefix_of(ours, load(prompt, ours, tokenizer)[0]))
        assert (theirs - expected).abs().max() <= 1e-5
        (there / "softprompt.json").unlink()  # what is left is PEFT's own folder
    result = run("import", there, "--from", to, "--model", inputs.model, "--output", back)
    assert result.exit_code == 0, result.output
    assert f"12 tokens from {to}" in result.stdout and ("moved by 12" in result.stdout) == (queries_at == "0")
    found = evaluate(run, inputs, back, tmp_path / "e.json")
    expected = json.loads((finished.folder / "evaluation.json").read_text())["heldout"]
    for name in ("kl_none", "kl_prompt", "kl_truncated", "recovered", "top1_agreement"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5), name


def test_inspect_says_what_a_prompt_is_and_whether_it_fits(run, inputs, finished, tmp_path):
    prompt = finished.folder / "prompt"
    text = run("inspect", prompt, "--model", inputs.model).stdout
    for part in (
        "kv (CARTRIDGE)",
        "12, the first 1 frozen",
        "layers 2, kv heads 2, head size 8",
        "float32",
        "recovered",
    ):
        assert part in text
    assert "yes (weights compared)" in text
    other = tmp_path / "other"
    LlamaForCausalLM(AutoModelForCausalLM.from_pretrained(inputs.model).config).save_pretrained(other)
    AutoTokenizer.from_pretrained(inputs.model).save_pretrained(other)
    result = run("inspect", prompt, "--json", "--model", other)
    facts = json.loads(result.stdout)
    assert result.exit_code == 1 and facts["model"]["fits"] is False and "other values" in facts["model"]["reasons"][0]
    record = json.loads((prompt / "softprompt.json").read_text())
    assert facts["context"] == record["context"] and facts["figures"] == record["figures"]


def test_the_loss_of_8_bits_is_shown(run, inputs, finished, tmp_path):
    files = ["--queries", inputs.heldout, "--new-tokens", 6]
    command = ["export", finished.folder / "prompt", "--dtype", "int8", "--output", tmp_path / "p"]
    text = run(*command).stdout
    assert "12 tokens in int8" in text and "relative error of keys" in text and "KL" not in text
    text = run(*command, "--model", inputs.model, *files).stdout
    (row,) = [line.split() for line in text.splitlines() if line.startswith("Rounded prompt")]
    assert "KL to the unrounded prompt" in text and 0 < float(row[2]) < 1e-2
    text = run(*command, "--model", inputs.model, *files, "--context", inputs.context).stdout
    before, after = ([float(x) for x in line.split()[2:]] for line in text.splitlines() if "ounded prompt  " in line)
    expected = json.loads((finished.folder / "evaluation.json").read_text())["heldout"]
    assert before[:2] == pytest.approx([expected["kl_prompt"], expected["recovered"]], abs=2e-5)
    assert after != before and after[:2] == pytest.approx(before[:2], abs=2e-2)
    found = evaluate(run, inputs, tmp_path / "p", tmp_path / "e.json")
    assert found["recovered"] == pytest.approx(after[1], abs=2e-5)


def test_what_vllm_would_answer_is_what_generate_answers(run, inputs, vectors, tmp_path):
    file, question = tmp_path / "request.json", "Who owns it?"
    command = ["export", vectors, "--to", "vllm-embeds", "--model", inputs.model, "--question", question]
    for _ in range(2):  # a request is replaced by another
        result = run(*command, "--new-tokens", 6, "--served-name", "tiny", "--output", file)
        assert result.exit_code == 0, result.output
    body = json.loads(file.read_text())
    _, tokenizer = load_model(str(inputs.model))
    embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
    assert body["model"] == "tiny" and embeds.shape == (5 + len(ChatFormat(tokenizer).query_ids(question)), 32)
    plain = AutoModelForCausalLM.from_pretrained(inputs.model).eval()
    options = {"max_new_tokens": body["max_tokens"], "do_sample": False, "eos_token_id": body["stop_token_ids"]}
    answer = plain.generate(inputs_embeds=embeds[None], **options)[0]
    ours = run("generate", "--model", inputs.model, "--prompt", vectors, "--max-new-tokens", 6, question).stdout
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == ours.strip()


def test_bad_input(refused, inputs, finished, vectors, tmp_path):
    prompt, out = finished.folder / "prompt", tmp_path / "out"
    (tmp_path / "text").write_text("words")
    for arguments, message in (
        (["inspect", tmp_path / "text"], "accepted formats are folder, peft, safetensors, cartridges, vllm-embeds"),
        (["inspect", finished.folder], "it holds one: prompt"),
        (["export", prompt, "--to", "cartridges", "--queries-at", "0", "--output", out], "got 0 without --model"),
        (["export", prompt, "--to", "peft", "--queries-at", "0", "--output", out], "0 is for cartridges"),
        (["export", vectors, "--to", "cartridges", "--output", out], "with --model they are made of its vectors"),
        (["export", prompt, "--to", "vllm-embeds", "--output", out], "KV prompt, which has keys and values"),
        (["export", prompt, "--to", "peft", "--dtype", "int8", "--output", out], "PEFT cannot read 8 bits"),
        (["export", prompt, "--to", "peft", "--type", "PROMPT_TUNING", "--output", out], "CARTRIDGE or PREFIX_TUNING"),
        (["export", prompt, "--output", tmp_path / "text"], "is a file"),
        (["export", prompt, "--output", out, "--context", inputs.context], "accepted are both"),
        (["export", prompt, "--output", out, "--queries", inputs.heldout], "accepted are both"),
        (
            ["export", prompt, "--output", out, "--queries", inputs.heldout, "--model", "m"],
            "float32, which rounds nothing",
        ),
        (["export", prompt, "--output", prompt, "--dtype", "int8"], "is the prompt itself"),
        (["import", prompt, "--output", prompt, "--model", inputs.model], "is the prompt itself"),
        (["generate", "--prompt", tmp_path / "text", "--model", inputs.model, "a"], "`softprompt import` makes one"),
        (["export", prompt, "--output", out, "--question", "a"], "accepted is --to vllm-embeds"),
        (["export", vectors, "--to", "vllm-embeds", "--output", out, "--question", "a"], "without --model"),
        (["export", vectors, "--to", "vllm-embeds", "--output", out, "--served-name", "a"], "without --question"),
        (["import", prompt, "--from", "cartridges", "--model", inputs.model, "--output", out], "--from folder"),
        (["import", prompt, "--model", inputs.model, "--output", tmp_path], "holds something else"),
        (["push", prompt, "--repo", "me/prompt"], "--base-model with its name on the hub"),
        (["push", prompt, "--repo", "prompt"], "accepted is USER/NAME"),
    ):
        assert message in refused(*arguments), arguments
        assert not out.exists()
