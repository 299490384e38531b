"""Formulas as MathML, which browsers typeset by themselves: no script, nothing loaded from elsewhere."""

import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

# What LaTeX knows and the converter does not, by what it knows.
SYNONYMS = {r"\\dots\b": r"\\ldots"}


def converted(source: str, as_block: bool) -> str:
    for pattern, synonym in SYNONYMS.items():
        source = re.sub(pattern, synonym, source)
    return tex2mathml(source, as_block=as_block)


def inline(writer, node: nodes.math) -> None:
    writer.body.append(converted(node.astext(), False))
    raise nodes.SkipNode


def block(writer, node: nodes.math_block) -> None:
    source = node.astext()
    if "\\\\" in source and "\\begin" not in source:
        source = f"\\begin{{aligned}}{source}\\end{{aligned}}"
    writer.body.append(f'<div class="formula">{converted(source, True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
