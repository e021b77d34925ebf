"""`softprompt chat`: turns and commands from a pipe and from a terminal, Ctrl-C, and what it says to nonsense."""

import json
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from softprompt_kernels.cli.chat import session, terminal
from softprompt_kernels.cli.chat.terminal import Terminal
from softprompt_kernels.compress.report.answers import printable

OWNER, PLACE = "Who owns it?", "And where?"


@pytest.fixture
def chat(run, inputs, finished) -> Any:
    """`chat("prompt", "context", lines=[...])`: with these options, and each line as a turn."""

    def talk(*names: str, lines: list[str], extra: tuple[object, ...] = ()) -> Any:
        places = {"prompt": finished.folder / "prompt", "context": inputs.context}
        options = [part for name in names for part in (f"--{name}", places[name])]
        command = ["chat", "--model", inputs.model, "--max-new-tokens", 6, *options, *extra]
        result = run(*command, stdin="".join(f"{line}\n" for line in lines))
        assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
        assert "\x1b" not in result.output
        return result

    return talk


def answers(output: str) -> dict[str, str]:
    """The answer under each question of a transcript."""
    parts = output.split("> ")[1:]
    return {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip() for part in parts}


def notices(result: Any) -> list[str]:
    return [line for line in result.stderr.splitlines() if line and not line.startswith("The answer was cut at 6 ")]


def test_each_line_of_a_pipe_is_a_turn_of_one_conversation(chat) -> None:
    both = answers(chat("prompt", lines=[OWNER, "", PLACE]).stdout)
    alone = answers(chat("prompt", lines=[PLACE, "/reset", OWNER]).stdout)
    assert list(both) == [OWNER, PLACE]
    assert both[OWNER] == alone[OWNER] and both[PLACE] != alone[PLACE], "the second one has read the first"


def test_the_full_text_is_in_use_without_a_prompt_and_by_context_on(chat) -> None:
    full = answers(chat("context", lines=[OWNER]).stdout)[OWNER]
    soft = answers(chat("prompt", lines=[OWNER]).stdout)[OWNER]
    lines = ["/context on", OWNER, "/reset", "/context off", f"{OWNER} ", "/context"]
    result = chat("prompt", "context", lines=lines)
    first, second = (part.strip() for part in result.stdout.split(f"> {OWNER}")[1:])
    assert first.startswith(full) and second.startswith(soft) and full != soft
    assert [line for line in notices(result) if "model reads" in line] == [
        "The model reads the full text.",
        "The model reads the soft prompt.",
        "The model reads the soft prompt.",
    ]
    assert "tokens) ..." in result.stderr, "it says that the text is read"


def test_compare_shows_the_answers_of_all_and_keeps_the_chat(chat) -> None:
    result = chat("prompt", "context", lines=[OWNER, "/compare", f"/compare {PLACE}", PLACE])
    tables = result.stdout.split("/compare")[1:]
    names = [line.split("|")[0].strip() for line in tables[0].splitlines() if "|" in line]
    assert [name for name in names if name] == ["full context", "soft prompt", "no context"]
    assert f"> {OWNER}" in tables[0] and f"> {PLACE}" in tables[1]
    first = answers(result.stdout.split("> /compare")[0])[OWNER]
    assert f"soft prompt  | {first}".splitlines()[0].strip() in tables[0]
    last = result.stdout.split(f"> {PLACE}")[-1].strip()
    assert last == answers(chat("prompt", lines=[OWNER, PLACE]).stdout)[PLACE]


def test_commands_that_cannot_be_done_are_one_sentence_each(chat, tmp_path) -> None:
    there = tmp_path / "there.json"
    there.write_text("mine")
    lines = {
        "/hlep": "/hlep is no command; /help lists them, and a question that starts with / needs a blank first.",
        "/compare": "/compare: there is nothing to compare without --prompt or --context.",
        "/context": "The model reads nothing before the turns.",
        "/context on": "/context: there is no full text; it needs --context FILE at the start.",
        "/context maybe": "/context: got 'maybe', accepted are on and off.",
        "/save": "/save: got no name, accepted is /save FILE.",
        f"/save {there}": f"/save: {there} is there already, accepted is the name of a new file.",
        f"/save {tmp_path}/no/x": f"/save: got {tmp_path}/no/x, but {tmp_path}/no is not a folder.",
        "/undo": "There is no turn to forget.",
        "/undo 3": "/undo: got '3', accepted is /undo alone.",
        "/reset": "Forgotten: 0 turns.",
        "so " * 200: "Question: it has 618 tokens and its answer up to 6, but the model's window of 512 has 512 left "
        "(no context); accepted are a shorter question or a smaller --max-new-tokens.",
    }
    result = chat(lines=[*lines, " /etc is a folder?", "/exit", "too late"])
    assert notices(result) == list(lines.values())
    assert there.read_text() == "mine"
    assert answers(result.stdout)["/etc is a folder?"] and "too late" not in result.stdout
    compared = chat("prompt", lines=["/compare", OWNER])
    assert "there is no question yet" in compared.stderr.lower() and answers(compared.stdout)[OWNER]


def test_the_turns_are_saved_and_forgotten(chat, inputs, finished, tmp_path) -> None:
    path = tmp_path / "chat.json"
    lines = [OWNER, PLACE, "/undo", f"/save {path}", f"/save {path}", "/reset", "/help"]
    result = chat("prompt", lines=lines)
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert (saved["model"], saved["prompt"]) == (str(inputs.model), str(finished.folder / "prompt"))
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"]
    assert saved["messages"][0]["content"] == OWNER and saved["messages"][1]["read"] == "soft prompt"
    said = [f"Forgotten: {PLACE}", f"Saved to {path}.", f"Saved to {path}.", "Forgotten: 1 turn."]
    assert notices(result) == said and "/save FILE" in result.stdout


def test_a_full_window_is_told_when_it_begins_to_leave_turns_out(chat) -> None:
    long = "and so on " * 12
    result = chat(lines=[*[long] * 5, "/undo", long, "/reset", OWNER])
    said = [line for line in notices(result) if "left out" in line]
    assert said == [
        "The oldest turn is left out: the model's window is full.",
        "The oldest 2 turns are left out: the model's window is full.",
    ]


@pytest.mark.parametrize(("times", "said"), [(1, "Stopped. What was written is kept"), (2, "Stopped. The convers")])
def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(chat, default_signals, monkeypatch, times, said) -> None:
    left = [times]

    class Interrupted(session._Stream):
        def put(self, value: Any) -> None:
            super().put(value)
            while value.numel() == 1 and left[0]:  # after the first token of the first answer
                left[0] -= 1
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(session, "_Stream", Interrupted)
    result = chat(lines=[OWNER, "/undo", PLACE])
    assert said in result.stderr and answers(result.stdout)[PLACE]
    assert f"Forgotten: {OWNER}" in result.stderr if times == 1 else "There is no turn" in result.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_at_a_terminal_ctrl_c_is_a_hint_and_ctrl_d_ends(default_signals, monkeypatch, capsys) -> None:
    typed: Iterator[Any] = iter(["  /etc?", KeyboardInterrupt(), "/help ", EOFError()])
    asked: list[str] = []

    def line(prompt: str) -> str:
        found = next(typed)
        if isinstance(found, BaseException):
            raise found
        return found

    class Keyboard:
        def isatty(self) -> bool:
            return True

    def said(message: str, style: str = "dim") -> None:
        print(message, file=sys.stderr)
        if message.startswith(("Ctrl-D", "Stopped")):
            signal.raise_signal(signal.SIGINT)  # pressed twice

    def ask(self: Any, question: str) -> None:
        asked.append(question)
        raise KeyboardInterrupt

    class Recorded:
        reads = "soft prompt"

    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr(sys, "stdin", Keyboard())
    monkeypatch.setattr(Terminal, "_ask", ask)
    monkeypatch.setattr(terminal, "notice", said)
    Terminal(Recorded(), {}).run()
    shown = capsys.readouterr()
    assert asked == ["/etc?"] and "/compare [TEXT]" in shown.out
    assert shown.err.splitlines() == [
        "The model reads the soft prompt. /help lists the commands, Ctrl-D ends.",
        "Stopped. The conversation is as before.",
        "Ctrl-D or /exit ends the chat.",
    ]


def test_words_are_not_broken_at_the_edge_of_a_terminal(monkeypatch, capsys) -> None:
    def shown(*parts: str) -> str:
        writer = terminal._Writer()
        for part in parts:
            writer.write(part)
        return capsys.readouterr().out

    parts = (" \n  one ", "three ", "four ", "a-very-long-word ", "磨坊磨", "坊\n  in ", "dented ", "")
    assert shown(*parts) == "one three four a-very-long-word 磨坊磨坊\n  in dented"
    monkeypatch.setattr(terminal, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "10")
    assert shown(*parts) == "one three\nfour\na-very-long-word\n磨坊磨坊\n  in\ndented"
    assert shown("a-very-long-word ", "is") == "a-very-long-word\nis"


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2Jb\n\tc\x07é") == "a\N{REPLACEMENT CHARACTER}[2Jb\n\tc\N{REPLACEMENT CHARACTER}é"


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--prompt", "{folder}"], "is not a saved prompt"),
        (["--context", "{folder}"], "context:"),
        (
            ["--max-new-tokens", "500", "--prompt", "{prompt}"],
            "--prompt leaves 500 of the model's window of 512 tokens",
        ),
        (["--context", "{long}"], "--context leaves 0 of the model's window"),
    ],
)
def test_bad_arguments_are_refused_with_one_message(run, inputs, finished, tmp_path, arguments, fragment) -> None:
    (tmp_path / "long").write_text("word " * 600)
    places = {"prompt": finished.folder / "prompt", "folder": tmp_path, "long": tmp_path / "long"}
    result = run("chat", "--model", inputs.model, *(text.format(**places) for text in arguments), stdin="Who?\n")
    assert result.exit_code == 2, result.output
    assert result.stderr.count("Error:") == 1 and fragment in result.stderr and not result.stdout


def test_input_that_is_not_utf8_is_refused(run, inputs) -> None:
    result = run("chat", "--model", inputs.model, stdin=b"\xff\xfe\n")
    assert result.exit_code == 2 and "standard input is not UTF-8" in result.stderr
