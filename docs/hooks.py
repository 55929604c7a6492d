"""MkDocs hooks: tables generated from the code, formulas as MathML, docstrings as Markdown."""

import html
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import griffe
from latex2mathml.converter import convert

import kd.losses
import kd.settings


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace ``<!-- generated: NAME -->`` by the generated text of that name."""
    return re.sub(r"<!-- generated: ([\w-]+) -->", lambda match: GENERATED[match[1]](), markdown)


def on_page_content(content: str, **_: object) -> str:
    """Convert the formulas marked by arithmatex from LaTeX to MathML, which browsers render without a script."""
    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', _mathml("inline"), content, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', _mathml("block"), content, flags=re.DOTALL)


def losses_table() -> str:
    """Return a table of all losses: name, summary, hyperparameters, published objective."""
    lines = ["| loss | definition | hyperparameters | published objective |", "|---|---|---|---|"]
    for name, loss in kd.losses.LOSSES.items():
        summary = _to_markdown(inspect.getdoc(loss) or "").partition("\n\n")[0].replace("\n", " ")
        cells = [f"[`{name}`](#{name})", summary, *map(_code, (kd.losses.hyperparameters_of(loss), loss.published))]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def losses_sections() -> str:
    """Return a section for each loss with the docstring of its class."""
    options = (
        "    options: {show_root_heading: false, show_root_toc_entry: false, members: false, show_signature: false}"
    )
    return "\n\n".join(
        f"### `{name}` {{ #{name} }}\n\n::: {loss.__module__}.{loss.__qualname__}\n{options}"
        for name, loss in kd.losses.LOSSES.items()
    )


def loss_families() -> str:
    """Return a table of the losses, grouped by the compared quantities."""
    lines = ["| compared quantities | losses |", "|---|---|"]
    names: dict[str, list[str]] = {}
    for name, loss in kd.losses.LOSSES.items():
        logits = "the logits of student and teacher" if loss.needs_teacher else "the student's logits and the labels"
        features = "feature maps" if issubclass(loss, kd.losses.FeatureLoss) else "gradients with respect to the image"
        family = logits if issubclass(loss, kd.losses.LogitLoss) else features
        names.setdefault(family, []).append(f"`{name}`")
    return "\n".join([*lines, *(f"| {family} | {' '.join(group)} |" for family, group in names.items())])


GENERATED = {
    "loss-families": loss_families,
    "flags": kd.settings.markdown_table,
    "losses": losses_table,
    "loss-sections": losses_sections,
}


class RestToMarkdown(griffe.Extension):
    """Rewrite the reStructuredText of docstrings (formulas and references) as Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _to_markdown(obj.docstring.value)


def _to_markdown(text: str) -> str:
    """Convert a docstring's references, such as ``:class:``, and its sections ``Shape:`` and ``Example:``.

    Example:
        >>> _to_markdown("See :class:`~kd.losses.SoftenedKL`.")
        'See `SoftenedKL`.'
    """
    text = re.sub(r"^Shape:\n((?:[ \t]+.*\n?|\n)+)", _shape, text, flags=re.MULTILINE)
    # griffe recognizes doctests under this heading.
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)


def _shape(section: re.Match[str]) -> str:
    return f"**Shape:**\n\n{textwrap.dedent(section[1])}\n"


def _mathml(display: str) -> Callable[[re.Match[str]], str]:
    def convert_match(match: re.Match[str]) -> str:
        formula = convert(html.unescape(match[1]).strip(), display=display)
        # Insert a space between a function's name and its argument, as LaTeX does, unless a parenthesis follows.
        return re.sub(
            r"(<mi>(?:log|cos|max)</mi>)(?!<mo stretchy=\"false\">&#x00028;)", r'\1<mspace width="0.167em" />', formula
        )

    return convert_match


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
