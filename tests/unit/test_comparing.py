"""Statistics, records and reports of comparisons."""

import html.parser
import random
import re
from pathlib import Path

import pytest

from bulkhead.choosing import costs
from bulkhead.comparing import metrics, model, page, plots, quoted, samples
from bulkhead.errors import Invalid, NotFound
from bulkhead.home import Home
from bulkhead.isolation.seccomp import describe
from bulkhead.linux import seccomp as kernel


def comparison(**host: str) -> model.Comparison:
    found = model.Comparison(
        model.VERSION, "2026-11-21T22:00:00+00:00", 90.0, {"KVM": "not usable", **host}, "", [],
        {"host": "the host", "container": "ours", "docker": "peer <b>"}, list(metrics.METRICS),
    )  # fmt: skip
    for subject, value in (("host", 1.0), ("container", 8.0), ("docker", 300.0)):
        found.add(subject, "start.first", [value, value * 1.1, value * 0.9])
        found.add(subject, "cpu", [100.0, 101.0, 99.0])
    found.add("container", "memory", samples.Estimate(1.5, 1.0, 2.0), "a & b")
    found.miss("podman", "", "not\ninstalled")
    return found


def test_a_median_lies_in_its_interval_and_so_does_the_next_one() -> None:
    draw = random.Random(7)
    held = 0
    for _ in range(400):
        one, other = (samples.median([draw.lognormvariate(2, 1) for _ in range(11)])
                      for _ in range(2))  # fmt: skip
        assert one.low <= one.value <= one.high
        held += one.low <= other.value <= one.high
    assert held / 400 > 0.93


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([5.0], 5.0, 5.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3.5 - 2.5 * 2**0.5, 3.5 + 2.5 * 2**0.5),
    ],
)
def test_few_values_give_all_they_have(values: list[float], low: float, high: float) -> None:
    found = samples.median(values)
    assert [found.low, found.high] == pytest.approx([low, high])


def test_an_outlier_does_not_move_the_interval() -> None:
    values = [float(value) for value in range(100, 111)]
    wild = [*values[:-1], 1e9]
    assert samples.median(values).high == samples.median(wild).high


def test_a_slope_is_that_of_most_points() -> None:
    points = [(float(x), 3.0 * x + 10) for x in range(12)]
    assert samples.slope(points).value == pytest.approx(3.0)
    points[5] = (5.0, 1e6)
    found = samples.slope(points)
    assert found.value == pytest.approx(3.0)
    assert found.low <= found.value <= found.high
    assert found == samples.slope(points)
    with pytest.raises(ValueError, match="two"):
        samples.slope([(1.0, 2.0), (1.0, 3.0)])


def test_turns_rotate_and_warm_rounds_do_not_count() -> None:
    order: list[str] = []

    def take(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = samples.interleaved({"a": lambda: take("a"), "b": lambda: take("b")}, 2, warm=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [4.0, 5.0], "b": [3.0, 6.0]}


def test_the_last_comparison_is_kept_and_advise_reads_it(tmp_path: Path) -> None:
    home = Home(str(tmp_path / "root"), str(tmp_path / "run"))
    with pytest.raises(NotFound, match="bulkhead compare"):
        model.last(home)
    made = comparison()
    model.keep(home, made)
    assert model.last(home) == made
    read = costs.load(home)
    assert read is not None
    assert read.figure("container", "start_warm_ms") == 8.0
    assert read.figure("container", "memory_mib") == 1.5
    assert read.figure("container", "cpu_ratio") == 1.0
    assert read.peers["docker"]["start_warm_ms"].rounds == 3
    assert [path.name for path in (tmp_path / "root").iterdir()] == [model.FILE]


@pytest.mark.parametrize("data", [b"", b"{}", b'{"version": 2}', b"\xff"])
def test_what_is_no_comparison_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / model.FILE).write_bytes(data)
    with pytest.raises(Invalid, match="again"):
        model.last(Home(str(tmp_path), str(tmp_path)))


def test_csv_has_a_line_for_each_figure() -> None:
    lines = model.as_csv(comparison()).splitlines()
    assert len(lines) == 1 + 7
    assert lines[0].startswith("subject,metric,unit,median")
    assert "container,memory,MiB,1.5,1,2,0,a & b" in lines


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [
            str(value)
            for key, value in attrs
            if key in ("src", "href") or tag in ("script", "link")
        ]


def test_the_report_loads_nothing_and_escapes_all() -> None:
    text = page.html(comparison())
    seen = _Page()
    seen.feed(text)
    assert not seen.loads
    assert not {"script", "link", "img", "iframe"} & set(seen.tags)
    assert "peer &lt;b&gt;" in text
    assert "a &amp; b" in text
    assert seen.tags.count("svg") == 3
    assert "not installed" in text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


def test_values_of_many_magnitudes_get_a_logarithmic_scale() -> None:
    found = comparison()
    by_key = {metric.key: metric for metric in found.metrics}
    starts = [one for one in found.figures if one.metric == "start.first"]
    works = [one for one in found.figures if one.metric == "cpu"]
    assert "logarithmic" in plots.svg(by_key["start.first"], starts)
    assert "from zero" in plots.svg(by_key["cpu"], works)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.01234, "0.0123"), (1.5, "1.50"), (12345.6, "12,346"), (99.94, "99.9"),
     (-3.0, "-3.00")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert plots.number(value) == text


def test_a_picture_can_be_made(tmp_path: Path) -> None:
    plots.png(comparison(), str(tmp_path / "all.png"))
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_quoted_is_judged_by_what_was_measured() -> None:
    found = {one.claim: one for one in quoted.verdicts(comparison())}
    assert found["A container starts in 1.3 s"].verdict == "not borne out"
    assert found["A container starts in milliseconds"].verdict == "borne out"
    micro = found["A microVM boots to its init in 125 ms"]
    assert micro.verdict == "cannot be said here: not measured"
    slow = comparison()
    slow.add("microvm", "start.first", [400.0])
    (micro,) = [one for one in quoted.verdicts(slow) if one.claim == micro.claim]
    assert micro.verdict == "cannot be said here: no KVM, guests are emulated"
    slow.host["KVM"] = "usable"
    (micro,) = [one for one in quoted.verdicts(slow) if one.claim == micro.claim]
    assert micro.verdict == "not borne out"
    assert "400 ms" in micro.here


def test_every_metric_is_explained_once() -> None:
    keys = [metric.key for metric in metrics.METRICS]
    assert len(set(keys)) == len(keys)
    assert all(len(metric.explains) > 15 for metric in metrics.METRICS)


def test_what_a_filter_lets_through_is_found_whatever_its_form() -> None:
    allow, deny = (kernel.RET_K, 0, 0, kernel.RET_ALLOW), (kernel.RET_K, 0, 0, kernel.RET_ERRNO)
    number = (kernel.LD_W_ABS, 0, 0, kernel.OFFSET_NUMBER)
    calls = kernel.numbers("x86_64")
    assert describe.passes(kernel.pack([allow]), "x86_64") == set(calls)
    assert describe.passes(kernel.pack([deny]), "x86_64") == set()
    but_open = [number, (kernel.JMP_JEQ_K, 1, 0, calls["openat"]), allow, deny]
    assert describe.passes(kernel.pack(but_open), "x86_64") == calls.keys() - {"openat"}
    argument = (kernel.LD_W_ABS, 0, 0, kernel.OFFSET_ARGUMENTS)
    some = [number, (kernel.JMP_JEQ_K, 0, 3, calls["socket"]), argument,
            (kernel.JMP_JEQ_K, 0, 1, 1), allow, deny]  # fmt: skip
    assert describe.passes(kernel.pack(some), "x86_64") == {"socket"}
