"""Tables have every value, aligned and escaped, and every metric has a definition."""

from pathlib import Path

from vaejax.evaluation import tables
from vaejax.metrics import MEMORIZATION, SETS, shown_in


def test_digits_are_as_many_as_the_error_allows():
    assert tables.format_estimate({"value": 1234.5678, "error": 12.3}) == "1,235 ± 12"
    assert tables.format_estimate({"value": 0.0123456, "error": 0.00034}) == "0.01235 ± 0.00034"
    assert tables.format_estimate({"value": 0.0123456, "error": None}) == "0.012346"
    assert tables.format_estimate(None) == "–"


def test_every_value_is_in_one_table(evaluation):
    built = tables.tables([evaluation.json])
    cells = {}
    for table in built:
        for row in table.rows:
            columns = zip(table.head[1:-3], row[1:-3], strict=True)
            by_set = table.title in (SETS, MEMORIZATION)
            cells |= {f"{row[0]}/{set_name}" if by_set else row[0]: c for set_name, c in columns}
    shown = {name: cell for name, cell in cells.items() if cell != "–"}
    metrics = evaluation.json["metrics"]
    assert shown == {name: tables.format_estimate(e) for name, e in metrics.items()}
    for table in built:  # no column is empty
        for i in range(1, len(table.head) - 3):
            assert any(row[i] != "–" for row in table.rows), (table.title, table.head[i])


def test_sets_of_several_priors_stand_beside_each_other():
    names = ("held_out", "train", "samples (mixture)", "samples", "reconstructions")
    metrics = {f"recall/{name}": {"value": i, "error": None} for i, name in enumerate(names)}
    (table,) = tables.tables([{"run": "a", "metrics": metrics}])
    order = ["samples (mixture)", "samples", "reconstructions", "train", "held_out"]
    assert table.head[1:-3] == order
    assert table.rows[0][:-3] == ["recall", "2", "3", "4", "1", "0"]
    both = tables.tables([{"run": "a", "metrics": metrics}, {"run": "b", "metrics": {}}])
    assert [row[:3] for row in both[0].rows][:2] == [
        ["recall/samples (mixture)", "2", "–"],
        ["recall/samples", "3", "–"],
    ]


def test_a_bar_does_not_end_a_cell():
    assert tables.to_markdown(["", "meaning"], [["kl", "q(z|x)"]]) == [
        "|  | meaning |",
        "|---|---|",
        "| kl | q(z\\|x) |",
    ]


def test_html_is_escaped_and_marks_the_best_values():
    head, row = ["", "a", "b", "unit", "better", "meaning"], ["mse", "1", "2", "", "↓", "x < y"]
    html = "".join(tables.to_html(tables.Table("Title", head, [row]), [{0}]))
    assert '<td class="n best">1</td><td class="n">2</td>' in html
    assert '<td class="about">x &lt; y</td>' in html


def test_every_metric_is_defined_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    rows = "\n".join(line for line in text.splitlines() if line.startswith("| `"))
    assert [name for name in shown_in("evaluation") if f"`{name}`" not in rows] == []
