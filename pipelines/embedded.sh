#!/usr/bin/env bash
# The embedded demo, stage by stage: what `equipoise demo` runs, with every setting in a recipe.
# usage:    pipelines/embedded.sh [--list] [OUT]        a killed run continues when it is run again
# needs:    nothing
# takes:    about 8 minutes on 2 CPU cores
source "$(dirname "$0")/common.sh"
no_tiny
recipes=$here/../recipes

run sample --config "$recipes/sample.yaml" --out "$out/train"
run score --config "$recipes/score.yaml" --run "$out/train"
run train value --config "$recipes/value.yaml" --run "$out/train" --out "$out/values"
run sweep --config "$recipes/sweep.yaml" --values "$out/values" --out "$out/sweep"
run evaluate --sweep "$out/sweep"
run report --evaluation "$out/sweep/evaluation.json" --out "$out/report.html"
