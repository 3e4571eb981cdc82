"""The command line, the fixture, and the replay of a failed launch."""

import numpy as np

from . import launcher
from .__main__ import main
from .kernels import kernel


def test_report_counts_instructions_and_succeeds(tmp_path, capsys):
    path = tmp_path / "k.ptx"
    path.write_text(kernel(1, "bar.sync 0; mov.b32 %r1, smem; st.shared.b32 [%r1], %t;"))
    assert main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "1 bar.sync" in text
    assert "1 st.shared.b32" in text
    assert "unsupported: 0" in text


def test_report_names_what_is_unsupported_and_fails(tmp_path, capsys):
    path = tmp_path / "k.ptx"
    path.write_text(kernel(0, "tcgen05.cp.cta_group::1.128x256b [%r1], %d1;"))
    assert main([str(path)]) == 1
    assert "unsupported: tcgen05.cp" in capsys.readouterr().out


def test_a_recording_replays_without_the_arrays_it_was_made_with(emulator, tmp_path, capsys):
    """The race of two warps, replayed from a file: its arrays are copies, at their old addresses."""
    body = """ld.param.b64 %d1, [p0]; ld.global.b32 %r2, [%d1]; mov.b32 %r1, smem;
    add.s32 %r2, %r2, %t; st.shared.b32 [%r1], %r2;"""
    recordings = []
    kept, launcher.on_launch = launcher.on_launch, recordings.append
    try:
        emulator.run(
            kernel(1, body, threads=64), 1, 64, [np.ones(1, np.uint32)], dynamic_shared=64, seed=5, check=False
        )
    finally:
        launcher.on_launch = kept
    path = tmp_path / "launch.pickle"
    recordings[0].save(path)
    assert main(["--replay", str(path)]) == 1
    assert "write-after-write race" in capsys.readouterr().out


def test_schedules_of_one_seed_are_the_same_run(emulator):
    """A failure replays: steps and asynchronous events depend on the seed alone."""
    runs = [launcher.Schedule.from_seed(seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    body = "bar.sync 0; " * 5
    steps = [emulator.run(kernel(0, body, threads=128), 4, 128, [], seed=s).steps for s in (3, 3)]
    assert steps[0] == steps[1]
