"""Folders of case studies: a page, pictures, and every number as JSON."""

import json
import math
import os
from importlib.util import find_spec
from pathlib import Path

from ..files import write_text
from ..reports.heatmap import Heatmap, Section, Table, tables_text, write_page
from ..reports.lines import LineChart, write_lines_png
from ..text.columns import paired
from .greater_than.study import GreaterThanStudy
from .published import PublishedStudy
from .replacement.study import ALL, ALL_BUT_LAST, INNER, ReplacementStudy


# The k of the table of the two curves; those of the paper among them.
_SHOWN_K = (0, 1, 2, 3, 5, 10, 15, 20, 21, 22, 23, 24, 30, 50, 75)
_MODEL, _TRANSCODER = "the model", "transcoder for the MLP"


def greater_than_text(study: GreaterThanStudy) -> str:
    """The main numbers as text for a terminal."""
    return tables_text([_scores_table(study), _curve_table(study), _features_table(study)])


def save_greater_than(study: GreaterThanStudy, folder: str | os.PathLike) -> Path:
    """Write a study of greater-than: `report.html`, `results.json` and, with matplotlib, PNG files of its curves.

    Args:
        study ([`GreaterThanStudy`]): What [`greater_than_study`] found.
        folder (`str` or `os.PathLike`): The folder, made if it does not exist.

    Returns:
        `Path`: the page.
    """
    curves = LineChart(
        f"Greater-than with few features of {study.protocol['writes']}",
        "features or neurons kept, by variance",
        "probability difference",
        {
            "features of the transcoder": list(enumerate(study.feature_curve)),
            "neurons of the MLP": list(enumerate(study.neuron_curve)),
        },
        {_MODEL: study.original_score.mean, _TRANSCODER: study.transcoder_score.mean},
        "Mean over years. All others are zero; biases stay.",
    )
    last_digits = [int(year[-2:]) for year in study.years]
    years = LineChart(
        "Probability difference by year",
        "last two digits of the year",
        "probability difference",
        {
            _MODEL: list(zip(last_digits, study.original, strict=True)),
            _TRANSCODER: list(zip(last_digits, study.transcoder, strict=True)),
        },
    )
    names = [str(feature.index) for feature in study.features]
    by_year = Heatmap(
        "Activation at the last position, by year",
        [feature.activations for feature in study.features],
        names,
        study.years,
        "feature",
        "year",
    )
    by_ending = Heatmap(
        "What a unit of a feature adds to the logit of each ending",
        [feature.by_ending for feature in study.features],
        names,
        study.endings,
        "feature",
        "ending",
        note="Direct effect through the final norm at its scale in each prompt, beyond the mean over endings.",
    )
    sections = [
        Section("The task", tables=[_scores_table(study)], charts=[years]),
        Section("Few features against few neurons", tables=[_curve_table(study)], charts=[curves]),
        Section("The features", tables=[_features_table(study)], heatmaps=[by_year, by_ending]),
    ]
    title = f"Greater-than, {study.protocol['model']}, {study.protocol['writes']}"
    return _save(study, folder, title, sections, study.protocol, {"curves": curves, "years": years})


def replacement_text(study: ReplacementStudy) -> str:
    """The table as text for a terminal."""
    return "\n".join([tables_text(_replacement_tables(study)), "", paired(study.protocol_lines())])


def save_replacement(study: ReplacementStudy, folder: str | os.PathLike) -> Path:
    """Write a study of whole-model replacement: `report.html`, `results.json` and, with matplotlib, PNG files.

    Args:
        study ([`ReplacementStudy`]): What [`replacement_study`] found.
        folder (`str` or `os.PathLike`): The folder, made if it does not exist.

    Returns:
        `Path`: the page.
    """
    charts = {}
    layers = [row.layers[0] for row in study.dictionaries]
    if len(set(layers)) > 1:
        for name, title, label, series in (
            (
                "recovered",
                "Loss recovered, each layer alone",
                "share of the damage avoided",
                {
                    "against zero-ablation": [row.recovered_zero for row in study.dictionaries],
                    "against mean-ablation": [row.recovered_mean for row in study.dictionaries],
                },
            ),
            (
                "agreement",
                "Same most likely token, each layer alone",
                "top-1 agreement",
                {
                    "with the dictionary": [row.replaced.top1_agreement for row in study.dictionaries],
                    "at its mean": [row.mean.top1_agreement for row in study.dictionaries],
                    "at zero": [row.zero.top1_agreement for row in study.dictionaries],
                },
            ),
        ):
            points = {
                each: [(x, y) for x, y in zip(layers, values, strict=True) if math.isfinite(y)]
                for each, values in series.items()
            }
            charts[name] = LineChart(title, "layer", label, points)
    groups, alone = _replacement_tables(study)
    sections = [
        Section("Many layers at once", tables=[groups]),
        Section("Each layer alone", tables=[alone], charts=list(charts.values())),
    ]
    title = f"Whole-model replacement, {study.protocol['base_model'] or 'unnamed model'}"
    return _save(study, folder, title, sections, study.protocol_lines(), charts)


def _save(study, folder, title, sections, protocol, charts) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", json.dumps(_finite(study.to_dict()), indent=1, allow_nan=False) + "\n")
    if find_spec("matplotlib"):
        for name, chart in charts.items():
            write_lines_png(folder / f"{name}.png", chart)
    return write_page(folder / "report.html", title, sections, protocol)


def _scores_table(study: GreaterThanStudy) -> Table:
    paper = study.published
    rows = [
        [_MODEL, str(study.original_score), _figure(paper, "original")],
        [_TRANSCODER, str(study.transcoder_score), _figure(paper, "transcoder")],
    ]
    shown = study.culprits[:3]
    if paper is not None:
        named = [feature for feature in study.features if f"without {feature.index}" in paper.figures]
        shown = [*shown, *(feature for feature in named if feature not in shown)]
    rows += [[f"... without feature {f.index}", f"{f.score:.3f}", _figure(paper, f"without {f.index}")] for f in shown]
    crossing = "in no k of the curve" if study.crossing is None else f"k = {study.crossing}"
    rows += [
        ["features no better than neurons from", crossing, _figure(paper, "crossing")],
        ["accuracy among the endings", str(study.accuracy), ""],
        ["accuracy among all tokens", str(study.full_accuracy), ""],
    ]
    note = (
        f"Probability of later years minus that of earlier ones after '{study.protocol['prompt']}', shared among "
        f"{len(study.endings)} endings; mean over {len(study.years)} years and its 95% interval (of accuracies Wilson's). "
        "Accuracy: the likeliest ending makes a later year."
    )
    return _with_paper("Greater-than", ["", "probability difference"], rows, note, paper)


def _curve_table(study: GreaterThanStudy) -> Table:
    length = max(len(study.feature_curve), len(study.neuron_curve))
    shown = sorted({k for k in _SHOWN_K if k < length} | {length - 1})
    rows = [
        [
            k,
            *(f"{curve[k]:.3f}" if k < len(curve) else "" for curve in (study.feature_curve, study.neuron_curve)),
            _figure(study.published, f"{k} features"),
        ]
        for k in shown
    ]
    pairs = list(zip(study.feature_curve, study.neuron_curve, strict=False))[1:]
    better = sum(ours > theirs for ours, theirs in pairs)
    note = f"Features are better at {better} of the {len(pairs)} k from 1 to {len(pairs)}."
    return _with_paper("With the k of the highest variance", ["k", "features", "neurons"], rows, note, study.published)


def _features_table(study: GreaterThanStudy) -> Table:
    whole = study.transcoder_score.mean
    high, low = study.protocol["direction"].split(" - ")
    rows = [
        [
            place,
            feature.index,
            feature.variance,
            f"{feature.score:.4f}",
            f"{feature.score - whole:+.4f}",
            f"{feature.effect:+.3f}",
            "" if feature.tokens is None else " ".join(map(repr, feature.tokens)),
        ]
        for place, feature in enumerate(study.features, 1)
    ]
    headers = ["by variance", "feature", "variance", "score without it", "change", f"effect on {high} - {low}"]
    note = (
        "Change: of the score with all features. Where it is positive, the feature works against the task. Effect: on the "
        f"logit of the ending {high} minus that of {low}, mean over years. De-embedding: the tokens whose embeddings it reads "
        "most."
    )
    return Table("Features of the highest variance", [*headers, "de-embedding"], rows, note)


def _replacement_tables(study: ReplacementStudy) -> list[Table]:
    headers = ["", "CE", "CE zero", "CE mean", "recovered (zero)", "recovered (mean)", "KL", "KL zero", "KL mean"]
    headers += ["top-1", "top-1 zero", "top-1 mean"]
    paper = study.published
    figures = {ALL: ("all ce", "all kl", ""), ALL_BUT_LAST: ("all ce", "all kl", "")}
    figures[INNER] = ("inner ce", "", "inner ce zero")
    rows = [["unchanged", _number(study.ce_original), *[""] * 10, _paper_of(paper, "ce_original", "", "")]]
    for row in study.groups:
        count = f" ({len(row.layers)} of {study.num_layers})"
        rows.append([row.name + count, *_losses(row), _paper_of(paper, *figures[row.name])])
    note = "CE and KL in nats per token; recovered: the share of an ablation's damage that the dictionaries avoid."
    groups = _with_paper("Many layers at once", headers, rows, note, paper)
    alone = [[row.name, *_losses(row), f"{row.l0:.4g}", f"{row.fvu:.4g}"] for row in study.dictionaries]
    return [groups, Table("Each layer alone", [*headers, "L0", "FVU"], alone)]


def _losses(row) -> list[str]:
    changes = (row.replaced, row.zero, row.mean)
    return [
        *(_number(change.ce) for change in changes),
        *(f"{share:.1%}" if math.isfinite(share) else "–" for share in (row.recovered_zero, row.recovered_mean)),
        *(_number(change.kl) for change in changes),
        *(f"{change.top1_agreement:.1%}" for change in changes),
    ]


def _number(value: float) -> str:
    return f"{value:.4f}"


def _paper_of(paper, ce, kl, zero) -> str:
    named = (("CE", ce), ("KL", kl), ("CE zero", zero))
    return ", ".join(f"{name} {_figure(paper, key)}" for name, key in named if key and _figure(paper, key))


def _figure(paper: PublishedStudy | None, key: str) -> str:
    value = None if paper is None else paper.figures.get(key)
    return "" if value is None else f"{value:g}"


def _with_paper(title, headers, rows, note, paper) -> Table:
    """A table whose last column is the paper's; without a paper, without that column."""
    if paper is None:
        return Table(title, headers, [row[:-1] for row in rows], note)
    notes = " ".join(f"({number}) {each}" for number, each in enumerate(paper.footnotes, 1))
    return Table(title, [*headers, "paper"], rows, f"{note}\nPaper: {paper.source}. {notes}")


def _finite(value):
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
