"""benchmarks: peers' folders and scripts, without any framework."""

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import sitting
from benchmarks.contestants import Script
from benchmarks.kernels import measured
from benchmarks.peers import PeersDir, load_weights
from benchmarks.step import _parser, _peers, check_losses, summary
from benchmarks.torch_kernels import CONVOLUTIONS, TorchKernels, convolution
from pocktvm.autodiff.differentiate import differentiate
from pocktvm.build import Build
from pocktvm.compiler import compile
from pocktvm.frontend.resolve import resolve_model
from pocktvm.passes import run_passes
from pocktvm.reference import RULES

pytestmark = pytest.mark.build

LINE = {"ms_per_step_median": 4.0, "loss0": 2.5, "peak_rss_mb": 3.0}


@pytest.fixture
def folder(tmp_path):
    """A peers' folder whose environment is this Python and whose script only prints."""
    (tmp_path / "v_tf" / "bin").mkdir(parents=True)
    (tmp_path / "v_tf" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "bench_tf.py").write_text(f"print('noise'); print({json.dumps(json.dumps(LINE))})")
    np.savez(tmp_path / "data_w1a.npz", __x=np.zeros(1), __y=np.zeros(1), weight=np.ones((2, 3)))
    (tmp_path / "train_w1a.json").write_text('{"sparse": ["weight"]}')
    return tmp_path


def test_a_script_is_launched_every_round(folder):
    shared = PeersDir(folder, "w1a")
    script = Script("tf", shared.command("tf", "sparse", 1), folder=folder)
    script.start(1)
    script.round()
    script.round()
    assert (script.times, script.losses, script.rss_bytes) == ([4.0, 4.0], [2.5], 3 * 2**20)
    assert shared.trained("sparse") == ["weight"]


def test_what_is_missing_is_named(folder):
    with pytest.raises(SystemExit, match="v_jax"):
        PeersDir(folder, "w1a").command("jax", "sparse", 1)
    with pytest.raises(SystemExit, match=r"data_w2\.npz"):
        _ = PeersDir(folder, "w2").weights
    failing = Script("tf", [sys.executable, "-c", "import sys; sys.exit('no such chip')"])
    with pytest.raises(SystemExit, match="no such chip"):
        failing.start(1)


def test_weights_are_loaded_by_name_or_refused(folder):
    module = torch.nn.Linear(3, 2, bias=False)
    load_weights(module, folder / "data_w1a.npz")
    assert (module.weight == 1).all()
    with pytest.raises(SystemExit, match="bias"):
        load_weights(torch.nn.Linear(3, 2), folder / "data_w1a.npz")


def test_peers_that_cannot_are_left_out(capsys):
    ask = ["--workload", "w3", "--peers", "torch,tf,jax", "--peers-dir", "."]
    assert _peers(_parser().parse_args(ask)) == ["torch", "jax"]
    assert "tf: no script for w3" in capsys.readouterr().err
    for wrong, what in ((["--peers", "mxnet"], "no peer"), (["--peers", "tf"], "--peers-dir")):
        with pytest.raises(SystemExit, match=what):
            _peers(_parser().parse_args(wrong))


def test_the_summary_keeps_its_names():
    options = _parser().parse_args([])
    ours = Script("pocktvm", [], times=[2.0, 4.0, 3.0], losses=[2.5])
    peers = [Script("tf", [], times=[6.0], losses=[2.5]), Script("jax", [], [9.0], [2.5])]
    result = summary(options, [ours, *peers], flops=30_000_000, peak=20.0)
    assert result["ours_ms"] == 3.0
    assert result["peers"] == {"tf": 6.0, "jax": 9.0}
    assert (result["ratio_to_best_peer"], result["fraction_of_peak"]) == (0.5, 0.5)
    peers[1].losses = [2.6]
    with pytest.raises(SystemExit, match="jax does other work"):
        check_losses([ours, *peers])


def test_a_sitting_is_taken_up_where_it_stopped(tmp_path, monkeypatch, capsys):
    ran = []

    def run(key, options):
        ran.append(key)
        workload, scheme, threads = key
        return {
            "workload": workload, "scheme": scheme, "threads": threads, "ours_ms": 10.0,
            "peers": {"torch": 40.0, "ort": 20.0}, "ratio_to_best_peer": 0.5,
            "minimum_ms": {"pocktvm": 9.0}, "peak_rss_bytes": {"pocktvm": 30e6, "ort": 200e6},
            "gflop": 2.0, "fma_peak_gflops": 500.0,
        }  # fmt: skip

    monkeypatch.setattr(sitting, "_run", run)
    path = tmp_path / "sitting.jsonl"
    sitting.main(["-o", str(path), "--rows", "w1a:full", "--threads", "1"])
    sitting.main(["-o", str(path), "--rows", "w1a:full,w2", "--threads", "1"])
    assert ran == [("w1a", "full", 1), ("w2", "sparse", 1)]
    row = capsys.readouterr().out.splitlines()[-1]
    assert row == (
        "| w2 | sparse | 1 | 10.0 (9.0) | torch 40.0, **ort 20.0** | 0.500 | 4.0 | 30 / 200 |"
    )
    with pytest.raises(SystemExit, match="no workload 'w9'"):
        sitting.main(["-o", str(path), "--rows", "w9:full"])


def test_peers_of_a_row():
    assert sitting.peers_of("w1a", True) == ["torch", "torch-fold_cl", "tf", "ort"]
    assert sitting.peers_of("w3", True) == ["torch", "torch-compile", "jax"]
    assert sitting.peers_of("w4", False) == ["torch", "torch-compile"]


@pytest.fixture(scope="module")
def small():
    """A small convolutional network's differentiated and fused step."""
    source = resolve_model("mobilenetv2:width=0.35,image=32,classes=4", batch=2)
    return Build.of(source.module, source.example_inputs, published=source.scheme)


def test_torchs_kernels_compute_what_ours_do(small):
    """Its convolutions equal the reference's, in both directions and for the weights."""
    step, _ = differentiate(*small.resolve(), small.loss, small.optimizer)
    step = run_passes(step, small.target)
    checked = set()
    rng = np.random.default_rng(0)
    for node in (n for top in step.nodes for n in top.kernel_nodes()):
        if node.op not in CONVOLUTIONS:
            continue
        checked.add((node.op, node.attrs.get("groups", 1) > 1))
        args = [
            torch.from_numpy(rng.standard_normal(step.values[i].shape).astype(np.float32))
            for i in node.inputs
        ]
        outs = [step.values[name] for name in node.outputs]
        expected = RULES[node.op](node, args, outs)
        torch.testing.assert_close(convolution(node, args, outs), expected, rtol=1e-4, atol=1e-4)
    assert len(checked) == 2 * len(CONVOLUTIONS)
    # the whole block, not the activation it ends with
    blocks = [n for n in step.nodes if len(n.kernel_nodes()) > 1]
    assert all(TorchKernels(step, 1).of[n.outputs] is n for n in blocks)


def test_every_kernel_has_a_roofline_and_torchs_time(small, tmp_path):
    artifact = compile(small, tmp_path / "artifact")
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    profile = [(call["call"], 1.0) for call in manifest["timeline"]["step"]]
    rows = measured(profile, small, torch_threads=1)
    assert [row["kernel"] for row in rows] == [label for label, _ in profile]
    assert [row["flops"] for row in rows] == [c["flops"] for c in manifest["timeline"]["step"]]
    assert all(row["bytes"] > 0 for row in rows)
    untimed = [row["kernel"] for row in rows if row["torch_ms"] is None]
    assert untimed == ["permute_dims"]
    with pytest.raises(SystemExit, match="the profile has 'other'"):
        measured([("other", 1.0), *profile[1:]], small)
