"""The report: complete, plain JSON, and readable at 80 to 100 columns."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cusprun.anatomy import LayerWidths
from cusprun.benchmarks.report import UNITS, build_report, figures, write_report
from cusprun.benchmarks.tables import as_text, bench_table, quality_table, render_markdown, render_table
from cusprun.benchmarks.tally import REMARK, Divergence, Quality, QualityPair, ratio_stderr
from cusprun.benchmarks.tasks import score
from cusprun.errors import InvalidRequest
from tests.benchmarks.test_speed import row
from tests.benchmarks.test_tasks import Item


def quality(perplexity: float, compared: bool) -> Quality:
    bits = 0.92 if compared else 0.9
    return Quality(perplexity, 0.41, bits, 25_500, 0.123 if compared else None, 0.81 if compared else None, 512)


@pytest.fixture
def parts() -> dict[str, Any]:
    items = [Item("p", ("a", "b"), answer) for answer in (0, 0, 1)]
    right, wrong = [[0.0, -1.0], [0.0, -1.0], [-1.0, 0.0]], [[0.0, -1.0], [-1.0, 0.0], [0.0, -1.0]]
    return {
        "scenario": {"language": "en", "domain": "legal", "task": None},
        "method": {"name": "refit", "ratio": 0.25},
        "before": [LayerWidths(1536, 9, 3)] * 2,
        "after": [LayerWidths(1024, 9, 3), LayerWidths(768, 6, 2)],
        "speed": [row("expert.gguf", [151.2, 149.0], 107_000_000), row("dense.gguf", [118.0, 121.0], 144_811_072)],
        "quality": {name: QualityPair(quality(24.1, True), quality(20.0, False)) for name in ("scenario", "general")},
        "tasks": {"en legal": (score(items, wrong), score(items, right))},
        "corpora": [{"entry": "scancode", "side": "held-out", "tokens": 25_500, "licence": "various"}],
        "stages": {"statistics": 61.23, "export": 4.0},
        "proofs": [{"path": "expert-q8_0.gguf", "top1_agreement": 0.99, "kld_mean": 0.002}],
    }


def test_how_the_divergence_is_spread_is_in_the_report_and_its_table(parts: dict[str, Any]) -> None:
    spread = Divergence(0.002, 0.0411, 0.3322, 1.7533, 6.2544, 0.004)
    pair = QualityPair(quality(24.1, True), quality(20.0, False), True, spread)
    report = build_report(**{**parts, "quality": {"scenario": pair, "general": parts["quality"]["general"]}})
    corpora = report["quality"]["corpora"]
    assert corpora["scenario"]["divergence"] == asdict(spread)
    assert "divergence" not in corpora["general"]
    table = " ".join(as_text(quality_table(corpora)).split())
    assert "scenario: KL median 0.0411, 90 % 0.3322, 99 % 1.7533, most 6.2544" in table
    assert "general: KL" not in table


def test_report_holds_everything(parts: dict[str, Any], tmp_path: Path) -> None:
    report = build_report(**parts)
    write_report(tmp_path / "report", report)
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    assert report["schema_version"] == 1
    assert report["layers"][1] == {
        "layer": 1,
        "ffn": {"before": 1536, "after": 768},
        "heads": {"before": 9, "after": 6},
        "kv_heads": {"before": 3, "after": 2},
    }
    assert report["speed"]["ratios"]["file_bytes"]["exact"] == pytest.approx(0.739, abs=1e-3)
    general = report["quality"]["corpora"]["general"]
    assert general["ratios"]["perplexity"] == pytest.approx(1.205)
    assert general["bits_per_byte_increase"] == pytest.approx(0.92 / 0.9 - 1)
    assert general["same_vocabulary"] is True
    assert "vocabularies" not in report["quality"]["how"]
    assert report["tasks"]["sets"]["en legal"]["paired"]["only_second"] == 2
    environment = report["environment"]
    assert environment["cpu"]
    assert environment["versions"]["cusprun"]
    assert "2 threads" in report["speed"]["how"]
    assert "llama-perplexity" in report["quality"]["how"]
    assert UNITS["decode_tps"] == "tokens/s"


def test_figures_for_expert_json(parts: dict[str, Any]) -> None:
    found = figures(build_report(**parts))
    assert found["file_bytes"]["ratio"] == pytest.approx(0.739, abs=1e-3)
    assert found["decode_tps"]["expert"]["n"] == 2
    assert found["tasks"]["en legal"]["dense"]["accuracy"] == 1
    assert all("unit" in value for key, value in found.items() if key not in ("quality", "tasks"))


def test_how_sure_the_increase_is_stands_in_the_report_and_its_tables(parts: dict[str, Any]) -> None:
    nats = (900.0, 1000.0, 1100.0), (880.0, 990.0, 1060.0)
    sure = replace(parts["quality"]["scenario"], nats=nats[0], against_nats=nats[1])
    report = build_report(**{**parts, "quality": {"scenario": sure, "general": parts["quality"]["general"]}})
    corpora = report["quality"]["corpora"]
    stderr = ratio_stderr(*nats)
    assert stderr is not None
    assert corpora["scenario"]["bits_per_byte_increase_stderr"] == stderr
    assert corpora["general"]["bits_per_byte_increase_stderr"] is None
    shown = f"+2.2 ± {100 * stderr:.1f} %"
    for text in (render_table(report), render_markdown(report), "\n".join(sure.as_lines())):
        assert shown in text
    assert max(map(len, render_table(report).splitlines())) <= 88
    assert sure.as_json()["bits_per_byte_increase_stderr"] == stderr


def test_table_fits_and_shows_every_figure(parts: dict[str, Any]) -> None:
    text = render_table(build_report(**parts))
    assert max(map(len, text.splitlines())) <= 88
    for shown in ("dense", "expert", "ratio", "138.1", "0.739×", "1.205×", "24.10 ± 0.41", "81.0%", "66.7%", "50.0%",
                  "+2.2 %"):  # fmt: skip
        assert shown in text, shown
    assert "…" not in text


def test_speed_table_fits_80_columns(parts: dict[str, Any]) -> None:
    speed = build_report(**parts)["speed"]
    text = as_text(bench_table([speed["expert"], speed["dense"]], speed["ratios"]), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_bench_of_one_file_has_its_name(parts: dict[str, Any]) -> None:
    text = as_text(bench_table([parts["speed"][0].as_json()]))
    assert "expert.gguf" in text
    assert "ratio" not in text


def test_quality_without_dense() -> None:
    text = as_text(quality_table({"text": {"expert": {**quality(24.1, False).__dict__}}}))
    assert "24.10 ± 0.41" in text


def test_markdown(parts: dict[str, Any]) -> None:
    text = render_markdown(build_report(**parts))
    for heading in ("Speed and size", "Quality on held-out text", "Answers", "Widths", "Text", "Stages"):
        assert f"## {heading}\n" in text
    assert "1536 → 768" in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_different_vocabularies_are_never_compared_by_perplexity(parts: dict[str, Any]) -> None:
    trimmed = Quality(17.5, 0.3, 0.9054, 27_030, None, None, 512)
    pair = QualityPair(trimmed, quality(20.0, False), same_vocabulary=False)
    report = build_report(**{**parts, "quality": {"scenario": pair}})
    entry = report["quality"]["corpora"]["scenario"]
    assert entry["ratios"] == {"perplexity": None, "bits_per_byte": pytest.approx(1.006), "tokens": pytest.approx(1.06)}
    assert entry["same_vocabulary"] is False
    assert REMARK in report["quality"]["how"]
    assert figures(report)["quality"]["scenario"]["bits_per_byte_increase"] == pytest.approx(0.006)
    text = render_table(report)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "not comparable" in text
    assert "+0.60 %" in text
    assert REMARK in " ".join(text.split())
    assert "KL and top-1" not in text
    assert "takes the expert 1.060× as many" in " ".join(text.split())
    assert "0.875×" not in text  # 17.5 / 20
    markdown = render_markdown(report)
    assert "expert over dense: **scenario +0.60 %**" in markdown
    assert REMARK in markdown
    lines = pair.as_lines()
    assert lines[-1] == REMARK
    assert any(line.endswith("+0.60 % bits per byte") for line in lines)


def test_layers_that_went_and_layers_without_attention(parts: dict[str, Any]) -> None:
    """As Plan.widths gives them: one entry per dense layer."""
    before = [LayerWidths(1536, 9, 3)] * 4
    after = [LayerWidths(1024, 9, 3), LayerWidths(0, 0, 0), LayerWidths(768, 0, 0), LayerWidths(0, 0, 0)]
    report = build_report(**{**parts, "before": before, "after": after})
    assert [layer["ffn"]["after"] for layer in report["layers"]] == [1024, 0, 768, 0]
    text = render_markdown(report)
    assert "| 1 | 1536 → 0 | 9 → 0 | 3 → 0 |" in text
    assert "layers gone: 1, 3; layers without attention: 2" in text
    assert "layers gone" not in render_markdown(build_report(**parts))
    with pytest.raises(InvalidRequest, match="for each dense layer"):
        build_report(**{**parts, "before": before, "after": after[:2]})


def test_what_is_no_report_is_said(parts: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="got 1 rows, 2 layers before and 2 after"):
        build_report(**{**parts, "speed": parts["speed"][:1]})
    with pytest.raises(InvalidRequest, match="finite numbers"):
        build_report(**{**parts, "stages": {"statistics": float("nan")}})
