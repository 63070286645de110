"""The page tells the whole story of a finished run, judges its numbers, and bears any folder, however little is in it."""

import json
from html.parser import HTMLParser

import pytest

from examples.report import plots
from examples.report.compose import STORY, compose, duration
from examples.report.page import Part
from examples.report.sections import balance, context, distill, fp8, generation, grpo, pretraining, sft

from .conftest import CONFIG, metrics, positions, pretrained, results, write

STAGES = tuple(results())
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Checks that what is opened is closed, and keeps tags and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def quick_pictures(monkeypatch):
    """Pictures are not drawn but written as their titles."""
    for name in ("lines", "heat", "bars", "intervals"):
        monkeypatch.setattr(plots, name, lambda path, title, *_, **__: path.write_text(title))


def test_every_part_of_the_story_in_order(told):
    folder, _ = told
    page, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "cannot be shown" not in page
    titles = [line[3:] for line in markdown.splitlines() if line.startswith("## ")]
    assert titles == [*(section.TITLE for section in STORY), "Cost, and how to make it again"]
    for section in STORY:
        own = page[page.index(f'id="{section.__name__.rpartition(".")[2]}"') :]
        assert "<img" in own[: own.index("<h2", 10)], section.TITLE  # a picture before the next part


def test_the_html_is_one_file_that_a_phone_can_read(told):
    folder, _ = told
    page = (folder / "report.html").read_text()
    reader = Reader(page)
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(images) > 25
    for image in images:
        assert image["src"].startswith("data:image/png;base64,iVBOR") and len(image["alt"]) > 10
    loaded = [a for tag, a in reader.tags if tag in ("script", "link", "iframe")]
    assert not loaded and "http" not in page and "url(" not in page and "@import" not in page
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in reader.tags
    assert (
        "prefers-color-scheme:dark" in page and ".wide{overflow-x:auto}" in page and "max-width:62rem" in page
    )
    anchors = {a["id"] for tag, a in reader.tags if "id" in a}
    assert {a["href"][1:] for tag, a in reader.tags if tag == "a"} == anchors


def test_markdown_and_html_say_the_same(told):
    folder, _ = told
    markdown = (folder / "report.md").read_text()
    reader = Reader((folder / "report.html").read_text())
    pictures = [line.split("](")[1][:-1] for line in markdown.splitlines() if line.startswith("![")]
    assert len(pictures) == sum(tag == "img" for tag, _ in reader.tags) == len(set(pictures))
    for name in pictures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    rows = sum(line.startswith("| ") for line in markdown.splitlines())
    assert rows == sum(tag == "tr" for tag, _ in reader.tags)
    assert sum(line.startswith("```") for line in markdown.splitlines()) % 2 == 0


def test_what_a_model_wrote_is_text(told):
    folder, _ = told
    page, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "<script>" not in page and "&lt;script&gt;x&lt;/script&gt;" in page
    assert "''' & more" in markdown  # a fence in the text does not end the block
    assert "7\\|8" in markdown  # nor a bar the cell


def test_the_glance_has_verdicts_and_times(told):
    folder, findings = told
    markdown = (folder / "report.md").read_text()
    top = markdown[: markdown.index("## ")]
    assert f"{len(STAGES)} stages in {duration(61 * len(STAGES))}. 11 numbers have a bound: all hold." in top
    assert [f.key for f in findings.values() if f.bound and not f.ok] == []
    assert "| GRPO: lift of greedy held-out accuracy | 0.2 | >= 0.15 | ok |" in top
    for stage in STAGES:
        assert f"| {stage} | 1 min 1 s | 512 | {stage}-digest |" in markdown
    assert "~0.100 [0.000, 0.200]" in markdown and "Not done: code: there is no sandbox here." in markdown
    assert [duration(s) for s in (0.4, 61, 3600, 7325)] == [
        "0 s",
        "1 min 1 s",
        "1 h 0 min 0 s",
        "2 h 2 min 5 s",
    ]


class Told:
    """What a section reads, from results alone."""

    def __init__(self, **changes):
        self.results, self.config = {**results(), **changes}, CONFIG

    def steps(self, stage):
        return [row for row in metrics().get(stage, []) if "lr" in row]

    def held_out(self, stage):
        return []


def grown(before, after):
    return {"steps": 1, "before": {"accuracy": before}, "after": {"accuracy": after}}


def extension(rise, plain, final=128):
    found = results()["extend"]
    return found | {
        "final_length": final,
        "positions": {"plain": positions(plain), "phase_2": positions(rise)},
    }


@pytest.mark.parametrize(
    ("section", "key", "changes", "ok"),
    [
        (pretraining, "held_out_loss", {"pretrain": pretrained(3.5)}, True),
        (pretraining, "held_out_loss", {"pretrain": pretrained(3.51)}, False),
        (balance, "max_violation", {"pretrain": pretrained(violation=0.49)}, True),
        (balance, "max_violation", {"pretrain": pretrained(violation=0.5)}, False),
        (balance, "max_violation_without_bias", {"without_bias": pretrained(violation=1.4)}, False),
        (fp8, "fp8_held_out_gap_percent", {"fp8": pretrained(3.0 * 1.0024)}, True),
        (fp8, "fp8_held_out_gap_percent", {"fp8": pretrained(3.0 * 0.997)}, False),
        (context, "yarn_rise", {"extend": extension(0.05, 1.0)}, True),
        (context, "yarn_rise", {"extend": extension(0.06, 1.0)}, False),
        (context, "yarn_rise", {"extend": extension(0.0, 1.0, final=64)}, False),  # 2x only
        (context, "plain_rise", {"extend": extension(0.0, 0.04)}, False),
        (context, "plain_rise", {"extend": extension(0.0, 0.06)}, True),
        (sft, "sft_loss", {"sft": results()["sft"] | {"after": results()["sft"]["before"]}}, False),
        (grpo, "grpo_gain", {"grpo": grown(0.25, 0.5)}, True),
        (grpo, "grpo_gain", {"grpo": grown(0.25, 0.375)}, False),
        (generation, "mtp_acceptance", {"generate": results()["generate"] | {"acceptance": 0.6}}, False),
        (generation, "speculative_equals_greedy", {"generate": results()["generate"] | {"equals_greedy": False}}, False),
    ],
)  # fmt: skip
def test_bounds(quick_pictures, tmp_path, section, key, changes, ok):
    part = Part(tmp_path)
    section.write(Told(**changes), part)
    (finding,) = (f for f in part.findings if f.key == key)
    assert finding.bound and finding.ok is ok and finding.verdict == ("ok" if ok else "MISSED")


def test_a_missed_bound_stands_first(quick_pictures, tmp_path):
    root = write(
        tmp_path / "run", results() | {"grpo": results()["grpo"] | {"after": results()["grpo"]["before"]}}
    )
    compose(root, root / "report", STAGES)
    markdown = (root / "report" / "report.md").read_text()
    assert "11 numbers have a bound: 1 missed." in markdown
    first = markdown[markdown.index("|---") :].splitlines()[1]
    assert first == "| GRPO: lift of greedy held-out accuracy | 0 | >= 0.15 | MISSED |"


def test_a_part_appears_when_its_stage_has_finished(quick_pictures, tmp_path):
    for count in range(1, len(STAGES) + 1):
        some = STAGES[:count]
        root = write(tmp_path / str(count), {stage: results()[stage] for stage in some})
        compose(root, root / "report", STAGES)
        markdown = (root / "report" / "report.md").read_text()
        for section in STORY:
            assert (f"## {section.TITLE}" in markdown) == (section.STAGE in some)
        assert "cannot be shown" not in markdown


ALSO = {
    balance: ("without_bias",),
    fp8: ("pretrain",),
    pretraining: ("evaluate",),
    distill: ("grpo",),
}  # what it reads, too


@pytest.mark.parametrize("stage", STAGES)
def test_an_older_folder_that_lacks_something_still_has_a_page(quick_pictures, tmp_path, stage):
    """Without any one key of the stage's result, and without its metrics, what other stages tell is there as before."""
    others = [section for section in STORY if stage not in (section.STAGE, *ALSO.get(section, ()))]
    for key in results()[stage]:
        found = results()
        del found[stage][key]
        root = write(tmp_path / key, found, {k: v for k, v in metrics().items() if k != stage})
        compose(root, root / "report", STAGES)
        markdown = (root / "report" / "report.md").read_text()
        assert [f"## {section.TITLE}" in markdown for section in STORY] == [True] * len(STORY)
        for section in others:
            own = markdown[markdown.index(f"## {section.TITLE}") :]
            assert "cannot be shown" not in own[: own.index("\n## ", 5)], (key, section.TITLE)


def test_what_comes_before_a_gap_is_kept(quick_pictures, tmp_path):
    found = results()
    del found["evaluate"]["ema"]
    root = write(tmp_path / "run", found)
    compose(root, root / "report", STAGES)
    markdown = (root / "report" / "report.md").read_text()
    assert "![Held-out loss of each source](held_out.png)" in markdown
    assert "The rest cannot be shown: what its stages left lacks something (KeyError: 'ema')." in markdown


def test_a_metric_of_some_steps_is_drawn_where_it_is(monkeypatch, tmp_path):
    """GRPO need not measure the divergence at every step, nor at any; NaN is null in a metrics file."""
    drawn = {}
    monkeypatch.setattr(
        plots, "lines", lambda path, *rest, **_: (path.write_text(""), drawn.update({path.stem: rest[3]}))
    )
    run = Told()
    rows = [row for row in metrics()["grpo"] if "lr" in row]
    for i, row in enumerate(rows):
        del row["entropy"]
        row["kl"] = None if i else 0.5
    run.steps = lambda stage: rows
    grpo.write(run, Part(tmp_path))
    assert (drawn["grpo_kl"][0].x, drawn["grpo_kl"][0].y) == ([1], [0.5])
    assert "grpo_entropy" not in drawn and len(drawn["grpo_reward"]) == 2


def test_pictures_of_a_part_that_is_gone_are_removed(quick_pictures, tmp_path):
    root = write(tmp_path / "run")
    compose(root, root / "report", STAGES)
    assert (root / "report" / "grpo_reward.png").exists()
    (root / "grpo" / "done.json").unlink()
    compose(root, root / "report", STAGES)
    assert not (root / "report" / "grpo_reward.png").exists()
    assert "grpo_reward" not in (root / "report" / "report.md").read_text()


def test_how_it_was_made_is_told(quick_pictures, tmp_path):
    root = write(tmp_path / "run")
    place = {
        "code": {"commit": "0123456789abcdef", "dirty": True, "tree": "feed"}, "torch": "2.13.0", "python": "3.11.7",
        "processor": "x86_64 AVX2", "cuda": None, "threads": 2,
    }  # fmt: skip
    processes = [{"environment": place}, {"environment": place}]
    (root / "sft" / "stage.json").write_text(json.dumps({"processes": processes}))
    compose(root, root / "report", STAGES)
    markdown = (root / "report" / "report.md").read_text()
    assert markdown.count("Code 0123456789ab with changes (sources feed), torch 2.13.0") == 1
    assert "the last of 2 processes" in markdown and f"--from {root}/STAGE" in markdown
