"""The command line as it is typed: answers, exit statuses, and how soon they come."""

import os
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


@pytest.mark.parametrize(
    ("setting", "given", "becomes"),
    [
        ("always [madvise] never", {}, "glibc.malloc.hugetlb=1"),
        ("[always] madvise never", {}, None),
        (None, {}, None),
        ("always [madvise] never", {"GLIBC_TUNABLES": ""}, ""),
        ("always [madvise] never", {"GLIBC_TUNABLES": "glibc.malloc.check=0"}, "glibc.malloc.check=0"),
    ],
)
def test_huge_pages_are_asked_for_by_the_same_process_started_anew(setting, given, becomes, tmp_path):
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, sys; from faceembed.cli import with_huge_pages\n"
        "with open('starts', 'a') as log: print(os.getpid(), file=log)\n"
        "with_huge_pages(pathlib.Path('enabled'))\n"
        "print([os.environ.get('GLIBC_TUNABLES'), sys.argv[1:], sys.flags.dont_write_bytecode])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"PYTHONPATH": str(ROOT)} | given
    done = subprocess.run(
        [sys.executable, "-B", "script.py", "two words", ""],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{[becomes, ['two words', ''], 1]}\n"
    starts = (tmp_path / "starts").read_text().split()
    assert len(starts) == (2 if becomes and not given else 1)
    assert len(set(starts)) == 1


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
    assert "processes: no launcher has started others" in done.stdout


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "node[3-4]"},
         "processes: this is process 1 of 2, by Slurm; train joins them at node3:"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
         "- of train: Open MPI does not say the rest: add --coordinator"),
    ],
)  # fmt: skip
def test_doctor_tells_what_a_launcher_says_of_other_processes(monkeypatch, capsys, variables, told):
    from faceembed.cli import doctor

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    doctor.run([])
    assert told in capsys.readouterr().out
