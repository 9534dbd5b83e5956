"""Invariant: what README and docs name is what the code has: options and defaults, metrics, files, commands."""

import re

import msgspec
import pytest

from vllm_dwdp import config

from conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text()


def rows(heading: str) -> dict[str, str]:
    """The table under a heading: names in the first column, each with the second."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| (`.+?) \| (.+?) \|", section, re.M)
    return {name: value for names, value in found for name in re.findall(r"`(\w+)`", names)}


def test_options() -> None:
    """Every option, each with its default where that is a value and not a rule."""
    written = rows("Options")
    fields = {field.name: field.default for field in msgspec.structs.fields(config.Options)}
    assert set(written) == set(fields)
    for name, default in fields.items():
        if default is not None:
            said = f"{default:g}" if isinstance(default, float) else str(default).lower()
            assert written[name].strip("`") == said, name


def test_metrics() -> None:
    code = (ROOT / "vllm_dwdp/integration/metrics.py").read_text()
    made = {f"vllm:dwdp_{name}{'_total' * (kind == 'counter')}"
            for kind, name in re.findall(r'self\._(counter|gauge)\("(\w+)"', code)}
    assert made and made == set(re.findall(r"vllm:dwdp_\w+", README))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_commands(page) -> None:
    """Files that a page names are there, as are those it links to, and what it tells make to do."""
    text = page.read_text()
    for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|json|md|png|sh))`", text):
        places = ["", "vllm_dwdp", "vllm_dwdp/integration", "tests", "kernels", "examples/results"]
        made = name in ("config.json", "gpu-test.json")  # a model's; what make gpu-test writes
        assert made or any((ROOT / place / name).is_file() for place in places), name
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.M)) <= targets


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 200
