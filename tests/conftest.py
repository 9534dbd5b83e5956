"""What every test shares: vLLM's environment on a machine without a GPU, tiny models."""

import os
import sys
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="INFO", VLLM_HOST_IP="127.0.0.1",
    VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1", VLLM_CPU_CI_ENV="1", TOKENIZERS_PARALLELISM="false",
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


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory):
    """`models(family, **overrides)`: the folder of a tiny seeded checkpoint, made once."""
    from tiny_models import make_model

    folder = tmp_path_factory.mktemp("models")

    def get(family: str, **overrides) -> str:
        name = "-".join([family, *(f"{k}{v}" for k, v in sorted(overrides.items()))])
        return str(make_model(family, folder / name, **overrides))

    return get
