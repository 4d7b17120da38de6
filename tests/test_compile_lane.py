"""The shipped kernels compile for GPUs that are not here and pass their gates; lengths recompile nothing.

In processes of their own: Triton decides when it is imported whether kernels are interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from undivided.kernels import evidence

pytest.importorskip("triton", reason="the compile lane needs Triton")

ROOT = Path(__file__).parent.parent
COMPILED = os.environ | {"TRITON_INTERPRET": "0"}


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=COMPILED, cwd=folder, check=False
    )


@pytest.mark.compile
def test_sample_of_the_shipped_kernels_passes_its_gates(tmp_path: Path) -> None:
    """Spills, a lost matrix instruction or a kernel that no longer fits show here, long before a GPU.

    So does an option that costs something where it is absent. (hazard D8, T7)
    """
    command = ["-m", "undivided.bench.static", "--options", "plain", "bias", "--json", "figures.json"]
    done = python(*command, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = json.loads((tmp_path / "figures.json").read_text())["kernels"]
    assert {"forward", "row_statistics", "dkdv", "dq", "dbias"} <= {row["kernel"] for row in kernels}
    assert {"sm_80", "sm_90", "sm_100", "gfx942"} <= {row["architecture"] for row in kernels}
    of_gluon = {row["kernel"] for row in kernels if row["variant"]["implementation"] == "gluon"}
    assert of_gluon == {"forward", "backward"}


KEYS = """
import json, torch
from triton import knobs
from undivided.bench.static.absent_gpu import absent_gpu
from undivided.bench.static.targets import TARGETS
from undivided.kernels.spec import DEFAULTS, Needs
from undivided.kernels.options import make_spec
from undivided.kernels.validation import make_inputs
from undivided.kernels.triton import attention_backward, attention_forward

keys = {}

def note(*, key, fn, **_):  # answering True leaves it at that: nothing is compiled or launched
    keys.setdefault(fn.name, set()).add(key)
    return True

knobs.runtime.jit_cache_hook = note
with absent_gpu(TARGETS["sm_90"]):
    for length in (*range(1, 65), 100, 1000, 4096, 65536):
        for batch in (1, 2, 3):
            q = torch.empty(batch, 8, length, 64, dtype=torch.bfloat16, device="meta")
            k = torch.empty(batch, 2, length, 64, dtype=torch.bfloat16, device="meta")
            inputs = make_inputs(q, k, k, DEFAULTS)
            spec = make_spec(64, {**DEFAULTS, "causal": True}, top_left=False, tf32=False)
            out, lse, _ = attention_forward(inputs, spec)
            attention_backward(q, None, out, lse, inputs, spec, Needs(True, True, True))
print(json.dumps({name: len(found) for name, found in keys.items()}))
"""


def test_no_sequence_length_recompiles(tmp_path: Path) -> None:
    """Triton specialises integers that are 1 or multiples of 16: lengths must be exempt from that.

    (hazard T4)
    """
    done = python("-c", KEYS, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert len(counts) == 4, counts
    assert set(counts.values()) == {1}, counts


WAITS = """
import torch
from triton import knobs
from undivided import Documents
from undivided.bench.static import variants
from undivided.bench.static.absent_gpu import absent_gpu
from undivided.bench.static.report import Variant
from undivided.bench.static.targets import TARGETS
from undivided.kernels.functional import prepare
from undivided.kernels.sequences import Sequences

launched = set()
knobs.runtime.jit_cache_hook = lambda *, fn, **_: launched.add(fn.name) or True  # nothing is compiled
x = torch.empty(64, 2, 16, dtype=torch.bfloat16, device="meta")
numbers = torch.empty(3, 64, dtype=torch.int32, device="meta")
prepare(x, x, x, {"causal": True}, sequences=Sequences(numbers[0], None, 32, 32))
dense = x.transpose(0, 1).expand(3, 2, 64, 16)
prepare(dense, dense, dense, {"mask": Documents(numbers), "key_lengths": numbers[:, 0]})
with absent_gpu(TARGETS["sm_90"]):
    for options in (*variants.OPTIONS, *variants.VISIBLE):
        variants.call(Variant(64, "bfloat16", options))
assert len(launched) == 5, launched
"""


def test_no_call_waits_for_its_device(tmp_path: Path) -> None:
    """A number of a tensor that the host reads: a graph cannot be captured. Meta tensors have none to read.

    From the public checks to the launches, forward and backward. (hazard D4)
    """
    done = python("-c", WAITS, folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_readme_shows_the_evidence() -> None:
    """A table by hand would claim what nobody tried."""
    readme = (ROOT / "README.md").read_text()
    shown = readme.partition("<!-- evidence:begin -->")[2].partition("<!-- evidence:end -->")[0]
    assert shown.strip() == evidence.markdown(), f"put this into the README:\n{evidence.markdown()}"


def test_evidence_is_of_the_version_it_was_recorded_for() -> None:
    """What compiled with one Triton says nothing about another."""
    assert evidence.state_of("fallback", "cpu") == "run natively"
    assert evidence.state_of("triton", "sm_90", triton_version="0.1") == evidence.NO_EVIDENCE
    for entry in evidence.records():
        assert entry.state in evidence.STATES[1:]
        assert (
            evidence.state_of(entry.implementation, entry.architecture, entry.triton) != evidence.NO_EVIDENCE
        )


def test_recording_keeps_what_says_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled record must not replace the one of a native run."""
    file = tmp_path / "evidence.json"
    file.write_text("[]")
    monkeypatch.setattr(evidence, "_FILE", file)
    evidence.records.cache_clear()
    native = evidence.Evidence("triton", "sm_90", "3.6.0", "run natively", "bench/results/h200.json")
    evidence.record([native])
    evidence.record([native._replace(state="compiled", source="python -m undivided.bench.static --full")])
    try:
        assert evidence.state_of("triton", "sm_90", "3.6.0") == "run natively"
        assert len(evidence.records()) == 2
    finally:
        monkeypatch.undo()
        evidence.records.cache_clear()
