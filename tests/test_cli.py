"""The command line as it is typed: answers, exit statuses, and how soon they come."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "launch.py", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ((), 0, "python launch.py train quickstart"),
        (("--help",), 0, "doctor"),
        (("trian",), 2, "did you mean 'train'?"),
        (("train", "--help"), 0, "quickstart"),
        (("train", "quickstrat"), 1, "Did you mean 'quickstart'?"),
        (("train", "quickstart", "--bacth.people", "3"), 2, "--batch.people"),
        (("train", "quickstart", "--steps", "many"), 2, "--steps"),
        (("train", "quickstart", "--batch.photos", "1"), 2, "no anchor has a"),
        (("train", "quickstart", "--loss.miner", "semihard"), 2, "'semi_hard'"),
        (("train", "quickstart", "--loss", "contrstive"), 1, "Try --loss contrastive"),
        (("train", "quickstart", "--loss=contrastive", "--loss.miner", "hardest"), 2, "Unrecognized"),
        (("train", "quickstart", "--encoder", "iresnet19"), 1, "--encoder iresnet"),
        (("verify", "runs/nowhere", "--pairs", "lfw:view3"), 1, "lfw:view1_test"),
        (("verify", "runs/nowhere", "--pairs", "lfw:view1_test", "--heads", "svm"), 1, "logistic_abs"),
        (("embed", "runs/nowhere", "synthetic", "--out", "x.npy"), 1, "x.npz"),
        (("data", "info", "celebb"), 1, "celeba"),
    ],
)
def test_answers(arguments, status, says):
    done = launch(*arguments)
    told = " ".join((done.stdout + done.stderr).split())
    assert says in told, told
    assert done.returncode == status
    assert "Traceback" not in told


@pytest.mark.parametrize(
    "arguments", [("--help",), ("train", "quickstart", "--bacth.people", "3"), ("train", "celeba", "-h")]
)
def test_help_and_errors_come_before_jax_is_imported(arguments):
    # What makes them quick; a clock in a test would only measure the machine.
    code = (
        "import sys; sys.argv = ['launch.py', *sys.argv[1:]]\n"
        "from faceembed.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('imported:', *[m for m in ('jax', 'flax', 'grain', 'sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "imported:"


def test_doctor_looks_at_devices_and_says_what_is_missing(tmp_path, monkeypatch):
    import json

    monkeypatch.setenv("FACEEMBED_DATA", str(tmp_path / "none"))
    done = launch("doctor", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["devices"] == 8
    assert found["mesh"] == {"data": 8, "model": 1}
    assert found["prepared"] == []
    assert "data prepare lfw" in done.stdout
