"""The page of explanations: controls beside every score, what was skipped, and texts from outside as text."""

from hf_transcoders.features.explain import FeatureScores
from hf_transcoders.reports.explanation_sections import explanation_sections, score_table
from hf_transcoders.reports.results_folder import write_results


PLANTED = "<img src=x onerror=alert(1)><b class=planted>bold</b>"


def results(shift, planted=""):
    scores = lambda value: {"simulation.top_and_random": value, "detection.balanced_accuracy": value}  # noqa: E731
    found = [
        FeatureScores(i, {"combination": f"e{i} {planted}", "chat model": planted},
                      {"token-table floor": scores(0.1 * i), "combination": scores(0.1 * i + shift)})
        for i in range(1, 6)
    ]  # fmt: skip
    return [*found, FeatureScores(9, skipped="feature 9 fires in 3 windows")]


def test_every_score_stands_beside_its_controls():
    table = score_table("t", results(0.2), results(-0.05))
    row = dict(zip(table.headers[:3], table.rows[2][:3], strict=True))
    assert row == {"explainer": "combination", "score": "simulation.top_and_random", "mean": "0.500"}
    assert table.rows[2][4:] == ["0.200", "0.200 to 0.200", 5, "0.250", table.rows[2][8], "0"]
    assert table.rows[3][-1] == "0.5" and table.rows[0][4] is None
    assert score_table("t", results(0.2), None).rows[2][7] is None


def test_the_page_has_what_was_skipped_and_no_markup_from_outside(tmp_path):
    facts = {i: {"density": "1%"} for i in range(1, 6)}
    sections = explanation_sections(results(0.2, PLANTED), results(0.0), facts)
    page = write_results(tmp_path, f"Explanations of {PLANTED}", sections, {}, {}).read_text()
    assert "5 of 6 features were scored." in page and "fires in too few windows of different documents" in page
    assert "<img" not in page and "<b class" not in page and page.count("&lt;img src=x") >= 5
    # Those that explain most come first.
    assert page.index("e5 ") < page.index("e1 ")
