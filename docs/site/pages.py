# SPDX-License-Identifier: Apache-2.0
"""What `make docs` adds to the pages of docs/: those of the folder above, with their links, and the
API, a page for each entry of API."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ABOVE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE")
# Lines of code and of tables have up to 130 characters.
STYLE = ".md-grid { max-width: 82rem }\n.md-typeset pre > code { font-size: 0.78em }\n"
# Page -> its title, and the modules and names that it lists. A folder stands for its modules.
API = {
    "ops": ("Ops", ["fastrec/ops"]),
    "data": ("Data", [
        "fastrec.prepare", "fastrec.SequenceDataset", "fastrec.data.batch", "fastrec.data.side",
        "fastrec.data.views", "fastrec.data.loader", "fastrec.data.graph",
        "fastrec.data.negatives", "fastrec.data.prepare.synthetic", "fastrec.Rng", "fastrec.random",
        "fastrec/data/steps",
    ]),
    "models": ("Models", [
        "fastrec.ModelConfig", "fastrec.UserModel", "fastrec.nn.items", "fastrec.nn.item_parts",
        "fastrec.nn.item_features", "fastrec.nn.pool", "fastrec.TextModel",
        "fastrec.nn.layouts", "fastrec/nn/encoders",
    ]),
    "training": ("Training", [
        "fastrec.fit", "fastrec.Recipe", "fastrec.training.stage", "fastrec.training.graphed",
        "fastrec.load_model", "fastrec.save_adapter", "fastrec.with_adapter",
    ]),
    "objectives": ("Objectives", ["fastrec/objectives"]),
    "answers": ("Answers", [
        "fastrec.evaluate", "fastrec.Protocol", "fastrec.evaluation.metrics", "fastrec.Recommender",
        "fastrec.recommend", "fastrec.OtherCatalogue", "fastrec.item_vectors",
        "fastrec.user_vectors", "fastrec.item_index", "fastrec.index_queries",
        "fastrec.index_recall",
        "fastrec.export_query", "fastrec.export_onnx", "fastrec.onnx_query", "fastrec.patch",
        "fastrec.patched", "fastrec.unpatch",
    ]),
}  # fmt: skip


def listed(name: str) -> list[str]:
    """What a name of API stands for. Of an op the function, which is public in `fastrec`."""
    if "/" not in name:
        return [name]
    modules = sorted(file.stem for file in (ROOT / name).glob("*.py"))
    package = "fastrec" if name == "fastrec/ops" else name.replace("/", ".")
    return [f"{package}.{module}" for module in modules if module not in ("__init__", "parts")]


def api_page(title: str, names: list[str]) -> str:
    """Markdown with a directive of mkdocstrings for each name."""
    return f"# {title}\n\n" + "\n\n".join(f"::: {each}" for name in names for each in listed(name))


def on_files(files, config):
    from mkdocs.structure.files import File

    for name in ABOVE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    files.append(File.generated(config, "site.css", content=STYLE))
    for page, (title, names) in API.items():
        files.append(File.generated(config, f"api/{page}.md", content=api_page(title, names)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links between docs/ and the folder above it: on the site all of them are in one folder."""
    if page.file.src_uri in ABOVE:
        return markdown.replace("](docs/", "](")
    depth = page.file.src_uri.count("/")
    names = "|".join(map(re.escape, ABOVE))
    outward, inward = re.escape("](" + "../" * (depth + 1)), "](" + "../" * depth
    return re.sub(f"{outward}({names})", rf"{inward}\1", markdown)
