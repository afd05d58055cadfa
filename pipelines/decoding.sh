#!/usr/bin/env bash
# Every way to decode that needs no second trained policy, on SmolLM2 between helpful and harmless: one table, held-out prompts.
# Values, trees and rewards are learnt from the model's own answers to training prompts, scored by the package's two rewards.
# usage:    [HH=FOLDER] pipelines/decoding.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# needs:    helpful-base and harmless-base of HH-RLHF (MIT) as FOLDER/NAME.test.jsonl.gz, by default ../shared/data/hh_rlhf
#           prompts, bank and pairs are those of pipelines/preferences.sh, which are taken over where OUT is the same
# takes:    beyond the bank about 2 hours of a core: values 11 minutes, rewards 8, trees and their model 25, comparison 75
# expect:   docs/results.md: single-pass values +0.78 helpful and +1.85 harmless at 4 nats for the price of one plain response
source "$(dirname "$0")/common.sh"
source "$here/own_answers.bash"
if [ -n "$tiny" ]; then
  points=(--limit 4 --steps 1 --reference_samples 4 --best_of '[2,4]' --n_boot 50 --examples 1)
else
  points=(--samples 1 --steps 2)
fi

run normalise --run "$out/bank" --out "$out/scale.json"
run train value --run "$out/bank" "${value[@]}" --out "$out/values"
for name in "${objectives[@]}"; do scorer "$name"; done
value_model

messages="['$first=You are a helpful assistant. Answer in full, with details and examples.|You give short, vague answers.',\
'$second=You are a careful assistant. Refuse politely what could do harm.|You say whatever harms or offends.']"
chosen="rewards: $rewards, scale: $out/scale.json"
ends="weights: ['$first=1,$second=0', '$first=0,$second=1']" # of those that read 40 candidates a token, a point takes 5 minutes and more
run compare --out "$out/decoding" "${asked[@]}" "${sampling[@]}" "${points[@]}" \
  --rewards "$rewards" --judges "$judges" --methods "{\
single-pass: {values: '$out/values'}, \
single-pass at 4 nats: {values: '$out/values', kl_budget: 4.0}, \
prefix: {values: '$out/values', form: prefix, $ends}, \
value model: {values: '$out/value-model', skip_above: 0.95, $ends}, \
contrast of prompts: {messages: $messages}, \
ARGS: {scorers: ['$first=$out/scorer-$first/model', '$second=$out/scorer-$second/model'], $ends}, \
Monte Carlo of 4: {choice: {how: resampling, n: 4, beta: 0.3, $chosen}}, \
rejection: {choice: {how: rejection, $chosen, segments: {threshold: 0.5, $segment}}}, \
blocks: {choice: {how: blocks, block: 10, n: 4, $chosen}}, \
single-pass best-of-4: {values: '$out/values', choice: {how: best_of, n: 4, $chosen}}}"
