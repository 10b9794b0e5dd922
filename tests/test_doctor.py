import resource
import time
from pathlib import Path

import pytest

from arae import doctor
from arae.doctor import arch_finding, examine, probe

CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("architectures", "capability", "state"),
    [
        (CU130, (7, 0), "missing"),  # V100
        (["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"], (7, 0), "ok"),
        (CU130, (7, 5), "ok"),
        (CU130, (8, 0), "ok"),
        (CU130, (8, 9), "ok"),  # Ada runs Ampere's binaries
        (["sm_86"], (8, 0), "missing"),  # but not an older minor version a newer one's
        (CU130, (9, 0), "ok"),
        (["sm_90a"], (9, 0), "ok"),
        (CU130, (10, 0), "ok"),
        (CU130, (12, 0), "ok"),
        (CU130, (11, 0), "missing"),
        (["sm_75", "compute_75"], (13, 1), "ok"),  # the driver compiles for later ones
        (["compute_80"], (7, 5), "missing"),
        (["gfx90a"], (9, 0), "ok"),
        ([], (8, 0), "missing"),
    ],
)
def test_kernels_for_a_gpu(architectures, capability, state):
    assert arch_finding(architectures, capability, "2.14.1").state == state


def test_a_v100_is_told_which_build_has_its_kernels():
    finding = arch_finding(CU130, (7, 0), "2.14.1+cu130", "Tesla V100")
    assert "Tesla V100 (sm_70): torch 2.14.1+cu130 has no sm_70 kernels" in finding.said
    assert "CUDA 12.6" in finding.mend
    assert "torch<2.15" in finding.mend
    assert "cu126" in finding.mend


ABOUT = {
    "version": "2.14.1", "cuda": "13.0", "hip": None, "devices": [["V100", [7, 0]], ["A100", [8, 0]]],
    "architectures": CU130, "gpu_bf16": False, "cpu_bf16": True, "threads": 2, "hub": "/hub",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "names", "states", "bf16"),
    [
        ({}, ["torch", "GPU", "GPU", "bfloat16"], ["ok", "missing", "ok", "ok"], "precision auto takes fp16"),
        ({"gpu_bf16": True}, ["torch", "GPU", "GPU", "bfloat16"], ["ok", "missing", "ok", "ok"], "by the GPU itself"),
        ({"devices": []}, ["torch", "GPU", "bfloat16"], None, "supported by this processor"),
        ({"devices": [], "cpu_bf16": False}, ["torch", "GPU", "bfloat16"], None, "precision auto takes fp32"),
    ],
)
def test_torch(changes, names, states, bf16):
    found = doctor.torch_findings((True, ""), ABOUT | changes)
    assert [f.name for f in found] == names
    assert states is None or [f.state for f in found] == states
    assert bf16 in found[-1].said


def test_a_torch_that_does_not_import_is_the_only_thing_said_of_it():
    (finding,) = doctor.torch_findings((False, "ImportError: libcudart"), {})
    assert (finding.state, finding.said) == ("missing", "ImportError: libcudart")


@pytest.mark.parametrize(
    ("built", "driver", "state"),
    [(True, False, "ok"), (False, False, "ok"), (True, True, "warn"), (False, True, "warn")],
)
def test_without_a_gpu(built, driver, state):
    assert doctor.no_gpu_finding(built_for_gpu=built, driver=driver).state == state


@pytest.mark.parametrize(
    ("code", "works", "said"),
    [
        ("print('noise'); print('1.0')", True, "1.0"),
        ("import no_such_module", False, "ModuleNotFoundError: No module named 'no_such_module'"),
        ("import os; os.kill(os.getpid(), 11)", False, "its process died of signal 11"),
        ("raise SystemExit(3)", False, "exit code 3 without a word"),
        ("import warnings; warnings.warn('x'); print(2)", True, "2"),
    ],
)
def test_a_probe_reports_what_happened(code, works, said):
    assert probe(code) == (works, said)


def test_a_probe_that_hangs_ends():
    start = time.monotonic()
    assert probe("import time; time.sleep(60)", 0.5) == (False, "no answer within 0.5 s")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("version", "state"), [((3, 11, 7), "ok"), ((3, 12, 0), "ok"), ((3, 10, 9), "warn"), ((3, 13, 0), "warn")]
)
def test_python(version, state):
    assert doctor.python_finding(version).state == state


@pytest.mark.parametrize(
    ("limit", "state"), [(256, "warn"), (1024, "warn"), (4096, "ok"), (resource.RLIM_INFINITY, "ok")]
)
def test_open_files(limit, state):
    assert doctor.open_files_finding(limit).state == state


@pytest.mark.parametrize(
    ("installed", "state", "said"),
    [
        (("chromium", "chromedriver"), "ok", "/bin/chromium"),
        (("google-chrome", "chromedriver"), "ok", "/bin/google-chrome"),
        (("chromedriver",), "missing", "no the browser;"),
        ((), "missing", "no the browser and chromedriver;"),
    ],
)
def test_chromium(installed, state, said):
    finding = doctor.chromium_finding(lambda name: f"/bin/{name}" if name in installed else None)
    assert finding.state == state
    assert said in finding.said


def test_lpips_weights_are_looked_for_in_torchs_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "package_finding", lambda name, *_: doctor.Finding(name, "ok", "0.1.4 installed"))
    assert doctor.lpips_finding(tmp_path).state == "warn"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    assert doctor.lpips_finding(tmp_path).state == "ok"


@pytest.mark.parametrize(("package", "state"), [("yaml_not_there", "missing"), ("pydantic", "ok")])
def test_packages_are_found_without_import(package, state):
    assert doctor.package_finding("x", package, "mend it").state == state


@pytest.mark.parametrize(("gib", "state"), [(0.5, "warn"), (1.0, "ok"), (64.0, "ok")])
def test_shared_memory(gib, state, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: doctor.shutil._ntuple_diskusage(int(gib * 2**30), 0, 0))
    assert doctor.shared_memory_finding(tmp_path).state == state


@pytest.mark.parametrize(("gib", "state"), [(0.5, "warn"), (50.0, "ok")])
def test_disk_is_looked_at_where_the_runs_will_be(gib, state, monkeypatch, tmp_path):
    asked = []
    usage = doctor.shutil._ntuple_diskusage

    def disk_usage(place):
        asked.append(place)
        return usage(0, 0, int(gib * 2**30))

    monkeypatch.setattr(doctor.shutil, "disk_usage", disk_usage)
    finding = doctor.disk_finding(tmp_path / "not" / "yet")
    assert finding.state == state
    assert f"{gib:.1f} GiB free" in finding.said
    assert asked == [tmp_path]


@pytest.mark.parametrize(("threads", "state"), [(1, "ok"), (10**6, "warn"), (None, "ok")])
def test_threads(threads, state):
    assert doctor.processor_finding(threads).state == state


def test_examine_hears_each_probe_and_mends_what_is_not_well(monkeypatch):
    """No heavy import in this process: every probe fails, and the rest is still found."""
    asked = []

    def failing(code):
        asked.append(code)
        return False, "broken"

    monkeypatch.setattr(doctor, "probe", failing)
    found = {f.name: f for f in examine(Path("runs"))}
    assert len(asked) == 5
    for name in ("torch", "torchvision", "FFCV", "Ray", "MLflow"):
        assert (found[name].state, found[name].said) == ("missing", "broken")
    assert "libopencv-dev libturbojpeg0-dev" in found["FFCV"].mend
    assert all(f.mend for f in found.values() if f.state != "ok")
    assert {"Python", "DeepSpeed", "LPIPS", "Chromium", "Fashion-MNIST", "disk", "shared memory", "open files"} <= set(
        found
    )


@pytest.mark.integration
def test_examine_on_this_machine():
    found = examine(Path("runs"))
    states = {f.name: f.state for f in found}
    assert states["torch"] == states["torchvision"] == "ok"
    assert all("\n" not in f.said + f.mend for f in found)
