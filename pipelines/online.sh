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
  rounds=(--loop.rounds 2 --loop.prompts 4 --loop.samples 2 --loop.steps 2 --loop.sampling.max_new_tokens 8)
  ppo=(--loop.lora.rank 2) dpo_online=(--loop.weighted.rank 2 --loop.weighted.shared_rank 2)
  offline=(--sft.test_share 0.1 --sft.lora.rank 2 --sft.fit.max_steps 2) again=(--ric.replay_rows 8) goals=(--limit 8)
else
  points=(--samples 2) rounds=() ppo=() dpo_online=()
  offline=() goals=(--limit 240 --seed 5)
  again=(--ric.replay_rows 240 --sft.fit.max_steps 40 --sft.fit.learning_rate 2e-4)
fi
asked=(--prompts "$out/prompts/prompts.jsonl")

run normalise --run "$out/bank" --out "$out/scale.json"
on_policy=("${asked[@]}" --model "$model" --rewards "$rewards" --statistics "$out/scale.json" "${rounds[@]}")
policies=()
for weights in 1,0 0.5,0.5 0,1; do
  run train ppo --config "$here/../recipes/morlhf.yaml" "${on_policy[@]}" "${ppo[@]}" \
    --loop.weights "$first=${weights%,*},$second=${weights#*,}" --out "$out/morlhf-$weights"
  policies+=("'$out/morlhf-$weights/adapter'")
done
run train online_dpo --config "$here/../recipes/online-dpo.yaml" "${on_policy[@]}" "${dpo_online[@]}" --out "$out/online-dpo"

ric=(--config "$here/../recipes/ric.yaml" --normalisation "$out/scale.json")
run train ric "${ric[@]}" --runs "[$out/bank]" --model "$model" "${offline[@]}" --out "$out/ric"
run sample --in_context "$out/ric" --goals simplex --model "$model" "${asked[@]}" --split train --samples 1 "${goals[@]}" "${sampling[@]}" --out "$out/round"
run score --run "$out/round" --model "$model" --rewards "$rewards"
run train ric "${ric[@]}" --runs "[$out/round]" --replay "[$out/bank]" --ric.selection.by any_quantile --model "$out/ric/adapter" \
  "${offline[@]}" "${again[@]}" --out "$out/ric-online"

run compare --out "$out/online" --model "$model" "${asked[@]}" --split test "${sampling[@]}" "${points[@]}" --rewards "$rewards" --judges "$judges" \
  --methods "{MORLHF: {policies: [$(IFS=,; echo "${policies[*]}")]}, online DPO: {policy: '$out/online-dpo/adapter'}, RiC: {in_context: '$out/ric-online'}}"
