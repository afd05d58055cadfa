#!/usr/bin/env bash
# Policies that learn online, on SmolLM2 between helpful and harmless: MORLHF at three weightings, online DPO and rewards-in-context at all.
# usage:    [HH=FOLDER] pipelines/online.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# needs:    helpful-base and harmless-base of HH-RLHF (MIT) as FOLDER/NAME.test.jsonl.gz, by default ../shared/data/hh_rlhf
#           prompts and bank are those of pipelines/preferences.sh and decoding.sh, which are taken over where OUT is the same
# takes:    beyond the bank about 3 hours of a core: MORLHF 3 x 28 minutes, online DPO 27, rewards-in-context 35, comparison 32
# expect:   docs/results.md: MORLHF +0.19 helpful and +0.48 harmless at the ends, online DPO +0.15 and +0.27; rewards-in-context hardly follows
source "$(dirname "$0")/common.sh"
source "$here/own_answers.bash"
if [ -n "$tiny" ]; then
  points=(--limit 4 --steps 2 --samples 1 --reference_samples 2 --best_of '[2]' --n_boot 50 --examples 1)
else
  points=(--samples 2)
fi

run normalise --run "$out/bank" --out "$out/scale.json"
policies=()
for weights in 1,0 0.5,0.5 0,1; do
  morlhf "$weights" "$first=${weights%,*},$second=${weights#*,}"
  policies+=("'$out/morlhf-$weights/adapter'")
done
online_dpo
in_context
run compare --out "$out/online" "${asked[@]}" --split test "${sampling[@]}" "${points[@]}" --rewards "$rewards" --judges "$judges" \
  --methods "{MORLHF: {policies: [$(IFS=,; echo "${policies[*]}")]}, online DPO: {policy: '$out/online-dpo/adapter'}, RiC: {in_context: '$out/ric-online'}}"
