"""Away from a terminal, progress is a few lines of log."""

from __future__ import annotations

from dni_seq.app.runs.progress import Progress


class Clock:
    """Seconds that pass as told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(seconds: int, capsys) -> list[str]:
    """The lines of a run of one step of 7 tokens a second."""
    clock = Clock()
    asked = []
    progress = Progress(total=seconds, done=0, clock=clock)
    for _ in range(seconds):
        clock.now += 1
        progress.step(7, lambda: asked.append(clock.now) or "loss 1.5")
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    # Figures cost a wait for the device: they are asked for only when shown.
    assert len(asked) == len(lines)
    return lines


def test_a_line_every_ten_seconds(capsys):
    lines = run(35, capsys)
    assert lines[0] == "step 10/35: loss 1.5, 7 tokens/s"
    assert len(lines) == 3


def test_the_first_line_comes_after_ten_steps_of_the_session(capsys):
    """Quick steps are shown long before ten seconds are over; a very short run shows none."""
    clock = Clock()
    progress = Progress(total=100, done=40, clock=clock)
    for _ in range(30):
        clock.now += 0.1
        progress.step(7, lambda: "loss 1.5")
    assert capsys.readouterr().err == "step 50/100: loss 1.5, 70 tokens/s\n"


def test_about_a_hundred_lines_in_a_run_of_hours(capsys):
    assert 50 < len(run(4 * 3600, capsys)) < 120


def test_messages_go_to_stdout(capsys):
    progress = Progress(total=None, done=3)
    progress.write_line("valid: ppl 12")
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == "valid: ppl 12\n"
    assert captured.err == ""
