"""What every test shares: vLLM's environment on a machine without a GPU, tiny models."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="INFO", VLLM_HOST_IP="127.0.0.1",
    VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1", VLLM_CPU_CI_ENV="1", TOKENIZERS_PARALLELISM="false",
    TRITON_F32_DEFAULT="ieee",  # on a GPU: its default rounds float32 factors to 10 bits, which tells orders of addition apart
    VLLM_CPU_SIM_MULTI_NUMA="0",  # from 0.33 a rank has the memory node of its number, unless this is set
)
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


RECORD: dict[str, dict] = {}


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> dict:
    """A test's own figures, by name with their unit; $DWDP_RECORD names the JSON file that they go to."""
    found: dict = {}
    request.node.user_properties.append(("figures", found))
    return found


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        seconds, why = round(report.duration, 2), {"why": report.longreprtext[-4000:]} if report.failed else {}
        RECORD.setdefault(report.nodeid, {}).update(outcome=report.outcome, seconds=seconds, **why, **dict(report.user_properties))
        write_record()


def write_record() -> None:
    """What was run so far, on what and from which commit, even if the run is cut short; of several workers, their leader does."""
    path = os.environ.get("DWDP_RECORD")
    if path and "PYTEST_XDIST_WORKER" not in os.environ:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        versions = {name: importlib.metadata.version(name) for name in ("vllm-dwdp", "vllm", "torch")}
        written = {"commit": commit, "devices": devices, "versions": versions, "tests": RECORD}
        Path(path).write_text(json.dumps(written, indent=2))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory):
    """`models(family, **overrides)`: the folder of a tiny seeded checkpoint, made once.

    A family is a name that tiny_models knows, or any transformers config as families.FAMILIES has it.
    """
    from tiny_models import make_model

    folder = tmp_path_factory.mktemp("models")

    def get(family, **overrides) -> str:
        name = "-".join([family if isinstance(family, str) else family[0], *(f"{k}{v}" for k, v in sorted(overrides.items()))])
        return str(make_model(family, folder / name, **overrides))

    return get


@pytest.fixture(scope="module")
def serve_parser():
    """`vllm serve`'s own parser, a subparser of `vllm`, with the plugin's options."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_dwdp.entrypoints import plugin

    plugin.register()
    parser = FlexibleArgumentParser(prog="vllm")
    ServeSubcommand().subparser_init(parser.add_subparsers())
    return parser
