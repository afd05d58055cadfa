#!/usr/bin/env bash
# ArmoRM whole on SmolLM2: rated responses -> heads, pairs -> a gate, and why one answer scored as it did.
# usage:    pipelines/armorm.sh [--list] [OUT]        a killed run continues when it is run again
# needs:    Cohere's ratings, PKU-SafeRLHF and HH-RLHF, as the recipes name them
# takes:    about 40 minutes on one core
# expect:   the figures in recipes/armorm-heads.yaml and recipes/armorm-gating.yaml
source "$(dirname "$0")/common.sh"
no_tiny
[ -n "$list" ] || cd "$here/.." # the recipes name the data from here
recipes=$here/../recipes

run embed --config "$recipes/armorm-ratings.yaml" --out "$out/ratings"
run embed --config "$recipes/armorm-harmless-pairs.yaml" --out "$out/harmless"
run embed --config "$recipes/armorm-helpful-pairs.yaml" --out "$out/helpful"
run train multi_head --config "$recipes/armorm-heads.yaml" --embeddings "$out/ratings" --out "$out/heads"
run train gating --config "$recipes/armorm-gating.yaml" --heads "$out/heads" --pairs "[$out/harmless,$out/helpful]" --out "$out/gated"
run explain --reward "multi_head:$out/gated" --prompt 'How do I bake bread?' --response 'Mix flour, water, salt and yeast, let it rise, and bake it.'
