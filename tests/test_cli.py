"""The command line: what it answers, on which stream, with which exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "launch/recipes/tiny.yaml")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'infra'}",
}


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "goku_mega.cli", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**ENVIRONMENT, **environment},
        # A shell starts background jobs, and so perhaps these tests, with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def goku_mega(*words: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a real process."""
    with start(*words, **environment) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def refused(*words: str) -> str:
    """The one line a wrong command is answered with."""
    code, out, err = goku_mega(*words)
    assert (code, out) == (2, ""), err
    assert err.startswith("goku-mega: error: ") and err.count("\n") == 1, err
    return err


def test_help_lists_the_commands_and_a_commands_help_its_settings():
    code, out, _ = goku_mega("--help")
    assert code == 0
    assert all(name in out for name in ("corpus shapes", "encode", "train", "sample", "evaluate shapes", "doctor"))
    code, out, _ = goku_mega("train", "--help")
    assert code == 0
    assert "layout.tp " in out and "Tensor parallel ranks" in out and "block_channels" in out
    assert goku_mega("checkpoint", "--help")[1].count("checkpoint ") >= 2


def test_flags_dotted_flags_and_bare_overrides_are_the_same():
    spellings = (
        ["run_dir=r", "steps=3", "data.path=d", "layout.dp_shard=2", "layout.sequence_parallel=true"],
        ["--run-dir", "r", "--steps", "3", "--data.path", "d", "--layout.dp-shard", "2", "--layout.sequence-parallel"],
        ["--run-dir=r", "--steps=3", "--data.path=d", "--layout.dp_shard=2", "--layout.sequence_parallel=true"],
    )
    shown = {goku_mega("train", *words, "--print-config") for words in spellings}
    assert len(shown) == 1
    code, out, _ = shown.pop()
    assert code == 0 and "run_dir: r\n" in out and "dp_shard: 2\n" in out


def test_train_takes_the_settings_of_its_task():
    vae = ("corpus=c", "output=o", "steps=3", "--print-config")
    assert "block_channels" in goku_mega("train", "task=vae", *vae)[1]
    assert "block_channels" in goku_mega("train", "--config", str(ROOT / "launch/recipes/vae_tiny.yaml"), *vae)[1]
    assert "did you mean 'vae'" in refused("train", "task=vea")


def test_a_prompt_may_hold_anything():
    prompt = "--a red circle: ${moving} = left, 50%"
    code, out, err = goku_mega("sample", "checkpoint=c", "output=o", f"--prompt={prompt}", "--print-config")
    assert code == 0, err
    assert "\\${moving} = left, 50%" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "'train'"),
        (["corpus"], "shapes"),
        (["corpus", "shpes"], "'shapes'"),
        (["checkpoint"], "list, verify"),
        (["train", "--config", TINY, "--layout.tpp", "2"], "'layout.tp'"),
        (["train", "--config", TINY, "stpes=3"], "'steps'"),
        (["train", "--config", TINY, "words"], "name=value"),
        (["train", "--config", TINY, "-x"], "'-x'"),
        (["train", "--config", TINY, "--seed"], "--seed needs a value"),
        (["train", "--config", TINY, "--seed", "--json"], "--seed needs a value"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["evaluate", "shapes", "--checkpoint", "x"], "prompts is not set"),
        (["checkpoint", "list", "nowhere"], "nowhere"),
        (["checkpoint", "verify"], "path is not set"),
        (["doctor", "speed=high"], "'speed'"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_2(words, said):
    assert said in refused(*words)


def test_an_error_that_every_rank_meets_is_told_by_rank_0_while_the_others_wait():
    other = start("train", "--config", "nowhere.yaml", RANK="1", WORLD_SIZE="2")
    code, _, err = goku_mega("train", "--config", "nowhere.yaml", RANK="0", WORLD_SIZE="2")
    assert (code, err.count("\n")) == (2, 1)
    with other:
        _, late = other.communicate(timeout=60)
    assert other.returncode == 2
    assert late.startswith("goku-mega: rank 1: error: ")


def test_json_is_one_object_on_the_last_line_and_nothing_else_is_on_stdout():
    code, out, err = goku_mega("doctor", "--json")
    assert code == 0, err
    assert json.loads(out)["megatron-core"] == "0.16.1"
    code, out, _ = goku_mega("doctor")
    assert "\npython: " in f"\n{out}"


def test_an_interrupt_is_quiet_and_exits_130(tmp_path):
    process = start("corpus", "shapes", "--output", str(tmp_path / "corpus"), "--videos", "100000", "--workers", "1")
    while process.poll() is None and not any((tmp_path / "corpus").rglob("*.mp4")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    with process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert "Traceback" not in err


def test_nobody_reading_the_output_is_quiet():
    process = start("train", "--help")
    process.stdout.close()
    with process:
        err = process.stderr.read()
    assert process.returncode == 141
    assert err == ""
