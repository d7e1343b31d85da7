"""Pictures are drawn, with content, from whole and from poor metrics."""

import math
import subprocess
import sys

import pytest
from PIL import Image

from lowmem_rlhf.report import plots
from lowmem_rlhf.report.plots import draw_run, plot_reward, smooth, to_png

EVALUATION = {"before": {"accuracy": 0.1, "problems": 128}, "after": {"accuracy": 0.6, "problems": 128}}


def rows(count: int, scale: float = 1.0) -> list[dict]:
    return [
        {
            "step": step, "reward/mean": scale * step / (count + 1), "reward/std": 0.1,
            "kl": None if step == 2 else 0.01 * step, "entropy": 1.0,
            "completion/mean_length": 5.0, "completion/truncated": 0.1, "grad_norm": 0.5,
            "time/step": 2.0, "time/rollout": 1.0, "time/score": 0.2, "time/update": 0.7,
        }
        for step in range(1, count + 1)
    ]  # fmt: skip


def colours(path) -> int:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return len(image.convert("RGB").getcolors(1 << 24))


def test_readme_picture_has_its_size_and_colours(tmp_path):
    path = plot_reward(rows(30), EVALUATION, tmp_path / "sub" / "reward.png", "Title")
    with Image.open(path) as image:
        assert image.size == (900, 450)
        colours_of = image.convert("RGB").getcolors(1 << 24)
    white = sum(count for count, colour in colours_of if colour == (255, 255, 255))
    assert 0.3 < white / (900 * 450) < 0.95
    assert colours(path) > 50


@pytest.mark.parametrize(
    ("metrics", "evaluation"),
    [
        (rows(40), EVALUATION),
        (rows(40, scale=-5), {"before": {"accuracy": 0.0}}),
        (rows(1), {"after": {"accuracy": None}}),
        ([], {}),
        ([], EVALUATION),
        ([{"step": 1}, {"step": 2, "reward/mean": math.nan, "kl": "?"}, {}], {"before": None}),
    ],
)
def test_any_metrics_can_be_drawn(tmp_path, metrics, evaluation):
    (tmp_path / "run.png").write_bytes(to_png(draw_run(metrics, evaluation), 130))
    assert colours(tmp_path / "run.png") > 2
    assert colours(plot_reward(metrics, evaluation, tmp_path / "reward.png", "")) > 2


def test_svg_by_suffix(tmp_path):
    assert b"<svg" in plot_reward(rows(3), {}, tmp_path / "run.svg").read_bytes()


def test_smooth_is_centred_and_skips_gaps():
    assert smooth([0.0, 3.0, 6.0], 3) == [0.0, 3.0, 6.0]
    assert smooth([0.0, 0.0, 9.0, 0.0, 0.0], 3) == [0.0, 3.0, 3.0, 3.0, 0.0]
    assert smooth([1.0, math.nan, 3.0], 3)[1] == 2.0
    assert math.isnan(smooth([math.nan], 3)[0])


@pytest.mark.parametrize(("mean", "low", "high"), [(0.5, 0.0, 1.0), (1.5, 0.7, 2.3)])
def test_the_band_stays_where_rewards_can_be(mean, low, high):
    axes = plots._figure(4, 3).add_subplot()
    plots._reward(axes, [{"step": i, "reward/mean": mean, "reward/std": 0.8} for i in range(1, 9)], {})
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (pytest.approx(low), pytest.approx(high))


def test_import_is_light():
    code = "import sys, lowmem_rlhf.report.html, lowmem_rlhf.display.live as _; "
    code += "print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_accuracy_far_from_the_reward_gives_way_to_the_held_out_reward():
    figure = plots._figure(4, 3)
    axes = figure.add_subplot()
    metrics = [{"step": i, "reward/mean": 0.6 + 0.01 * i} for i in range(1, 9)]
    evaluation = {
        when: {"accuracy": 0.01, "reward/mean": 0.6 + more} for when, more in (("before", 0), ("after", 0.08))
    }
    plots._reward(axes, metrics, evaluation)
    assert "held-out reward" in [text.get_text() for text in axes.get_legend().get_texts()]
    marks = next(line for line in axes.lines if line.get_label() == "held-out reward")
    assert list(marks.get_ydata()) == pytest.approx([0.6, 0.68])


def test_every_evaluation_is_marked_at_its_step_with_its_interval():
    def row(step, value):
        return {"step": step, "accuracy": value, "headline": "accuracy", "intervals": {"accuracy": [0.0, value + 0.2]}}

    evaluation = {"before": row(0, 0.1), "during": [row(4, 0.3), row(8, 0.5)], "after": row(8, 0.5)}
    metrics = [{"step": i, "reward/mean": 0.1 * i} for i in range(1, 9)]
    axes = plots._figure(4, 3).add_subplot()
    plots._reward(axes, metrics, evaluation)
    marks = next(line for line in axes.lines if line.get_label() == "held-out accuracy")
    assert list(zip(*marks.get_data(), strict=True)) == [(0, 0.1), (4, 0.3), (8, 0.5)]
    (bars,) = axes.containers
    ends = [point[1] for path in bars.lines[2][0].get_segments() for point in path]
    assert ends == pytest.approx([0.0, 0.3, 0.0, 0.5, 0.0, 0.7]) and axes.get_ylim()[1] > 0.7
    losses = [{"step": i, "loss": 1 / i} for i in range(1, 9)]
    assert len(draw_run(losses, evaluation).axes) == len(draw_run(losses, {}).axes) + 1  # a place for the accuracy


def test_marks_lie_inside_the_axes():
    axes = plots._figure(4, 3).add_subplot()
    plots._reward(axes, [{"step": i, "reward/mean": 0.7} for i in range(1, 9)], {"before": {"accuracy": 0.1}})
    low, high = axes.get_ylim()
    assert low < 0.1 < high
