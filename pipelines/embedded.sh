#!/usr/bin/env bash
# The embedded demo, stage by stage: what `equipoise demo` runs, with every setting in a recipe. About 8 minutes on 2 CPU cores.
# Kill it at any point and run it again: it continues. Usage: pipelines/embedded.sh [OUT]
set -euo pipefail
out=${1:-runs/embedded}
here=$(cd "$(dirname "$0")/.." && pwd)
equipoise sample --config "$here/recipes/sample.yaml" --out "$out/train"
equipoise score --config "$here/recipes/score.yaml" --run "$out/train"
equipoise train value --config "$here/recipes/value.yaml" --run "$out/train" --out "$out/values"
equipoise sweep --config "$here/recipes/sweep.yaml" --values "$out/values" --out "$out/sweep"
equipoise evaluate --sweep "$out/sweep"
equipoise report --evaluation "$out/sweep/evaluation.json" --out "$out/report.html"
