#!/usr/bin/env bash
# Resolve pyproject.toml into the two locks. The CPU lock leaves out four packages that only carry CUDA or media code.
set -euo pipefail
cd "$(dirname "$0")"
root=../..
left_out=$(mktemp)
printf '%s\n' torchvision torchaudio torchcodec triton > "$left_out"
# the SLURM executor asks for numpy>=2.4.5 and mistral-common, which vLLM needs, for <2.4; the executor imports numpy for
# one report alone, so its wish is overruled
numpy=$(mktemp)
echo 'numpy<2.4' > "$numpy"
finder=(${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"})
resolve() { uv pip compile "$root/pyproject.toml" --extra dev --override "$numpy" --no-annotate --no-header --quiet "$@"; }
keep_header() { grep '^#' "$1"; }
for kind in cpu cuda; do keep_header $kind.txt > $kind.new; done
resolve --extra cpu --excludes "$left_out" "${finder[@]}" >> cpu.new
# flash-attn needs torch to be built, so it is pinned by hand and installed last
flash=$(grep '^flash-attn' cuda.txt)
uv pip compile <(python3 - <<'PY'
import tomllib
project = tomllib.load(open("../../pyproject.toml", "rb"))["project"]
extra = project["optional-dependencies"]
print("\n".join(project["dependencies"] + extra["dev"] + [d for d in extra["cuda"] if not d.startswith("flash-attn")]))
PY
) --override "$numpy" --no-annotate --no-header --quiet >> cuda.new
echo "$flash" >> cuda.new
for kind in cpu cuda; do mv $kind.new $kind.txt; done
