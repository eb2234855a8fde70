"""Write the tree of a feature as a folder: a page, and every number as JSON."""

import os
from pathlib import Path

from ...reports.results_folder import write_results
from ...reports.sections import Section
from .tree_results import FeatureTree, tree_tables


def save_feature_tree(tree: FeatureTree, folder: str | os.PathLike) -> Path:
    """Write the tree of a feature: `report.html` and `results.json`.

    Args:
        tree ([`FeatureTree`]): Result of [`feature_tree_study`].
        folder (`str` or `os.PathLike`): Folder to write to, made if it does not exist.

    Returns:
        `Path`: Path of the page.
    """
    title = f"Tree of feature {tree.root.feature} of {tree.root.dictionary}, {tree.protocol['model']}"
    return write_results(folder, title, [Section("Tree", tables=tree_tables(tree))], tree.protocol, tree.to_dict())
