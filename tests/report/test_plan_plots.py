"""What fits and the phases of a plan, printed and drawn: the figures are the plan's, and no text lies on another."""

import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lowmem_rlhf import cli
from lowmem_rlhf.architecture.catalogue import find
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.profiles import find_profile, profile_device
from lowmem_rlhf.planning.fits import one_card, shipped_cards, what_fits
from lowmem_rlhf.planning.plan import make_plan
from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.report.axes import INK
from lowmem_rlhf.report.fits_view import cell_text, gigabytes, print_fits, short_name, speed_text
from lowmem_rlhf.report.plan_plots import GROUPS, PRECISIONS, check_picture, draw_fits, draw_phases, save_picture

GIB = 1024**3
MODELS = ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "google/gemma-3-1b-it", "microsoft/phi-4")


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("grpo_gsm8k")


@pytest.fixture(scope="module")
def models():
    return {name: find(name) for name in MODELS}


@pytest.fixture(scope="module")
def on_all(recipe, models):
    return what_fits(recipe, shipped_cards()[::2], models)


@pytest.fixture(scope="module")
def on_one(recipe, models):
    return what_fits(recipe, one_card(profile_device(find_profile("rtx-3070")), "rtx-3070"), models)


def a_plan(model, profile, vram=None, *overrides):
    loaded = load_recipe("grpo_gsm8k", [f"model={model}", *overrides])
    return make_plan(loaded, profile_device(find_profile(profile), vram), profile).to_dict()


PLANS = [
    ("Qwen/Qwen2.5-1.5B-Instruct", "rtx-2080-ti", None),
    ("Qwen/Qwen2.5-7B-Instruct", "rtx-2080-ti", None),
    ("Qwen/Qwen2.5-7B-Instruct", "rtx-5090", None),
    ("Qwen/Qwen2.5-7B-Instruct", "rtx-2080-ti", "3GB"),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "cpu", "4GB"),
]


def overlaps(figure):
    """Return the pairs of texts that lie on each other, and those that leave the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    beyond = set()  # ticks that matplotlib keeps beyond the axes, and does not draw
    for axes in figure.axes:
        low, high = axes.get_xlim()
        labels = [tick.label1 for tick in axes.xaxis.majorTicks]
        beyond |= {id(text) for text in labels if not low <= text.get_position()[0] <= high}
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    texts = [text for text in texts if id(text) not in beyond]
    boxes = {id(text): text.get_window_extent() for text in texts}
    width, height = figure.canvas.get_width_height()
    out = [
        text.get_text()
        for text in texts
        for box in [boxes[id(text)]]
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]
    pairs = itertools.combinations(texts, 2)
    return out + [(a.get_text(), b.get_text()) for a, b in pairs if boxes[id(a)].overlaps(boxes[id(b)])]


@pytest.mark.parametrize(("model", "profile", "vram"), PLANS)
def test_the_bars_are_the_phases_and_the_marks_are_the_plan_s(model, profile, vram, tmp_path):
    plan = a_plan(model, profile, vram)
    figure = draw_phases(plan, f"grpo_gsm8k, {model}")
    (axes,) = figure.axes
    phases = plan["memory"]["phases"]
    ends = [0.0] * len(phases)
    for bar in axes.patches:
        row = round(bar.get_y() + bar.get_height() / 2)
        ends[row] = max(ends[row], bar.get_x() + bar.get_width())
    assert ends == pytest.approx([sum(parts.values()) / GIB for parts in phases.values()])
    assert [label.get_text() for label in axes.get_yticklabels()] == list(phases)
    lines = {round(line.get_xdata()[0], 6) for line in axes.lines}
    assert round(plan["memory"]["budget_bytes"] / GIB, 6) in lines
    assert round(plan["device"]["total_bytes"] / GIB, 6) in lines
    marks = [tuple(line.get_xdata()) for line in axes.lines]
    low, high = plan["memory"]["low_bytes"] / GIB, plan["memory"]["high_bytes"] / GIB
    assert any(mark == pytest.approx((low, high)) for mark in marks) == (high > low)
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "weights" in named and ("allocator" in named) == (profile != "cpu")
    assert len(set(named)) == len(named) <= len(GROUPS) <= 8
    assert overlaps(figure) == []
    with Image.open(save_picture(figure, tmp_path / "x.png")) as image:
        assert image.size[0] == 1344 and len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_every_component_of_a_plan_is_in_one_group_and_the_rest_is_small():
    named = [name for _, names in GROUPS.values() for name in names]
    assert len(set(named)) == len(named)
    for plan in (a_plan(*case) for case in PLANS):
        for parts in plan["memory"]["phases"].values():
            assert sum(size for name, size in parts.items() if name not in named) < 0.03 * sum(parts.values())


# What is left of linear RGB without one kind of cones (Machado, Oliveira, Fernandes 2009, severity 1)
VISIONS = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(colour: str):
    """Return a colour's linear RGB."""
    rgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """Return CIELAB of linear RGB."""
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    xyz = to_xyz @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883]
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("colours", [[colour for colour, _ in GROUPS.values()], list(PRECISIONS.values())])
def test_colours_are_told_apart_with_any_colour_vision(colours, vision):
    seen = [lab(VISIONS[vision] @ linear(colour)) for colour in colours]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20  # 2.3 are just noticed


def test_texts_stand_out_from_their_cells():
    def light(colour):
        return float(linear(colour) @ [0.2126, 0.7152, 0.0722]) + 0.05

    for precision, colour in PRECISIONS.items():
        ink = "#ffffff" if precision == "32-bit" else INK
        low, high = sorted((light(colour), light(ink)))
        assert high / low >= 4.5  # WCAG 2, AA


def test_the_map_of_all_cards_says_what_the_table_says(on_all, tmp_path):
    figure = draw_fits(on_all)
    assert len(figure.axes) == 3
    for axes, rows in zip(figure.axes, on_all.cells.values(), strict=True):
        cells = [cell for row in rows.values() for cell in row]
        texts = [text.get_text() for text in axes.texts]
        assert len(texts) == len(cells)
        for text, cell in zip(texts, cells, strict=True):
            first, _, second = text.partition("\n")
            if cell.fits:
                assert first.rstrip("*") == f"{cell.longest:,}" and first.endswith("*") == bool(cell.savings)
                assert second == speed_text(cell) != "-/s"
            else:
                assert first == ("refused" if cell.room_bytes is None else f"-{gigabytes(cell.room_bytes)}")
                assert second == (f"up to {cell.longest:,}" if cell.longest else "")
        pixels = axes.images[0].get_array()
        colours = {cell.precision if cell.fits else None: set() for cell in cells}
        for index, cell in enumerate(cells):
            y, x = divmod(index, len(on_all.cards))
            colours[cell.precision if cell.fits else None].add(tuple(pixels[y, x]))
        assert all(len(found) == 1 for found in colours.values())
        assert len(set.union(*colours.values())) == len(colours) >= 3
    assert overlaps(figure) == []
    with Image.open(save_picture(figure, tmp_path / "x.png")) as image:
        assert image.size[0] == 1344 and len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_the_map_of_one_card_has_the_longest(on_one):
    figure = draw_fits(on_one)
    texts = [text.get_text() for text in figure.axes[0].texts]
    cells = [on_one.cells[algorithm][model][0] for model in MODELS for algorithm in on_one.cells]
    assert len(texts) == len(cells) == 12
    for text, cell in zip(texts, cells, strict=True):
        assert (f"longest {cell.longest:,}" if cell.longest else "no length fits") in text
        assert text.endswith(f", {speed_text(cell)}") == cell.fits
    assert overlaps(figure) == []


def test_pictures_are_written_in_the_kind_of_their_name(on_one, tmp_path):
    figure = draw_fits(on_one)
    assert b"<svg" in save_picture(figure, tmp_path / "x.svg").read_bytes()
    assert save_picture(figure, tmp_path / "x.PDF").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.gif", r"got '.gif'; a picture is a .png, .svg or .pdf file"),
        ("picture", "got no kind at all"),
        ("nowhere/x.png", "the folder .*nowhere' does not exist; make it first"),
        ("folder.png", "it is a folder"),
    ],
)
def test_a_path_that_cannot_be_is_refused(name, message, tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=message):
        check_picture(tmp_path / name)


def printed(fits, width):
    stream = io.StringIO()
    print_fits(fits, Console(file=stream, width=width, force_terminal=width is not None, color_system=None))
    return stream.getvalue()


def test_the_table_of_all_cards_has_every_cell_whatever_the_width(on_all):
    wide = printed(on_all, None).splitlines()
    head = next(index for index, line in enumerate(wide) if line.startswith("GRPO, prompts of 512 and 8 completions"))
    assert all(card.label in wide[head + 1] for card in on_all.cards)
    for model, line in zip(MODELS, wide[head + 2 :], strict=False):
        texts = [part.strip() for part in line.split("  ") if part.strip()]
        assert texts == [short_name(model), *map(cell_text, on_all.cells["grpo"][model])]
    gemma = on_all.cells["grpo"]["google/gemma-3-1b-it"]
    assert not any("overflows" in cell_text(cell) for cell in gemma)  # cards without bfloat16 too: see `engine.wide`
    narrow = printed(on_all, 100)
    assert max(map(len, narrow.splitlines())) <= 100
    for model in MODELS:
        for cell in on_all.cells["ppo"][model]:
            assert cell_text(cell) in narrow


def test_the_table_of_one_card_says_what_is_missing(on_one):
    text = printed(on_one, 80)
    (phi,) = on_one.cells["grpo"]["microsoft/phi-4"]
    assert not phi.fits and f"phi-4: {phi.lacks}" in " ".join(text.split())
    (small,) = on_one.cells["grpo"][MODELS[0]]
    row = [line.split() for line in text.splitlines() if line.startswith("Qwen2.5-1.5B-Instruct")][1]
    expected = ["yes", small.precision, f"{small.micro_batch_tokens:,}", str(small.rollout_rows)]
    assert row[1:] == [*expected, f"{small.peak_bytes / GIB:.2f}", speed_text(small), f"{small.longest:,}"]
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("width", [40, 60, 74])
def test_a_narrow_table_of_one_card_folds_no_number(on_one, width):
    lines = printed(on_one, width).splitlines()
    assert max(map(len, lines)) <= width
    (cell,) = on_one.cells["grpo"][MODELS[0]]
    said = [f"{cell.peak_bytes / GIB:.2f}", f"{cell.longest:,}"] if width >= 74 else [cell_text(cell)]
    assert all(any(number in line for line in lines) for number in [*said, speed_text(cell)])


def test_room_is_rounded_down_and_a_shortage_up():
    assert [gigabytes(count) for count in (0, GIB // 20, 2 * GIB - 1, -1, -GIB)] == [
        "0.0G",
        "0.0G",
        "1.9G",
        "0.1G",
        "1.0G",
    ]


@pytest.fixture
def run(monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["lowmem-rlhf", "plan", "grpo_gsm8k", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, *capsys.readouterr()

    return command


def test_plan_plot_writes_the_picture_and_names_it(run, tmp_path):
    path = tmp_path / "phases.png"
    code, out, _ = run("--profile", "rtx-2080-ti", "--plot", str(path))
    assert code == 0 and out.splitlines()[-1] == str(path) and Image.open(path).format == "PNG"
    code, out, err = run("--profile", "rtx-2080-ti", "--plot", str(path), "--json")
    assert code == 0 and json.loads(out)["profile"] == "rtx-2080-ti" and err.splitlines()[-1] == str(path)


def test_what_fits_is_printed_drawn_and_one_json_object(run, tmp_path):
    path = tmp_path / "fits.png"
    arguments = ["--all-profiles", "--profile", "rtx-2080-ti", "--models", "Qwen2.5-7B-Instruct"]
    code, out, _ = run(*arguments, "--plot", str(path))
    assert code == 0 and Image.open(path).format == "PNG"
    assert "budget 10.18 GiB" in out and out.count("Qwen2.5-7B-Instruct") == 3 and "longest" in out
    code, out, _ = run(*arguments, "--json")
    (cells,) = {tuple(found) for found in json.loads(out)["tables"]["grpo"]["cells"].values()}
    assert code == 0 and cells == ("rtx-2080-ti",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "x.gif"], "error: --plot x.gif: got '.gif'"),
        (["--plot", str(Path("nowhere", "x.png")), "--all-profiles"], "the folder 'nowhere' does not exist"),
        (["--models", "all"], "error: --models: is for --all-profiles"),
    ],
)
def test_wrong_options_are_one_sentence(run, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1
