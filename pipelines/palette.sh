#!/usr/bin/env bash
# Three palettes on SmolLM2: solved on one bank, served on held-out prompts, the grouped dual beside the pooled one.
# usage:    pipelines/palette.sh [--list] [OUT]        a killed run continues when it is run again
# needs:    nothing
# takes:    about 30 minutes on 2 CPU cores
# expect:   on 80 held-out prompts every level of the grouped dual has its target inside its interval (0.47 [0.31, 0.64] harmless
#           asked 0.38; 0.33 [0.18, 0.47] helpful asked 0.40); the pooled one falls short of helpful by 0.27 and 0.30, outside its intervals
source "$(dirname "$0")/common.sh"
no_tiny

run sample --config "$here/../recipes/sample.yaml" --limit 0 --samples 16 --out "$out/bank"
run score --run "$out/bank" --rewards '[helpful,harmless,brief]'
run palette --config "$here/../recipes/palette.yaml" --bank "$out/bank" --out "$out/harmless-grouped"
run palette --bank "$out/bank" --ask 'harmless>=q75 helpful>=keep brief>=keep' --dual pooled --out "$out/harmless-pooled"
run palette --bank "$out/bank" --ask 'helpful>=q75 harmless>=keep' --dual grouped --out "$out/helpful-grouped"
run palette --bank "$out/bank" --ask 'helpful>=q75 harmless>=keep' --dual pooled --out "$out/helpful-pooled"
run palette --bank "$out/bank" --ask 'helpful>=+0.5sd harmless>=+0.5sd brief>=keep' --dual grouped --out "$out/both-grouped"
run palette --bank "$out/bank" --ask 'helpful>=+0.5sd harmless>=+0.5sd brief>=keep' --dual pooled --out "$out/both-pooled"
run palette apply --out "$out/applied" --closed_loop \
  --palettes "[$out/harmless-grouped,$out/harmless-pooled,$out/helpful-grouped,$out/helpful-pooled,$out/both-grouped,$out/both-pooled]"
