"""report.html from report.json: the verdict, what is shown and what is refused; test_report_browser.py opens it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cusprun.benchmarks.report_page import read_experts, render_page, verdicts, write_page, write_pages
from cusprun.benchmarks.report_page.frontier import own_frontiers
from cusprun.benchmarks.report_page.intervals import bits_interval, mean_interval, ratio_interval
from cusprun.errors import InvalidRequest
from tests.benchmarks.reports_made import answers, frontier, make_expert, make_report, qualities, speeds


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return make_expert(tmp_path / "one")


def sentences(tmp_path: Path, **changes: Any) -> tuple[str, str, str]:
    return verdicts(read_experts([make_expert(tmp_path / "e", make_report(**changes))]))[0]


def test_page_shows_everything(one: Path) -> None:
    (path,) = write_pages(one)
    assert path == one / "report" / "report.html"
    page = path.read_text(encoding="utf-8")
    for heading in ("Verdict", "What was asked", "What came out", "Speed and size", "Quality on held-out text",
                    "Multiple choice", "Sample answers", "Where it was cut", "How everything was measured",
                    "Recipe"):  # fmt: skip
        assert re.search(rf"<h2 id=[^>]*>{heading}</h2>", page), heading
    for shown in ("org/tiny", "c" * 64, "ratio: 0.25", "107.0 MB", "49,152 → 28,672 tokens (-41.7 %)", "1536 → 768",
                  "Who pays the rent?", "+2.2 %", "61.2"):  # fmt: skip
        assert shown in page, shown
    assert page.count("<figure ") == page.count('<svg xmlns="http://www.w3.org/2000/svg"') == 4
    assert page.count("<figure ") == page.count(": the numbers</summary>")
    assert "Frontier" not in page  # nobody compared


def test_page_is_the_same_each_time_and_asks_for_nothing(one: Path) -> None:
    (path,) = write_pages(one)
    page = path.read_bytes()
    assert write_pages(one) == [path]
    assert path.read_bytes() == page
    text = page.decode()
    assert not re.findall(r'(?:src|href)="(?!#|data:,|\.\./)[^"]*"', text)
    assert "<script" not in text
    assert "url(http" not in text


def test_plots_take_the_colours_of_the_page_and_ids_are_unique(tmp_path: Path) -> None:
    report = make_report(frontier=frontier(True))
    experts = read_experts([make_expert(tmp_path / name, report) for name in ("a", "b")])
    page = render_page(experts)
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'(?:url\(|href=")#([^")]+)', page))
    assert referred <= {*ids}
    assert len(referred) > 20
    drawn = "".join(re.findall(r"<svg .*?</svg>", page, re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #\w+", drawn)
    assert {"var(--dense)", "var(--expert)", "var(--given)"} <= set(re.findall(r"var\(--\w+\)", drawn))
    assert "font-family" not in drawn


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    report = make_report(quality={}, tasks={}, samples=[], corpora=[], proofs=[], stages={})
    (path,) = write_pages(make_expert(tmp_path / "e", report))
    page = path.read_text()
    for heading in ("Quality on held-out text", "Multiple choice", "Sample answers", "Frontier"):
        assert f">{heading}</h2>" not in page
    assert page.count("<figure ") == 2
    assert "was not measured" in page
    assert "no questions were asked" in page
    (tmp_path / "e" / "expert.json").unlink()
    (tmp_path / "e" / "recipe.yaml").unlink()
    assert "Recipe</h2>" not in write_pages(tmp_path / "e")[0].read_text()


def test_text_of_models_and_names_is_only_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"`&\ud800\x00 $x$ {{ 7 * 7 }}"
    samples = [{"prompt": evil, "reference": evil, "dense": evil, "expert": evil}]
    scenario = {"language": '"><b>', "domain": evil, "name": evil}
    folder = make_expert(tmp_path / "e", make_report(samples=samples[:0], quality=qualities(0.9, 0.8)))
    report = json.loads((folder / "report" / "report.json").read_text())
    report |= {"samples": samples, "scenario": scenario, "frontier": frontier(False)}
    report["frontier"]["rows"][1]["name"] = evil
    report["frontier"]["verdicts"] = [evil]
    report["quality"]["corpora"] = {evil: report["quality"]["corpora"]["scenario"]}
    report["frontier"]["text"] = evil
    for row in report["frontier"]["rows"]:
        row["bits_per_byte"] = {evil: 0.9}
    (folder / "report" / "report.json").write_text(json.dumps(report))
    page = write_pages(folder)[0].read_text(encoding="utf-8")
    assert not re.findall(r"<script|<img|<b>", page)
    assert "{{ 7 * 7 }}" in page
    assert page.count("&lt;script&gt;") > 10


def test_verdict_is_three_sentences_of_the_figures(tmp_path: Path) -> None:
    bought, paid, shipping = sentences(tmp_path)
    assert bought == (
        "The expert's file has 107.0 MB, 26.1% smaller than the dense model's in q8_0 (144.8 MB), and it decodes "
        "faster: 150.0 tokens/s against 100.0 (1.50×, 95 % interval 1.44 to 1.56, 3 paired runs)."
    )
    assert paid.startswith("Bits per byte of held-out text change by +2.2 % on scenario and +53.3 % on general; ")
    assert (
        "of 64 questions it answers 62.5% [50%, 73%] right and dense 65.6% [53%, 76%], a difference within chance "
        in paid
    )
    assert "(p = 0.50; scored per byte p = 0.50)" in paid
    assert paid.endswith("; a constant answer gets 50.0%.")
    assert "`cusprun-edge compare`" in shipping


def test_verdict_does_not_call_noise_speed(tmp_path: Path) -> None:
    bought, _, _ = sentences(tmp_path, speed=speeds([100.0, 120.0, 90.0], [101.0, 100.0, 99.0]))
    assert "a difference in decoding speed is not shown" in bought
    assert "faster" not in bought
    few, _, _ = sentences(tmp_path, speed=speeds([150.0, 151.0], [100.0, 100.0]))
    assert "too few for an interval" in few
    slower, _, _ = sentences(tmp_path, speed=speeds([50.0, 51.0, 50.0], [100.0, 101.0, 100.0], (200, 100)))
    assert "100.0% larger than" in slower
    assert "decodes slower" in slower


def test_the_ratio_is_the_report_s_own_with_its_interval(tmp_path: Path) -> None:
    drifted = [100.0 + (-1) ** (index // 6) * 3 + index % 2 for index in range(12)]
    report = make_report(speed=speeds(drifted, [100.0] * 12))
    kept = report["speed"]["ratios"]["decode_tps"]
    logs = [math.log(run / 100) for run in drifted]
    assert kept["of_pairs"] == pytest.approx(math.exp(sum(logs) / 12))
    assert kept["ci95"][0] < math.exp(mean_interval(logs)[0]) - 0.005  # runs that hang together
    shown = f"{kept['of_pairs']:.2f}×, 95 % interval {kept['ci95'][0]:.2f} to {kept['ci95'][1]:.2f}, 12 paired runs"
    for name in ("new", "old"):
        assert shown in verdicts(read_experts([make_expert(tmp_path / name, report)]))[0][0]
        for field in ("of_pairs", "pairs", "ci95"):
            kept.pop(field, None)
    report = make_report()
    report["speed"]["ratios"]["decode_tps"] |= {"of_pairs": 1.41, "ci95": [1.31, 1.51]}
    experts = read_experts([make_expert(tmp_path / "kept", report)])
    assert "(1.41×, 95 % interval 1.31 to 1.51, 3 paired runs)" in verdicts(experts)[0][0]
    assert "1.41× [1.31, 1.51]" in render_page([*experts, *experts])
    del report["speed"]["expert"]["samples"]
    for field in ("of_pairs", "pairs", "ci95"):
        del report["speed"]["ratios"]["decode_tps"][field]
    assert "(1.50×, of 3 runs each" in verdicts(read_experts([make_expert(tmp_path / "oldest", report)]))[0][0]


@pytest.mark.parametrize(
    ("right", "said"),
    [
        ((20, 60), "a difference beyond chance (p < 0.001"),
        ((30, 30), "no difference (p = 1.00"),
        ((35, 50), "and expert is not shown to beat a constant answer's 50.0%"),
        ((20, 22), "neither is shown to beat a constant answer's 50.0%"),
        ((60, 61), "; a constant answer gets 50.0%."),
    ],
)
def test_verdict_holds_answers_against_chance_and_a_constant(tmp_path: Path, right: tuple[int, int], said: str) -> None:
    assert said in sentences(tmp_path, tasks=answers(*right))[1]


def test_verdict_beside_the_frontier(tmp_path: Path) -> None:
    *_, dominated = sentences(tmp_path, frontier=frontier(True))
    assert dominated == (
        "On these figures do not ship it: dense q4 in gguf q4_0 (91.0 MB, 0.910 bits per byte, 160 tokens/s) is at "
        "least as small, as fast and as good on scenario."
    )
    *_, stands = sentences(tmp_path, frontier=frontier(False))
    assert stands == (
        "It is not dominated by any of the 2 other files compared: none is at once as small, as fast and as good on "
        "scenario."
    )
    traded = frontier(False)
    traded["rows"][1] |= {"bits_per_byte": {"scenario": 0.91}, "decode_tps": {"mean": 90.0, "sd": 1.0, "n": 3}}
    assert (
        "though dense q4 in gguf q4_0 (91.0 MB, 0.910 bits per byte, 90 tokens/s) is smaller and loses less"
        in (sentences(tmp_path, frontier=traded)[2])
    )
    alone = frontier(False)
    del alone["rows"][1]
    assert "no dense file as small" in sentences(tmp_path, frontier=alone)[2]
    other = frontier(False)
    del other["rows"][0]
    assert "does not hold this file" in sentences(tmp_path, frontier=other)[2]


def weighed(*megabytes: int, dominated: bool = False) -> dict[str, Any]:
    """The frontier in which the dense file in four bits is better in all but memory."""
    found = frontier(dominated)
    found["rows"][1]["bits_per_byte"] = {"scenario": 0.91}
    for row, size in zip(found["rows"], megabytes, strict=True):
        row["peak_rss_bytes"] = size * 10**6
    return found


def test_verdict_names_memory_where_it_alone_saves_the_expert(tmp_path: Path) -> None:
    *_, saved = sentences(tmp_path, frontier=weighed(200, 240, 150))
    assert saved == (
        "It is not dominated by any of the 2 other files compared: only its memory (200 MB against 240 MB) keeps it "
        "from being dominated by dense q4 in gguf q4_0 (91.0 MB, 0.910 bits per byte, 160 tokens/s)."
    )
    slower = weighed(200, 240, 150)
    slower["rows"][1]["decode_tps"] = {"mean": 90.0, "sd": 1.0, "n": 3}
    assert sentences(tmp_path, frontier=slower)[2] == (
        "It is not dominated by any of the 2 other files compared: none is at once as small, as fast and as good on "
        "scenario and takes as little memory, though dense q4 in gguf q4_0 (91.0 MB, 0.910 bits per byte, 90 tokens/s) "
        "is smaller and loses less."
    )
    beaten = weighed(200, 190, 150, dominated=True)
    assert "as fast and as good on scenario, and takes as little memory." in sentences(tmp_path, frontier=beaten)[2]
    unexplained = weighed(200, 240, 150, dominated=True)
    unexplained["rows"][0]["remark"] = "dominated by dense q4"
    assert sentences(tmp_path, frontier=unexplained)[2] == "On these figures do not ship it: dominated by dense q4."


def test_noise_dominates_no_expert(tmp_path: Path) -> None:
    """Expert and dense file of one size and one loss: the dense one is faster in both means, in the second truly."""
    steady, sizes = [108.0, 112.0, 110.0, 109.0, 111.0], (100_000_000, 100_000_000)
    for name, expert, slower in (("noisy", [100.0, 130.0, 95.0, 120.0, 101.0], False), ("slow", [100.0] * 5, True)):
        report = make_report(quality=qualities(0.9, 0.9), speed=speeds(expert, steady, sizes))
        folders = [make_expert(tmp_path / name / each, report) for each in "ab"]
        ((found, _),) = own_frontiers(read_experts(folders))
        assert [found.dominated(row) for row in found.rows] == [slower, slower, False]
        assert "round by round" in found.how


def test_a_dominated_expert_s_better_means_are_called_noise(tmp_path: Path) -> None:
    beaten = weighed(200, 201, 150, dominated=True)
    for row, mean, runs in zip(
        beaten["rows"], (111, 110, 50), ([100, 130, 103], [108, 112, 110], [50] * 3), strict=True
    ):
        row |= {"decode_tps": {"mean": mean, "sd": 9.0, "n": 3}, "samples": {"decode_tps": runs}}
    shipping = sentences(tmp_path, frontier=beaten)[2]
    assert shipping == (
        "On these figures do not ship it: dense q4 in gguf q4_0 (91.0 MB, 0.910 bits per byte, 110 tokens/s) is at "
        "least as small, as fast and as good on scenario, and takes as little memory (the rounds show no difference in "
        "speed; memory is alike within 1%)."
    )
    beaten["how"] = "speeds differ where they differ"
    (path,) = write_pages(make_expert(tmp_path / "how", make_report(frontier=beaten)))
    assert "Speeds differ where they differ." in path.read_text()
    assert "noise and all" not in path.read_text()
    old = weighed(200, 201, 150)  # when memory was compared to the byte
    (path,) = write_pages(make_expert(tmp_path / "old", make_report(frontier=old)))
    assert "Speeds and memory were compared as they are, noise and all." in path.read_text()
    assert "only its memory (200 MB against 201 MB) keeps it" in sentences(tmp_path, frontier=old)[2]


def test_frontier_is_drawn_with_its_table(tmp_path: Path) -> None:
    page = write_pages(make_expert(tmp_path / "e", make_report(frontier=frontier(False))))[0].read_text()
    assert page.count("<figure ") == 6
    assert "tiny stands beside two others." in page
    assert "Bits per byte (scenario) over megabytes" in page
    assert "Bits per byte (scenario) over decoding speed" in page
    untimed = frontier(False)
    for row in untimed["rows"]:
        row["decode_tps"] = None
    page = write_pages(make_expert(tmp_path / "f", make_report(frontier=untimed)))[0].read_text()
    assert page.count("<figure ") == 5
    assert "over reference" not in page  # of an old record nothing is known of it
    for row, error in zip(untimed["rows"], (0.004, None, 0.006), strict=True):
        row |= {"increase": {"scenario": 0.02}, "increase_stderr": {"scenario": error}}
    page = write_pages(make_expert(tmp_path / "g", make_report(frontier=untimed)))[0].read_text()
    assert [page.count(figure) for figure in ("over reference scenario", "+2.0 ± 0.4 %", "+2.0 %")] == [1, 1, 1]


def test_many_experts_share_a_page_and_a_frontier_of_the_same_text(tmp_path: Path) -> None:
    second = make_report(
        scenario={"language": "en", "name": "smaller"},
        speed=speeds([200.0, 201.0, 199.0], [100.0, 102.0, 98.0], (90_000_000, 144_811_072)),
        quality=qualities(1.0, 0.9),
    )
    foreign = make_report(corpora=[{"text": "scenario", "side": "held-out", "entry": "x", "sha256": "b" * 64}])
    folders = [
        make_expert(tmp_path / "a"),
        make_expert(tmp_path / "b", second),
        make_expert(tmp_path / "c" / "a", foreign),
    ]
    experts = read_experts(folders)
    assert [expert.name for expert in experts][1] == "smaller"
    assert len({expert.name for expert in experts}) == 3  # two are called tiny
    ((found, own),) = own_frontiers(experts)
    assert set(own) == {0, 1}
    assert [(row.kind, row.bytes) for row in found.rows] == [
        ("expert", 107_000_000), ("expert", 90_000_000), ("dense", 144_811_072)
    ]  # fmt: skip
    assert found.rows[2].tps == {"mean": 100.0, "sd": pytest.approx(1.414, abs=1e-3), "n": 6}
    page = write_page(experts, tmp_path / "all.html").read_text()
    assert page.count("<article ") == 3
    assert page.count("<figure ") == 3 * 4 + 2
    told = verdicts(experts)
    assert "not dominated by any of the 2 other files" in told[0][2]
    assert "no dense file as small" in told[0][2]
    assert "Whether to ship it is open" in told[2][2]


def test_experts_of_other_base_models_share_no_frontier(tmp_path: Path) -> None:
    """Their windows hold other bytes, though as many tokens."""

    def shared(*bases: dict[str, str] | None) -> int:
        folders = [make_expert(tmp_path / f"{number}") for number in range(len(bases))]
        for folder, base in zip(folders, bases, strict=True):
            card = json.loads((folder / "expert.json").read_text())
            card["base"] |= base or {}
            (folder / "expert.json").write_text(json.dumps(card))
            if base is None:
                (folder / "expert.json").unlink()
        return len(own_frontiers(read_experts(folders)))

    assert shared({"sha256": "1" * 64}, {"sha256": "1" * 64}) == 1
    assert shared({"sha256": "1" * 64}, {"sha256": "1" * 64, "id": "a/copy"}) == 1
    assert shared({"sha256": "1" * 64}, {"sha256": "2" * 64}) == 0
    assert shared({}, {}) == 1
    assert shared({}, {"id": "org/other"}) == 0
    assert shared(None, None) == 0


def test_every_type_of_an_expert_is_shown(tmp_path: Path) -> None:
    rows = [replace(row, quant="q4_0") for row in speeds([180.0] * 3, [120.0] * 3, (60_000_000, 91_000_000))]
    folder = make_expert(tmp_path / "e", q4_0=make_report(speed=rows, quality=qualities(0.95, 0.93)))
    stale = folder / "report" / "iq2_m" / "report.json"  # of an earlier build: expert.json does not list it
    stale.parent.mkdir()
    stale.write_text((folder / "report" / "report.json").read_text())
    paths = write_pages(folder)
    assert [path.relative_to(folder / "report").as_posix() for path in paths] == ["report.html", "q4_0/report.html"]
    both, second = (path.read_text() for path in paths)
    assert both.count("<article ") == 2
    assert ">tiny q8_0</h2>" in both
    assert ">tiny q4_0</h2>" in both
    assert 'href="../report.html"' in second
    assert "60.0 MB" in second
    # the dense model in four bits is on the page, and the verdict on eight bits says so
    assert "of the 3 other files" in verdicts(read_experts([folder]))[0][2]


def test_pages_stay_in_the_folder(tmp_path: Path) -> None:
    rows = [replace(row, quant="../../../stolen") for row in speeds([180.0] * 3, [120.0] * 3)]
    folder = make_expert(tmp_path / "a" / "e", q4_0=make_report(speed=rows))
    assert {path.parent for path in write_pages(folder)} == {folder / "report", folder / "report" / "q4_0"}
    assert not list(tmp_path.rglob("stolen"))


def test_what_is_no_report_is_refused_in_one_message(tmp_path: Path, one: Path) -> None:
    damaged, other, lacking, wrong = (make_expert(tmp_path / name) for name in ("damaged", "other", "lacking", "wrong"))
    (damaged / "report" / "report.json").write_text('{"schema_version": 1, "speed": {')
    value = make_report()
    (other / "report" / "report.json").write_text(json.dumps({**value, "schema_version": 2}))
    del value["speed"]["expert"]["file_bytes"]
    (lacking / "report" / "report.json").write_text(json.dumps(value))
    (wrong / "expert.json").write_text("[]")
    with pytest.raises(InvalidRequest) as caught:
        read_experts([one, tmp_path / "nowhere", damaged, other, lacking, wrong, one])
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    for line, said in zip(
        lines,
        ("nowhere has no report/report.json", "report.json is damaged (Expecting",
         "schema_version 2 and this cusprun reads 1",
         "damaged (speed.expert.file_bytes: Field required)", "expert.json is damaged (it holds no JSON object)",
         "given twice"),
        strict=True,
    ):  # fmt: skip
        assert said in line
    not_finite = json.loads(json.dumps(make_report()))
    not_finite["speed"]["expert"]["decode_tps"]["mean"] = float("nan")
    (lacking / "report" / "report.json").write_text(json.dumps(not_finite))
    with pytest.raises(InvalidRequest, match=r"speed\.expert\.decode_tps\.mean"):
        read_experts([lacking])


SOLVED = {"figure": "file_bytes", "wish": None, "predicted": 90_000_000, "measured": 91_000_000, "error": -0.011}


@pytest.mark.parametrize(
    ("solved", "budget", "said"),
    [
        (5, None, "solved: Input should be a valid list"),
        ([5], None, r"solved\.0: "),
        ([{**SOLVED, "figure": "colour"}], None, r"solved\.0\.figure: "),
        ([{**SOLVED, "predicted": "many"}], None, r"solved\.0\.predicted: "),
        ([{**SOLVED, "measured": "91"}], None, r"solved\.0\.measured: "),
        ([{name: SOLVED[name] for name in ("figure", "wish", "predicted", "measured")}], None, r"solved\.0\.error: "),
        ([], {"sizes": 1}, r"method\.budget\.sizes: "),
        ([], {"size": "60MB"}, r"method\.budget\.size: "),
        ([], {"tps": float("inf")}, r"method\.budget\.tps: "),
        ([], 5, r"method\.budget: "),
    ],
)
def test_a_damaged_solution_is_told_by_its_place(tmp_path: Path, solved: Any, budget: Any, said: str) -> None:
    folder = make_expert(tmp_path / "e")
    path = folder / "report" / "report.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({**report, "solved": solved, "method": {**report["method"], "budget": budget}}))
    with pytest.raises(InvalidRequest, match=rf"report\.json is damaged \({said}"):
        read_experts([folder])


def test_what_was_solved_is_shown(tmp_path: Path) -> None:
    budget = {"size": 91_000_000, "speedup": 1.5}
    report = make_report(method={"name": "refit", "budget": budget, "solved": {"file_bytes": 90_000_000}})
    page = write_pages(make_expert(tmp_path / "e", report))[0].read_text()
    assert "--size 91MB --speedup 1.5" in page
    assert "file, MB" in page


def test_out_is_an_html_file(tmp_path: Path, one: Path) -> None:
    experts = read_experts([one])
    for out in (one / "report" / "report.json", tmp_path):
        with pytest.raises(InvalidRequest, match=r"name a file that ends in \.html"):
            write_page(experts, out)
    json.loads((one / "report" / "report.json").read_text())


def test_intervals_against_known_values() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0]) or (0.0, 0.0)
    assert (low, high) == (pytest.approx(2 - 4.302653 / 3**0.5), pytest.approx(2 + 4.302653 / 3**0.5))
    assert mean_interval([1.0, 2.0]) is None
    assert ratio_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == (pytest.approx(2), pytest.approx(2))
    assert ratio_interval([2.0, 4.0, 6.0], [1.0, 2.0]) is None
    # ln 20 = 2.9957 nats, its standard error 0.4 / 20
    found = bits_interval({"perplexity": 20.0, "perplexity_stderr": 0.4, "bits_per_byte": 0.9})
    assert found == (pytest.approx(0.9 * (1 - 1.96 * 0.02 / 2.9957), abs=1e-5), pytest.approx(0.91178, abs=1e-4))


def test_command(tmp_path: Path, one: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "cusprun.cli", "report", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)

    found = json.loads(run(one, "--json").stdout)
    assert found["pages"] == [str(one / "report" / "report.html")]
    assert len(found["experts"][0]["verdict"]) == 3
    two = make_expert(tmp_path / "two")
    done = run("one", two, "--out", "all.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all.html"
    assert (tmp_path / "all.html").read_text().count("<article ") == 2
    refused = run(tmp_path / "nowhere", tmp_path / "neither")
    assert refused.returncode == 2
    assert refused.stderr.count("has no report/report.json") == 2
    assert not list(tmp_path.glob("report.html"))
